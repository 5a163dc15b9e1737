"""Spoiled folders of shards: one line that says what, before any SVD."""

import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from peft_posthoc import open_checkpoint
from tests.make.same import same
from tests.make.shards import SHARDS, edited, entry, place_of, put_in_place_of_a_tensor, save
from tests.make.spoiled import NAMES, contents, forbid_svd, refused, run


def no_metadata(at):
    (at / ".metadata").unlink()
    return f"`{at}/.metadata` is missing", "saving did not end"


def metadata_of_garbage(at):
    (at / ".metadata").write_bytes(bytes(range(256)) * 8)
    return f"`{at}/.metadata` is refused", "or is no pickle"


def metadata_of_text(at):
    (at / ".metadata").write_text("<html>404: not found</html>")
    return f"`{at}/.metadata` is refused", "or is no pickle"


def metadata_of_nothing(at):
    (at / ".metadata").write_bytes(b"")
    return f"`{at}/.metadata` is refused", "or is no pickle"


def metadata_cut_off(at):
    whole = (at / ".metadata").read_bytes()
    (at / ".metadata").write_bytes(whole[: len(whole) // 2])
    return f"`{at}/.metadata` is refused", "or is no pickle"


def a_folder_for_metadata(at):
    (at / ".metadata").unlink()
    (at / ".metadata").mkdir()
    return (f"`{at}/.metadata` cannot be read",)


def metadata_of_a_list(at):
    (at / ".metadata").write_bytes(pickle.dumps([1, 2, 3]))
    return (f"`{at}/.metadata` is no metadata of a checkpoint",)


def metadata_of_a_dtype(at):
    (at / ".metadata").write_bytes(pickle.dumps(torch.float32))
    return (f"`{at}/.metadata` is no metadata of a checkpoint",)


def metadata_of_a_class(at):
    (at / ".metadata").write_bytes(pickle.dumps(MetadataIndex))
    return (f"`{at}/.metadata` is no metadata of a checkpoint",)


def metadata_without_places(at):
    edited(at, lambda metadata: setattr(metadata, "storage_data", {}))
    return (f"`{at}/.metadata` is no metadata of a checkpoint",)


def metadata_of_no_tensors(at):
    edited(at, lambda metadata: metadata.state_dict_metadata.clear())
    return ("`tuned` holds no tensors",)


def a_size_of_words(at):
    edited(at, lambda metadata: setattr(entry(metadata), "size", ("a", "b")))
    return (f"`{at}/.metadata` is no metadata of a checkpoint",)


def a_negative_size(at):
    def negative(metadata):
        entry(metadata).size = (-24, -16)

    edited(at, negative)
    return (f"`{at}/.metadata` is no metadata of a checkpoint",)


def an_offset_of_none(at):
    edited(at, lambda metadata: setattr(place_of(metadata), "offset", "0"))
    return (f"`{at}/.metadata` is no metadata of a checkpoint",)


def no_dtype(at):
    edited(at, lambda metadata: setattr(entry(metadata).properties, "dtype", "float32"))
    return (f"`{at}/.metadata` is no metadata of a checkpoint",)


def a_tensor_without_pieces(at):
    edited(at, lambda metadata: entry(metadata).chunks.clear())
    return f"`{at}/.metadata` is refused", f"pieces of `model.{NAMES[0]}` do not make up", "[24, 16]"


def a_tensor_larger_than_its_pieces(at):
    edited(at, lambda metadata: setattr(entry(metadata), "size", torch.Size([10**9, 16])))
    return f"`{at}/.metadata` is refused", f"pieces of `model.{NAMES[0]}` do not make up"


def a_piece_larger_than_its_file(at):
    def huge(metadata):
        entry(metadata).size = entry(metadata).chunks[0].sizes = torch.Size([10**9, 16])

    edited(at, huge)
    return f"`{at}/.metadata` is refused", f"piece of `model.{NAMES[0]}` does not fit"


def a_piece_out_of_its_tensor(at):
    def shift(metadata):
        (chunk,) = entry(metadata).chunks
        info = place_of(metadata)
        chunk.offsets = torch.Size([1, 0])
        metadata.storage_data[MetadataIndex(f"model.{NAMES[0]}", [1, 0])] = info

    edited(at, shift)
    return f"`{at}/.metadata` is refused", f"piece of `model.{NAMES[0]}` does not fit"


def a_compressed_tensor(at):
    edited(at, lambda metadata: setattr(place_of(metadata), "transform_descriptors", ["stream.zstd/1"]))
    return f"`{at}/.metadata` is refused", "compressed", f"`model.{NAMES[0]}`"


def one_name_twice(at):
    def twice(metadata):
        metadata.planner_data[f"model.{NAMES[1]}"] = ("model", NAMES[0])

    edited(at, twice)
    return f"`{at}/.metadata` is refused", f"`{NAMES[0]}` twice"


def no_shard(at):
    (at / "__0_0.distcp").unlink()
    return f"`{at}` lacks shards", "__0_0.distcp"


def a_folder_for_a_shard(at):
    (at / "__0_0.distcp").unlink()
    (at / "__0_0.distcp").mkdir()
    return f"`{at}` lacks shards", "__0_0.distcp"


def a_shard_cut_off(at):
    whole = (at / "__0_0.distcp").read_bytes()
    (at / "__0_0.distcp").write_bytes(whole[:-1])
    return f"`{at}/__0_0.distcp` is cut off", f"it has {len(whole) - 1} bytes", f"up to byte {len(whole)}"


def an_empty_shard(at):
    (at / "__0_0.distcp").write_bytes(b"")
    return (f"`{at}/__0_0.distcp` is cut off",)


SPOILED = [
    no_metadata,
    metadata_of_garbage,
    metadata_of_text,
    metadata_of_nothing,
    metadata_cut_off,
    a_folder_for_metadata,
    metadata_of_a_list,
    metadata_of_a_dtype,
    metadata_of_a_class,
    metadata_without_places,
    metadata_of_no_tensors,
    a_size_of_words,
    a_negative_size,
    an_offset_of_none,
    no_dtype,
    a_tensor_without_pieces,
    a_tensor_larger_than_its_pieces,
    a_piece_larger_than_its_file,
    a_piece_out_of_its_tensor,
    a_compressed_tensor,
    one_name_twice,
    no_shard,
    a_folder_for_a_shard,
    a_shard_cut_off,
    an_empty_shard,
]


@pytest.mark.parametrize("spoil", SPOILED)
def test_shards_that_cannot_be_read_are_named_before_any_svd(spoil, work, monkeypatch):
    forbid_svd(monkeypatch)
    says = spoil(Path("tuned") / SHARDS)
    before = contents(work)
    refused(run("extract", "base", "tuned", "out"), *says)
    assert contents(work) == before


def shard_of_garbage(at):
    size = (at / "__0_0.distcp").stat().st_size
    (at / "__0_0.distcp").write_bytes((bytes(range(256)) * (1 + size // 256))[:size])
    return f"`{at}/__0_0.distcp`", "Nothing of it was executed"


def a_flipped_name(at):
    content = (at / "__0_0.distcp").read_bytes()
    (at / "__0_0.distcp").write_bytes(content.replace(b"data.pkl", b"atad.pkl"))
    return (f"`{at}/__0_0.distcp` is not a readable shard",)


def another_tensor(at):
    def swap(metadata):
        places = metadata.storage_data
        one, two = (MetadataIndex(f"model.{name}", [0, 0]) for name in NAMES[:2])
        places[one], places[two] = places[two], places[one]

    edited(at, swap)
    return f"`{at}/__0_0.distcp` is refused", "does not hold the tensor that its metadata describes"


def another_dtype(at):
    def narrow(metadata):
        entry(metadata).properties.dtype = torch.bfloat16

    edited(at, narrow)
    return f"`{at}/__0_0.distcp` is refused", "does not hold the tensor that its metadata describes"


def no_tensor_at_all(at):
    put_in_place_of_a_tensor(at, "text")
    return f"`{at}/__0_0.distcp` is refused", "does not hold the tensor that its metadata describes"


@pytest.mark.parametrize("spoil", [shard_of_garbage, a_flipped_name, another_tensor, another_dtype, no_tensor_at_all])
def test_a_shard_with_other_content_is_named(spoil, work):
    says = spoil(Path("tuned") / SHARDS)
    before = contents(work)
    refused(run("extract", "base", "tuned", "out"), *says)
    assert contents(work) == before


def pieced(where, size, pieces):
    """Shards of one tensor `w` of that size; `pieces` are what they hold, by offsets."""
    shards = save({f"piece{i}": piece for i, piece in enumerate(pieces.values())}, where)

    def join(metadata):
        entries, places = metadata.state_dict_metadata, metadata.storage_data
        properties = entries["piece0"].properties
        chunks = [ChunkStorageMetadata(torch.Size(at), piece.shape) for at, piece in pieces.items()]
        by_piece = {
            MetadataIndex("w", at): places[MetadataIndex(f"piece{i}", [0] * piece.ndim)]
            for i, (at, piece) in enumerate(pieces.items())
        }
        assert all(isinstance(info, _StorageInfo) for info in by_piece.values())
        metadata.state_dict_metadata = {"w": TensorStorageMetadata(properties, torch.Size(size), chunks)}
        metadata.storage_data, metadata.planner_data = by_piece, {"w": ("w",)}

    edited(shards, join)
    return shards


def test_pieces_cut_along_any_side_are_put_together(tmp_path):
    whole = torch.randn(7, 6, 5, dtype=torch.bfloat16)
    cuts = [(slice(i, i + 3), slice(j, j + 4), slice(k, k + 2)) for i in (0, 3, 6) for j in (0, 4) for k in (0, 2, 4)]
    pieces = {tuple(side.start for side in cut): whole[cut].contiguous() for cut in cuts}
    # What a process writes that has nothing of it.
    pieces[7, 0, 0] = whole[7:]
    assert same(open_checkpoint(pieced(tmp_path / "shards", whole.shape, pieces)), {"w": whole})


def test_where_pieces_overlap_what_no_piece_covers_is_not_what_was_in_memory(tmp_path):
    rows = torch.ones(2, 64)
    checkpoint = open_checkpoint(pieced(tmp_path / "shards", (4, 64), {(0, 0): rows, (1, 0): rows}))
    for _ in range(20):
        left_in_memory = torch.full((4, 64), 7.0)
        del left_in_memory
        assert checkpoint.read("w")[3].tolist() == [0.0] * 64
