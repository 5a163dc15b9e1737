"""Adapters to the hub by `phlora push` and `push_to_hub`: the real client, and a hub of our own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from peft_posthoc import extract
from peft_posthoc.cli.main import main
from tests.make.fake_hub import FakeHub, environment
from tests.make.hub_session import SESSION
from tests.make.limits import HANG

OURS = {"README.md", "adapter_config.json", "adapter_model.safetensors", "phlora_report.json"}
BY_PYTHON = """
import sys
from peft_posthoc import extract
print(extract(*sys.argv[1:3], 2).push_to_hub("me/python", private=True))
"""


@pytest.fixture(scope="module")
def pushed(llama_pair, tmp_path_factory):
    """(the hub, the adapter's folder, what came of each command)"""
    folder = tmp_path_factory.mktemp("push")
    adapter = extract(*llama_pair, 4).save(folder / "adapter")
    (adapter / "optimizer.pt").write_bytes(b"mine")
    written = extract(*llama_pair, 2).save(folder / "written")
    (written / "README.md").write_text("# Mine")
    hub = FakeHub()
    hub.token = "secret"
    hub.repository("me/theirs").put({"README.md": b"# Theirs"}, "main")
    commands = [
        ["push", str(adapter), "me/new", "--private"],
        ["push", str(adapter), "me/new"],
        ["push", str(written), "me/written"],
        ["push", str(written), "me/forced", "--force"],
        ["push", str(adapter), "me/theirs"],
        ["push", str(adapter), "not an id"],
        ["push", str(folder), "me/nothing"],
    ]
    with hub.serve() as address:
        env = environment(address, folder / "home")
        lines = "\n".join(map(json.dumps, commands))
        results = []
        for token, given in (("secret", lines), ("wrong", json.dumps(["push", str(adapter), "me/refused"]))):
            ran = subprocess.run(
                [sys.executable, "-c", SESSION],
                input=given,
                env=env | {"HF_TOKEN": token},
                capture_output=True,
                text=True,
                timeout=HANG,
                check=True,
            )
            results += map(json.loads, ran.stdout.splitlines())
        subprocess.run([sys.executable, "-c", BY_PYTHON, *llama_pair], env=env | {"HF_TOKEN": "secret"}, check=True)
    return hub, adapter, results


def test_the_adapter_goes_there_and_nothing_else_of_its_folder(pushed):
    hub, adapter, results = pushed
    repository = hub.repositories["me/new"]
    assert set(repository.files) == OURS
    assert repository.private
    for name in OURS - {"README.md"}:
        assert repository.files[name] == (adapter / name).read_bytes()
    assert [result[0] for result in results] == [0, 0, 0, 0, 0, 2, 1, 1]
    assert "Adapter pushed to http" in results[0][1]


def test_the_card_there_loads_from_there_and_tells_no_folder_of_this_machine(pushed, llama_pair):
    page = pushed[0].repositories["me/new"].files["README.md"].decode()
    assert 'from_pretrained(base_model, "me/new")' in page
    assert "# tuned as a LoRA adapter" in page
    assert str(Path(llama_pair[0]).parent) not in page


def test_a_card_that_somebody_wrote_goes_along_or_stays_there_unless_forced(pushed):
    hub = pushed[0]
    assert hub.repositories["me/written"].files["README.md"] == b"# Mine"
    assert b"as a LoRA adapter" in hub.repositories["me/forced"].files["README.md"]
    assert hub.repositories["me/theirs"].files["README.md"] == b"# Theirs"
    assert set(hub.repositories["me/theirs"].files) == OURS


def test_what_goes_wrong_is_one_line(pushed):
    hub, _, results = pushed
    for result, words in zip(results[-3:], ("no hub id", "adapter_config.json", "did not take"), strict=True):
        assert result[2].startswith("phlora: error: ")
        assert words in result[2]
        assert result[2].count("\n") == 1
    assert not {"me/nothing", "me/refused"} & hub.repositories.keys()


def test_python_pushes_what_it_extracted(pushed):
    repository = pushed[0].repositories["me/python"]
    assert repository.private
    assert set(repository.files) == OURS


def test_offline_nobody_is_sent_to_look_for_rights(pushed):
    result = CliRunner().invoke(main, ["push", str(pushed[1]), "me/offline"], prog_name="phlora")
    assert result.exit_code == 1
    assert "`me/offline` on the hub did not take the adapter: " in result.stderr
    assert "offline mode" in result.stderr
    assert "rights" not in result.stderr
    assert ".." not in result.stderr
