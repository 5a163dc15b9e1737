"""Whatever a user calls a model, opened as a checkpoint: a base with an adapter on it too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from glob import escape
from os import PathLike
from os.path import isdir
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from peft_posthoc.adapters.applied import Applied
from peft_posthoc.adapters.config import CONFIG, read_config
from peft_posthoc.adapters.foreign import format_of, image_file, refuse_foreign
from peft_posthoc.adapters.named_base import another_base, base_of
from peft_posthoc.adapters.wrapped import as_computed
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.distcp import Distcp, find_shards
from peft_posthoc.checkpoints.folder import File, Folder
from peft_posthoc.checkpoints.gguf import SUFFIX, Gguf, only_model
from peft_posthoc.checkpoints.hub import OnHub, fetch_beside, find, is_repo_id, repo_and_file
from peft_posthoc.checkpoints.hub_files import HubFiles
from peft_posthoc.checkpoints.mean import Mean, members
from peft_posthoc.checkpoints.memory import InMemory, of_module
from peft_posthoc.checkpoints.model_files import SUFFIXES, weight_files
from peft_posthoc.checkpoints.modules import listed_modules, with_modules
from peft_posthoc.checkpoints.object_store import is_url, open_store
from peft_posthoc.checkpoints.quantized.decoded import decoded
from peft_posthoc.checkpoints.streamed import Streamed
from peft_posthoc.checkpoints.wrappers import unwrapped, without_second_names
from peft_posthoc.checkpoints.zero import Zero, find_partitions
from peft_posthoc.errors import AdapterError, CheckpointError
from peft_posthoc.models.from_gguf import as_model_of_gguf

# One of several files of a model: `model-00002-of-00004.safetensors`.
_SHARD = re.compile(r"-\d+-of-(\d{1,18})\b")


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter, and no whole weights beside it."""
    return (folder / CONFIG).is_file() and not weight_files({path.name for path in folder.iterdir()})


def sides(source: str) -> tuple[str, str] | None:
    """The two sides of `BASE+ADAPTER`; None if that is not what it says. A `+` may be part of a path, too."""
    parts = source.split("+")
    for at in range(len(parts) - 1, 0, -1):
        base, adapter = "+".join(parts[:at]), "+".join(parts[at:])
        there = Path(adapter).exists() or image_file(Path(adapter)) is not None
        if base and adapter and (there or is_repo_id(adapter)):
            return base, adapter
    return None


def adapted(base: str, adapter: str, *, role: str = "source") -> Applied:
    """A model with an adapter on it, both given.

    Args:
        base: A folder, a file or a hub id; or again a model with an adapter on it.
        adapter: A folder or a hub id.
        role: What messages call the model.

    Raises:
        AdapterError: The adapter is none, does not fit, or is more than base + b @ a.
        CheckpointError: One of them cannot be read.
    """
    if image_file(Path(adapter)) is not None:
        return Applied(open_checkpoint(base, role=role), Path(adapter), label=f"{base}+{adapter}")
    folder = Path(adapter) if Path(adapter).exists() else find(adapter, role=role, adapter=True).get()
    refuse_foreign(folder)
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"`{adapter}`, right of the `+`, is no adapter: it has no {CONFIG}. Give BASE+ADAPTER.")
    made = Applied(open_checkpoint(base, role=role), folder, label=f"{base}+{adapter}")
    made.doubt = another_base(read_config(folder), base)
    return made


