"""What the installed PEFT does with an adapter on its base, after a change of the vocabulary if need be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from peft_posthoc.adapters.arrivals import Arrivals, ask
from peft_posthoc.adapters.config import try_patterns
from peft_posthoc.adapters.names import own_name
from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.models.find import model_of
from peft_posthoc.models.model import Model


class Arrived(NamedTuple):
    """PEFT's answer."""

    found: Arrivals
    vocabulary: int | None
    """The size that the base's vocabulary must be brought to first; None where it fits."""


def arrived(base: Model, config: Mapping[str, Any], headers: Mapping[str, Header], label: str) -> Arrived | None:
    """Let PEFT load an adapter into its base, without a weight; None where the base's class is not known.

    Args:
        base: The model that it is served on.
        config: The adapter's configuration.
        headers: Of the tensors in its file.
        label: What messages call the adapter.

    Raises:
        AdapterError: A pattern of the configuration would hold PEFT up without end.
    """
    model = model_of(base.layout, base.checkpoint)
    if model is None:
        return None
    try_patterns(config, [name for name, _ in model.named_modules()], label)
    found = ask(model, config, headers)
    size = _vocabulary(base, found, headers)
    if size is None or (larger := model_of(base.layout, base.checkpoint)) is None:
        return Arrived(found, None)
    larger.resize_token_embeddings(size, mean_resizing=False)  # type: ignore[operator]
    again = ask(larger, config, headers)
    return Arrived(found, None) if again.misfits else Arrived(again, size)


def _vocabulary(base: Model, found: Arrivals, headers: Mapping[str, Header]) -> int | None:
    """The vocabulary of the adapter, if that is all of it that does not fit."""
    ends = tuple(f"{module}." for module in (base.layout.tokens, base.layout.head) if module)
    if not found.misfits or not all(own_name(name).startswith(ends) for name in found.misfits):
        return None
    rows = {headers[name].shape[1 if name.endswith("lora_embedding_A") else 0] for name in found.misfits}
    return rows.pop() if len(rows) == 1 else None
