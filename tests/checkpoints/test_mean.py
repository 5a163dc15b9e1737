"""`mean:A,B,...`: siblings stand in for a base that nobody has, and what that costs is known by construction."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from peft_posthoc import CheckpointError, extract, open_checkpoint, preflight
from peft_posthoc.checkpoints.mean import Mean
from peft_posthoc.cli.main import main
from tests.make import models

RANK, SIDE = 2, 32


@pytest.fixture
def family(tmp_path):
    """A base and eight siblings, whose deltas of rank 2 and norm 1 are at right angles to each other on both sides."""
    torch.manual_seed(0)
    names = [f"layers.{at}.q_proj.weight" for at in range(2)]
    base = {name: torch.randn(SIDE, SIDE) for name in names}
    sides = {name: [torch.linalg.qr(torch.randn(SIDE, SIDE)).Q for _ in "uv"] for name in names}
    for sibling in range(8):
        at = slice(RANK * sibling, RANK * sibling + RANK)
        deltas = {name: u[:, at] @ v[:, at].T / RANK**0.5 for name, (u, v) in sides.items()}
        save_file({name: base[name] + deltas[name] for name in names}, tmp_path / f"{sibling}.safetensors")
    return base, [str(tmp_path / f"{sibling}.safetensors") for sibling in range(8)]


def of(*models):
    return f"mean:{','.join(map(str, models))}"


@pytest.mark.parametrize("count", [2, 4, 7])
def test_of_other_siblings_one_part_of_their_count_and_one_is_lost_at_the_tasks_own_rank(count, family):
    _, siblings = family
    totals = extract(of(*siblings[1 : count + 1]), siblings[0], RANK, exact=True).report.totals
    assert totals.energy == pytest.approx(count / (count + 1), abs=1e-5)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_with_itself_among_them_one_part_of_their_count_is(count, family):
    _, siblings = family
    totals = extract(of(*siblings[:count]), siblings[0], RANK, exact=True).report.totals
    assert totals.energy == pytest.approx((count - 1) / count, abs=1e-5)


def test_at_the_rank_of_all_of_them_nothing_is_lost_on_the_mean_that_was_written(family):
    _, siblings = family
    adapter = extract(of(*siblings[:4]), siblings[0], 4 * RANK, exact=True)
    mean, tuned = open_checkpoint(of(*siblings[:4])), load_file(siblings[0])
    for name in tuned:
        a, b = adapter.factors[name.removesuffix(".weight")]
        torch.testing.assert_close(mean.read(name) + b @ a, tuned[name], atol=1e-5, rtol=0)


def test_the_mean_is_as_far_from_the_base_as_their_deltas_share_out(family):
    base, siblings = family
    mean = open_checkpoint(of(*siblings[:4]))
    for name, weight in base.items():
        assert float((mean.read(name) - weight).norm()) == pytest.approx(4**-0.5, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_is_computed_in_float32_and_rounded_once_to_the_models_own_type(dtype):
    parts = [{"a.weight": torch.randn(4, 4).to(dtype), "ids": torch.arange(3)} for _ in range(5)]
    mean = Mean([open_checkpoint(part) for part in parts], label="mean:a,b")
    expected = torch.stack([part["a.weight"].double() for part in parts]).mean(0)
    assert mean.headers["a.weight"].dtype == mean.read("a.weight").dtype == dtype
    torch.testing.assert_close(mean.read("a.weight").double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert mean.read("ids").equal(torch.arange(3))
    assert all(part["a.weight"].dtype == dtype for part in parts)


def test_the_report_the_dry_run_and_the_adapter_say_that_the_base_is_a_stand_in(tmp_path):
    base = models.llama()
    siblings = [models.save(models.tuned_from(base), tmp_path / name) for name in "abc"]
    (siblings[0] / "trainer_state.json").write_text("{}")
    made = tmp_path / "out"
    ran = CliRunner().invoke(main, ["extract", of(*siblings), str(siblings[2]), str(made), "--rank", "4"])
    assert ran.exit_code == 0, ran.output
    assert "Warning: The base is a stand-in, the mean of 3 models, and the adapter is for that mean" in ran.output
    assert "swapped" not in ran.output
    assert json.loads((made / "adapter_config.json").read_text())["base_model_name_or_path"] == of(*siblings)
    planned, of_one = preflight(of(*siblings), siblings[2], 4), preflight(siblings[0], siblings[2], 4)
    assert any("stand-in" in line for line in planned.summary())
    assert planned.read_bytes == 2 * of_one.read_bytes  # three models and the fine-tune, in place of two
    # The adapter names it, so that whoever reads the two finds it again.
    checked = CliRunner().invoke(main, ["verify", str(made), "--base", of(*siblings), "--tuned", str(siblings[2])])
    assert checked.exit_code == 0, checked.output
    assert open_checkpoint(str(made)).label == f"{of(*siblings)}+{made}"


def test_what_has_no_mean_is_told_in_one_line(tmp_path, family):
    _, siblings = family
    other = tmp_path / "other.safetensors"
    for tensors, said in (
        ({"layers.0.q_proj.weight": torch.zeros(8, SIDE)}, r"Of `layers.0.q_proj.weight` .* has \[32, 32\], and"),
        ({**load_file(siblings[0]), "more": torch.zeros(1)}, "Of `more` .* has none, and"),
    ):
        save_file(tensors, other)
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(of(siblings[0], other))
    with pytest.raises(CheckpointError, match="mean of fewer than two models"):
        open_checkpoint(of(siblings[0]))
    for at, name in enumerate("ab"):
        save_file({"ids": torch.tensor([at]), "w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="`ids` is not the same in"):
        open_checkpoint(of(tmp_path / "a.safetensors", tmp_path / "b.safetensors")).read("ids")
