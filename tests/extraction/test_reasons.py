import json

import pytest
import torch

from peft_posthoc import extract, preflight
from peft_posthoc.extraction.plan import by_flags, make_plan, tuned_bytes
from peft_posthoc.extraction.reasons import LeftOut, Reason
from peft_posthoc.sources import open_pair
from tests.make.diagonal import diagonal, pair_with

REASONS = [LeftOut(reason, ("this", "that")) for reason in Reason]


def rows_of(account):
    return {row["weight"]: row for row in json.loads(json.dumps(account.to_dict()))["rows"]}


@pytest.mark.parametrize("account", [lambda *sides: extract(*sides, 2).report, lambda *sides: preflight(*sides, 2)])
def test_reports_give_the_reason_as_a_code_and_the_options_that_decide_it(llama_pair, account):
    rows = rows_of(account(*llama_pair))
    head, norm, layer = (
        rows[name] for name in ("lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight")
    )
    assert (head["cause"], head["way_out"]) == ("not-asked-for", {"head": True})
    assert head["reason"] == "head (carried with --head)"
    assert (norm["cause"], norm["way_out"]) == ("vector", {})
    assert (layer["reason"], layer["cause"], layer["way_out"]) == ("", None, {})


def test_the_options_named_as_the_way_out_carry_the_weight(tied_pair):
    way_out = rows_of(extract(*tied_pair, 2).report)["model.embed_tokens.weight"]["way_out"]
    assert way_out == {"embeddings": True, "head": True}
    for option, value in way_out.items():
        assert rows_of(extract(*tied_pair, 2, **{option: value}).report)["model.embed_tokens.weight"]["reason"] == ""


def test_a_reason_of_the_callers_is_never_taken_for_one_of_ours():
    base, tuned = pair_with({"a.weight": diagonal(3.0), "b.weight": diagonal(4.0)})
    adapter = extract(base, tuned, 1, leave_out={"b.weight": "only in base"})
    assert rows_of(adapter.report)["b.weight"]["cause"] == "told"
    assert not any("are only in base" in warning for warning in adapter.report.warnings)
    assert tuned_bytes(adapter.plan) == sum(header.bytes for header in adapter.plan.headers.values())


@pytest.mark.parametrize("left_out", REASONS, ids=lambda one: one.reason.name)
def test_every_reason_has_a_text_for_reports_and_one_for_whoever_asked(left_out):
    for text in (left_out.text, left_out.hint):
        assert text
        assert "{" not in text
    assert ("--" in left_out.text) == bool(left_out.reason.ways)
    assert "--" not in left_out.hint


def test_codes_are_unlike_one_another():
    assert len({str(reason) for reason in Reason}) == len(list(Reason)) == len({reason.text for reason in Reason})


def test_every_tensor_has_one_fate(llama_pair):
    plan = make_plan(*open_pair(*llama_pair, base_revision=None, tuned_revision=None), choose=by_flags())
    assert plan.fates.keys() == plan.headers.keys()
    assert sorted([*plan.factored, *plan.kept, *plan.left_out]) == sorted(plan.headers)


def test_what_only_the_base_has_is_no_part_of_the_tuned_checkpoint():
    base, tuned = pair_with({"a.weight": diagonal(3.0, 2.0)})
    adapter = extract({**base, "b.weight": torch.zeros(100, 100)}, tuned, 1)
    assert tuned_bytes(adapter.plan) == sum(tensor.nbytes for tensor in tuned.values())
