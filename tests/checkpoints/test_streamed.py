"""Weights that are fetched when they are read, from the hub and from stores: what is asked for, and what is kept."""

import json
from collections import Counter

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import CheckpointError, MissingExtraError, extract, extract_many, open_checkpoint, preflight
from peft_posthoc.checkpoints import streamed
from peft_posthoc.checkpoints.object_store import StoreFiles
from peft_posthoc.errors import FetchError
from tests.make import models
from tests.make.hub_session import HUGE, refused


def adapter(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def sharded(model, folder):
    return models.save(model, folder, max_shard_size="20KB")


@pytest.fixture
def served_pair(hub, tmp_path):
    """(base, tuned) folders in shards, which the hub has as `s/base` and `s/tuned`."""
    torch.manual_seed(0)
    model = models.llama()
    pair = sharded(model, tmp_path / "base"), sharded(models.tuned_from(model), tmp_path / "tuned")
    for path in pair:
        hub.repository(f"s/{path.name}").commit(path, "main")
    return pair


def weights_fetched(hub):
    """By file, the bytes that were sent of it behind its header."""
    found = Counter()
    for repo, file, first, last in hub.parts:
        found[repo, file] += last + 1 - first
    return found


def test_the_adapter_is_that_of_the_files_and_no_weights_are_left_on_disk(hub, phlora, served_pair, tmp_path):
    hub.repository("s/base").claimed = {"model-00001-of-00003.safetensors": HUGE}  # which no disk has room for
    status, _, stderr = phlora("extract", "s/base", "s/tuned", tmp_path / "out", "--rank", "4", "--stream")
    assert status == 0, stderr
    extract(*map(str, served_pair), 4).save(tmp_path / "expected")
    tensors, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "expected"))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert not [file for _, file in hub.fetched if file.endswith(".safetensors")]
    # Every byte of both was sent once, in parts.
    sizes = {
        (f"s/{folder.name}", path.name): path.stat().st_size
        for folder in served_pair
        for path in folder.glob("*.safetensors")
    }
    assert weights_fetched(hub) == sizes


