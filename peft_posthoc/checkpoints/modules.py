"""Modules that SentenceTransformers keeps beside the model, in folders of their own: `2_Dense/linear.weight`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, place_of
from peft_posthoc.checkpoints.folder import Folder
from peft_posthoc.checkpoints.model_files import is_plain_name, weight_files
from peft_posthoc.errors import CheckpointError
from peft_posthoc.json_file import read_json

MODULES = "modules.json"


class WithModules(Checkpoint):
    """A model, and the modules that run before or after it: their tensors have their folder's name before a slash."""

    def __init__(self, root: Checkpoint, modules: Mapping[str, Folder]) -> None:
        """Put the tensors of all under one roof.

        Args:
            root: The model, as transformers knows it.
            modules: By the names of their folders.
        """
        self.label, self.revision, self.config = root.label, root.revision, root.config
        self.folder, self.sequential, self.to_fetch = root.folder, root.sequential, root.to_fetch
        self.to_stream, self.beside = getattr(root, "to_stream", 0), place_of(root)
        self.identity = [root.identity, *(module.identity for module in modules.values())]
        self._owners = {name: (root, name) for name in root.headers}
        self._owners |= {
            f"{path}/{name}": (module, name) for path, module in modules.items() for name in module.headers
        }
        self.headers = {name: owner.headers[own] for name, (owner, own) in self._owners.items()}

    def read(self, name: str) -> Tensor:
        """The tensor of that name."""
        owner, own = self._owners[name]
        return owner.read(own)


def with_modules(checkpoint: Checkpoint, beside: Path) -> Checkpoint:
    """The checkpoint with the weights of modules that are listed beside it; itself, where there are none.

    Args:
        checkpoint: The model in the folder.
        beside: The folder, with `modules.json`.

    Raises:
        CheckpointError: The list is none, names a folder elsewhere, or the weights cannot be read.
    """
    folders = {path: beside / path for path in listed_modules(beside) if (beside / path).is_dir()}
    modules = {
        path: Folder(folder, label=f"{checkpoint.label}/{path}", revision=checkpoint.revision)
        for path, folder in folders.items()
        if weight_files({file.name for file in folder.iterdir()})
    }
    return WithModules(checkpoint, modules) if modules else checkpoint


def listed_modules(folder: Path) -> list[str]:
    """The folders of the modules that a list beside a model names, without the model's own.

    Raises:
        CheckpointError: The list is none, or names a folder elsewhere.
    """
    path = folder / MODULES
    if not path.is_file():
        return []
    try:
        read = read_json(path)
        found = [str(module["path"]) for module in read]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"`{path}` is no list of modules: {error!r}.") from error
    for name in filter(None, found):
        if not is_plain_name(name):
            raise CheckpointError(f"`{path}` names the folder `{name}`, which is not one beside it. Refused.")
    return [name for name in found if name]


def module_of(name: str) -> str:
    """The folder of the module that a tensor belongs to; empty for the model's own."""
    folder, slash, _ = name.partition("/")
    return folder if slash and "." not in folder else ""
