"""The models that a configuration names: which is the base, and what of them no adapter or no merge can be made of."""

from __future__ import annotations

from pathlib import Path

import torch
from mergekit.architecture import ModelArchitecture
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_plugin.method import NAME, NO_BASE
from mergekit_plugin.models import folder_of
from mergekit_plugin.recipe import slices_of
from peft_posthoc.adapters.config import try_patterns
from peft_posthoc.adapters.open import open_adapter
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.folder import Folder
from peft_posthoc.checkpoints.hub import is_repo_id
from peft_posthoc.checkpoints.quantized.decoded import decoded
from peft_posthoc.checkpoints.quantized.undecoded import refuse_codes
from peft_posthoc.errors import CheckpointError, MismatchError, PosthocError
from peft_posthoc.files import check_folder
from peft_posthoc.models.by_class import check_counts


def base_of(config: MergeConfiguration, given: str | None) -> ModelReference:
    """The model that the adapter is for, as the configuration calls it.

    Raises:
        PosthocError: There is no base, or it holds an adapter of its own.
    """
    named = [config.base_model, *(piece.base_model for piece in slices_of(config))]
    bases = list(dict.fromkeys(base for base in named if base is not None))
    if config.merge_method == NAME and not bases:
        raise PosthocError(NO_BASE)
    if given is None and not bases:
        raise PosthocError("The configuration names no `base_model`. Say with `--base` which model the adapter is for.")
    base = bases[0] if given is None else ModelReference.parse(given)
    if base.lora is not None:
        raise PosthocError(
            f"The base `{base}` is a model with an adapter; ours would need that one too. Merge the two first."
        )
    same = (model for model in config.referenced_models() if model.lora is None and _path(model) == _path(base))
    return next(same, base)


def _path(model: ModelReference) -> tuple[Path | str, str | None]:
    path = Path(model.model.path)
    return (path.resolve() if path.exists() else model.model.path, model.model.revision)


def opened(model: ModelReference, *, merged: bool) -> Checkpoint:
    """A model of the merge, or the one that the adapter is for.

    Args:
        model: How the configuration calls it.
        merged: Whether mergekit reads it, which knows no codes.

    Raises:
        PosthocError: It is no folder of a model that mergekit can merge, or is one that nobody can wait for.
    """
    local = Path(model.model.path).exists()
    if local and not Path(model.model.path).is_dir():
        raise CheckpointError(f"`{model.model.path}` is no folder of a model, which mergekit merges.")
    if not local and not is_repo_id(model.model.path):
        raise CheckpointError(f"`{model.model.path}` does not exist. Give a model's folder, or a hub id.")
    if model.lora is not None and Path(model.lora.path).is_dir():
        # mergekit gives it to PEFT, which tells less of what is wrong with it, or never ends.
        adapter = open_adapter(model.lora.path)
        try_patterns(adapter.config, list(adapter.modules), model.lora.path)
    folder = Path(folder_of(model) or "")
    check_folder(folder)  # mergekit reads more of it than we do.
    label = str(model) if model.lora is not None else model.model.path
    # A model of the hub lies in a folder that is named by its commit.
    found = Folder(folder, label=label, revision=None if local else folder.name)
    check_counts(found.config or {})
    if merged:
        refuse_codes(
            found,
            "mergekit would merge its codes (a quantised base that is in no part of the merge is given with `--base`)",
        )
    return decoded(found)


def is_narrower(dtype: torch.dtype | None, model: Checkpoint) -> bool:
    """Tell whether values of the model would be rounded to this type."""
    floats = (header.dtype for header in model.headers.values() if header.dtype.is_floating_point)
    return dtype is not None and any(torch.promote_types(dtype, one) != dtype for one in floats)


def check_layers(config: MergeConfiguration, arch: ModelArchitecture, base: ModelReference) -> None:
    """See that every layer of the result is the same layer of the base.

    Raises:
        MismatchError: Slices renumber layers, or leave some out.
    """
    for name, module in config.modules.items():
        layers = arch.modules[name].architecture.num_layers(base.config(trust_remote_code=False))
        at = 0
        for piece in module.slices:
            for source in piece.sources:
                if source.layer_range[0] != at:
                    raise MismatchError(
                        f"Slices renumber layers: layer {at} of the result is layer {source.layer_range[0]} of "
                        f"`{source.model}`. No adapter of `{base}` leads there."
                    )
            at += piece.sources[0].layer_range[1] - piece.sources[0].layer_range[0]
        if at != layers:
            raise MismatchError(f"The result has {at} layers, `{base}` has {layers}. No adapter of it leads there.")
