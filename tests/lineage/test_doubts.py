"""A pair that looks wrong is asked about, or refused; a fine-tune and its base never are."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import MismatchError, NothingToCarryError, extract, extract_many, open_checkpoint, preflight
from peft_posthoc.checkpoints.memory import InMemory
from peft_posthoc.lineage.doubts import doubts
from tests.make import models, trees

SIBLINGS = "Are `{tree}/tuned` and `{tree}/sibling` siblings? Both name `{named}` as their base."
CARD = "---\nbase_model: {}\n---\n# A model\n"


@pytest.fixture
def pair(tmp_path):
    return models.save_pair(models.llama(), tmp_path)


def asked(base, tuned):
    found = [note for note in extract(base, tuned, 2).report.notes if note.startswith("Are base and tuned swapped?")]
    assert [note for note in preflight(base, tuned, 2).notes if note.startswith("Are base")] == found
    return found


def test_a_pair_as_it_should_be_is_not(pair, tmp_path):
    (tmp_path / "tuned/trainer_state.json").write_text("{}")
    (tmp_path / "tuned/README.md").write_text(CARD.format(pair[0]))
    (tmp_path / "base/README.md").write_text(CARD.format("org/yet-another"))
    assert asked(*pair) == []


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "training_args.bin"])
def test_a_base_of_a_training_run(name, pair, tmp_path):
    (tmp_path / "base" / name).write_text("{}")
    assert f"holds `{name}` of a training run" in asked(*pair)[0]
    (tmp_path / "tuned/optimizer.pt").write_text("")  # two stages of training
    assert asked(*pair) == []


@pytest.mark.parametrize("listed", ["{}", "\n- org/one\n- {}"])
def test_a_base_whose_card_names_the_tuned(listed, pair, tmp_path):
    (tmp_path / "base/README.md").write_text(CARD.format(listed.format(pair[1])))
    assert asked(*pair) == [f"Are base and tuned swapped? `{pair[0]}` names `{pair[1]}` as its own base."]


def test_a_base_whose_configuration_names_the_tuned(pair, tmp_path):
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"_name_or_path": pair[1]}))
    assert "as its own base" in asked(*pair)[0]


@pytest.mark.parametrize("card", ["---\nbase_model: [\n---\n", "---\n- 1\n---\n", "no card"])
def test_a_card_that_cannot_be_read_is_nothing(card, pair, tmp_path):
    (tmp_path / "base/README.md").write_text(card)
    assert asked(*pair) == []


def noted(base, tuned):
    return doubts(open_checkpoint(base), open_checkpoint(tuned))


@pytest.fixture
def tree(tmp_path):
    """By name, folders of a root, its child, and two children of that; each card names the parent."""
    root = trees.model(0, columns=256, layers=8)
    parent = trees.tune(root, 1)
    grown = {"root": root, "parent": parent, "tuned": trees.tune(parent, 2), "sibling": trees.lora(parent, 3)}
    named = {"parent": "root", "tuned": "parent", "sibling": "parent"}
    for name, tensors in grown.items():
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        if name in named:
            (tmp_path / name / "README.md").write_text(CARD.format(tmp_path / named[name]))
    return tmp_path


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("change", [trees.tune, trees.lora, trees.int8, trees.some_layers])
def test_in_random_trees_no_true_pair_is_doubted_and_strangers_are_refused(seed, change):
    root = trees.model(seed, columns=256, layers=8)
    parent = change(root, seed + 100) if change is not trees.int8 else change(root)
    tuned, saved = trees.tune(parent, seed + 200, 0.001), {n: w.bfloat16() for n, w in parent.items()}
    for pair in ((parent, tuned), (saved, tuned), (saved, {n: w.bfloat16() for n, w in tuned.items()})):
        assert extract(*pair, 1).report.notes == ()
    for pair in (
        (trees.model(seed + 300, columns=256, layers=8), tuned),
        (tuned, trees.model(seed + 300, columns=256, layers=8)),
    ):
        with pytest.raises(MismatchError, match=r"`state dict` is no fine-tune .* weights that were read have nothing"):
            extract(*pair, 1)
        assert extract(*pair, 1, unrelated=True).report.notes == ()


def test_a_tree_whose_cards_are_right_is_not_doubted(tree):
    for base, tuned in (("root", "parent"), ("parent", "tuned"), ("parent", "sibling")):
        assert noted(tree / base, tree / tuned) == []


@pytest.mark.parametrize("base", ["sibling", "root"])
def test_a_sibling_or_a_grandparent_in_place_of_the_parent_that_is_named_is_asked_about(base, tree):
    (said,) = noted(tree / base, tree / "tuned")
    assert said.startswith(f"Is `{tree / base}` the base? `{tree / 'tuned'}` names `{tree / 'parent'}` as its own")
    assert said.endswith(f"`{tree / base}` is a sibling or grandparent.")
    assert extract(tree / base, tree / "tuned", 2).report.notes[-1] == said


def test_another_form_of_the_base_that_is_named_is_not_asked_about(tree):
    parent = load_file(tree / "parent" / "model.safetensors")
    assert noted({name: weight.bfloat16() for name, weight in parent.items()}, tree / "tuned") == []


def test_a_fine_tune_that_cannot_be_sampled_is_asked_about_by_its_card_alone(tree):
    spoiled = load_file(tree / "tuned" / "model.safetensors")
    spoiled["layers.0.q_proj.weight"][0, 0] = torch.nan
    save_file(spoiled, tree / "tuned" / "model.safetensors")
    assert noted(tree / "sibling", tree / "tuned") == [SIBLINGS.format(tree=tree, named=tree / "parent")]
    assert noted(tree / "root", tree / "tuned") == []


def test_siblings_of_a_base_that_is_not_here_are_asked_about(tree):
    for name in ("tuned", "sibling"):
        (tree / name / "README.md").write_text(CARD.format("org/the-base"))
    assert noted(tree / "sibling", tree / "tuned") == [SIBLINGS.format(tree=tree, named="org/the-base")]


def test_a_quantised_or_rounded_copy_is_asked_about_and_the_same_files_are_refused(tree):
    root = trees.model(0, columns=256, layers=8)
    for copy, kind in ((trees.int8(root), "a quantised copy"), ({n: w.half() for n, w in root.items()}, "a copy")):
        (said,) = extract(root, copy, 1).report.notes
        assert f"It looks like {kind}: the corners of all 8 matrices" in said
    with pytest.raises(NothingToCarryError, match="in the same files"):
        extract(tree / "root", tree / "root" / ".", 2)


def test_of_a_fleet_a_stranger_is_a_row_and_stops_no_other(tree):
    save_file(trees.model(9, columns=256, layers=8), tree / "stranger.safetensors")
    fleet = extract_many(tree / "root", [tree / "parent", tree / "stranger.safetensors"], 2, out=tree / "out")
    assert [member.state for member in fleet.members] == ["made", "failed"]
    assert "nothing in common" in fleet.members[1].error


def test_it_costs_no_bytes_but_those_that_are_read_anyway_and_looks_no_further_than_it_must(tree):
    reads = []

    class Counted(InMemory):
        def read(self, name):
            reads.append(name)
            return super().read(name)

    root = trees.model(0, columns=256, layers=8)
    extract(Counted(root, label="a"), Counted(trees.tune(root, 1), label="b"), 1)
    assert sorted(reads) == sorted([*root, *root])
    strangers = {f"{at}.weight": torch.randn(64, 256) for at in range(40)}
    reads.clear()
    with pytest.raises(MismatchError):
        extract(Counted(strangers, label="a"), Counted({n: torch.randn(64, 256) for n in strangers}, label="b"), 1)
    assert len(reads) <= 18  # eight weights of both, and one that is read ahead


def test_a_fine_tune_whose_first_weights_are_new_is_no_stranger():
    root = trees.model(0, columns=256, layers=9)
    new = {**root, **{name: torch.randn(64, 256) for name in list(root)[:7]}}
    assert extract(root, trees.tune(new, 1), 1).report.notes == ()


def test_of_few_values_chance_says_nothing():
    base = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(4, 4) for i in range(1200)}
    tuned = {name: weight + 0.01 * torch.randn_like(weight) for name, weight in base.items()}
    assert extract(base, tuned, 1).report.notes == ()
