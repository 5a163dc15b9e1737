"""A full checkpoint of base + adapter: read, added to and written one shard at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch

# It takes any text, a configuration's too.
from os.path import exists
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from peft_posthoc.adapters.card import REPORT
from peft_posthoc.adapters.merge import Merge
from peft_posthoc.adapters.named_base import base_of
from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.checkpoints import hub
from peft_posthoc.checkpoints.beside import TOKENIZER, matching
from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header, place_of
from peft_posthoc.checkpoints.folder import Folder
from peft_posthoc.checkpoints.model_files import SAFETENSORS, SAFETENSORS_INDEX
from peft_posthoc.errors import AdapterError, PosthocError
from peft_posthoc.files import free_at, staged
from peft_posthoc.formats.result import Exported, Out, files_of, write_report
from peft_posthoc.progress import progress_bar
from peft_posthoc.room import clear_beside
from peft_posthoc.sources import open_checkpoint
from peft_posthoc.text import size

# Of a single file where the base's own division cannot be kept; transformers' own default.
_SHARD = "50GB"
# What lies beside weights and belongs to the model. Its README is about the base.
_BESIDE = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "image_processor*.json", "modules.json", "configuration_*.py"),
    *("modeling_*.py", "tokenization_*.py", "processing_*.py", "LICENSE*", "NOTICE*", *TOKENIZER),
)


def write(deltas: AdapterOnModel, out: Out, *, dtype: torch.dtype | None, force: bool, progress: bool) -> Exported:
    """Write the checkpoint: the base's own shards and dtypes, its configuration and tokenizer.

    Tied weights that the adapter changes alike stay tied; where it changes them differently, both are written and the
    configuration says that they are not tied.

    Raises:
        AdapterError: The adapter changes what a checkpoint of this base has no place for, or it cannot be written.
        CheckpointError: The base cannot be read, or holds codes that are not decoded.
    """
    merge = Merge(deltas, dtype, _served(deltas))
    total = sum(header.bytes for header in merge.headers.values())
    clear_beside(out.place)
    # Before the base's weights are fetched, if it is on the hub.
    _room_for(total, deltas.base, out)
    shards, config = _shards(deltas, merge.headers), merge.config()
    ours = files_of(out.place)
    with staged(out.place, what="The merged model", called=out.called, force=force, ours=ours) as made:
        made.mkdir()
        bar = progress_bar(total=len(merge.headers), desc="Tensors", progress=progress)
        with bar:
            for file, names in shards.items():
                tensors: dict[str, Tensor] = {}
                for name in names:
                    tensors[name] = merge.read(name)
                    bar.update()
                save_file(tensors, made / file, metadata={"format": "pt"})
        beside = _copy_beside(deltas, merge, made)
        files = [*shards, *beside]
        if config is not None:
            (made / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            files.append("config.json")
        if len(shards) > 1:
            where = {name: file for file, names in shards.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            (made / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            files.append(SAFETENSORS_INDEX)
        dtypes = ", ".join(sorted({str(h.dtype).removeprefix("torch.") for h in merge.headers.values()}))
        exported = Exported.of(
            "merged",
            deltas,
            out,
            dtype=dtypes,
            rank=None,
            files=files,
            size=total,
            notes=(*merge.notes, *merge.of_grid()),
        )
        write_report(made, exported)
        # safetensors makes files that only their owner can read; servers often run as somebody else.
        for file in shards:
            (made / file).chmod((made / REPORT).stat().st_mode)
    return exported


def _served(deltas: AdapterOnModel) -> Checkpoint | None:
    """The model that the adapter names as its base, where that is here, and the one that is merged into has no grid."""
    named, base = base_of(deltas.folder.config), deltas.base
    if named is None or not exists(named.name) or any(map(base.coded_as, base.headers)):
        return None
    try:
        return open_checkpoint(named.name)
    except PosthocError:
        return None


def _shards(deltas: AdapterOnModel, headers: Mapping[str, Header]) -> dict[str, list[str]]:
    """The tensors of each file: divided as the base is, if that is done in the usual way."""
    base = deltas.stored
    files = base.files if isinstance(base, Folder | hub.OnHub) else {}
    usual = {*files.values()} == {SAFETENSORS} or (
        base.folder is not None
        and (base.folder / SAFETENSORS_INDEX).is_file()
        and all(fnmatch(file, "model-*-of-*.safetensors") for file in files.values())
    )
    if files and usual:
        shards: dict[str, list[str]] = {file: [] for file in sorted({*files.values()})}
        # One that was not there before goes where most room is.
        smallest = min(shards, key=lambda file: sum(base.headers[n].bytes for n, f in files.items() if f == file))
        for name in headers:
            shards[files.get(name, smallest)].append(name)
        return {file: names for file, names in shards.items() if names}
    from huggingface_hub import split_torch_state_dict_into_shards

    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in headers.items()}
    plan = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=_SHARD
    )
    return dict(plan.filename_to_tensors)


def _room_for(total: int, base: Checkpoint, out: Out) -> None:
    """See before the work whether the disk holds the model beside what is yet to be fetched of the base.

    Raises:
        AdapterError: The disk is too full.
        CheckpointError: The disk of the hub's cache is.
    """
    free = free_at(out.place)
    if total > free:
        raise AdapterError(f"`{out.called}` needs {size(total)}; the disk has {size(free)} free.")
    hub.check_room(base.to_fetch, base.label, out=out.place, taken=total)


def _copy_beside(deltas: AdapterOnModel, merge: Merge, made: Path) -> list[str]:
    """Copy what belongs to the model beside its weights; the tokenizer that is beside the adapter, if one is."""
    base, adapter = deltas.base, deltas.folder.place
    folder = place_of(base)
    if folder is None:
        merge.notes.append(f"`{base.label}` is no folder: no tokenizer was copied.")
        return []
    if base.revision is not None:
        hub.fetch_beside(base.label, _BESIDE, revision=base.revision)
    copied = dict(matching(folder, [pattern for pattern in _BESIDE if pattern != "config.json"]))
    if (adapter / "tokenizer_config.json").is_file():
        kept = {name: path for name, path in copied.items() if not any(fnmatch(name, one) for one in TOKENIZER)}
        copied = kept | dict(matching(adapter, TOKENIZER))
        merge.notes.append(f"The tokenizer is the one in `{deltas.folder.label}`.")
    elif merge.vocabulary is not None:
        merge.notes.append(
            f"The vocabulary is the adapter's ({merge.vocabulary.after} tokens) and the tokenizer the base's "
            f"({merge.vocabulary.before}): use the tuned model's."
        )
    for name, path in copied.items():
        (made / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, made / name)
    return sorted(copied)
