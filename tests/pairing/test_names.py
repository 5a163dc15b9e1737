import copy
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from peft_posthoc import MismatchError, extract, open_checkpoint, verify
from peft_posthoc.pairing.names import as_named
from peft_posthoc.pairing.pair import match
from tests.make import models


def under(folder, name_of, to):
    """A copy of a model folder whose tensors have other names."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    save_file({name_of(name): tensor for name, tensor in tensors.items()}, to / "model.safetensors", {"format": "pt"})
    return to


def same_as(adapter, other):
    assert adapter.factors.keys() == other.factors.keys()
    for module, factors in other.factors.items():
        assert all(torch.equal(x, y) for x, y in zip(adapter.factors[module], factors, strict=True))


WRAPPERS = [
    lambda name: f"module.{name}",
    lambda name: f"base_model.model.{name}",
    lambda name: f"_orig_mod.{name}",
    lambda name: name.replace("layers.", "_fsdp_wrapped_module.layers.").replace("mlp.", "mlp._orig_mod."),
]
OTHERS = [
    lambda name: name.replace("model.", "model.language_model.") if name.startswith("model.") else name,
    lambda name: f"policy.actor.{name}",
]


@pytest.mark.parametrize("name_of", [*WRAPPERS, *OTHERS])
def test_what_the_fine_tune_calls_its_weights_leaves_no_trace_in_the_adapter(name_of, llama_pair, tmp_path):
    base, tuned = llama_pair
    adapter, plain = extract(base, under(tuned, name_of, tmp_path / "tuned"), 4), extract(base, tuned, 4)
    same_as(adapter, plain)
    assert {row.weight for row in adapter.report.rows} == {row.weight for row in plain.report.rows}


@pytest.mark.parametrize("name_of", WRAPPERS)
def test_wrappers_around_both_leave_no_trace_either(name_of, llama_pair, tmp_path):
    sides = [under(folder, name_of, tmp_path / str(n)) for n, folder in enumerate(llama_pair)]
    same_as(extract(*sides, 4), extract(*llama_pair, 4))


def test_the_report_tells_what_was_taken_for_what(llama_pair, tmp_path):
    base, tuned = llama_pair
    other = under(tuned, lambda name: f"policy.{name}", tmp_path / "tuned")
    report = extract(base, other, 4).report
    (note,) = report.notes
    assert f"(`policy.{next(iter(load_file(f'{tuned}/model.safetensors')))}` is" in note
    assert f"{len(report.rows)} with another beginning" in note
    assert note in report.table()
    assert report.to_dict()["notes"] == [note]
    assert extract(base, tuned, 4).report.notes == ()


def test_a_bare_model_is_matched_with_one_that_has_a_head(tmp_path):
    model = models.gpt2()
    base, tuned = models.save_pair(model, tmp_path)
    bare = transformers.GPT2Model.from_pretrained(tuned)
    bare.save_pretrained(tmp_path / "bare")
    same_as(extract(base, tmp_path / "bare", 4), extract(base, tuned, 4))


def test_a_wrapped_live_model_is_its_model(llama_pair):
    base, tuned = (models.load(folder) for folder in llama_pair)
    plain = extract(base, tuned, 4)
    same_as(extract(nn.DataParallel(copy.deepcopy(base)), nn.DataParallel(copy.deepcopy(tuned)), 4), plain)


def test_rules_rename_in_turn(llama_pair, tmp_path):
    base, tuned = llama_pair
    other = under(tuned, lambda name: name.replace("self_attn", "attention").replace("mlp", "ffn"), tmp_path / "tuned")
    rules = [r"\.attention\.=>.attn.", r"(layers\.\d+)\.attn=>\1.self_attn", "ffn=>mlp"]
    adapter = extract(base, other, 4, rename=rules)
    same_as(adapter, extract(base, tuned, 4))
    assert [note.partition(":")[0] for note in adapter.report.notes] == [f"--map {rule}" for rule in rules]
    assert verify(adapter.save(tmp_path / "out"), base, other, outputs=False, rename=rules).energy > 0.1


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("attention", r"`rename='attention'` is no rule: give `regex=>replacement`"),
        ("(=>x", r"`rename='\(=>x'` is not a regular expression"),
        (r"q_proj=>\3", r"is not a regular expression and its replacement"),
        ("no_such=>x", r"`rename='no_such=>x'` changes no tensor name. Names look like `model\."),
    ],
)
def test_rules_that_make_no_sense_are_told(rule, said, llama_pair):
    with pytest.raises(ValueError, match=said):
        extract(*llama_pair, 4, rename=rule)


def test_two_tensors_do_not_get_one_name(llama_pair):
    with pytest.raises(MismatchError, match=r"`.*q_proj.weight` of `.*` would both be"):
        extract(*llama_pair, 4, rename="[kq]_proj=>q_proj")


def test_a_name_that_may_be_either_of_two_is_asked_for():
    base = {f"{tower}.layers.{n}.fc.weight": torch.zeros(4, 4) for tower in ("text", "vision") for n in range(2)}
    tuned = {f"layers.{n}.fc.weight": torch.eye(4) for n in range(2)}
    with pytest.raises(MismatchError, match=r"`layers.0.fc.weight` of .* may be `text.* or `vision.*rename="):
        extract(base, tuned, 2)
    assert extract(base, tuned, 2, rename="^layers=>vision.layers").factors.keys() == {
        "vision.layers.0.fc",
        "vision.layers.1.fc",
    }


def test_shapes_decide_where_names_do_not():
    shapes = {"text": (4, 6), "vision": (8, 4)}
    base = {f"{tower}.layers.{n}.fc.weight": torch.zeros(shape) for tower, shape in shapes.items() for n in range(2)}
    tuned = {f"layers.{n}.fc.weight": torch.ones(8, 4) for n in range(2)}
    assert extract(base, tuned, 1).factors.keys() == {"vision.layers.0.fc", "vision.layers.1.fc"}


def test_a_new_head_is_not_taken_for_another_tensor():
    base = {"model.a.weight": torch.zeros(4, 4), "lm_head.weight": torch.zeros(9, 4)}
    tuned = {"model.a.weight": torch.eye(4), "score.weight": torch.ones(9, 4)}
    reasons = {row.weight: row.reason for row in extract(base, tuned, 2).report.rows}
    assert reasons["score.weight"] == "only in tuned"
    assert reasons["lm_head.weight"] == "only in base"


def test_names_that_agree_are_left_alone(llama_pair):
    base, tuned = (open_checkpoint(folder) for folder in llama_pair)
    found = match(base, tuned)
    wanted = {name: header.shape for name, header in base.headers.items()}
    assert as_named(tuned, wanted, found.layout).checkpoint is tuned
    assert (found.base, found.tuned) == (base, tuned)


def test_what_is_left_out_may_be_told_by_the_name_that_it_is_stored_under(llama_pair, tmp_path):
    base, tuned = llama_pair
    other = under(tuned, lambda name: f"policy.{name}", tmp_path / "tuned")
    stored = "policy.model.layers.0.mlp.up_proj.weight"
    reasons = {
        row.weight: row.reason for row in extract(base, other, 4, leave_out={stored: "not this one"}).report.rows
    }
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "not this one"
    assert list(reasons.values()).count("not this one") == 1
