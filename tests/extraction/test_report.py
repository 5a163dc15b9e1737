import math

import pytest
import torch

from peft_posthoc import Inspection, Series, extract
from peft_posthoc.inspection.curves import Curves
from peft_posthoc.ranks.rules import keep_energy
from tests.make import models
from tests.make.diagonal import diagonal, pair_with


def test_every_tensor_of_both_checkpoints_has_exactly_one_row(tmp_path):
    base, tuned = models.llama(), models.tuned_from(models.llama())
    before, after = base.state_dict(), tuned.state_dict()
    after["score.weight"] = after.pop("lm_head.weight")[:2]
    report = extract(before, after, 4).report
    names = [row.weight for row in report.rows]
    assert sorted(names) == sorted(set(before) | set(after))
    totals = report.totals
    assert totals.extracted + totals.unchanged + totals.left_out == len(names)


def test_a_row_says_what_the_factors_hold():
    report = extract(*pair_with({"a.weight": diagonal(4.0, 3.0, 0.0)}), 1, exact=True).report
    (row,) = report.rows
    assert (row.status, row.rank, row.modules, row.shape) == ("extracted", 1, ("a",), (8, 8))
    assert row.energy == pytest.approx(16 / 25)
    assert row.relative_error == pytest.approx(3 / 5)
    assert row.delta_norm == pytest.approx(5)
    assert row.base_norm == pytest.approx(100)
    assert row.relative_delta == pytest.approx(0.05)
    assert row.bytes == 8 * (8 + 8) * 4  # padded to rank 8, float32


def test_totals_are_weighted_by_energy_and_know_what_is_left_out():
    deltas = {
        "a.weight": diagonal(4.0, 3.0),
        "b.weight": diagonal(1.0, 0.0),
        "b.bias": torch.tensor([2.0, 0.0, 0.0]),
        "lm_head.weight": diagonal(0.0, 5.0),
        "c.weight": diagonal(0.0),
    }
    totals = extract(*pair_with(deltas), 1, exact=True).report.totals
    assert totals.energy == pytest.approx((16 + 1) / (25 + 1))
    assert totals.energy_of_all == pytest.approx((16 + 1) / (25 + 1 + 4 + 25))
    assert (totals.extracted, totals.unchanged, totals.left_out) == (2, 1, 2)


def test_energies_at_lower_ranks_are_those_of_the_same_layers_cut():
    deltas = {"a.weight": diagonal(4.0, 3.0, 2.0, 2.0, 1.0), "b.weight": diagonal(6.0, 5.0, side=6)}
    report = extract(*pair_with(deltas), 5, exact=True).report
    a, b = report.rows
    assert a.energy_at == pytest.approx({1: 16 / 34, 2: 25 / 34, 4: 33 / 34})
    assert b.energy_at == pytest.approx({1: 36 / 61, 2: 1, 4: 1})
    assert report.totals.energy_at == pytest.approx({1: (16 + 36) / 95, 2: (25 + 61) / 95, 4: (33 + 61) / 95})
    for rank, share in report.totals.energy_at.items():
        assert share == pytest.approx(extract(*pair_with(deltas), rank, exact=True).report.totals.energy)


def test_a_layer_of_a_lower_rank_counts_with_all_that_it_keeps():
    deltas = {"a.weight": diagonal(*[1.0] * 8), "b.weight": diagonal(3.0, 1.0)}
    report = extract(*pair_with(deltas), keep_energy(0.9), exact=True).report
    assert [row.rank for row in report.rows] == [8, 1]
    assert report.rows[1].energy_at == {}
    assert report.totals.energy_at == pytest.approx({1: (1 + 9) / 18, 2: (2 + 9) / 18, 4: (4 + 9) / 18})


def test_what_is_left_out_is_warned_of_with_its_share_and_the_flag_that_carries_it():
    deltas = {"a.weight": diagonal(1.0), "lm_head.weight": diagonal(3.0), "a.bias": torch.tensor([0.01, 0, 0])}
    report = extract(*pair_with(deltas), 1).report
    (warning,) = report.warnings
    assert warning.startswith("90.0% of the fine-tune's energy is left out in 1 tensor: head (carried with --head)")
    assert extract(*pair_with(deltas), 1, head=True).report.warnings == ()


def test_tensors_on_one_side_only_are_warned_of():
    warnings = extract(*pair_with({"a.weight": diagonal(1.0)}, ["old"], ["new", "newer"]), 1).report.warnings
    assert any(
        "1 tensor is only in base, not in tuned, and not carried: old (norm 1.73)" in warning for warning in warnings
    )
    assert any(
        "2 tensors are only in tuned, not in base, and not carried: new (norm 1.73), newer (norm 1.73)" in warning
        for warning in warnings
    )