def on_its_base(folder: Path, *, label: str, revision: str | None = None) -> Applied:
    """An adapter on the model that it says it was trained on. No other is ever taken for it.

    Args:
        folder: The adapter's.
        label: What the user called it.
        revision: Its commit, if it is from the hub.

    Raises:
        AdapterError: The adapter names no base, is no LoRA adapter, or is more than base + b @ a.
        CheckpointError: The base is not there or cannot be read.
    """
    named = base_of(read_config(folder))
    advice = f"Say on which model it belongs: BASE+{label}."
    if named is None:
        raise AdapterError(f"`{label}` is a LoRA adapter that does not name its base. {advice}")
    name = named.name
    is_there = isdir(name) or bool(members(name))
    if not (is_there or is_repo_id(name)):
        raise CheckpointError(f"`{label}` is a LoRA adapter of `{name}`, which is not there. {advice}")
    try:
        found = None if is_there else find(name, revision=named.revision, role="base")
        if isdir(name) and is_adapter(Path(name)) if found is None else found.is_adapter:
            raise CheckpointError(f"`{label}` is a LoRA adapter of `{name}`, which is an adapter too. {advice}")
        base = open_checkpoint(name, revision=found.commit if found else None, role="base")
    except CheckpointError as error:
        error.add_note(f"`{label}` is a LoRA adapter that names it as its base. {advice}")
        raise
    return Applied(base, folder, label=f"{name}+{label}", revision=revision)


Source: TypeAlias = "str | PathLike[str] | nn.Module | Mapping[str, Tensor] | Checkpoint"


def open_pair(
    base: Source,
    tuned: Source,
    *,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
    stream: bool = False,
) -> tuple[Checkpoint, Checkpoint]:
    """Open both sides of a delta, as `open_checkpoint` does.

    Raises:
        CheckpointError: One of them cannot be read.
    """
    before = open_checkpoint(base, revision=base_revision, role="base", modules=True, stream=stream)
    after = open_checkpoint(tuned, revision=tuned_revision, role="tuned", modules=True, stream=stream)
    return without_second_names(before, after), without_second_names(after, before)


def _of_folder(path: Path, *, label: str, commit: str | None = None) -> Checkpoint:
    """The model in a folder: whole weights, an adapter, or the partitions of a training run."""
    if is_adapter(path):
        return on_its_base(path, label=label, revision=commit)
    if (shards := find_shards(path)) is not None:
        return Distcp(path, shards, label=label)
    if (partitions := find_partitions(path)) is not None:
        return Zero(path, partitions, label=label)
    names = {file.name for file in path.iterdir()}
    if not weight_files(names) and (model := only_model(names, label)):
        return as_model_of_gguf(Gguf(path / model, label=label))
    return Folder(path, label=label, revision=commit)


def _of_file(path: Path, *, label: str) -> Checkpoint:
    """The model in a single file.

    Raises:
        CheckpointError: The file holds a part of a model.
    """
    if path.suffix == SUFFIX:
        return as_model_of_gguf(Gguf(path, label=label))
    count = _SHARD.search(path.name)
    if count and int(count[1]) > 1:
        raise CheckpointError(
            f"`{label}` is one of {int(count[1])} shards of a model. Give their folder: `{path.parent}`."
        )
    return File(path, label=label)


def _is_misspelt(path: Path) -> bool:
    """Tell whether it names a file of weights that a folder here lacks; it could be read as a hub id too."""
    return path.suffix in (*SUFFIXES, SUFFIX) and path.parent != Path() and path.parent.is_dir() and not path.exists()


