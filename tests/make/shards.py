"""Folders of shards as torch.distributed.checkpoint writes them."""

import io
import pickle
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from tests.make.spoiled import NAMES

SHARDS = "pytorch_model_fsdp_0"


def save(state, where):
    """As one process saves it."""
    with warnings.catch_warnings():
        # That this is one process is what torch warns of.
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=where, no_dist=True)
    return where


def trained(where, weights):
    """A checkpoint folder as the Trainer leaves it under FSDP2, but for its size."""
    save({"model": weights}, where / SHARDS)
    save({"optimizer": {"state": {name: torch.zeros_like(w) for name, w in weights.items()}}}, where / "optimizer_0")
    for name in ("scheduler.pt", "rng_state_0.pth", "trainer_state.json"):
        (where / name).write_bytes(b"not to be opened")
    return where


def edited(shards, edit):
    """Change the metadata of shards that torch wrote."""
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    metadata = edit(metadata) or metadata
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))


SAVE = """
import os
import sys
from types import SimpleNamespace

import accelerate
from accelerate.utils.fsdp_utils import save_fsdp_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType

from tests.make import models

accelerator = accelerate.PartialState(cpu=True)
mesh = init_device_mesh("cpu", (2,))
plugin = SimpleNamespace(fsdp_version=2, state_dict_type=StateDictType.SHARDED_STATE_DICT, state_dict_config=None)
for place in sys.argv[1:]:
    model = models.load(f"{place}/tuned")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    save_fsdp_model(plugin, accelerator, model, f"{place}/checkpoint-3")
accelerator.wait_for_everyone()
accelerator.destroy_process_group()
# All is saved. Gloo's threads may outlive the interpreter, which ends the process with "terminate called without an
# active exception" as it leaves.
os._exit(0)
"""


def put_in_place_of_a_tensor(shards, content):
    """Let the metadata say that the first tensor is this; it is as long as that one at least."""
    buffer = io.BytesIO()
    torch.save([content, torch.zeros(24, 16)], buffer)

    def move(metadata):
        info = place_of(metadata)
        info.offset, info.length = (shards / "__0_0.distcp").stat().st_size, len(buffer.getvalue())

    edited(shards, move)
    with (shards / "__0_0.distcp").open("ab") as file:
        file.write(buffer.getvalue())
    return buffer


def entry(metadata):
    return metadata.state_dict_metadata[f"model.{NAMES[0]}"]


def place_of(metadata):
    return metadata.storage_data[MetadataIndex(f"model.{NAMES[0]}", [0, 0])]
