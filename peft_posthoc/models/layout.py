"""Which module each weight of a model belongs to, and of what kind it is.

What kind a weight has is asked of the model's own class where there is one (`by_class`), and read off names and
shapes otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

from torch import Tensor

from peft_posthoc.models.kinds import EMBEDDING, LayerKind
from peft_posthoc.models.part import Part

GUESSED = "names and shapes"

Role = Literal["layer", "embedding", "head", "convolution", "expert"]


class Place(NamedTuple):
    """A module of the model that a weight lives in, or, of an expert's matrix, the parameter."""

    module: str
    kind: LayerKind
    role: Role

    @property
    def part(self) -> Part | None:
        """Which matrix of an expert's parameter it is; None of a module, and of a parameter that is no stack."""
        return Part.named(self.module) if self.kind.stacked else None

    @property
    def parameter(self) -> str:
        """The module; or, of an expert's matrix, the parameter with those of all experts."""
        return self.part.tensor if self.part else self.module


def is_of_an_expert(module: str) -> bool:
    """Tell whether a module is part of one expert among several."""
    return re.search(r"(^|\.)experts\.\d+\.", module) is not None


class Stack(NamedTuple):
    """A parameter that holds the matrices of several experts, or their biases as the rows of one matrix."""

    name: str
    """The model's own."""
    shape: tuple[int, ...]
    """Experts x out x in features; in x out where transposed; two numbers only for biases."""
    kind: LayerKind
    parts: tuple[tuple[str, ...], ...]
    """By expert, the tensors on disk that it is made of, one above the other; empty if it is itself there."""

    @property
    def units(self) -> tuple[str, ...]:
        """Names of the experts' matrices: `NAME[0]`, `NAME[1]`, ...; of biases `NAME` alone."""
        return tuple(str(Part(self.name, e)) for e in range(self.shape[0])) if len(self.shape) == 3 else (self.name,)


class Conversion(NamedTuple):
    """Tensors on disk of which a model makes others: a fused matrix that it splits, or parts that it puts together."""

    sources: tuple[str, ...]
    """On disk."""
    make: Callable[..., dict[str, Tensor]]
    """From the sources, in their order: by the model's name, what is made of them; nothing where they do not fit it."""


@dataclass(frozen=True)
class Layout:
    """Which module each weight of a model belongs to."""

    origin: str
    """The source of this knowledge: a class, or names and shapes."""
    kinds: Mapping[str, LayerKind]
    """Every module that PEFT can adapt."""
    classes: Mapping[str, str] = field(default_factory=dict)
    """The class of every module, where it is known; of the others with a weight, `""`."""
    head: str | None = None
    """The module that gives the logits of a language model."""
    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """For a module whose weight is stored once and used again: the modules that use it."""
    prefix: str = ""
    """The beginning that names in a checkpoint of the bare model lack (`transformer.` for GPT-2)."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """By name on disk, the model's own name of a tensor, where transformers renames it when it loads."""
    conversions: tuple[Conversion, ...] = ()
    """The model's tensors that are on disk in other pieces."""
    stacks: tuple[Stack, ...] = ()
    """The parameters of the experts, in the model's order."""
    mistaken: Mapping[str, LayerKind] = field(default_factory=dict)
    """Layers that PEFT takes for an expert's, by their names, and whose factors it drops in silence."""
    peft_takes_experts: bool = False
    """Whether PEFT stacks the factors of single experts; if not, it ignores them in silence."""
    tokens: str | None = None
    """The module of the token embeddings."""
    task_type: str | None = None
    """The task for which PEFT has a class that adds nothing to the model."""
    unread: frozenset[str] = frozenset()
    """Tensors on disk, by the model's name, that its class passes over when it loads: older versions' buffers."""
    auto_mapping: Mapping[str, str] | None = None
    """PEFT's words for the model's class, where no task says it."""
    fan_in_fan_out: bool = False

    def module_of(self, weight: str) -> str:
        """The module that a weight name belongs to."""
        weight = self.renamed.get(weight, weight)
        module = weight.rpartition(".")[0] or weight
        if module not in self.classes and f"{self.prefix}{module}" in self.classes:
            return f"{self.prefix}{module}"
        return module

    def name_of(self, weight: str) -> str:
        """The model's own name of a checkpoint's tensor."""
        module, leaf = self.module_of(weight), self.renamed.get(weight, weight).rpartition(".")[2]
        return module if module == leaf else f"{module}.{leaf}"  # A parameter at the top is in no module.

    def names_of(self, weight: str) -> tuple[str, ...]:
        """The model's own name of a checkpoint's tensor, and the names of those that share it."""
        own = self.name_of(weight)
        return own, *self.shared.get(own, ())

    @cached_property
    def shared(self) -> dict[str, tuple[str, ...]]:
        """Ties by the names of tensors: they are told of modules by their weight, of whatever else by its own name."""
        found: dict[str, tuple[str, ...]] = {}
        for owner, users in self.ties.items():
            suffix = ".weight" if owner in self.classes else ""
            found[f"{owner}{suffix}"] = tuple(f"{user}{suffix}" for user in users)
        return found

    def places(self, weight: str) -> list[Place]:
        """The places of a weight; none if it is not the weight of a module that PEFT can adapt."""
        own = self.name_of(weight)
        if own in self.kinds and self.kinds[own].stacked:
            part = Part.named(own)
            shared = self.ties.get(part.tensor if part else own, ())
            names = [own, *(str(part._replace(tensor=user)) if part else user for user in shared)]
            return [Place(name, self.kinds[own], "expert") for name in names]
        module, _, leaf = own.rpartition(".")
        if leaf != "weight":
            return []
        users = [module, *self.ties.get(module, ())]
        # Adapted in one place and not in another, a tied weight would be two.
        if any(user not in self.kinds for user in users):
            return []
        return [Place(user, self.kinds[user], self._role(user)) for user in users]

    def of_experts(self, weight: str) -> bool:
        """Tell whether a weight is a matrix, or the stacked matrices, of experts that are not taken apart."""
        return self.name_of(weight) in self._expert_names or weight in self._expert_names

    @cached_property
    def _expert_names(self) -> set[str]:
        parts = (part for stack in self.stacks for parts in stack.parts for part in parts)
        return {*(stack.name for stack in self.stacks), *parts}

    def without_ties(self, untied: Iterable[str]) -> Layout:
        """This layout, but with weights of their own for the modules of these weights."""
        own = {self.name_of(weight).removesuffix(".weight") for weight in untied}
        ties = {owner: tuple(user for user in users if user not in own) for owner, users in self.ties.items()}
        return replace(self, ties=ties)

    def _role(self, module: str) -> Role:
        if module == self.head:
            return "head"
        if is_of_an_expert(module):
            return "expert"
        kind = self.kinds[module]
        return "embedding" if kind is EMBEDDING else "convolution" if kind.kernel else "layer"


def ends(module: str) -> list[str]:
    """The name of a module and what follows each of its dots: by any of these PEFT finds it."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
