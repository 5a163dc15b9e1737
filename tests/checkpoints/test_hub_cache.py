"""What the hub's cache gets: nothing that its disk does not hold, nothing before the checks, and all that counts."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.make.hub_session import HUGE, adapter_of, refused


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_nothing_is_fetched_that_the_disk_of_the_cache_does_not_hold(kind, hub, phlora, pair, work):
    files = ["model.safetensors", "model.safetensors"]
    if kind == "pickle":
        torch.save(load_file(pair[0] / files[0]), pair[0] / "pytorch_model.bin")
        (pair[0] / files[0]).unlink()
        files[0] = "pytorch_model.bin"
    for path, file in zip(pair, files, strict=True):
        hub.repository(f"huge/{kind}-{path.name}").commit(path, "main")
        hub.repository(f"huge/{kind}-{path.name}").claimed = {file: HUGE}
    command = ["extract", f"huge/{kind}-base", f"huge/{kind}-tuned", work / "out"]
    line = refused(phlora(*command), work, "are free at", "HF_HOME")
    assert "200000000.0 GB" in line if kind == "safetensors" else "100000000.0 GB" in line
    assert hub.fetched == []


def test_what_is_in_the_cache_needs_no_room(hub, phlora, pair, work):
    for path in pair:
        hub.repository(f"cached/{path.name}").commit(path, "main")
    status, said, stderr = phlora("extract", "cached/base", "cached/tuned", work / "out", "--dry-run", "--json")
    assert status == 0, stderr
    assert json.loads(said)["download_bytes"] == sum((path / "model.safetensors").stat().st_size for path in pair)
    assert phlora("extract", "cached/base", "cached/tuned", work / "out")[0] == 0
    for path in pair:
        hub.repository(f"cached/{path.name}").claimed = {"model.safetensors": HUGE}
    status, _, stderr = phlora("extract", "cached/base", "cached/tuned", work / "again")
    assert status == 0, stderr


def test_a_slash_behind_a_hub_id_or_a_folder_is_no_part_of_its_name(hub, phlora, pair, work):
    for path in pair:
        hub.repository(f"slash/{path.name}").commit(path, "main")
    status, _, stderr = phlora("extract", "slash/base/", f"{pair[1]}/", work / "out")
    assert status == 0, stderr
    _, config, provenance = adapter_of(work / "out")
    assert config["base_model_name_or_path"] == "slash/base"
    assert provenance["tuned"] == str(pair[1])


def test_modules_beside_the_model_are_fetched_with_it(hub, phlora, pair, work):
    for path in pair:
        (path / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
        (path / "2_Dense").mkdir()
        save_file({"linear.weight": torch.randn(4, 4)}, path / "2_Dense" / "model.safetensors")
        hub.repository(f"sentences/{path.name}").commit(path, "main")
    status, _, stderr = phlora("extract", "sentences/base", "sentences/tuned", work / "out")
    assert status == 0, stderr
    rows = json.loads((work / "out" / "phlora_report.json").read_text())["rows"]
    assert [row["cause"] for row in rows if row["weight"] == "2_Dense/linear.weight"] == ["beside-model"]


def test_a_dry_run_of_an_adapter_fetches_nothing_of_the_base_that_it_names(hub, phlora, pair, tmp_path, work):
    for path in pair:
        hub.repository(f"named/{path.name}").commit(path, "main")
    assert phlora("extract", "named/base", pair[1], tmp_path / "lora", "--rank", "4")[0] == 0
    hub.repository("named/later").put({"model.safetensors": (pair[0] / "model.safetensors").read_bytes()}, "main")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    changed = config | {"base_model_name_or_path": "named/later/", "revision": None}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(changed))
    hub.fetched.clear()
    status, said, stderr = phlora("extract", pair[0], tmp_path / "lora", work / "out", "--dry-run", "--json")
    assert status == 0, stderr
    assert hub.fetched == []
    assert json.loads(said)["download_bytes"] == (pair[0] / "model.safetensors").stat().st_size
