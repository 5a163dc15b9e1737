"""Many fine-tunes of one base: it is read once, and each adapter is what a single extraction makes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from peft_posthoc import CheckpointError, extract, extract_many, keep_energy, open_checkpoint, preflight_many
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.cli.main import main
from peft_posthoc.sources import Source
from tests.make import models
from tests.make.spoiled import run

FILES = ("adapter_model.safetensors", "adapter_config.json")


class Counting(Checkpoint):
    """A checkpoint that counts the bytes that are read of it, and what is alive of them."""

    def __init__(self, source: Source) -> None:
        self.seen = open_checkpoint(source)
        self.label, self.headers, self.config = self.seen.label, self.seen.headers, self.seen.config
        self.identity, self.folder = self.seen.identity, self.seen.folder
        self.bytes = 0

    def read(self, name: str) -> torch.Tensor:
        self.bytes += self.headers[name].bytes
        return self.seen.read(name)


def same(one: Path, other: Path) -> bool:
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in FILES)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """A base and twenty fine-tunes of it, of which some leave layers as they are."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fleet")
    base = models.llama()
    models.save(base, folder / "base")
    for at in range(20):
        only = (lambda name: "layers.1" in name) if at % 3 == 0 else None
        models.save(models.tuned_from(base, only=only), folder / f"tuned-{at:02}")
    return str(folder / "base"), [str(folder / f"tuned-{at:02}") for at in range(20)]


def test_the_base_is_read_once_and_each_adapter_is_that_of_a_single_extraction(fleet, tmp_path: Path) -> None:
    base, tuned = fleet
    counted = Counting(base)
    made = extract_many(counted, tuned, 4, out=tmp_path / "all")
    assert counted.bytes == sum(header.bytes for header in counted.headers.values())
    assert [one.state for one in made.members] == ["made"] * 20
    for at in (0, 7, 19):
        extract(base, tuned[at], 4).save(tmp_path / "one" / str(at))
        assert same(tmp_path / "all" / Path(tuned[at]).name, tmp_path / "one" / str(at))
    # Nothing else is left: no finished layers, and a note of what was made.
    names = {path.name for path in (tmp_path / "all").iterdir()}
    assert names == {*(Path(one).name for one in tuned), ".phlora_fleet.json"}


@pytest.mark.parametrize("options", [{"form": "peft"}, {"embeddings": True, "head": True, "rank": keep_energy(0.5)}])
def test_options_are_those_of_an_extraction(fleet, tmp_path: Path, options) -> None:
    base, tuned = fleet
    extract_many(base, tuned[:2], out=tmp_path / "all", **options)
    for one in tuned[:2]:
        extract(base, one, **options).save(tmp_path / "one" / Path(one).name)
        assert same(tmp_path / "all" / Path(one).name, tmp_path / "one" / Path(one).name)


