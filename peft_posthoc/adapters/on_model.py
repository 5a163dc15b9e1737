"""An adapter held against its base: what it adds to each of the base's matrices, however either stores experts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from peft_posthoc.adapters.cast import cast
from peft_posthoc.adapters.experts import places_in_file
from peft_posthoc.adapters.lora_folder import Factors, LoraFolder
from peft_posthoc.adapters.peft_format import PREFIX
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.errors import AdapterError
from peft_posthoc.models.kinds import EMBEDDING, LINEAR, LayerKind
from peft_posthoc.models.layout import Layout, Stack

# Of two deltas that a tied weight has under its two names: what float32 leaves of two ways to compute one product.
_ALIKE = 1e-6


class Slot(NamedTuple):
    """A matrix of the base."""

    kind: LayerKind
    m: int
    n: int


class Place(NamedTuple):
    """Where the factors of a matrix are in the file."""

    module: str
    expert: int
    rows: slice | None
    """Which of the rows of the file's delta: gate or up of a fused matrix."""


class Deltas:
    """What an adapter adds to the matrices of its base.

    Matrices of experts are one for each expert and projection, by the names that their modules have on disk where each
    expert has modules of its own; where it has none (gpt-oss), one for each expert of the model's parameter:
    `NAME[0]`, `NAME[1]`, ...

    Args:
        folder: The adapter.
        base: The model that it is for, with or without values.
        layout: Of the base.

    Raises:
        AdapterError: It does not fit the base.
    """

    def __init__(self, folder: LoraFolder, base: Checkpoint, layout: Layout) -> None:
        self.folder = folder
        self.base = base
        self.stacks = layout.stacks
        modules = {module: LINEAR for stack in self.stacks for parts in stack.parts for module in map(_module, parts)}
        self.layout = replace(layout, kinds={**layout.kinds, **layout.mistaken, **modules})
        self.slots: Mapping[str, Slot] = _slots(base, self.layout, self.stacks)
        """Every matrix of the base."""
        self._places = dict(self._find())
        self._last: tuple[str, list[Factors]] = ("", [])
        self._fit()
        self.biases = tuple(name for name, module in folder.modules.items() if module.bias and self.bias(name).any())
        """The modules to whose bias something is added that is not zero."""
        whole = {name.removeprefix(PREFIX): name for name in folder.whole}
        self.whole = {name: key for name, key in whole.items() if ".base_layer." not in name}
        """By the model's name, the file's name of what takes the place of the base's tensor."""
        self.base_layers = {n.replace(".base_layer.", "."): key for n, key in whole.items() if ".base_layer." in n}
        """The same of what takes its place before the factors are added."""

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices with factors."""
        return tuple(self._places)

    @property
    def rank(self) -> int:
        """The largest rank of a matrix."""
        return max(module.rank for module in self.folder.modules.values())

    def rank_of(self, name: str) -> int:
        """Pairs in the factors of a matrix; 0 if it has none."""
        return self.folder.modules[self._places[name].module].rank if name in self._places else 0

    def factors(self, name: str) -> Factors:
        """The factors of a matrix in float64, the scale folded into `b`; of rank 0 if it has none."""
        if name not in self._places:
            _, m, n = self.slots[name]
            return Factors(torch.zeros(0, n, dtype=torch.float64), torch.zeros(m, 0, dtype=torch.float64))
        module, expert, rows = self._places[name]
        if self._last[0] != module:  # All experts of a layer come from one tensor.
            self._last = (module, self.folder.factors(module))
        a, b = self._last[1][expert]
        return Factors(a, b if rows is None else b[rows])

    def padded(self, name: str, rank: int, dtype: torch.dtype) -> Factors:
        """The same, padded with zeros to a rank, in a dtype.

        Raises:
            AdapterError: The dtype does not hold a factor.
        """
        return Factors(*cast(*self.factors(name), dtype, name, rank=rank))

    def bias(self, module: str) -> Tensor:
        """What is added to a module's bias, in float64."""
        found = self.folder.bias(module)
        if found is None:
            raise KeyError(module)
        return found

    def of_experts(self) -> tuple[Stack, ...]:
        """The stacks of whose matrices some have factors."""
        names = set(self._places)
        return tuple(stack for stack in self.stacks if not names.isdisjoint(matrices(stack)))

    def alike(self, owner: str, user: str) -> bool:
        """Whether the adapter does the same to a weight under each of the names of two tied modules."""
        whole = [self.whole.get(f"{module}.weight") for module in (owner, user)]
        if any(whole):
            return all(whole) and torch.equal(*(self.folder.tensor(str(key)) for key in whole))
        if {owner, user}.isdisjoint(self._places):
            return True
        one, other = (self._stored(module) for module in (owner, user))
        apart = Factors(torch.cat([one.a, other.a]), torch.cat([one.b, -other.b], dim=1))
        return _norm(apart) <= _ALIKE * max(_norm(one), _norm(other))

    def only_factors(self, who: str) -> None:
        """See that nothing but factors is in the file.

        Raises:
            AdapterError: There is something else, which that program does not read.
        """
        label = self.folder.label
        if self.whole:
            name = next(iter(self.whole))
            raise AdapterError(f"`{label}` holds `{name}` whole, which {who} does not read. Use `--to merged`.")
        if self.biases:
            raise AdapterError(
                f"`{label}` adds to the bias of `{self.biases[0]}` (`lora_bias`), which {who} does not read. Use "
                "`--to merged`."
            )
        convolutions = [name for name in self._places if self.slots[name].kind.kernel]
        if convolutions:
            raise AdapterError(
                f"`{label}` has factors for the convolution `{convolutions[0]}`, which {who} does not read. Use "
                "`--to merged`."
            )

    def notes(self) -> list[str]:
        """What of the file is the base's own and is left out."""
        return [f"`{name}` in the file is the base's own and was left out." for name in self.base_layers]

    def _stored(self, module: str) -> Factors:
        """Factors of the delta as the weight is stored: a tied weight is an embedding's and a linear layer's."""
        a, b = self.factors(module)
        return Factors(b.mT, a.mT) if self.slots[module].kind.transposed else Factors(a, b)

    def _find(self) -> Iterable[tuple[str, Place]]:
        ends = tuple(f".{end}" for end in self.folder.config.get("target_parameters") or ())
        meant = [stack for stack in self.stacks if f".{stack.name}".endswith(ends)]
        stacks = {stack.name: stack for stack in meant}
        by_place = {place: stacks[name] for name, place in places_in_file(meant).items()}
        for module in self.folder.modules.values():
            if module.kind != "experts":
                yield module.name, Place(module.name, 0, None)
                continue
            if module.name not in by_place:
                raise AdapterError(
                    f"`{self.folder.label}` has factors for `{module.name}`, and the base `{self.base.label}` no "
                    "stacked experts there."
                )
            stack = by_place[module.name]
            _, m, _ = _slot(stack)
            if module.experts != len(stack.units) or module.b_shape[0] != m:
                raise AdapterError(
                    f"`{self.folder.label}` has factors for {module.experts} matrices of {module.b_shape[0]} rows in "
                    f"`{module.name}`; the base `{self.base.label}` has {len(stack.units)} of {m}."
                )
            for expert, unit in enumerate(stack.units):
                if not stack.parts:
                    yield unit, Place(module.name, expert, None)
                    continue
                parts = stack.parts[expert]
                rows = m // len(parts)
                for index, part in enumerate(parts):
                    yield _module(part), Place(module.name, expert, slice(index * rows, (index + 1) * rows))

    def _fit(self) -> None:
        for name, (module, _, rows) in self._places.items():
            slot, found = self.slots.get(name), self.folder.modules[module]
            if slot is None or (slot.kind is EMBEDDING) != (found.kind == "embedding"):
                raise AdapterError(
                    f"`{self.folder.label}` adapts `{name}`, which the base `{self.base.label}` does not have as a "
                    f"{'layer' if slot is None else slot.kind.name}."
                )
            m, n = found.size if rows is None else (rows.stop - rows.start, found.size[1])
            if (m, n) != (slot.m, slot.n):
                raise AdapterError(
                    f"`{self.folder.label}` adapts `{name}` as {m} x {n}; in the base `{self.base.label}` it is "
                    f"{slot.m} x {slot.n}."
                )


