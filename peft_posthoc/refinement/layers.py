"""The linear layers of base + adapter, beside the tuned model's: what a closed form can fit, and why not the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from peft_posthoc.adapters.names import PREFIX
from peft_posthoc.errors import PosthocError
from peft_posthoc.models.kinds import EMBEDDING, LayerKind, kind_of
from peft_posthoc.running.live import Live


@dataclass(frozen=True)
class Layer:
    """A linear layer with factors."""

    name: str
    """The model's."""
    base: nn.Module
    """Of base + adapter, without the factors."""
    tuned: nn.Module
    kind: LayerKind
    a: Parameter
    b: Parameter
    scale: float
    """What PEFT multiplies their product with."""
    bias: Tensor | None = None
    """Of the factors, which PEFT multiplies likewise."""

    @property
    def rank(self) -> int:
        """How many pairs of the factors are no padding."""
        return int(self._pairs.sum())

    @property
    def size(self) -> tuple[int, int]:
        """`m` and `n`."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def _pairs(self) -> Tensor:
        return self.a.any(dim=1) & self.b.any(dim=0)

    def delta(self) -> Tensor:
        """The tuned weight minus the base's, `m` by `n`."""
        after, before = (self.kind.matrix(one.weight.detach()).float() for one in (self.tuned, self.base))  # type: ignore[operator]
        return after.to(before.device) - before

    def lacks(self, made: Tensor, wanted: Tensor) -> Tensor:
        """What the factors are to add to the base's output, for that of the tuned layer."""
        return wanted - made if self.bias is None else wanted - made - self.scale * self.bias.float()

    @torch.no_grad()
    def put(self, a: Tensor, b: Tensor) -> None:
        """Give it other factors, of its rank or less, in place of those that are no padding."""
        (pairs,) = self._pairs.nonzero(as_tuple=True)
        for own in (self.a, self.b):
            own.zero_()
        self.a[pairs[: len(a)]] = a.to(self.a)
        self.b[:, pairs[: len(a)]] = (b / self.scale).to(self.b)


class Layers(NamedTuple):
    """What is fitted, and what is not."""

    linear: dict[str, Layer]
    """By the model's names."""
    others: dict[str, str]
    """By name, why their factors stay as they are."""


def layers_of(live: Live, factors: Mapping[str, Parameter]) -> Layers:
    """Sort the modules that have factors, `factors` by the names of the file.

    Raises:
        PosthocError: What the tuned model computes with are not its weights alone.
    """
    if hasattr(live.tuned, "peft_config"):
        raise PosthocError(
            "`compensated` compares weights, and the tuned model has an adapter on it. Give what `merge_and_unload()` "
            "makes of it, or refine by `distil`."
        )
    found, chosen = Layers({}, {}), {id(factor) for factor in factors.values()}
    places = [name for name, own in live.adapted.named_parameters() if id(own) in chosen]
    for module in dict.fromkeys(name.partition(".lora_")[0] for name in places):
        own, layer = module.removeprefix(PREFIX), cast(Any, live.adapted.get_submodule(module))
        base = layer.base_layer
        kind = kind_of(base)
        if kind is None or kind.stacked or isinstance(base, nn.ModuleList):
            found.others[own] = "the factors of stacked experts are not fitted in closed form"
        elif kind is EMBEDDING:
            # Rows that are looked up carry no error of earlier layers: the SVD is the fit, but for how often each is
            # read, of which a few texts say little.
            found.others[own] = "an embedding has no earlier layer's error to make up for"
        elif kind.kernel:
            found.others[own] = "a convolution is not fitted in closed form"
        else:
            a, b = (factor[live.name] for factor in (layer.lora_A, layer.lora_B))
            tuned, scale = live.tuned.get_submodule(own), layer.scaling[live.name]
            one = Layer(own, base, tuned, kind, a.weight, b.weight, scale, b.bias)
            if one.rank:
                found.linear[own] = one
            else:
                found.others[own] = "one of its factors is zero, which leaves no pair to fit"
    return found


class Through(NamedTuple):
    """What went through a layer: tokens by features."""

    inputs: Tensor
    outputs: Tensor


class Enough(Exception):
    """Every layer that is watched has run: the rest of a model need not."""


@contextmanager
def watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Through]]:
    """See what goes through modules that are called once each, and run nothing after the last of them."""
    seen: dict[str, Through] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = Through(args[0].detach().flatten(0, -2), output.detach().flatten(0, -2))
            if len(seen) == len(modules):
                raise Enough

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        with suppress(Enough):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def listed(modules: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Tensor]]]:
    """List the calls of modules, in their order, each with what it reads."""
    calls: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            calls.append((name, args[0]))

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def groups_of(calls: Sequence[tuple[str, Tensor]]) -> list[list[str]]:
    """The layers by what they read, in the order in which they run: what reads the same follows each other."""
    groups: list[list[str]] = []
    last: Tensor | None = None
    for name, read in calls:
        if read is not last:
            groups.append([])
        groups[-1].append(name)
        last = read
    return groups