def open_checkpoint(
    source: Source,
    *,
    revision: str | None = None,
    role: str = "source",
    modules: bool = False,
    stream: bool = False,
) -> Checkpoint:
    """Open a folder, a file, a hub id, a place in a store, a module, a state dict or another checkpoint for reading.

    Args:
        source: A local folder, be it with the shards of torch.distributed.checkpoint or DeepSpeed's ZeRO; a single file
            of weights; a hub id (`org/name`), whose needed files are fetched; `s3://...` or another place that fsspec
            knows, whose weights are fetched when they are read; a LoRA adapter's folder or hub id, whose
            base it names itself; `BASE+ADAPTER`; `mean:A,B,...`; a `torch.nn.Module`; a state dict; or anything that
            already is a `Checkpoint`.
        revision: Branch, tag or commit of a hub id.
        role: What messages call it: `base` or `tuned`.
        modules: Show the weights of modules beside the model too, which SentenceTransformers has.
        stream: Of a hub id's safetensors, fetch each weight when it is read, and keep nothing on disk.

    Raises:
        CheckpointError: There is no such folder or repository, or its files cannot be read as plain tensors.
        ValueError: `revision` is given for something that has none.
    """
    checkpoint: Checkpoint
    beside = None
    if isinstance(source, nn.DataParallel | nn.parallel.DistributedDataParallel):
        source = source.module
    if isinstance(source, nn.Module):
        checkpoint = of_module(source)
    elif isinstance(source, Mapping):
        strangers = [str(name) for name, value in source.items() if not isinstance(value, Tensor)]
        if strangers:
            raise CheckpointError(f"The {role} state dict holds values that are no tensors: {', '.join(strangers)}.")
        checkpoint = InMemory(source, label="state dict")
    elif isinstance(source, str | PathLike):
        path, label = Path(source), str(source).rstrip("/") or str(source)
        if several := members(label):
            parts = [open_checkpoint(one, role=role, modules=modules, stream=stream) for one in several]
            checkpoint = Mean(parts, label=label)
        elif path.is_dir():
            checkpoint, beside = _of_folder(path, label=label), path
        elif path.is_file() and path.suffix in (*SUFFIXES, SUFFIX):
            checkpoint, beside = _of_file(path, label=label), path.parent
        elif not path.exists() and not _is_misspelt(path) and (named := repo_and_file(label)):
            found = find(named[0], revision=revision, role=role, file=named[1])
            headers = None if stream and found.streams else found.headers()
            if stream and found.streams:
                files = HubFiles(found)
                identity = [found.repo_id, found.commit]
                checkpoint = Streamed(
                    files, found.files, label=label, revision=found.commit, identity=identity, beside=found.folder
                )
            elif found.files[0].endswith(SUFFIX):
                checkpoint = as_model_of_gguf(Gguf(found.get() / found.files[0], label=label, revision=found.commit))
            elif headers is None:
                checkpoint = _of_folder(found.get(), label=label, commit=found.commit)
            else:
                checkpoint = OnHub(found, *headers)
            beside = found.folder
            if modules and (listed := listed_modules(beside)):
                fetch_beside(label, [f"{escape(path)}/*" for path in listed], revision=found.commit)
            revision = None
        elif is_url(label) and not path.exists():
            checkpoint = open_store(label, role=role)
            beside = checkpoint.beside
        elif not path.exists() and (both := sides(label)):
            checkpoint = adapted(*both, role=role)
        else:
            kinds = ", ".join((*SUFFIXES, SUFFIX))
            what = "is no regular file" if path.exists() else "does not exist"
            what = f"is a file of another kind than {kinds}" if path.is_file() else what
            if _is_misspelt(path):
                held = sorted(one.name for one in path.parent.iterdir() if one.suffix in (*SUFFIXES, SUFFIX))
                what += f" (`{path.parent}` holds {', '.join(held[:5]) or 'no weights'})"
            raise CheckpointError(
                f"The {role} `{source}` {what}. Give a model folder, a file of weights, or a hub id such as "
                "`org/name`; with an adapter on it, BASE+ADAPTER; mean:A,B,... for the mean of several."
            )
    elif isinstance(source, Checkpoint):
        checkpoint = source
    else:
        raise TypeError(
            f"The {role} must be a folder, a file, a hub id, a module or a state dict. Got {type(source).__name__}."
        )
    if revision is not None:
        raise ValueError(f"A revision ({revision!r}) belongs to a hub id; the {role} `{checkpoint.label}` is none.")
    if not checkpoint.headers:
        raise CheckpointError(f"The {role} `{checkpoint.label}` holds no tensors.")
    if (form := format_of(checkpoint.headers)) is not None:
        raise CheckpointError(
            f"The {role} `{checkpoint.label}` is no model but an adapter in the format of {form.owner}. {form.advice}"
        )
    if modules and beside is not None and isinstance(checkpoint, Folder | OnHub | Streamed):
        checkpoint = with_modules(checkpoint, beside)
    return as_computed(decoded(unwrapped(checkpoint), beside), beside)
