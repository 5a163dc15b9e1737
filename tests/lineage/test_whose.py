import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from peft_posthoc import whose
from peft_posthoc.cli.main import main
from tests.make import coded_folders, models
from tests.make.trees import int8, lora, model, tune


def _kinds(found):
    return [one.kind for one in found.candidates]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("change", [tune, lora])
def test_in_random_trees_the_parent_is_found_beside_a_sibling_a_grandparent_and_a_stranger(seed, change):
    root = model(seed)
    parent = change(root, seed + 100)
    tuned, sibling = change(parent, seed + 200), change(parent, seed + 300)
    found = whose(tuned, [sibling, model(seed + 400), root, parent])
    assert _kinds(found) == ["sibling or grandparent", "unrelated", "sibling or grandparent", "parent"]


@pytest.mark.parametrize("seed", range(20))
def test_siblings_alone_or_a_mean_of_three_have_no_parent_among_them(seed):
    root = model(seed)
    kin = [tune(root, seed + 100 * at) for at in range(1, 5)]
    mean = {name: sum(one[name] for one in kin[:3]) / 3 for name in root}
    assert whose(kin[3], kin[:3]).base is None
    assert whose(kin[3], kin[:1]).base is None
    assert whose(mean, [*kin[:3], root]).base is None


def test_a_merge_of_two_is_said_to_lie_between_them():
    one, other = tune(model(0), 1), tune(model(0), 2)
    found = whose({name: (one[name] + other[name]) / 2 for name in one}, [one, other])
    assert _kinds(found) == ["part of a merge", "part of a merge"]
    assert found.base is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_saved_again_is_a_copy_and_no_child_of_another(dtype):
    root = model(0)
    assert _kinds(whose({n: w.to(dtype) for n, w in root.items()}, [tune(root, 1), root])) == ["related", "copy"]


def test_a_model_rounded_to_int8_is_a_quantised_copy_and_atune_is_none():
    root = model(0)
    assert _kinds(whose(int8(root), [root])) == ["quantised copy"]
    assert _kinds(whose(tune(root, 1, 0.001), [root])) == ["related"]


def test_a_fine_tune_of_one_step_of_bfloat16_is_no_copy_and_a_second_copy_hides_no_parent():
    root = {name: weight.bfloat16() for name, weight in model(0).items()}
    moved = {n: torch.where(torch.rand(w.shape) < 0.2, w.nextafter(torch.full_like(w, 9)), w) for n, w in root.items()}
    copy = {name: weight.float() for name, weight in root.items()}
    found = whose(moved, [root, tune(root, 1), copy])
    assert _kinds(found) == ["parent", "sibling or grandparent", "copy of the parent"]


@pytest.mark.parametrize("how", [coded_folders.fp8, coded_folders.int4, coded_folders.nf4])
def test_a_folder_of_codes_is_a_quantised_copy_of_what_was_coded_and_of_no_stranger(how, tmp_path):
    root, other = (
        models.save(models.llama(hidden_size=64, intermediate_size=128, num_hidden_layers=2), tmp_path / name)
        for name in ("root", "other")
    )
    found = whose(coded_folders.quantise(root, tmp_path / "coded", how), [root, other])
    assert _kinds(found) == ["quantised copy", "unrelated"]


def test_the_rank_of_a_mergedlora_is_told_and_a_fulltune_has_none():
    root = model(0)
    assert [whose(change(root, 1), [root]).candidates[0].rank for change in (lora, tune)] == [4, None]


def test_a_resized_vocabulary_hides_no_parent():
    root = {**model(0), "embed.weight": torch.randn(40, 64)}
    tuned = tune(root, 1)
    tuned["embed.weight"] = torch.cat([tuned["embed.weight"], torch.randn(8, 64)])
    assert whose(tuned, [root, tune(root, 2)]).candidates[0].kind == "parent"


def test_shards_in_another_order_hide_no_parent_and_tables_of_integers_are_passed_over(tmp_path: Path):
    root = {**model(0), "ids.table": torch.arange(16).reshape(4, 4)}
    tuned = {**tune(model(0), 1), "ids.table": root["ids.table"]}
    save_file(tuned, tmp_path / "tuned.safetensors")
    for at, name in enumerate(reversed(list(root)), 1):
        file = f"model-{at:05}-of-{len(root):05}.safetensors"
        save_file({name: root[name]}, tmp_path / file)
    files = {n: f"model-{at:05}-of-{len(root):05}.safetensors" for at, n in enumerate(reversed(list(root)), 1)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    found = whose(tmp_path / "tuned.safetensors", [tune(model(0), 2), tmp_path])
    assert found.base == str(tmp_path)


def test_too_few_values_to_tell_angles_are_unsure():
    root = {"a.weight": torch.randn(8, 8)}
    assert whose(tune(root, 1), [root, tune(root, 2)]).base is None


def test_a_broken_candidate_another_architecture_and_itself_are_rows_that_stop_no_other(tmp_path: Path):
    root = model(0)
    places = {"root": root, "tuned": tune(root, 1), "sibling": tune(root, 2), "other": model(3, columns=32)}
    for name, tensors in places.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no header")
    order = ["broken", "other", "tuned", "sibling", "root"]
    found = whose(tmp_path / "tuned", [tmp_path / name for name in order])
    assert _kinds(found) == ["failed", "other architecture", "itself", "sibling or grandparent", "parent"]
    said = CliRunner().invoke(main, ["whose", *(str(tmp_path / name) for name in ["tuned", *order])])
    assert said.exit_code == 0
    assert said.output.startswith(f"base: {tmp_path / 'root'} (parent)")
