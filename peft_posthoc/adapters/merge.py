"""Tensors of base + adapter, one at a time, and the configuration of a model that has them."""

from __future__ import annotations

import json
from math import prod
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.adapters.on_model import AdapterOnModel, matrices
from peft_posthoc.adapters.vocabulary import resize_of
from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header, place_of
from peft_posthoc.checkpoints.quantized.undecoded import refuse_codes
from peft_posthoc.errors import AdapterError, CheckpointError
from peft_posthoc.json_file import read_json
from peft_posthoc.models.as_model import as_model, converted, second_names
from peft_posthoc.models.config import of_plain_layers
from peft_posthoc.models.layout import Conversion
from peft_posthoc.models.ties import without_false_ties
from peft_posthoc.text import asked, percent

# Of the values that an adapter changes, the share from which it is worth saying that a grid would not have the change.
_MOST = 0.5
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Merge:
    """A merged checkpoint, tensor by tensor, each made of the base's and the adapter's.

    Raises:
        AdapterError: The adapter changes something that has no place in it.
        CheckpointError: The base holds codes that are not decoded.
    """

    def __init__(self, deltas: AdapterOnModel, dtype: torch.dtype | None, served: Checkpoint | None = None) -> None:
        """Plan the tensors.

        Args:
            deltas: The adapter on its base.
            dtype: Of what is written; the base's if None.
            served: The base that the adapter is served on, where that is another form of it: of its grid is told.
        """
        self._deltas = deltas
        self._served = deltas.base if served is None else as_model(served, deltas.layout)
        self._layout = without_false_ties(deltas.layout, deltas.base)
        self.notes: list[str] = []
        self._used: dict[str, str] = {}
        base, names = deltas.base, deltas.base.headers
        if base.sequential:
            raise CheckpointError(f"`{base.label}` can be read once only. Write it to a folder first.")
        refuse_codes(deltas.stored, "its numbers need their scales")
        untied = self._untied()
        stored = {self._layout.name_of(name): name for name in names}
        users = {user for owner, users in self._layout.shared.items() if owner in stored for user in users}
        # A loader that ties them does not read what else is stored under a tied name.
        self._sources = {name: name for name in names if self._layout.name_of(name) not in users}
        self._own = {name: self._used.get(own := self._layout.name_of(name), own) for name in self._sources}
        for user, owner in untied.items():
            name = stored.get(user, user)
            self._sources[name], self._own[name] = stored[owner], user
        self.vocabulary = resize_of(deltas)
        self._merged = {
            name: self._header(self._own[name], names[source], dtype) for name, source in self._sources.items()
        }
        self._check()
        self._dtype, self._is_untied = dtype, bool(untied)
        self._values = self._unmoved = 0  # of weights on a grid
        self._fused: dict[str, Conversion] = {}
        self._parts: tuple[Conversion | None, dict[str, Tensor]] = None, {}
        self._names: dict[str, str] = {}
        self.headers: dict[str, Header] = {}
        """Of every tensor, by its name in the base's files."""
        self._name_as_stored()

    def config(self) -> dict[str, Any] | None:
        """The configuration, as it is to be; None if the base has none."""
        if self._deltas.base.config is None:
            return None
        config = of_plain_layers(_raw_config(self._deltas))
        config = config if self.vocabulary is None else self.vocabulary.config(config)
        parts = [config, *(part for key, part in config.items() if key.endswith("_config") and isinstance(part, dict))]
        if self._is_untied:
            config["tie_word_embeddings"] = False
            for part in parts[1:]:
                if "tie_word_embeddings" in part:
                    part["tie_word_embeddings"] = False
        if self._dtype is not None:
            for part in parts:
                for key in {"dtype", "torch_dtype"} & part.keys():
                    part[key] = str(self._dtype).removeprefix("torch.")
        return config

    def read(self, name: str) -> Tensor:
        """One tensor of the merged checkpoint.

        Raises:
            AdapterError: Its dtype does not hold what the adapter makes of it.
        """
        if name in self._fused:
            return self._as_stored(self._fused[name])[name]
        return self._read(self._names[name])

    def of_grid(self) -> list[str]:
        """What is to be said, once all is read, of a base that is quantised."""
        if not self._values:
            return []
        share = self._unmoved / self._values
        told = []
        if share > _MOST:
            told = [
                f"{percent(share)} of what the adapter changes is within half a step of the grid of "
                f"`{self._served.label}`: quantised again in the same way, that would be as it was before."
            ]
        if self._served is self._deltas.base:
            told.insert(0, f"`{self._served.label}` is quantised: the merged model is written in floating point.")
        return told

    def _name_as_stored(self) -> None:
        """Find by which of the base's own names and pieces the model's tensors are saved."""
        stored, layout = self._deltas.stored, self._layout
        second = {first: name for name, first in second_names(stored, layout).items()}
        made = {target: one for one in layout.conversions for target in converted(stored, one)}
        for name, header in self._merged.items():
            if name in made:
                for source in made[name].sources:
                    self._fused[source] = made[name]
                    self.headers[source] = Header(stored.headers[source].shape, header.dtype)
            else:
                own = second.get(name, name)
                own = name if own in self._merged else own
                self._names[own], self.headers[own] = name, header

    def _as_stored(self, conversion: Conversion) -> dict[str, Tensor]:
        """The file's tensors that the model has in other pieces: every number goes back to where it came from."""
        last, parts = self._parts
        if last is conversion:
            return parts
        headers = [self.headers[source] for source in conversion.sources]
        sizes = [prod(header.shape) for header in headers]
        places = torch.arange(sum(sizes)).split(sizes)
        numbers = torch.empty(sum(sizes), dtype=headers[0].dtype)
        made = conversion.make(*(place.view(header.shape) for place, header in zip(places, headers, strict=True)))
        for name, place in made.items():
            numbers[place.flatten()] = self._read(name).flatten()
        found = {
            source: one.view(header.shape)
            for source, header, one in zip(conversion.sources, headers, numbers.split(sizes), strict=True)
        }
        self._parts = conversion, found
        return found

    def _read(self, name: str) -> Tensor:
        """One of the model's tensors."""
        dtype = self._merged[name].dtype
        before, merged = self._deltas.read(self._own[name], self._sources[name], dtype)
        after = merged.to(dtype).contiguous()
        if merged is not before and (steps := self._steps(self._sources[name], after)) is not None:
            self._values += after.numel()
            self._unmoved += int(((merged.float() - before.float()).abs() < steps / 2).sum())
        if after is not before and not torch.isfinite(after).all() and torch.isfinite(before).all():
            raise AdapterError(f"`{name}` overflows {dtype} with the adapter. Choose another `{asked('dtype', None)}`.")
        return after

    def _steps(self, name: str, like: Tensor) -> Tensor | None:
        """The steps of the grid that a tensor is served on."""
        header = self._served.headers.get(name)
        return self._served.steps(name) if header is not None and header.shape == like.shape else None

    def _header(self, own: str, header: Header, dtype: torch.dtype | None) -> Header:
        """The shape that the base's tensor has with the adapter, and the type that it is written in."""
        shape, size = header.shape, self.vocabulary
        if size is not None and own in size.names:
            shape = (size.after, *shape[1:])
        return Header(shape, header.dtype if dtype is None or header.dtype not in _FLOATS else dtype)

    def _untied(self) -> dict[str, str]:
        """The owner of each tied weight that the adapter changes otherwise than its owner, by names.

        Raises:
            AdapterError: Such a weight is not the head's, or the model computes otherwise when its head is not tied.
        """
        deltas, found = self._deltas, {}
        stored = {self._layout.name_of(name) for name in deltas.base.headers}
        stacks = {stack.name for stack in deltas.stacks}
        config = deltas.base.config or {}
        for owner, users in self._layout.shared.items():
            for user in users:
                if deltas.alike(owner, user):
                    continue
                # A parameter that no module uses but by the name that the adapter has: BERT's `cls.predictions.bias`.
                if not (owner.endswith(".weight") or owner in stacks or deltas.changes(owner)):
                    self._used[owner] = user
                    continue
                # T5 scales what goes into a head that is tied.
                possible = user == f"{self._layout.head}.weight" and not config.get("is_encoder_decoder")
                if not possible or owner not in stored:
                    raise AdapterError(
                        f"`{deltas.folder.label}` changes `{owner}` and `{user}` differently, which are one weight in "
                        f"`{deltas.base.label}`: no checkpoint of it holds that. Serve the adapter unmerged."
                    )
                found[user] = owner
                self.notes.append(
                    f"`{owner}` and `{user}` are no longer tied: the adapter changes them differently. Both are "
                    "written, and the configuration says `tie_word_embeddings: false`."
                )
        return found

    def _check(self) -> None:
        """See that all that the adapter changes is in the checkpoint, as a tensor that can be added to."""
        deltas, label = self._deltas, self._deltas.folder.label
        own = {name: stored for stored, name in self._own.items()}
        tied = {user for users in self._layout.ties.values() for user in users}
        stacks = {part: stack.name for stack in deltas.stacks for part in matrices(stack)}
        for name in deltas.names:
            stored = own.get(f"{name}.weight") or own.get(stacks.get(name, ""))
            if stored is None and (name in tied or stacks.get(name) in tied):
                continue
            if stored is None:
                raise AdapterError(f"`{label}` adapts `{name}`, which `{deltas.base.label}` holds no weight of.")
            if deltas.base.headers[self._sources[stored]].dtype not in _FLOATS:
                dtype = str(deltas.base.headers[self._sources[stored]].dtype).removeprefix("torch.")
                raise CheckpointError(
                    f"`{stored}` of the base `{deltas.base.label}` is {dtype}; what is added to it is lost in "
                    "rounding. Give the model that it was made from."
                )
        for module in deltas.biases:
            if f"{module}.bias" not in own:
                raise AdapterError(
                    f"`{label}` adds to the bias of `{module}`, which has none in `{deltas.base.label}`: no checkpoint "
                    "of it holds that. Serve the adapter unmerged."
                )
        for name, key in deltas.replaced.items():
            if name not in own:
                if name.removesuffix(".weight") in tied:
                    continue
                raise AdapterError(
                    f"`{label}` holds `{name}` whole, which the base `{deltas.base.label}` does not have. Give the "
                    "base with the class that the adapter was trained with."
                )
            found, wanted = deltas.folder.headers[key].shape, self._merged[own[name]].shape
            if found != wanted:
                raise AdapterError(
                    f"`{label}` holds `{name}` whole as {list(found)}; in the base `{deltas.base.label}` it is "
                    f"{list(wanted)}. Give the base with the class that the adapter was trained with."
                )


def _raw_config(deltas: AdapterOnModel) -> dict[str, Any]:
    """The base's configuration as it stands in its file, special numbers and all."""
    folder = place_of(deltas.base)
    if folder is not None and (folder / "config.json").is_file():
        found: dict[str, Any] = read_json(folder / "config.json")
        return found
    module = deltas.base.module
    to_json = getattr(getattr(module, "config", None), "to_json_string", None)
    found = json.loads(to_json()) if to_json is not None else dict(deltas.base.config or {})
    return found if found.get("architectures") or module is None else found | {"architectures": [type(module).__name__]}
