"""`phlora resize` and `phlora combine` through the real command."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from peft_posthoc.cli import main as cli


def write(folder, *, seed=0, rank=8, **config):
    """An adapter of two layers."""
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for layer, (m, n) in enumerate([(24, 16), (16, 24)]):
        stem = f"base_model.model.layers.{layer}.proj"
        weights |= {
            f"{stem}.lora_A.weight": torch.randn(rank, n, generator=draw),
            f"{stem}.lora_B.weight": torch.randn(m, rank, generator=draw),
        }
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def product(folder, layer=0):
    weights = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    stem = f"base_model.model.layers.{layer}.proj"
    return config["lora_alpha"] / config["r"] * (weights[f"{stem}.lora_B.weight"] @ weights[f"{stem}.lora_A.weight"])


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments], prog_name="phlora")


@pytest.fixture
def work(tmp_path, monkeypatch):
    write(tmp_path / "a")
    write(tmp_path / "b", seed=1, rank=4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_resize_prints_what_is_kept_then_a_row_for_each_kind_of_module(work):
    kinds, layers = (run("resize", "a", "out", "--rank", "4", "--force", *more) for more in ((), ("--layers",)))
    deltas = [torch.linalg.svdvals(product(work / "a", layer).double()) ** 2 for layer in (0, 1)]
    share = f"{100 * float(sum(s[:4].sum() for s in deltas) / sum(s.sum() for s in deltas)):.1f}%"
    verdict = f"2 modules at rank 4 (padded to 8 in the file) hold {share} of their deltas' energy; 2.6 kB on disk"
    for result, names in ((kinds, [["proj", "2", "8", "8", "4", share]]), (layers, ["layers.0.proj", "layers.1.proj"])):
        assert result.stdout.startswith(verdict)
        rows = [line.split() for line in result.stdout.splitlines() if "proj " in line]
        assert [row[:6] for row in rows] == names or [row[0] for row in rows] == names


def test_resize_writes_its_report(work):
    result = run("resize", "a", "out", "--rank", "4")
    assert result.stdout.endswith("Adapter written to out\n")
    report = json.loads((work / "out" / "phlora_report.json").read_text())
    s = torch.linalg.svdvals(product(work / "a").double()) ** 2
    row = report["rows"][0]
    assert (row["module"], row["rank_before"], row["true_rank"], row["rank"]) == ("layers.0.proj", 8, 8, 4)
    assert row["energy"] == pytest.approx(float(s[:4].sum() / s.sum()), abs=1e-6)
    assert report["provenance"]["adapters"] == [{"adapter": "a", "base": None, "rank": 8, "weight": 1.0}]
    file = work / "out" / "adapter_model.safetensors"
    assert report["totals"]["bytes"] == sum(tensor.nbytes for tensor in load_file(file).values())
    assert [path.name for path in work.iterdir() if path.name.startswith(".")] == []


def test_energy_and_error_are_two_ways_to_say_one_thing(work):
    for option, value in (("energy", 0.75), ("error", 0.5)):
        result = run("resize", "a", f"by-{option}", f"--{option}", value, "--quiet", "--form", "peft")
        assert (result.exit_code, result.stdout) == (0, "")
        assert [line[:44] for line in result.stderr.splitlines()] == ["Warning: The `peft` form is for PEFT alone: "]
    one, other = (json.loads((work / f"by-{name}" / "phlora_report.json").read_text()) for name in ("energy", "error"))
    assert [row["rank"] for row in one["rows"]] == [row["rank"] for row in other["rows"]]
    assert all(row["relative_error"] <= 0.5 for row in one["rows"])


def test_json_goes_to_stdout_or_into_a_file(work):
    result = run("resize", "a", "out", "--json", "-", "--dtype", "bfloat16")
    assert json.loads(result.stdout) == json.loads((work / "out" / "phlora_report.json").read_text())
    assert {one.dtype for one in load_file(work / "out" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    run("resize", "a", "other", "--json", "report.json")
    assert json.loads((work / "report.json").read_text())["totals"]["modules"] == 2


def test_combine_weighs_and_keeps_the_sum_unless_told_otherwise(work):
    assert run("combine", "a", "b", "out", "--weights", "0.7,-0.3").exit_code == 0
    for layer in (0, 1):
        wanted = 0.7 * product(work / "a", layer) - 0.3 * product(work / "b", layer)
        assert torch.allclose(product(work / "out", layer), wanted, atol=1e-4)
    assert json.loads((work / "out" / "phlora_report.json").read_text())["totals"]["rank"] == 12
    run("combine", "a", "b", "cut", "--rank", "3")
    assert json.loads((work / "cut" / "phlora_report.json").read_text())["totals"]["rank"] == 3


def test_a_rank_that_cuts_nothing_is_no_silent_success(work):
    said = "Warning: Nothing is cut: no module's rank was above what was asked for.\n"
    assert said in run("resize", "a", "out").stdout  # 32 is the default, and the adapter's rank is 8
    assert said not in run("resize", "a", "less", "--rank", "7").stdout
    assert "Nothing is cut" not in run("combine", "a", "b", "sum").stdout


@pytest.mark.parametrize(("one", "other", "same"), [("org/m", "./here/m/", True), ("m", "m/", True), ("m", "n", False)])
def test_sums_of_adapters_say_when_their_bases_differ(one, other, same, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate((one, other)):
        write(tmp_path / str(seed), seed=seed, base_model_name_or_path=name)
    assert ("The adapters name different bases" in run("combine", "0", "1", "out").stdout) is not same


def test_an_adapter_can_be_replaced_by_its_smaller_self(work):
    before = product(work / "a").double()
    assert run("resize", "a", "a", "--rank", "2").exit_code == 1
    assert torch.equal(product(work / "a").double(), before)
    assert run("resize", "a", "a", "--rank", "2", "--force").exit_code == 0
    assert int(torch.linalg.matrix_rank(product(work / "a"))) == 2


BAD = {
    "no such folder": (
        ["resize", "nowhere", "out"],
        "`nowhere` is not a readable LoRA adapter: it does not exist. Give the folder",
    ),
    "no rank": (["resize", "a", "out", "--rank", "0"], "A rank must be a whole number of at least 1. Got 0."),
    "two rules": (["resize", "a", "out", "--rank", "2", "--error", "0.1"], "Give --rank or --error, not both."),
    "energy": (["resize", "a", "out", "--energy", "1.5"], "An energy share must lie above 0"),
    "error": (["resize", "a", "out", "--error", "1"], "A relative error must be at least 0 and below 1. Got 1.0."),
    "occupied": (["resize", "a", "b"], "`b` exists and is not empty."),
    "cancel": (["combine", "a", "a", "out", "--weights", "1,-1"], "`a` and `a` hold deltas that cancel"),
    "one": (["combine", "a", "out"], "Give at least two adapters"),
    "weights": (["combine", "a", "b", "out", "--weights", "1,x"], "`1,x` is not a list of numbers."),
    "count": (["combine", "a", "b", "out", "--weights", "1"], "2 adapters need as many weights."),
    "json": (["resize", "a", "out", "--json", "no/where.json"], "there is no folder `no`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(work, case):
    arguments, message = BAD[case]
    before = sorted(str(path) for path in work.rglob("*"))
    result = run(*arguments, "--quiet")
    assert result.exit_code != 0
    assert message in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith(("Usage:", "Try ")) and line]
    assert line.lower().startswith(("phlora: error: ", "error: "))
    assert sorted(str(path) for path in work.rglob("*")) == before