def matrices(stack: Stack) -> tuple[str, ...]:
    """The matrices that a stack is made of, as `Deltas` names them, by expert and from top to bottom."""
    return tuple(_module(part) for parts in stack.parts for part in parts) if stack.parts else stack.units


def _slots(base: Checkpoint, layout: Layout, stacks: Iterable[Stack]) -> dict[str, Slot]:
    slots: dict[str, Slot] = {}
    for name, header in base.headers.items():
        for place in layout.places(name):
            size = place.kind.size(header.shape)
            if size is not None:
                slots[place.module] = Slot(place.kind, *size)
    for stack in stacks:
        kind, m, n = _slot(stack)
        names = matrices(stack)
        each = len(names) // len(stack.units)
        slots |= {name: Slot(LINEAR if stack.parts else kind, m // each, n) for name in names}
    return slots


def _slot(stack: Stack) -> Slot:
    return Slot(stack.kind, *(stack.kind.size(stack.shape[-2:]) or (0, 0)))


def _module(part: str) -> str:
    return part.removesuffix(".weight")


def _norm(factors: Factors) -> float:
    """`||b @ a||_F`, without the product."""
    b, a = (torch.linalg.qr(x, mode="r").R for x in (factors.b, factors.a.mT))
    return float(torch.linalg.norm(b @ a.mT))
