"""The vocabulary of base + adapter, where the adapter holds embeddings for more or fewer tokens than its base has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.errors import AdapterError


class Resize(NamedTuple):
    """Numbers of tokens."""

    before: int
    """In the base."""
    after: int
    """With the adapter."""
    names: frozenset[str]
    """The model's names of the tensors with a row for each."""

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The base's configuration with the new number, wherever it says the old one."""
        new = {}
        for key, value in config.items():
            old = key == "vocab_size" and value == self.before
            new[key] = self.after if old else self.config(value) if isinstance(value, Mapping) else value
        return new


def resize_of(on: AdapterOnModel) -> Resize | None:
    """The change of the number of tokens; None if there is none.

    Raises:
        AdapterError: The adapter holds embeddings or head of another size, and not the other one of the two.
    """
    ends = {on.layout.tokens, on.layout.head} - {None}
    sizes: dict[str, tuple[int, int]] = {}
    for stored, header in on.base.headers.items():
        for own in on.layout.names_of(stored):
            if own.rpartition(".")[0] in ends and header.shape:
                key = on.replaced.get(own)
                found = on.folder.headers[key].shape if key else header.shape
                if found[1:] == header.shape[1:]:
                    sizes[own] = header.shape[0], found[0]
    changed = {name: size for name, size in sizes.items() if size[0] != size[1]}
    if not changed:
        return None
    name, (before, after) = next(iter(changed.items()))
    for other, (_, rows) in sizes.items():
        if rows != after:
            raise AdapterError(
                f"`{on.folder.label}` holds `{name}` for {after} tokens, and with it `{other}` of the base "
                f"`{on.base.label}` is for {rows}: no model has both."
            )
    return Resize(before, after, frozenset(changed))
