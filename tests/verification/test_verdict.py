"""The one verdict: weights stay compared whatever happens later, and a result that is no better than the base fails."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from peft_posthoc import extract, verify
from peft_posthoc.cli import main as cli
from tests.make import architectures, models


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pair, and an adapter of it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("made")
    base, tuned = models.save_pair(models.llama(), folder, only=lambda name: "norm" not in name)
    extract(base, tuned, 8).save(folder / "adapter")
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "made")
    monkeypatch.chdir(tmp_path / "made")
    return tmp_path / "made"


def run(*arguments):
    line = ["verify", "adapter", "--base", "base", "--tuned", "tuned", *arguments]
    return CliRunner().invoke(cli.main, [str(argument) for argument in line], prog_name="phlora")


def break_tokenizer():
    for side in ("base", "tuned"):
        Path(side, "tokenizer.json").write_text("{")


def break_model():
    config = Path("tuned/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "nonsense"}))


FAILURES = {
    "beyond the vocabulary": (["--token-ids", "96"], None, "Token id 96 is not in the vocabulary of `tuned`, 0 to 95."),
    "below it": (["--token-ids", "-1"], None, "Token id -1 is not in the vocabulary of `tuned`, 0 to 95."),
    "beyond all numbers": (["--token-ids", "9" * 23], None, f"Token id {'9' * 23} is in no vocabulary."),
    "no ids": (["--token-ids", ""], None, "`--token-ids` needs at least one token id in every sequence."),
    "no tokenizer": (["--prompt", "hello"], None, "There is no tokenizer beside `tuned` or `base` for the prompts."),
    "a broken tokenizer": ([], break_tokenizer, "The tokenizer of `tuned` cannot be read: "),
    "a broken model": ([], break_model, "transformers cannot load `tuned`: "),
}


@pytest.mark.parametrize("case", FAILURES)
def test_weights_stay_compared_whatever_happens_later(place, case):
    options, spoil, message = FAILURES[case]
    if spoil is not None:
        spoil()
    result = run(*options, "--json", "out.json")
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert line.startswith("phlora: error: The weights were compared, the outputs were not: ")
    assert message in line
    assert "Weights: the adapter has cosine 0." in result.stdout
    found = json.loads((place / "out.json").read_text())
    assert 0 < found["energy"] < 1
    assert len(found["rows"]) == 21
    assert message in found["failure"]


def test_a_result_that_is_nearer_than_the_base_says_so(place):
    result = run("--token-ids", "1 2 3")
    assert result.exit_code == 0
    assert result.stdout.endswith("Base + adapter is nearer to tuned than base is.\n")
    only = run("--weights-only")
    assert only.stdout.endswith("Base + adapter is nearer to tuned than base is, by its weights.\n")


@pytest.mark.parametrize("bar", ["--min-cosine", "--max-kl"])
def test_a_bar_that_is_no_number_is_passed_by_nothing(place, bar):
    assert run("--token-ids", "1 2 3", bar, "nan").exit_code == 1


@pytest.mark.parametrize("factor", [-1, 0])
def test_a_result_that_is_no_nearer_than_the_base_fails(place, factor):
    file = place / "adapter/adapter_model.safetensors"
    save_file({k: v * factor if "lora_B" in k else v for k, v in load_file(file).items()}, file)
    result = run("--token-ids", "1 2 3", "--json", "out.json")
    assert result.exit_code == 1
    assert (
        "Base + adapter is no nearer to tuned than base is: not in its weights and not in its outputs." in result.stderr
    )
    assert json.loads((place / "out.json").read_text())["nearer"] is False


def test_models_without_a_difference_are_explained_by_nothing_that_is_added(place):
    assert verify("adapter", "base", "base", outputs=False).energy == 0


def test_tensors_that_cannot_be_compared_are_named(place):
    tensors = load_file(place / "tuned/model.safetensors")
    save_file(tensors | {"extra.weight": torch.ones(3, 3)}, place / "tuned/model.safetensors", {"format": "pt"})
    found = verify("adapter", "base", "tuned", outputs=False)
    assert found.uncompared == ("extra.weight",)
    assert "Not compared, as base and tuned hold them differently: 1 (extra.weight)." in found.weights()


def test_there_is_a_row_for_the_worst_of_each_kind_or_for_every_weight(place):
    found = verify("adapter", "base", "tuned", outputs=False)
    queries = {row.weight: row.delta_cosine for row in found.rows if row.weight.endswith("q_proj.weight")}
    first, *rows = found.weights().splitlines()
    assert first.startswith(f"Weights: the adapter has cosine {found.cosine:.4f} with the whole delta")
    (row,) = [row for row in rows if row.startswith("q_proj ")]
    assert row.split()[:3] == ["q_proj", f"({len(queries)})", f"{min(queries.values()):.4f}"]
    assert [name for name in queries if name in found.weights()] in ([], [found.worst])
    assert all(name in found.weights(layers=True) for name in queries)


def doubts(named, given):
    config = Path("adapter/adapter_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(named)}))
    return verify("adapter", given, "tuned", outputs=False).notes


def test_one_base_has_many_names(place):
    shutil.copytree("base", "copy")
    os.symlink("base", "link")
    shutil.copytree("base", "snapshot/models--org--base/snapshots/abc")
    for named in (
        "base/",
        "./base",
        place / "base",
        "link",
        "copy",
        "org/base",
        "/elsewhere/base",
        "C:\\x\\base",
        None,
    ):
        assert not doubts(named or "", "base"), named
    for given in ("base/", place / "base", "base/model.safetensors", "copy"):
        assert not doubts("base", given), given
    assert not doubts("org/base", "snapshot/models--org--base/snapshots/abc")


def test_another_base_than_the_adapter_names_is_told(place):
    for named in ("x" * 1000, "a\0b", "tuned", "org/other", "/elsewhere/other"):
        assert doubts(named, "base") == (f"The adapter names `{named}` as its base, and `base` was given.",)
    assert f"The adapter names `{named}` as its base" in run("--weights-only").stdout


def test_weights_are_shown_before_a_model_is_loaded(place, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt  # as little can be done as where the system ends a process for its memory

    monkeypatch.setattr("peft_posthoc.verification.outputs.load_model", killed)
    result = run("--json", "out.json")
    assert result.exit_code == 130
    assert "Weights: the adapter has cosine 0." in result.stdout
    assert len(json.loads((place / "out.json").read_text())["rows"]) == 21


@pytest.mark.parametrize(("name", "reads"), [("vit", "`pixel_values`"), ("whisper", "`input_features`")])
def test_a_model_that_reads_no_tokens_is_compared_by_its_weights(name, reads, tmp_path):
    base, tuned = architectures.pair_of(name, tmp_path)
    found = verify(extract(base, tuned, 4).save(tmp_path / "out"), base, tuned)
    assert (found.failure, found.nearer) == ("", True)
    assert found.outputs_note == f"the model reads no tokens but {reads}"
