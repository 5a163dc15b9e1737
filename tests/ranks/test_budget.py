"""Ranks of all layers together: as good as any within the size, and never above it on disk."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_posthoc import Spectrum, budget, extract
from peft_posthoc.ranks.allocate import allocate, uniform
from peft_posthoc.ranks.weighting import balanced, depth, early, energy, relative
from tests.make import models
from tests.make.spectra import with_spectrum


def spectrum(values, shape=None):
    s = torch.tensor(values, dtype=torch.float64)
    return Spectrum(s, float(s.square().sum()), shape or (len(s), len(s) + 1))


def kept(ranks, spectra, weighting):
    worth = weighting(spectra)
    return sum(worth[n] * float(one.s[: ranks[n]].square().sum()) for n, one in spectra.items())


def spent(ranks, costs):
    return sum(rank * costs[name] for name, rank in ranks.items())


def best(spectra, costs, room, weighting):
    """By trying all."""
    choices = itertools.product(*(range(1, len(one.s) + 1) for one in spectra.values()))
    fitting = (dict(zip(spectra, choice, strict=True)) for choice in choices)
    return max(kept(ranks, spectra, weighting) for ranks in fitting if spent(ranks, costs) <= room)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), data=st.data())
@pytest.mark.parametrize("weighting", [energy(), relative(), balanced(), early()], ids=str)
def test_nothing_better_fits_into_the_room_that_a_threshold_uses(weighting, seed, data):
    generator = torch.Generator().manual_seed(seed)
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    spectra = {
        f"{i}": spectrum(torch.rand(k, generator=generator).sort(descending=True).values.tolist(), (k, 9 + 7 * i))
        for i, k in enumerate(sizes)
    }
    costs = {name: sum(one.shape) for name, one in spectra.items()}
    # Every triplet beyond the first of a layer, in the order of its worth per cost: the rooms where none is left over.
    worth = sorted(
        (
            (weighting(spectra)[name] * float(s) ** 2 / costs[name], costs[name])
            for name, one in spectra.items()
            for s in one.s[1:]
        ),
        reverse=True,
    )
    room = sum(costs.values()) + sum(cost for _, cost in worth[: data.draw(st.integers(0, len(worth)))])
    ranks = allocate(spectra, costs, room, weighting)
    assert spent(ranks, costs) <= room
    assert kept(ranks, spectra, weighting) == pytest.approx(best(spectra, costs, room, weighting))
    # In any other room no more is lost than the one triplet that did not fit.
    less = room + data.draw(st.integers(0, 40))
    first = max((value * cost for value, cost in worth), default=0)
    assert kept(allocate(spectra, costs, less, weighting), spectra, weighting) >= best(
        spectra, costs, less, weighting
    ) - (first + 1e-9)


def test_energy_goes_to_the_large_delta_and_relative_shares_alike():
    large, small = [8.0, 7.0, 6.0, 5.0], [0.8, 0.7, 0.6, 0.5]
    spectra, costs = {"large": spectrum(large), "small": spectrum(small)}, {"large": 1, "small": 1}
    assert allocate(spectra, costs, 5, energy()) == {"large": 4, "small": 1}
    assert allocate(spectra, costs, 6, relative()) == {"large": 3, "small": 3}


def test_equal_values_go_to_layers_in_their_order():
    spectra = {name: spectrum([1.0] * 4) for name in "abc"}
    ranks = allocate(spectra, dict.fromkeys("abc", 1), 8, energy())
    assert ranks == {"a": 4, "b": 3, "c": 1}


def test_what_is_left_goes_to_what_still_fits():
    spectra = {"dear": spectrum([9.0, 8.0]), "cheap": spectrum([1.0, 0.1, 0.1])}
    assert allocate(spectra, {"dear": 10, "cheap": 1}, 13, energy()) == {"dear": 1, "cheap": 3}


def test_limits_hold_and_steps_are_whole():
    spectra = {"a": spectrum(torch.linspace(9, 1, 40).tolist()), "b": spectrum([0.1] * 40)}
    ranks = allocate(spectra, {"a": 1, "b": 1}, 60, energy(), least=8, most=24, multiple=8)
    assert ranks == {"a": 24, "b": 24}
    assert allocate(spectra, {"a": 1, "b": 1}, 39, energy(), least=8, multiple=8) == {"a": 24, "b": 8}


def test_a_layer_never_gets_more_than_is_known_of_it():
    assert allocate({"a": spectrum([1.0, 1.0])}, {"a": 1}, 99, energy()) == {"a": 2}


def test_a_zero_layer_gets_the_least():
    spectra = {"zero": spectrum([0.0, 0.0]), "a": spectrum([1.0, 0.5])}
    for weighting in (energy(), relative(), balanced(), early()):
        assert allocate(spectra, {"zero": 1, "a": 1}, 3, weighting) == {"zero": 1, "a": 2}


def test_no_room_for_the_least_is_an_error_with_the_numbers():
    with pytest.raises(ValueError, match="There is room for 3, and the least takes 4"):
        allocate({"a": spectrum([1.0])}, {"a": 4}, 3, energy())


def test_uniform_is_the_largest_rank_that_fits_where_small_layers_have_all():
    shapes = {"a": (4, 90), "b": (64, 64)}
    costs = {"a": 94, "b": 128}
    assert uniform(shapes, costs, 4 * 94 + 10 * 128) == 10
    assert uniform(shapes, costs, 4 * 94 + 10 * 128 - 1) == 9
    assert uniform(shapes, costs, 4 * 94 + 15 * 128, multiple=8) == 8
    assert uniform(shapes, costs, 10**9) == 64
    assert uniform(shapes, costs, 1) == 0


@pytest.mark.parametrize(
    ("size", "limit"),
    [
        (5000, 5000),
        ("5000", 5000),
        ("5000B", 5000),
        ("5kB", 5000),
        ("1.5 MB", 1_500_000),
        ("2MiB", 2 * 2**20),
        ("2%", 20_000),
        (".5%", 5000),
        ("1GB", 10**9),
    ],
)
def test_a_size_is_bytes_a_number_with_a_unit_or_a_share(size, limit):
    assert budget(size).limit(1_000_000) == limit


@pytest.mark.parametrize("size", ["", "-3MB", "0MB", "64 megabytes", "MB", "1e6", True, 0, -5])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(ValueError, match="A budget is a size such as 64MB"):
        budget(size)


def test_a_budget_has_a_size_or_parameters():
    for wrong in ({}, {"size": 1, "params": 1}):
        with pytest.raises(ValueError, match="one of them"):
            budget(**wrong)
    with pytest.raises(ValueError, match="Got 0"):
        budget(params=0)
    with pytest.raises(ValueError, match="no rank is left"):
        budget(1, most=4, least=8)


# On disk.


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    torch.manual_seed(0)
    return models.save_pair(models.llama(num_hidden_layers=3), tmp_path_factory.mktemp("pair"), scale=0.02)


def weights_file(folder):
    return (folder / "adapter_model.safetensors").stat().st_size


WEIGHTINGS = [None, energy(), relative(), balanced(), early()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["portable", "peft"])
def test_the_file_never_exceeds_the_budget_in_real_bytes(form, dtype, pair, tmp_path):
    whole = extract(*pair, 10**6, form=form, dtype=dtype)
    least, most = (weights_file(whole.at(rank).save(tmp_path / f"{rank}")) for rank in (1, 10**6))
    for step, weighting in itertools.product(range(1, 6), WEIGHTINGS):
        size = least + 3000 + step * (most - least) // 5
        rule = budget(size, weighting=weighting)
        # Settling what is there, or extracting anew: the ranks may differ, the promise does not.
        found = extract(*pair, rule, form=form, dtype=dtype) if step == 2 else whole.at(rule)
        written = weights_file(found.save(tmp_path / f"{step}-{weighting}"))
        assert written <= size
        if form == "peft" and weighting is not None and step not in (2, 5):
            # What is not used is less than a triplet of the smallest layer, and room for digits.
            assert size - written < (32 + 16) * dtype.itemsize + 20 * len(whole.layers) * 2 + 200


def test_a_portable_budget_is_the_largest_safe_rank_that_fits(pair, tmp_path):
    at = {rank: weights_file(extract(*pair, rank).save(tmp_path / f"r{rank}")) for rank in (8, 16, 32)}
    slack = 1200  # for the digits of numbers that are not known in advance
    for rank in (8, 16, 32):
        found = extract(*pair, budget(at[rank] + slack, weighting=energy()))
        assert found.rank == rank
    assert extract(*pair, budget(at[16] - 1)).rank == 8
    assert extract(*pair, budget(at[32] - 1)).rank == 16


def test_a_budget_above_everything_keeps_everything(pair):
    for weighting in WEIGHTINGS:
        found = extract(*pair, budget("1GB", weighting=weighting), form="peft")
        assert found.report.totals.energy == pytest.approx(1, abs=1e-6)
        assert all(len(one.factors.s) == min(found.spectra[name].shape) for name, one in found.layers.items())


@pytest.mark.parametrize("form", ["portable", "peft"])
def test_a_budget_below_the_smallest_adapter_says_how_much_that_is(form, pair):
    with pytest.raises(ValueError, match="below the smallest adapter of these layers") as told:
        extract(*pair, budget("1kB"), form=form)
    assert "`size='1kB'`" in str(told.value)
    least = int(str(told.value).split("layers, ")[1].split(" bytes")[0].replace(",", ""))
    assert least > 1000
    # The header is known only once the layers are: the second message has all of it.
    with pytest.raises(ValueError, match="below the smallest adapter") as told:
        extract(*pair, budget(least), form=form)
    exact = int(str(told.value).split("layers, ")[1].split(" bytes")[0].replace(",", ""))
    assert exact < 1.5 * extract(*pair, 1, form=form).report.totals.bytes + 12_000
    assert extract(*pair, budget(exact), form=form).rank == (8 if form == "portable" else 1)


@pytest.mark.parametrize("form", ["portable", "peft"])
def test_parameters_are_the_numbers_in_the_file(form, pair, tmp_path):
    from safetensors.torch import load_file

    for count in (20_000, 33_333):
        folder = extract(*pair, budget(params=count, weighting=relative()), form=form).save(tmp_path / f"{count}")
        numbers = sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())
        assert numbers <= count
        assert form == "portable" or numbers > count - 50


def test_a_share_is_of_the_tuned_checkpoint(pair, tmp_path):
    from pathlib import Path

    tensors = (Path(pair[1]) / "model.safetensors").stat().st_size
    folder = extract(*pair, budget("40%", weighting=energy()), form="peft").save(tmp_path / "out")
    assert 0.37 * tensors < weights_file(folder) <= 0.4 * tensors


def test_limits_and_ranks_by_hand_hold_within_a_budget(pair):
    rule = budget("60kB", weighting=energy(), least=2, most=12, multiple=2)
    found = extract(*pair, rule, form="peft", rank_pattern={"q_proj": 3})
    for name, layer in found.layers.items():
        rank = len(layer.factors.s)
        assert rank == 3 if "q_proj" in name else 2 <= rank <= 12 and rank % 2 == 0
    assert found.provenance["options"]["rule"].startswith("budget(size='60kB', params=None, weighting=energy()")


def test_layers_that_have_not_changed_take_no_room(tmp_path):
    torch.manual_seed(0)
    folders = models.save_pair(models.llama(), tmp_path, only=lambda name: "q_proj" in name)
    found = extract(*folders, 32, form="peft").at(budget(params=1000, weighting=energy()))
    assert found.layers.keys() == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert sum(len(layer.factors.s) for layer in found.layers.values()) == 1000 // 64
    # How many will have changed is not known before: each is factored up to four times what it would get of all.
    found = extract(*folders, budget(params=6000, weighting=energy()), form="peft")
    assert [len(layer.factors.s) for layer in found.layers.values()] == [20, 20]


def test_a_budget_is_no_rank_of_one_weight(pair):
    with pytest.raises(ValueError, match="shares ranks out among all layers"):
        extract(*pair, {"model.layers.0.mlp.up_proj.weight": budget("1MB")})


def test_the_floor_is_a_share_of_the_uniform_rank():
    base = {f"layers.{i}.proj.weight": torch.zeros(40, 40, dtype=torch.float64) for i in range(2)}
    strong, weak = (with_spectrum(40, 40, scale * (torch.arange(40) + 1.0) ** -0.2, seed=3) for scale in (100, 1))
    tuned = dict(zip(base, (strong, weak), strict=True))
    for floor, rank in ((0.0, 1), (0.5, 10), (1.0, 20)):
        rule = budget(params=2 * 20 * 80, weighting=energy(), floor=floor)
        found = extract(base, tuned, rule, form="peft")
        assert [len(layer.factors.s) for layer in found.layers.values()] == [40 - rank, rank]


def test_a_budget_settles_an_adapter_that_is_there_without_factoring(pair, monkeypatch):
    whole = extract(*pair, 32, form="peft")
    monkeypatch.setattr("peft_posthoc.extraction.work.truncated_svd", None)
    cut = whole.at(budget(params=20_000, weighting=relative()))
    assert sum(len(one.factors.s) for one in cut.layers.values()) < sum(
        len(one.factors.s) for one in whole.layers.values()
    )


def test_padding_is_the_difference_between_the_forms(pair, tmp_path):
    found = extract(*pair, 0.6)
    totals = found.report.totals
    own = sum(len(one.factors.s) * sum(found.spectra[name].shape) * 4 for name, one in found.layers.items())
    assert totals.padding == totals.bytes - own > 0
    assert extract(*pair, 16).report.totals.padding == 0
    assert extract(*pair, 0.6, form="peft").report.totals.padding == 0
    assert "are zeros, for loaders that need one rank" in found.report.table()
    folder = found.save(tmp_path / "out")
    assert json.loads((folder / "phlora_report.json").read_text())["totals"]["padding"] == totals.padding
    assert math.isclose(totals.bytes, weights_file(folder), rel_tol=0.3)


def test_depth_is_read_off_names():
    names = [
        "model.embed_tokens.weight",
        *(f"model.layers.{i}.mlp.experts.{j}.up_proj.weight" for i in range(3) for j in range(9)),
        "lm_head.weight",
    ]
    found = depth(dict.fromkeys(names))
    assert found["model.embed_tokens.weight"] == 0
    assert found["lm_head.weight"] == 1
    assert [found[f"model.layers.{i}.mlp.experts.8.up_proj.weight"] for i in range(3)] == [0, 0.5, 1]
    both = depth(dict.fromkeys(["encoder.block.0.q", "encoder.block.5.q", "decoder.block.0.q", "decoder.block.1.q"]))
    assert list(both.values()) == [0, 1, 0, 1]
    assert depth({"h.0.attn": None, "proj2.weight": None}) == {"h.0.attn": 0, "proj2.weight": 0}


def test_early_layers_come_first():
    spectra = {f"h.{i}.attn.weight": spectrum([4.0, 3.0, 2.0, 1.0]) for i in range(3)}
    ranks = allocate(spectra, dict.fromkeys(spectra, 1), 8, early())
    assert list(ranks.values()) == [3, 3, 2]
    assert list(early(ratio=1)(spectra).values()) == pytest.approx([3 / 30] * 3)


@pytest.mark.parametrize(("form", "experts"), [("peft", "fused"), ("portable", "per-expert"), ("portable", "fused")])
def test_experts_are_within_the_budget_too(form, experts, tmp_path):
    torch.manual_seed(0)
    folders = models.save_pair(models.mixtral(), tmp_path)
    how = {"form": form, "experts": experts}
    sizes = [weights_file(extract(*folders, rank, **how).save(tmp_path / f"r{rank}")) for rank in (8, 16)]
    for step in range(3):
        size = sizes[0] + 4000 + step * (sizes[1] - sizes[0]) // 2
        found = extract(*folders, budget(size), **how)
        assert 0.5 * size < weights_file(found.save(tmp_path / f"{step}")) <= size
