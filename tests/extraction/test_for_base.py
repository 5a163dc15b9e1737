"""What a delta is where base or tuned is quantised, and adapters for a base that is served quantised."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from peft_posthoc import MismatchError, check, extract, preflight
from peft_posthoc.cli.main import main
from tests.make import coded_folders, gguf_files, models
from tests.make.grids import OnGrid

NAMES = [f"layers.0.{leaf}.weight" for leaf in ("q_proj", "o_proj")]
SHAPE, RANK = (256, 320), 4
STD = 0.02
# Of one entry: half a step of the grid below, a step and a half, and a tenth of one.
SMALL, LARGE, TINY = 0.0015, 0.006, 0.0005


def weights(seed, size=STD, rank=None):
    generator = torch.Generator().manual_seed(seed)
    (m, n), r = SHAPE, rank or 1
    if rank is None:
        return {name: size * torch.randn(m, n, generator=generator) for name in NAMES}
    return {
        name: size * torch.randn(m, r, generator=generator) @ torch.randn(r, n, generator=generator) / r**0.5
        for name in NAMES
    }


BASE = weights(0)


def plus(base, delta):
    return {name: base[name] + delta[name] for name in NAMES}


def norm(tensors):
    return float(torch.cat([x.flatten() for x in tensors]).norm())


def served(base=BASE, **how):
    return OnGrid(base, label="base-int4", **how)


def test_factors_for_a_quantised_base_are_those_of_the_task_and_the_report_has_both_norms(tmp_path):
    tuned, quantised = plus(BASE, weights(1, SMALL, RANK)), served()
    plain, adapter = extract(BASE, tuned, RANK), extract(BASE, tuned, RANK, for_base=quantised)
    files = [one.save(tmp_path / name) for one, name in ((plain, "plain"), (adapter, "adapter"))]
    both = [load_file(file / "adapter_model.safetensors") for file in files]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0] | both[1])
    named = json.loads((files[1] / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == "base-int4"
    for row in adapter.report.rows:
        base, after, low = BASE[row.weight], tuned[row.weight], quantised.read(row.weight)
        wanted = [float((x - y).norm()) for x, y in ((after, base), (low, base), (after, low))]
        assert [row.delta_norm, row.served_error, row.served_delta] == pytest.approx(wanted, rel=1e-5)
    totals = adapter.report.totals
    assert totals.served_error == pytest.approx(norm(quantised.read(n) - BASE[n] for n in NAMES), rel=1e-5)
    assert totals.served_delta == pytest.approx(norm(tuned[n] - quantised.read(n) for n in NAMES), rel=1e-5)
    task = norm(tuned[n] - BASE[n] for n in NAMES)
    (said,) = (note for note in adapter.report.notes if "To be served on" in note)
    assert f"the task's delta has norm {task:.3g}, the base's quantisation error {totals.served_error:.3g}" in said


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 64)])
def test_the_error_that_a_grid_is_expected_to_make_is_the_one_that_it_makes(bits, group):
    adapter = extract(served(bits=bits, group=group), BASE, 1)
    for row in adapter.report.rows:
        assert row.grid == pytest.approx((row.delta_norm, 0.0), rel=0.03)


@pytest.mark.parametrize("quantised", ["tuned", "base", "both"])
@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_the_rank_above_the_grid_s_noise_is_the_task_s(quantised, size):
    tuned = plus(BASE, weights(1, size, RANK))
    pair = (BASE if quantised == "tuned" else served(), tuned if quantised == "base" else OnGrid(tuned, label="tuned"))
    assert [row.rank for row in extract(*pair, "auto").report.rows] == [RANK, RANK]


def test_where_the_task_is_below_the_noise_it_is_said_and_nothing_is_taken_for_it():
    tuned = OnGrid(plus(BASE, weights(1, TINY / 20, RANK)), label="tuned")
    report = extract(BASE, tuned, "auto").report
    assert [row.signal_rank for row in report.rows] == [0, 0]
    (warning,) = report.warnings
    assert "of the deltas' energy is what quantising is expected to leave there" in warning
    assert "Give the fine-tune as it was before, or let `--rank auto` tell" in warning


def test_a_quantised_base_whose_error_dominates_is_warned_of_with_the_way_out():
    report = extract(served(), plus(BASE, weights(1, TINY, RANK)), RANK).report
    (note,), (warning,) = report.notes, report.warnings
    assert (
        "`base-int4` (a grid) is quantised: the delta is the total one, the task's and the error of quantising" in note
    )
    assert "`--for-base base-int4`" in warning
    assert "`phlora refine`" in warning
    share = report.totals.grid[0] ** 2 / sum(row.delta_norm**2 for row in report.rows)
    assert f"{100 * share:.1f}% of the deltas' energy" in warning
    large = extract(served(), plus(BASE, weights(1, LARGE, RANK)), RANK).report
    assert large.notes
    assert not large.warnings


@pytest.mark.parametrize("size", [TINY, SMALL, LARGE])
def test_a_fine_tune_of_the_rounded_weights_is_known_by_the_error_that_it_lacks(size):
    base = served()
    task = weights(1, size, 8)
    tuned = {name: base.read(name) + task[name] for name in NAMES}
    adapter = extract(base, tuned, "auto")
    for layer in adapter.layers.values():
        assert len(layer.factors.s) == 8
        found = layer.lowrank.b @ layer.lowrank.a
        assert float((found - task[layer.weight]).norm()) <= 1e-3 * float(task[layer.weight].norm())
    assert "the fine-tune started from the rounded weights, as merges of QLoRA do" in adapter.report.notes[0]
    assert not [warning for warning in adapter.report.warnings if "quantising" in warning]
    if size < SMALL:
        # At full rank nothing is left to be looked at; the delta alone is too small then.
        assert extract(base, tuned, 256).report.notes == adapter.report.notes


def test_a_dry_run_counts_what_is_read_of_the_served_base_and_refuses_as_the_run_does():
    tuned = plus(BASE, weights(1, SMALL, RANK))
    plain, planned = preflight(BASE, tuned, RANK), preflight(BASE, tuned, RANK, for_base=served())
    assert planned.read_bytes == plain.read_bytes * 3 // 2
    assert planned.adapter_bytes == plain.adapter_bytes
    with pytest.raises(MismatchError, match="is not in `lacking`"):
        preflight(BASE, tuned, RANK, for_base=OnGrid({NAMES[0]: BASE[NAMES[0]]}, label="lacking"))


def test_a_base_of_another_shape_is_refused_with_both_shapes():
    other = OnGrid({name: torch.randn(256, 64) for name in NAMES}, label="other")
    with pytest.raises(MismatchError, match=r"is \[256, 64\] in `other`, and \[256, 320\] in the base"):
        extract(BASE, plus(BASE, weights(1, SMALL, RANK)), RANK, for_base=other)


def test_the_command_names_the_served_base_and_an_interrupted_run_is_another_for_another_one(llama_pair, tmp_path):
    base, tuned = llama_pair
    quarter = models.load(base).half()
    models.save(quarter, tmp_path / "served")
    command = ["extract", base, tuned, str(tmp_path / "out"), "--rank", "4", "--for-base", str(tmp_path / "served")]
    run = CliRunner().invoke(main, command, catch_exceptions=False)
    assert run.exit_code == 0, run.output
    assert "To be served on" in run.output
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "served")
    told = json.loads((tmp_path / "out/phlora_report.json").read_text())
    assert told["provenance"]["base"] == base
    assert 0 < told["totals"]["served_error"] < 1e-2 * told["totals"]["served_delta"]
    assert "served_error" in told["rows"][0]


@pytest.fixture(scope="module")
def fp8_pair(tmp_path_factory):
    """A model, its form in FP8, and a full fine-tune of it in 16 bits."""
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("fp8")
    model = models.llama(hidden_size=128, intermediate_size=192, num_hidden_layers=1).bfloat16()
    base, tuned = models.save_pair(model, where, scale=2e-3, rank=4)
    return base, coded_folders.quantise(base, where / "fp8", coded_folders.fp8), tuned


def test_a_folder_in_fp8_is_served_and_named(fp8_pair, tmp_path):
    base, low, tuned = fp8_pair
    adapter = extract(base, tuned, 4, for_base=low)
    files = [extract(base, tuned, 4).save(tmp_path / "plain"), adapter.save(tmp_path / "for-fp8")]
    both = [load_file(file / "adapter_model.safetensors") for file in files]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0] | both[1])
    assert json.loads((files[1] / "adapter_config.json").read_text())["base_model_name_or_path"] == low
    (said,) = (note for note in adapter.report.notes if "To be served on" in note)
    assert said.startswith(f"To be served on `{low}` (compressed-tensors, FP8): the task's delta has norm")
    totals = adapter.report.totals
    assert 0 < totals.served_error < totals.served_delta
    found = rules_broken(files[1], low)
    assert not {"another-base", "maybe-another-base", "wrong-path"} & set().union(*found)
    assert sum("format-lorax" in one for one in found) == 1
    # The 16-bit base's own adapter is as right there; another model's form is not.
    assert not any("another-base" in one for one in rules_broken(files[0], low))
    other = models.save(models.load(base).apply(shuffled), tmp_path / "other")
    low = coded_folders.quantise(other, tmp_path / "other-fp8", coded_folders.fp8)
    assert all("another-base" in one for one in rules_broken(files[0], low))


def rules_broken(adapter, base):
    return [{one.rule for one in outcome.findings} for outcome in check(adapter, base=base).outcomes]


@torch.no_grad()
def shuffled(module):
    if isinstance(module, torch.nn.Linear):
        module.weight.copy_(module.weight.flip(0))


# How a report names what is in a folder.
FOLDERS = {
    "fp8": "compressed-tensors, FP8",
    "fp8_rows": "compressed-tensors, FP8 by row",
    "int4": "compressed-tensors, INT4",
    "nf4": "bitsandbytes, NF4",
    "Q4_1": "GGUF",
}


def written(plain, out, how):
    """A model in a folder or file of one format."""
    if not hasattr(coded_folders, how):
        kind = getattr(gguf_files.QUANT, how)
        return str(gguf_files.save(models.load(plain), out.with_suffix(".gguf"), "llama", kind=kind))
    return coded_folders.quantise(plain, out, getattr(coded_folders, how))


@pytest.fixture(scope="module", params=FOLDERS)
def coded(request, fp8_pair, tmp_path_factory):
    """A base and its fine-tune, each plain and in one format, and the format's name."""
    base, _, tuned = fp8_pair
    where = tmp_path_factory.mktemp("coded")
    low = [written(one, where / str(i), request.param) for i, one in enumerate((base, tuned))]
    return base, tuned, *low, FOLDERS[request.param]


def rows_of(adapter):
    return [row for row in adapter.report.rows if row.status == "extracted"]


def test_the_error_of_a_folder_is_expected_from_its_scales(coded):
    base, _, low, _, _ = coded
    for pair in ((low, base), (base, low)):
        for row in rows_of(extract(*pair, 1)):
            assert sum(row.grid) == pytest.approx(row.delta_norm, rel=0.15)


def test_the_rank_that_was_trained_stands_out_of_a_folder_s_grid_and_the_report_names_it(coded):
    base, tuned, low, low_tuned, form = coded
    for pair, said in (
        ((base, low_tuned), f"`{low_tuned}` ({form}) is quantised: the delta has the error of quantising beside"),
        ((low, tuned), f"`{low}` ({form}) is quantised: the delta is the total one"),
    ):
        adapter = extract(*pair, "auto")
        assert {row.signal_rank for row in rows_of(adapter)} == {4}
        assert adapter.report.notes[0].startswith(said)
