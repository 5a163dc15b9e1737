"""An adapter held against its base: what it adds to each matrix and makes of each tensor, however experts are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from peft_posthoc.adapters.cast import cast
from peft_posthoc.adapters.experts import places_in_file
from peft_posthoc.adapters.factors import Factors
from peft_posthoc.adapters.names import own_name
from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.errors import AdapterError
from peft_posthoc.models.as_model import as_model
from peft_posthoc.models.kinds import EMBEDDING, LINEAR
from peft_posthoc.models.layout import Layout, Stack
from peft_posthoc.models.slots import Slot

# Of two deltas that a tied weight has under its two names: what float32 leaves of two ways to compute one product.
_ALIKE = 1e-6


class Place(NamedTuple):
    """Where the factors of a matrix are in the file."""

    module: str
    expert: int
    rows: slice | None
    """Which of the rows of the file's delta: gate or up of a fused matrix."""


class AdapterOnModel:
    """An adapter on its base: what is added to each matrix.

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

    def __init__(self, folder: AdapterFile, base: Checkpoint, layout: Layout) -> None:
        self.folder = folder
        self.stored = base
        """The base as it was given."""
        self.base = as_model(base, layout)
        """The same in the model's own tensors."""
        self.beside: Mapping[str, Tensor] = {}
        """Differences of tensors that no adapter has a place for, by the base's names, where they are known."""
        self.stacks = layout.stacks
        modules = {module: LINEAR for stack in self.stacks for parts in stack.parts for module in map(_module, parts)}
        self.layout = replace(layout, kinds={**layout.kinds, **layout.mistaken, **modules})
        copies = [name for name in folder.whole if name.endswith(".base_layer.weight")]
        self.whole = {own_name(name): name for name in folder.whole if name not in copies}
        """The file's names of tensors that take the place of the base's, by the model's names."""
        self.base_layers = {own_name(name): name for name in copies}
        """The same of those that take its place before the factors are added."""
        self.replaced = self.base_layers | self.whole
        """Both."""
        self.slots: Mapping[str, Slot] = self._slots()
        """Every matrix of the base."""
        self._filed = {self.own(name): name for name in folder.modules}
        self._places = dict(self._find())
        self._last: tuple[str, list[Factors]] = ("", [])
        self.added = {self._own_tensor(name): key for name, key in folder.added.items()}
        """The file's names of what is added beside any factors, by the model's names of tensors."""
        self._fit()
        biased = {own: name for own, name in self._filed.items() if folder.modules[name].bias}
        self.biases = tuple(own for own in biased if self.bias(own).any())
        """The modules to whose bias something is added that is not zero."""

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices with factors."""
        return tuple(self._places)

    @property
    def rank(self) -> int:
        """The largest rank of a matrix."""
        return max((module.rank for module in self.folder.modules.values()), default=0)

    def rank_of(self, name: str) -> int:
        """Pairs in the factors of a matrix; 0 if it has none."""
        return self.folder.modules[self._places[name].module].rank if name in self._places else 0

    def factors(self, name: str) -> Factors:
        """The factors of a matrix in float64, the scale folded into `b`; of rank 0 if it has none."""
        if name not in self._places:
            _, m, n = self.slots[name]
            return Factors(torch.zeros(0, n, dtype=torch.float64), torch.zeros(m, 0, dtype=torch.float64))
        module, expert, rows = self._places[name]
        last = self._last
        if last[0] != module:  # All experts of a layer come from one tensor.
            last = self._last = (module, self.folder.factors(module))
        a, b = last[1][expert]
        return Factors(a, b if rows is None else b[rows])

    def kernel_of(self, name: str) -> tuple[int, ...]:
        """The kernel of a convolution with factors; empty for other matrices."""
        return self.folder.modules[self._places[name].module].filed.a_shape[2:]

    def padded(self, name: str, rank: int, dtype: torch.dtype) -> Factors:
        """The factors of a matrix padded with zeros to a rank, in a dtype.

        Raises:
            AdapterError: The dtype does not hold a factor.
        """
        return Factors(*cast(*self.factors(name), dtype, name, rank=rank))

    def bias(self, module: str) -> Tensor:
        """The summand of a module's bias, in float64."""
        found = self.folder.bias(self._filed.get(module, module))
        if found is None:
            raise KeyError(module)
        return found

    def of_experts(self) -> tuple[Stack, ...]:
        """The stacks of whose matrices some have factors."""
        names = set(self._places)
        return tuple(stack for stack in self.stacks if not names.isdisjoint(matrices(stack)))

    def alike(self, owner: str, user: str) -> bool:
        """Tell whether the adapter does the same to a tensor under each of two names that the model has for it."""
        whole = [self.whole.get(name) for name in (owner, user)]
        if any(whole):
            return all(whole) and torch.equal(*(self.folder.tensor(str(key)) for key in whole))
        if not self.added.keys().isdisjoint({owner, user}):
            return False
        if owner in self._stacks and user in self._stacks:
            both = zip(*(self._matrices(self._stacks[name]) for name in (owner, user)), strict=True)
            return all(self._add_alike(*pair) for pair in both)
        return self._add_alike(_module(owner), _module(user))

    def _add_alike(self, owner: str, user: str) -> bool:
        if not any(map(self.rank_of, (owner, user))):
            return True
        if not self.slots.keys() >= {owner, user}:
            return False
        one, other = map(self._stored, (owner, user))
        apart = Factors(torch.cat([one.a, other.a]), torch.cat([one.b, -other.b], dim=1))
        return _norm(apart) <= _ALIKE * max(_norm(one), _norm(other))

    def changes(self, name: str) -> bool:
        """Tell whether the model's tensor of this name is another one with the adapter."""
        return name in self.replaced or self.adds(name)

    def adds(self, name: str) -> bool:
        """Tell whether something is added to the model's tensor of this name."""
        module, _, leaf = name.rpartition(".")
        if name in self.added:
            return True
        if name in self._stacks:
            return any(map(self.rank_of, self._matrices(self._stacks[name])))
        return bool(self.rank_of(module)) if leaf == "weight" else leaf == "bias" and module in self.biases

    def read(self, name: str, source: str | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The tensor that PEFT computes with in place of one of the base.

        Args:
            name: The model's name of it.
            source: The base's, on disk; None where it has none.
            dtype: What the result is to be saved in: stacked experts, which are large, are added to in it.

        Returns:
            The tensor that takes its place before anything is added, and the sum: float32 or wider, and of stacked
            experts at least as wide as `dtype`; or the same tensor twice.

        Raises:
            KeyError: Neither the base nor the adapter has such a tensor.
        """
        module, _, leaf = name.rpartition(".")
        added = self.bias(module) if leaf == "bias" and module in self.biases else None
        if key := self.replaced.get(name):
            before = self.folder.tensor(key)
        elif source is not None:
            before = self.base.read(source)
        elif added is not None:
            return added, added
        else:
            raise KeyError(name)
        if name in self._stacks:
            return before, self._stacked(before, self._stacks[name], dtype)
        if key := self.added.get(name):
            more = self.folder.tensor(key).double()
            added = more if added is None else added + more
        if leaf == "weight" and self.rank_of(module):
            summed = self._wide(module, before).added(before, self.slots[module].kind)
            return before, summed if added is None else summed.double() + added
        return before, before if added is None else before.double() + added

    def notes(self) -> list[str]:
        """Sentences about tensors in the file that are the base's own and are left out."""
        return [f"`{name}` in the file is the base's own and was left out." for name in self.base_layers]

    def _stored(self, module: str) -> Factors:
        """Factors of the delta as the weight is stored: a tied weight is an embedding's and a linear layer's."""
        a, b = self.factors(module)
        return Factors(b.mT, a.mT) if self.slots[module].kind.transposed else Factors(a, b)

    def _wide(self, name: str, before: Tensor) -> Factors:
        return self.factors(name).to(torch.promote_types(torch.float32, before.dtype))

    def _stacked(self, before: Tensor, stack: Stack, dtype: torch.dtype) -> Tensor:
        names = self._matrices(stack)
        if not any(map(self.rank_of, names)):
            return before
        each = len(names) // len(stack.units)
        # Some models are stored the other way round than they compute (Qwen3-VL-MoE).
        turned = tuple(before.shape) != stack.shape
        after = (before.mT if turned else before).to(torch.promote_types(before.dtype, dtype), copy=True)
        for index, matrix in enumerate(after if after.ndim == 3 else [after]):
            rows = stack.kind.matrix(matrix)
            for part, block in zip(names[index * each : (index + 1) * each], rows.chunk(each), strict=True):
                block.copy_(self._wide(part, before).added(block, LINEAR))
        return after.mT if turned else after

    @cached_property
    def _stacks(self) -> dict[str, Stack]:
        return {stack.name: stack for stack in self.stacks}

    def _matrices(self, stack: Stack) -> tuple[str, ...]:
        """The matrices of a stack: by expert as the base holds them, where it holds views of one stack."""
        seen = len(stack.shape) == 3 and stack.units[0] in self.base.headers
        return stack.units if seen else matrices(stack)

    def _slots(self) -> dict[str, Slot]:
        slots: dict[str, Slot] = {}
        for name, header in self.base.headers.items():
            for own in self.layout.names_of(name):
                module, _, leaf = own.rpartition(".")
                module = module if leaf == "weight" else own
                kind = self.layout.kinds.get(module)
                if kind is None or kind.stacked != (module == own):
                    continue
                copy = self.base_layers.get(own)
                size = kind.size(header.shape if copy is None else self.folder.headers[copy].shape)
                if size is not None and 0 not in size:
                    slots[module] = Slot(kind, *size)
        for stack in self.stacks:
            kind, m, n = _slot(stack)
            names = self._matrices(stack)
            each = len(names) // len(stack.units)
            slots |= dict.fromkeys(names, Slot(kind if names == stack.units else LINEAR, m // each, n))
        return slots

    def own(self, module: str) -> str:
        """The model's name of a module that the file may call as a checkpoint on disk does: PEFT renames it too."""
        return module if module in self.slots else self.layout.module_of(f"{module}.weight")

    def _own_tensor(self, name: str) -> str:
        module, _, leaf = name.rpartition(".")
        return f"{self.own(module)}.{leaf}" if leaf in ("weight", "bias") else self.layout.name_of(name)

    def _find(self) -> Iterable[tuple[str, Place]]:
        ends = tuple(f".{end}" for end in self.folder.config.get("target_parameters") or ())
        meant = [stack for stack in self.stacks if f".{stack.name}".endswith(ends)]
        stacks = {stack.name: stack for stack in meant}
        by_place = {place: stacks[name] for name, place in places_in_file(meant).items()}
        for module in self.folder.modules.values():
            if module.kind != "experts":
                yield self.own(module.name), Place(module.name, 0, None)
                continue
            if module.name not in by_place:
                raise AdapterError(
                    f"`{self.folder.label}` has factors for `{module.name}`, and the base `{self.base.label}` no "
                    "stacked experts there."
                )
            stack = by_place[module.name]
            _, m, _ = _slot(stack)
            if module.experts != len(stack.units) or module.size[0] != m:
                raise AdapterError(
                    f"`{self.folder.label}` has factors for {module.experts} matrices of {module.size[0]} rows in "
                    f"`{module.name}`; the base `{self.base.label}` has {len(stack.units)} of {m}."
                )
            for expert, unit in enumerate(stack.units):
                if self._matrices(stack) == stack.units:
                    yield unit, Place(module.name, expert, None)
                    continue
                parts = stack.parts[expert]
                rows = m // len(parts)
                for index, part in enumerate(parts):
                    yield _module(part), Place(module.name, expert, slice(index * rows, (index + 1) * rows))

    def _fit(self) -> None:
        shapes = {own: h.shape for n, h in self.base.headers.items() for own in self.layout.names_of(n)}
        for name, key in self.added.items():
            if shapes.get(name) != (shape := self.folder.headers[key].shape):
                raise AdapterError(
                    f"`{self.folder.label}` adds {list(shape)} to `{name}`, which the base `{self.base.label}` "
                    f"{f'has as {list(shapes[name])}' if name in shapes else 'does not have'}."
                )
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
    """The matrices that a stack is made of, as `AdapterOnModel` names them, by expert and from top to bottom."""
    return tuple(_module(part) for parts in stack.parts for part in parts) if stack.parts else stack.units


def _slot(stack: Stack) -> Slot:
    return Slot(stack.kind, *(stack.kind.size(stack.shape[-2:]) or (0, 0)))


def _module(part: str) -> str:
    return part.removesuffix(".weight")


def _norm(factors: Factors) -> float:
    """`||b @ a||_F`, without the product."""
    b, a = (torch.linalg.qr(x, mode="r").R for x in (factors.b, factors.a.mT))
    return float(torch.linalg.norm(b @ a.mT))