def on_disk(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@pytest.mark.parametrize("flag", ["--stream", "--keep-downloads"])
def test_the_most_that_is_on_the_disk_is_no_shard_or_all_of_them(flag, hub, phlora, served_pair, tmp_path, homes):
    weights = [path.stat().st_size for folder in served_pair for path in folder.glob("*.safetensors")]
    for path in served_pair:
        hub.repository(f"kept/{path.name}").commit(path, "main")
    before = on_disk(homes)
    most = [before]

    def looked_at(_):
        most.append(on_disk(homes))
        return False

    hub.drops = looked_at
    status, _, stderr = phlora("extract", "kept/base", "kept/tuned", tmp_path / "out", "--rank", "4", flag)
    assert status == 0, stderr
    assert len(most) > len(weights)
    if flag == "--stream":
        # Indices and configurations.
        assert max(most) - before < min(weights)
    assert (on_disk(homes) - before >= sum(weights)) == (flag == "--keep-downloads")


def test_without_it_the_refusal_names_it(hub, phlora, served_pair, tmp_path, work):
    hub.repository("s/base").claimed = {path.name: HUGE for path in served_pair[0].glob("*.safetensors")}
    refused(phlora("extract", "s/base", "s/tuned", work / "out"), work, "--stream")
    hub.repository("s/base").claimed = {}


def test_a_dry_run_says_what_will_be_fetched_and_fetches_headers_alone(hub, phlora, served_pair, tmp_path):
    status, said, stderr = phlora("extract", "s/base", "s/tuned", tmp_path / "out", "--stream", "--dry-run", "--json")
    assert status == 0, stderr
    told = json.loads(said)
    headers = [open_checkpoint(path).headers for path in served_pair]
    assert told["stream_bytes"] == sum(header.bytes for side in headers for header in side.values())
    assert told["download_bytes"] == 0
    assert (
        sum(weights_fetched(hub).values())
        < sum(path.stat().st_size for folder in served_pair for path in folder.glob("*.safetensors"))
        - told["stream_bytes"]
        + 1
    )


def test_a_connection_that_ends_at_any_request_is_gone_on_with(hub, phlora, served_pair, tmp_path):
    phlora("extract", "s/base", "s/tuned", tmp_path / "whole", "--rank", "2", "--stream")
    count = len(hub.parts)
    hub.parts.clear()
    hub.drops = lambda at: at % 11 == 3
    status, _, stderr = phlora("extract", "s/base", "s/tuned", tmp_path / "out", "--rank", "2", "--stream")
    assert status == 0, stderr
    assert len(hub.parts) > count
    assert adapter(tmp_path / "out") == adapter(tmp_path / "whole")


def test_a_shard_that_changes_between_two_parts_is_refused(hub, phlora, served_pair, work):
    file = min(path.name for path in served_pair[1].glob("*.safetensors"))

    def replaced(count):
        if sum(part[:2] == ("s/tuned", file) for part in hub.parts) == 3:
            hub.tags["s/tuned", file] = "another"
        return False

    hub.drops = replaced
    refused(phlora("extract", "s/base", "s/tuned", work / "out", "--stream"), work, file, "changed while it was read")


def test_a_fleet_fetches_the_base_once(hub, phlora, served_pair, tmp_path):
    torch.manual_seed(1)
    other = sharded(models.tuned_from(models.load(served_pair[0])), tmp_path / "other")
    hub.repository("s/other").commit(other, "main")
    status, stdout, stderr = phlora(
        "extract", "s/base", "s/tuned", "s/other", "--out", tmp_path / "all", "--rank", "4", "--stream"
    )
    assert status == 0, stdout + stderr
    sizes = {
        (f"s/{folder.name}", path.name): path.stat().st_size
        for folder in (*served_pair, other)
        for path in folder.glob("*.safetensors")
    }
    assert weights_fetched(hub) == sizes
    extract(str(served_pair[0]), str(other), 4).save(tmp_path / "one")
    one, of_fleet = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "all/other"))
    assert all(torch.equal(one[name], of_fleet[name]) for name in one)


def test_a_collection_is_a_fleet_of_the_models_in_it(hub, phlora, served_pair, tmp_path, work):
    items = [("s/base", "model"), ("s/tuned", "model"), ("s/texts", "dataset"), ("s/absent", "model")]
    hub.collections["s/tunes-123"] = items
    for address in ("collections/s/tunes-123", "https://huggingface.co/collections/s/tunes-123"):
        out = tmp_path / address.replace("/", "-")
        status, said, _ = phlora("extract", "s/base", address, "--out", out, "--rank", "4", "--json")
        assert status == 1  # of the one that is not there
        told = {one["name"]: one for one in json.loads(said)["adapters"]}
        assert told.keys() == {"tuned", "absent"}
        assert told["tuned"]["state"] == "made"
        assert "repository on the hub" in told["absent"]["error"]
    refused(phlora("extract", "s/base", "collections/s/none-1", "--out", work / "all"), work, "collections/s/none-1")


@pytest.fixture
def stored(served_pair):
    """The same pair in fsspec's store in memory."""
    store = fsspec.filesystem("memory")
    for folder in served_pair:
        store.makedirs(f"/models/{folder.name}", exist_ok=True)
        for path in folder.iterdir():
            store.pipe(f"/models/{folder.name}/{path.name}", path.read_bytes())
    yield store
    store.rm("/models", recursive=True)


