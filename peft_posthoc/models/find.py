"""The layout of a model, from the first source that knows it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.models.by_name import of_names
from peft_posthoc.models.config import architecture, auto_mapping, task_type
from peft_posthoc.models.decoders import is_plain_decoder, of_plain_decoder
from peft_posthoc.models.layout import Layout


def layout_of(*checkpoints: Checkpoint, of_tuned: bool = False) -> Layout:
    """Find out what kind each weight of a model is, from the first of its checkpoints that knows.

    A live module is asked itself. A configuration that transformers knows is built into its class on the meta device,
    but for the common decoders, of which all is known (the class takes seconds to import). Anything else goes by names
    and shapes. The task is the last one's: a reward model made from a language model is none.

    Args:
        *checkpoints: Of one model, the tuned one last.
        of_tuned: Ask the last one first.
    """
    layout = _first_known(checkpoints[::-1] if of_tuned else checkpoints)
    last = checkpoints[-1]
    name = type(last.module).__name__ if last.module is not None else architecture(last.config or {})
    other = bool(name) and name != layout.origin and task_type(name, encoder_decoder=True) is None
    if not other:
        return layout
    from peft_posthoc.models.by_class import class_of

    cls = class_of(name)
    return replace(layout, task_type=None, auto_mapping=auto_mapping(cls) if cls else None)


def model_of(layout: Layout, *checkpoints: Checkpoint) -> nn.Module | None:
    """The model that a layout is of, without values; None where transformers and diffusers have no such class.

    Args:
        layout: As `layout_of` found it.
        *checkpoints: Those that may have its configuration, the best first.
    """
    from peft_posthoc.models.by_class import build

    for checkpoint in checkpoints:
        config = checkpoint.config or {}
        if checkpoint.module is not None and type(checkpoint.module).__name__ == layout.origin:
            config = {**config, "architectures": [layout.origin]}
        if layout.origin in (architecture(config), config.get("_class_name")):
            return build(config)
    return None


def _first_known(checkpoints: tuple[Checkpoint, ...]) -> Layout:
    from peft_posthoc.models.by_class import build
    from peft_posthoc.models.of_module import layout_of_module

    files = [checkpoint.headers for checkpoint in checkpoints]
    for checkpoint in checkpoints:
        if checkpoint.module is not None:
            return layout_of_module(checkpoint.module, type(checkpoint.module).__name__, files)
    for checkpoint in checkpoints:
        config = checkpoint.config or {}
        if is_plain_decoder(checkpoint):
            return of_plain_decoder(checkpoint, config)
        built = build(config)
        if built is not None:
            return layout_of_module(built, type(built).__name__, files)
    return of_names(checkpoints[0])
