"""`phlora inspect`: what it tells is what `phlora extract` then does."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from peft_posthoc import extract
from peft_posthoc.cli import main as cli
from peft_posthoc.errors import AdapterError, MissingExtraError, OutputError
from peft_posthoc.files import write_whole
from peft_posthoc.inspection.answers import of
from peft_posthoc.inspection.inspection import Inspection, inspect
from peft_posthoc.models.grid import Cell, cells
from tests.make import llama_spectra, models
from tests.make.diagonal import diagonal, pair_with


def run(*arguments):
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def by_flags(inspection):
    return {one.flags: one for one in inspection.candidates}


@pytest.fixture(scope="module")
def rounded_pair(tmp_path_factory):
    """Folders of a Llama in bfloat16, and of a fine-tune of rank 3 that was rounded to it."""
    torch.manual_seed(0)
    model = models.llama(hidden_size=64, intermediate_size=96)
    return models.save_pair(model, tmp_path_factory.mktemp("rounded"), dtype=torch.bfloat16, rank=3, scale=0.01)


@pytest.mark.parametrize("form", ["portable", "peft"])
def test_what_a_rule_would_choose_is_what_extract_writes(form, rounded_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "peft_posthoc.inspection.answers.BUDGETS", ("40%",)
    )  # A tiny model's adapters are as large as itself.
    inspection = inspect(*rounded_pair, form=form)
    for flags in ("--rank 8", "--energy 0.9", "--rank auto", "--budget 40%"):
        told = by_flags(inspection)[flags]
        out = tmp_path / flags
        run("extract", *rounded_pair, out, *flags.split(), "--form", form, "--quiet")
        report = json.loads((out / "phlora_report.json").read_text())
        assert told.ranks == {row["weight"]: row["rank"] for row in report["rows"] if row["status"] == "extracted"}
        assert told.energy == pytest.approx(report["totals"]["energy"], rel=1e-4)
        assert getattr(told, form) == report["totals"]["bytes"]
        assert told.padding == report["totals"]["padding"] or form == "peft"
        assert not told.beyond


def test_both_forms_are_sized_for_the_same_layers_and_padding_is_their_difference():
    deltas = {"a.weight": diagonal(3.0, 3.0, 3.0, 1.0), "b.weight": diagonal(9.0, 1.0)}
    half = by_flags(inspect(*pair_with(deltas)))["--energy 0.9"]
    assert half.ranks == {"a.weight": 3, "b.weight": 1}
    assert half.peft == (3 + 1) * (8 + 8) * 4
    assert half.portable == 2 * 8 * (8 + 8) * 4
    assert half.padding == half.portable - half.peft
    assert half.energy == pytest.approx((27 + 81) / (28 + 82))


def test_no_factor_is_kept_and_nothing_can_be_saved(tmp_path):
    adapter = extract(*pair_with({"a.weight": diagonal(4.0, 3.0)}), 2, keep_factors=False)
    known = adapter.layers["a.weight"].factors
    assert (known.shape, known.s.tolist()) == ((8, 8), pytest.approx([4.0, 3.0]))
    assert not any(isinstance(one, torch.Tensor) and one.ndim > 1 for one in known)
    with pytest.raises(AdapterError, match="keep_factors=False"):
        adapter.at(1).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="takes no `out`"):
        extract(*pair_with({"a.weight": diagonal(4.0)}), 2, keep_factors=False, out=tmp_path / "out")


def test_a_rank_beyond_what_was_factored_is_told_as_higher():
    inspection = inspect(*pair_with({"a.weight": diagonal(*[2.0] * 4, *[1.0] * 4)}), 4, exact=True)
    rules = by_flags(inspection)
    assert rules["--energy 0.5"].lowest_to_highest() == "3"
    most = rules["--energy 0.9"]
    assert (most.lowest_to_highest(), most.rank("a.weight"), most.at_least("50.0%"), most.at_most("1%")) == (
        ">4",
        ">4",
        ">50.0%",
        "<1%",
    )
    assert (inspection.rank_for(0.5), inspection.rank_for(0.9)) == ("3", ">4")
    assert "--rank 8" not in rules
    assert rules["--budget 10%"].reason


def test_noise_is_measured_where_the_type_tells_it(rounded_pair):
    inspection = inspect(*rounded_pair)
    rows = inspection.rows.values()
    assert all(0 < row.noise < 0.5 and row.signal_rank == 3 for row in rows)
    assert by_flags(inspection)["--rank auto"].lowest_to_highest() == "3"
    (row,) = inspect(*pair_with({"a.weight": diagonal(4.0)})).rows.values()
    assert row.noise is None


def test_a_rank_known_in_advance_stays_so_where_noise_is_measured(monkeypatch):
    # The rule must reach the factorization as a rule whose rank is known: its first block is then wide enough.
    from peft_posthoc.extraction import work as factor
    from peft_posthoc.linalg import spectrum, svd

    seen = []
    real = svd.truncated_svd
    monkeypatch.setattr(
        factor, "truncated_svd", lambda delta, rule, **how: seen.append(rule) or real(delta, rule, **how)
    )
    inspect(*pair_with({"a.weight": diagonal(4.0)}), 7)
    assert [spectrum.in_advance(rule) for rule in seen] == [7]


def test_json_has_spectra_curves_ranks_and_sizes(rounded_pair):
    told = json.loads(run("inspect", *rounded_pair, "--json", "--quiet", "--max-rank", 16))
    name = "model.layers.1.mlp.up_proj.weight"
    s, curve = torch.tensor(told["singular_values"][name]), torch.tensor(told["layers"][name])
    assert len(s) == len(curve) == 16
    torch.testing.assert_close(torch.cumsum(s**2, 0) / (s**2).sum(), curve / curve[-1])
    weight = told["weights"][name]
    assert (weight["layer"], weight["module"], weight["shape"], weight["signal_rank"]) == (1, "up_proj", [96, 64], 3)
    assert {"flags", "ranks", "energy", "bytes", "padding"} <= set(told["rules"][0])
    assert told["rules"][0]["ranks"][name] == 8


def test_the_table_has_a_row_for_every_kind_or_for_every_layer_and_one_for_every_rule(rounded_pair):
    inspection = inspect(*rounded_pair)
    for layers, names in ((False, list(inspection.kinds)), (True, list(inspection.spectra))):
        _, rows, rules = inspection.table(layers=layers).split("\n\n")
        assert [line.split()[0] for line in rows.splitlines()[1:]] == [*names, "total"]
        assert sum(line.startswith("--") for line in rules.splitlines()) == len(inspection.candidates)
        assert max(map(len, [*rows.splitlines(), *rules.splitlines()])) < 120


def test_a_kind_of_module_holds_what_its_layers_hold_together():
    deltas = {"layers.0.up.weight": diagonal(4.0, 3.0), "layers.1.up.weight": diagonal(10.0, 10.0)}
    inspection = inspect(*pair_with({**deltas, "head.weight": diagonal(1.0)}), 2, exact=True, head=True)
    (row,) = [line for line in inspection.table().splitlines() if line.startswith("up (2)")]
    assert row.split()[2] == f"{100 * (16 + 100) / (25 + 200):.1f}%"


def test_the_answer_comes_first_and_names_what_no_rank_carries():
    # 8 of 8 directions of `a` in the file; the norm's change holds 3 parts in 4 of the whole.
    deltas = {"a.weight": diagonal(*[1.0] * 8, side=16), "norm.weight": torch.full((6,), 2.0)}
    inspection = inspect(*pair_with(deltas))
    assert inspection.table().splitlines()[0] == (
        "Rank 8 keeps 100.0% of the change of the 1 weight that it carries, 25.0% of the whole change, in 1.0 kB."
    )
    assert inspection.missing() == "norm holds 75.0% of the whole change and is not carried."
    told = inspection.to_dict()["shares"]
    assert list(told) == ["norm", "a"]
    assert told["norm"]["layers"] == {"other": pytest.approx(0.75)}
    assert (told["norm"]["left_out"], told["a"]["left_out"]) == (pytest.approx(0.75), 0)


def test_an_adapter_that_takes_more_than_the_fine_tune_is_marked():
    inspection = inspect(*pair_with({"a.weight": diagonal(*[1.0] * 8)}))
    (row,) = [line for line in inspection.table().splitlines() if line.startswith("--rank 8")]
    assert row.endswith("larger than the fine-tune")
    assert "in 512 B, more than the fine-tune itself (256 B)." in inspection.kept()


def test_every_layer_of_a_large_model_is_in_the_table_and_what_is_too_small_is_said():
    inspection = llama_spectra.llama(layers=4, width=256, inner=512, rank=64)
    assert len(inspection.rows) == 4 * 7
    assert inspection.cells["model.layers.3.self_attn.q_proj.weight"] == Cell("q_proj", 3)
    assert "--budget 1% " in inspection.table()


def test_extract_tells_of_the_adapter_that_was_written(rounded_pair, tmp_path):
    pytest.importorskip("matplotlib")
    run("extract", *rounded_pair, tmp_path / "out", "--rank", "2,4", "--html", tmp_path / "page.html", "--quiet")
    page = (tmp_path / "page.html").read_text()
    assert "<code>r2</code>" in page
    assert "<code>r4</code>" in page
    run("extract", *rounded_pair, tmp_path / "one", "--rank", "2", "--html", tmp_path / "page.html", "--quiet")
    assert "<code>as written</code>" in (tmp_path / "page.html").read_text()


def test_an_adapters_own_answer_is_its_ranks_and_bytes():
    adapter = extract(*pair_with({"a.weight": diagonal(4.0, 3.0)}), 1, exact=True)
    (one, *_) = Inspection.of(adapter, {"mine": adapter}).candidates
    assert one == of("mine", adapter)
    assert (one.flags, one.lowest_to_highest(), one.portable) == ("mine", "1", adapter.report.totals.bytes)
    assert one.energy == pytest.approx(16 / 25)


def test_a_module_has_the_same_word_in_every_layer_and_no_two_share_one():
    names = [
        *(f"encoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(2)),
        *(f"decoder.block.{i}.layer.0.SelfAttention.q.weight" for i in range(2)),
        "decoder.block.0.layer.1.EncDecAttention.q.weight",
        "decoder.block.0.layer.2.DenseReluDense.wi.weight",
        "model.layers.7.mlp.experts.31.w1.weight",
        "lm_head.weight",
        "7.weight",
    ]
    assert list(cells(names).values()) == [
        *(Cell("encoder.SelfAttention.q", i) for i in range(2)),
        *(Cell("decoder.SelfAttention.q", i) for i in range(2)),
        Cell("decoder.EncDecAttention.q", 0),
        Cell("wi", 0),
        Cell("w1", 7),
        Cell("lm_head", None),
        Cell("7", 7),
    ]
    assert {cell.module for cell in cells(["x.y.z", "y.x.z"]).values()} == {"x.y.z", "y.x.z"}


@pytest.mark.parametrize("command", [("inspect",), ("extract", "out")])
def test_without_matplotlib_one_line_says_so_before_the_work(command, rounded_pair, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(tmp_path)
    name, *out = command
    result = CliRunner().invoke(cli.main, [name, *rounded_pair, *out, "--html", "page.html"])
    assert result.exit_code == 1
    assert result.stderr == "phlora: error: Plots need matplotlib: `pip install 'peft-posthoc[plot]'`.\n"
    assert not list(tmp_path.iterdir())
    with pytest.raises(MissingExtraError):
        llama_spectra.llama(layers=1, width=128, inner=128, rank=8).plot("plot.png")


def test_a_format_that_matplotlib_does_not_know_is_refused_before_the_work(rounded_pair, tmp_path):
    pytest.importorskip("matplotlib")
    result = CliRunner().invoke(cli.main, ["inspect", *rounded_pair, "--plot", str(tmp_path / "plot.docx")])
    assert result.exit_code == 2
    assert "A picture cannot be a `.docx` file" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_file_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    write_whole(target, b"first")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OutputError, match=r"page\.html` could not be written: No space left on device\."):
        write_whole(target, b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert target.read_bytes() == b"first"


def test_the_blocks_of_the_page_about_it(rounded_pair, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    text = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text(encoding="utf-8")
    shell, python = (re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1] for language in ("sh", "python"))
    monkeypatch.chdir(tmp_path)
    for folder in rounded_pair:
        (tmp_path / Path(folder).name).symlink_to(folder)
    for line in shell.splitlines():
        run(*shlex.split(line, comments=True)[1:])
    assert {path.name for path in tmp_path.iterdir()} >= {"ranks.json", "energy.png", "energy.html", "adapter.html"}
    exec(python, {})


def test_the_command_ends_with_what_it_wrote_and_what_comes_next(rounded_pair, tmp_path):
    base, tuned = map(str, rounded_pair)
    page = tmp_path / "page.html"
    lines = run("inspect", base, tuned, "--max-rank", 8, "--html", page).splitlines()
    assert lines[-2] == f"Written: {page}"
    assert lines[-1].startswith(f"To make an adapter: phlora extract {base} {tuned} adapter --rank ")