@pytest.mark.parametrize(("size", "warned"), [(60.0, True), (40.0, False)])
def test_a_delta_that_is_too_large_for_a_fine_tune_asks_for_the_right_base(size, warned):
    warnings = extract(*pair_with({"a.weight": diagonal(size)}), 1).report.warnings
    assert any("Is this the base" in warning for warning in warnings) is warned


def test_excluded_tensors_of_other_shapes_are_rows_without_a_size():
    base, tuned = (
        {"a.weight": diagonal(0.0), "b.weight": torch.ones(3, 3)},
        {"a.weight": diagonal(1.0), "b.weight": torch.ones(4, 3)},
    )
    report = extract(base, tuned, 1, exclude=["b"]).report
    row = next(row for row in report.rows if row.weight == "b.weight")
    assert (row.status, row.reason, row.delta_norm) == ("left out", "shapes differ (--exclude)", None)
    assert any("another shape" in warning for warning in report.warnings)


def test_the_table_shows_what_is_kept_then_what_is_lost_then_a_row_for_each_kind_of_module():
    layers = {f"model.layers.{n}.self_attn.q_proj.weight": diagonal(4.0, 3.0) for n in (0, 1, 2, 10)}
    report = extract(*pair_with({**layers, "lm_head.weight": diagonal(10.0)}), 1, exact=True).report
    lines = report.table().splitlines()
    assert lines[0].startswith("4 weights at rank 1 (padded to 8 in the file) hold 64.0%")
    assert "head (carried with --head): 50.0%" in lines[2]
    assert [line.split()[:5] for line in lines if "q_proj" in line] == [["q_proj", "4", "1", "64.0%", "50.0%"]]
    told = [line.split()[0] for line in report.table(layers=True).splitlines() if "q_proj" in line]
    assert told == list(layers)


def test_what_a_prompt_and_a_notebook_show_is_short_and_says_what_is_kept():
    deltas = {"a.weight": diagonal(4.0, 3.0), "lm_head.weight": diagonal(5.0)}
    adapter = extract(*pair_with(deltas), 1, exact=True)
    for one in (adapter, adapter.report):
        assert len(repr(one)) < 250
        assert "holds 64.0% of its delta's energy, 32.0% of the whole" in repr(one)
        assert "head (carried with --head): 50.0%" in one._repr_html_()
    for one in (Series({"r1": adapter}), Inspection.of(adapter)):
        assert len(repr(one)) < 100
        assert one._repr_html_().startswith("<pre>")


def test_curves_are_the_energies_of_every_rank():
    deltas = {"a.weight": diagonal(4.0, 3.0), "b.weight": diagonal(2.0, side=6)}
    curves = Curves.of(extract(*pair_with(deltas), 512, exact=True))
    torch.testing.assert_close(curves.layers["a.weight"], torch.tensor([0.64, *[1.0] * 7], dtype=torch.float64))
    torch.testing.assert_close(curves.layers["b.weight"], torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(curves.total[:2], torch.tensor([20 / 29, 1.0], dtype=torch.float64))
    assert len(curves.total) == 8
    assert curves.bytes_per_rank == (8 + 8 + 6 + 6) * 4
    assert curves.ranks() == [1, 2, 4, 8]
    assert curves.to_dict()["total"] == curves.total.tolist()
    assert (curves.at("a.weight", 1), curves.at("b.weight", 8)) == pytest.approx((0.64, 1.0))


def test_a_cut_curve_is_measured_against_the_true_energy():
    # Of eight equal singular values, four hold one half: not all of what was computed.
    delta = torch.linalg.qr(torch.randn(8, 8)).Q
    curves = Curves.of(extract(*pair_with({"a.weight": delta}), 4))
    torch.testing.assert_close(curves.total, torch.tensor([1 / 8, 2 / 8, 3 / 8, 4 / 8]).double(), rtol=1e-4, atol=0)


def test_the_norms_are_summed_in_float64():
    # In float32 the sum of 2^24 ones and one more stays at 2^24.
    from peft_posthoc.linalg.norms import frobenius

    assert frobenius(torch.ones(2**24 + 9)) == pytest.approx(math.sqrt(2**24 + 9), rel=1e-12)


def test_a_counter_is_no_energy():
    base, tuned = pair_with({"a.weight": diagonal(1.0)})
    base["norm.num_batches_tracked"], tuned["norm.num_batches_tracked"] = torch.tensor(0), torch.tensor(1000)
    report = extract(base, tuned, 1).report
    assert report.totals.energy_of_all == pytest.approx(1)
    assert report.warnings == ()