def test_experts_that_each_fine_tune_stores_otherwise_are_read_of_the_base_once(tmp_path: Path) -> None:
    base, tuned = models.save_pair(models.mixtral(), tmp_path)
    stacked = models.load(tuned)
    counted = Counting(base)
    made = extract_many(
        counted, {"stored": tuned, "live": stacked}, 2, out=tmp_path / "all", experts="per-expert", dtype="float32"
    )
    assert not made.failed
    assert counted.bytes == sum(header.bytes for header in counted.headers.values())
    one, other = (load_file(tmp_path / "all" / name / FILES[0]) for name in ("stored", "live"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_more_of_the_base_is_held_than_what_is_in_work(fleet, tmp_path: Path, monkeypatch) -> None:
    from peft_posthoc.checkpoints.shared import Shared

    held, done = [], Shared.done

    def counted(self, step):
        done(self, step)
        held.append(len(self._tensors))

    monkeypatch.setattr(Shared, "done", counted)
    base, tuned = fleet
    extract_many(base, tuned[:5], 4, out=tmp_path / "all")
    assert max(held) == 1
    assert held[-1] == 0


def worse(tuned: str, folder: Path) -> str:
    """A copy of a fine-tune of which one weight holds a NaN."""
    model = models.load(tuned)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    return str(models.save(model, folder))


def test_what_fails_is_a_row_with_its_one_line_and_stops_no_other(fleet, tmp_path: Path) -> None:
    base, tuned = fleet
    other = models.save(models.llama(hidden_size=16), tmp_path / "other")
    cut = models.save(models.load(tuned[1]), tmp_path / "cut")
    file = models.weights_of(cut)
    file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "all" / "tuned-02").mkdir(parents=True)
    (tmp_path / "all" / "tuned-02" / "mine").write_text("")
    sources = [tuned[0], worse(tuned[1], tmp_path / "nan"), other, cut, tmp_path / "absent", base, tuned[2], tuned[3]]
    exit_code, out, err = run("extract", base, *sources, "--out", tmp_path / "all", "--rank", "4")
    assert exit_code == 1
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    for name, why in {
        "nan": "NaN or infinity in `model.layers.1.mlp.up_proj.weight`",
        "other": "in tuned than in base",
        "cut": "safetensors",
        "absent": "does not exist",
        "base": "the same weights",
        "tuned-02": "exists and is not empty",
    }.items():
        assert "failed:" in rows.get(name, ""), out + err
        assert why in rows[name], rows[name]
    assert "2 of 8 fine-tunes have an adapter" in out
    assert {path.name for path in (tmp_path / "all").iterdir() if (path / FILES[0]).exists()} == {
        "tuned-00",
        "tuned-03",
    }
    assert not [path for path in (tmp_path / "all").iterdir() if ".spool-" in path.name]
    extract(base, tuned[3], 4).save(tmp_path / "one")
    assert same(tmp_path / "all" / "tuned-03", tmp_path / "one")


def test_what_is_there_is_not_made_again_and_other_options_replace_nothing_by_themselves(fleet, tmp_path: Path) -> None:
    base, tuned = fleet
    extract_many(base, tuned[:2], 4, out=tmp_path / "all")
    before = [(tmp_path / "all" / Path(one).name / FILES[0]).stat().st_mtime_ns for one in tuned[:2]]
    counted = Counting(base)
    again = extract_many(counted, tuned[:3], 4, out=tmp_path / "all")
    assert [one.state for one in again.members] == ["was there", "was there", "made"]
    assert [(tmp_path / "all" / Path(one).name / FILES[0]).stat().st_mtime_ns for one in tuned[:2]] == before
    assert again.comparison is not None
    assert again.comparison.names == tuple(Path(one).name for one in tuned[:3])
    assert {one.state for one in extract_many(base, tuned[:3], 2, out=tmp_path / "all").members} == {"failed"}
    assert {one.state for one in extract_many(base, tuned[:3], 2, out=tmp_path / "all", force=True).members} == {"made"}
    # Somebody else's adapter in the place of ours is not taken for it.
    extract(base, tuned[5], 2).save(tmp_path / "all" / "tuned-00", force=True)
    assert [one.state for one in extract_many(base, tuned[:2], 2, out=tmp_path / "all").members] == [
        "failed",
        "was there",
    ]


def test_finished_layers_that_cannot_be_read_again_are_not_waited_for(fleet, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("peft_posthoc.extraction.spool._read", lambda path: None)
    base, tuned = fleet
    (failed,) = extract_many(base, tuned[:1], 4, out=tmp_path / "all").failed
    assert "finished layers" in failed.error


def test_a_base_that_cannot_be_read_is_told_once(fleet, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="base"):
        extract_many(tmp_path / "absent", fleet[1], out=tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_a_dry_run_tells_what_is_read_and_writes_nothing(fleet, tmp_path: Path) -> None:
    base, tuned = fleet
    planned = preflight_many(base, tuned[:3], 4, out=tmp_path / "all").to_dict()
    of_one = sum(header.bytes for header in open_checkpoint(base).headers.values())
    assert planned["read_bytes"] == 4 * of_one
    exit_code, out, _ = run("extract", base, *tuned[:3], tmp_path / "no", "--out", tmp_path / "all", "--dry-run")
    assert exit_code == 1
    assert "the base once" in out
    assert "does not exist" in out
    assert not (tmp_path / "all").exists()


def test_models_in_memory_have_the_names_that_they_are_given(fleet, tmp_path: Path) -> None:
    base, tuned = fleet
    weights = {name: tensor.clone() for name, tensor in load_file(models.weights_of(tuned[0])).items()}
    with pytest.raises(ValueError, match="names"):
        extract_many(base, [weights], out=tmp_path / "all")
    made = extract_many(base, {"mine": weights}, 4, out=tmp_path / "all")
    assert not made.failed
    extract(base, tuned[0], 4).save(tmp_path / "one")
    assert (tmp_path / "all/mine" / FILES[0]).exists()
    one, other = (load_file(folder / FILES[0]) for folder in (tmp_path / "all/mine", tmp_path / "one"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_command_tells_as_json(fleet, tmp_path: Path) -> None:
    base, tuned = fleet
    (tmp_path / "list.txt").write_text(f"# two\n{tuned[0]}\n\n{tuned[1]}\n")
    exit_code, out, _ = run("extract", base, tmp_path / "list.txt", "--out", tmp_path / "all", "--rank", "4", "--json")
    assert exit_code == 0
    told = json.loads(out)
    assert [one["name"] for one in told["adapters"]] == ["tuned-00", "tuned-01"]
    assert told["adapters"][0]["relative_delta_by_layer"]["0"] == 0
    assert told["adapters"][0]["relative_delta_by_layer"]["1"] > 0
    assert told["adapters"][0]["totals"]["rank"] == 4


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--rank", "4,8"), "A fleet takes one rank rule; `phlora resize` makes its adapters smaller."),
        (("--refine",), "--refine goes with one TUNED. `phlora refine` refines each adapter afterwards."),
        (("--to", "kohya"), "--to goes with one TUNED. `phlora export` writes each adapter afterwards."),
    ],
)
def test_what_a_fleet_does_not_do_is_told_with_what_does_it_afterwards(
    fleet, options: tuple[str, ...], why: str, tmp_path: Path
) -> None:
    base, tuned = fleet
    result = CliRunner().invoke(main, ["extract", base, *tuned[:2], "--out", str(tmp_path / "all"), *options])
    assert result.exit_code == 2
    assert why in " ".join(result.output.split())
    assert not (tmp_path / "all").exists()