def test_a_store_is_read_as_a_folder_is(stored, served_pair, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "PIECE", 1000)  # so that weights come in several pieces
    made = extract("memory://models/base", "memory://models/tuned", 4, out=tmp_path / "out")
    made.save(tmp_path / "out")
    expected = extract(*map(str, served_pair), 4)
    expected.save(tmp_path / "expected")
    tensors, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "expected"))
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert made.report.provenance["layout"] == expected.report.provenance["layout"]
    assert made.report.provenance["base"] == "memory://models/base"
    told = preflight("memory://models/base", f"file://{served_pair[1]}", 4)
    assert told.stream_bytes > 0
    fleet = extract_many("memory://models/base", ["memory://models/tuned"], 4, out=tmp_path / "all")
    assert not fleet.failed
    assert adapter(tmp_path / "all/tuned") == adapter(tmp_path / "out")


@pytest.fixture
def lost(monkeypatch):
    """Call it with how many parts come before the connection is lost; gives the parts that were asked for."""
    real, asked = StoreFiles.fetch, []

    def after(count):
        asked.clear()

        def fetch(self, file, start, end):
            if len(asked) == count:
                raise FetchError("The connection is lost.")
            asked.append((self._label, file, start, end))
            return real(self, file, start, end)

        monkeypatch.setattr(StoreFiles, "fetch", fetch)
        return asked

    return after


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("count", [26, 33, 47])
def test_a_connection_that_is_lost_costs_nothing_that_is_done(stored, lost, tmp_path, monkeypatch, many, count):
    monkeypatch.setattr("peft_posthoc.extraction.spool.Spool.patience", 0.0)
    sides, out = ("memory://models/base", "memory://models/tuned"), tmp_path / "all" / "tuned"

    def run():
        if many:
            return extract_many(sides[0], [sides[1]], 4, out=out.parent).failed
        return extract(*sides, 4, out=out).save(out, force=False) and []

    extract(*sides, 4).save(tmp_path / "whole")
    asked = lost(count)
    if many:
        assert "The connection is lost" in run()[0].error
    else:
        with pytest.raises(FetchError) as error:
            run()
        assert "The same command goes on from there" in error.value.__notes__[0]
    assert not out.exists()
    before = {part for part in asked if part[2] > 8}
    asked = lost(-1)
    assert not run()
    # What is fetched again are headers, and the weights that were in work when it was lost.
    weights = [part for part in asked if part in before and part[2] > 8]
    headers = 2 * len({part[:2] for part in asked})
    assert len(weights) <= headers / 2 + 6
    assert adapter(out) == adapter(tmp_path / "whole")
    assert not [path for path in out.parent.iterdir() if ".spool-" in path.name]


def test_what_changes_in_a_store_is_refused(stored):
    base = open_checkpoint("memory://models/base")
    name = next(iter(base.headers))
    base.read(name)
    file = base._places[name][0]
    stored.pipe(f"/models/base/{file}", stored.cat(f"/models/base/{file}"))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        base.read(name)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("memory://models/absent", "could not be opened"),
        ("memory://models/odd", "No weights in"),
        ("memory://models/cut", "ends before its header says|not a readable safetensors"),
        ("nowhere://models/base", "could not be opened"),
    ],
)
def test_what_is_no_model_in_a_store_is_told_in_a_line(stored, url, why):
    stored.pipe("/models/odd/notes.txt", b"none")
    stored.pipe("/models/cut/model.safetensors", (10**6).to_bytes(8, "little") + b"{")
    with pytest.raises(CheckpointError, match=why):
        open_checkpoint(url)


def test_a_store_whose_package_is_not_installed_is_named(monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(MissingExtraError, match="s3fs"):
        open_checkpoint("s3://bucket/model")


def test_a_single_file_in_a_store_is_a_model_without_configuration(stored, tmp_path):
    save_file({"a.weight": torch.eye(4)}, tmp_path / "one.safetensors")
    stored.pipe("/models/one.safetensors", (tmp_path / "one.safetensors").read_bytes())
    found = open_checkpoint("memory://models/one.safetensors")
    assert torch.equal(found.read("a.weight"), torch.eye(4))
    assert found.config is None
