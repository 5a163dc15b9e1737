"""PEFT's wrapped model as a state dict (`base_layer.weight` beside `lora_A.NAME.weight`), read as what it computes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from peft_posthoc.adapters.applied import Applied
from peft_posthoc.adapters.config import CONFIG, read_config
from peft_posthoc.adapters.names import PREFIX
from peft_posthoc.adapters.plain import not_plain
from peft_posthoc.adapters.reader import LoraFolder
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.checkpoints.view import View, same
from peft_posthoc.errors import CheckpointError

# Of an adapter: `q_proj.lora_A.NAME.weight`, `wte.lora_embedding_A.NAME`, `lm_head.modules_to_save.NAME.weight`.
_OF_AN_ADAPTER = re.compile(r"(?P<module>.+)\.(?P<what>lora_\w+|modules_to_save)\.(?P<adapter>[^.]+)(?P<leaf>\..+)?")
# Of the model within: `q_proj.base_layer.weight`, `lm_head.original_module.weight`.
_WITHIN = re.compile(r"\.(?:base_layer|original_module)(?=\.)")


class _Within(LoraFolder):
    """The adapter in a wrapped model, under the names that PEFT saves it with."""

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str], beside: Path) -> None:
        """Find the adapter's tensors.

        Args:
            checkpoint: The wrapped model.
            names: Its names of the adapter's tensors, by PEFT's.
            beside: The folder of its configuration.

        Raises:
            AdapterError: The adapter is more than factors and whole modules.
        """
        self.label, self.place, self.config = checkpoint.label, beside.absolute(), read_config(beside)
        self.files = (beside / CONFIG,)
        # What an adapter took from its base at the start is missing in the base that lies beside it here.
        if (why := not_plain({**self.config, "init_lora_weights": True})) is not None:
            raise CheckpointError(f"The adapter in `{self.label}` is no plain LoRA delta: {why}. {_MERGE}")
        self._file = View(checkpoint, {peft: same(checkpoint, own) for peft, own in names.items()})
        self._sort(self._file.headers)


_MERGE = "Give the model that `merge_and_unload()` makes of it."


def as_computed(checkpoint: Checkpoint, beside: Path | None) -> Checkpoint:
    """The model that a state dict of PEFT's wrapped model computes: base + scale * `b @ a`; any other as it is.

    Args:
        checkpoint: What was opened.
        beside: Where its `adapter_config.json` would be.

    Raises:
        AdapterError: The adapter is more than factors and whole modules.
        CheckpointError: It holds several adapters, or there is nothing that says their scale.
    """
    found = {name: match for name in checkpoint.headers if (match := _OF_AN_ADAPTER.fullmatch(name))}
    inner = {name: _WITHIN.sub("", name) for name in checkpoint.headers if name not in found}
    if all(name == own for name, own in inner.items()):
        return checkpoint
    adapters = sorted({match["adapter"] for match in found.values()})
    what = f"`{checkpoint.label}` is a model as PEFT wraps it"
    if len(adapters) != 1:
        held = f"with several adapters ({', '.join(adapters)})" if adapters else "without LoRA factors"
        raise CheckpointError(f"{what}, {held}. {_MERGE}")
    if beside is None or not (beside / CONFIG).is_file():
        raise CheckpointError(f"{what}, and no {CONFIG} beside it says the scale of its adapter. {_MERGE}")
    names = {f"{PREFIX}{_saved(match)}": name for name, match in found.items()}
    base = View(checkpoint, {own: same(checkpoint, name) for name, own in inner.items()})
    return Applied(base, _Within(checkpoint, names, beside), label=checkpoint.label, revision=checkpoint.revision)


def _saved(match: re.Match[str]) -> str:
    """The name that PEFT saves an adapter's tensor with, behind its prefix."""
    what = "" if match["what"] == "modules_to_save" else f".{match['what']}"
    return f"{match['module']}{what}{match['leaf'] or ''}"
