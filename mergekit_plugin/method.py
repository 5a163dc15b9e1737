"""The merge method `phlora`: base + the low-rank part of what a fine-tune changed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mergekit.merge_methods import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    TensorGroup,
)
from torch import Tensor

from mergekit_plugin.models import folder_of, plan_of
from mergekit_plugin.settings import PARAMETERS, Settings
from peft_posthoc.checkpoint import Header, InMemory
from peft_posthoc.errors import NothingToCarryError
from peft_posthoc.factor import Layer, Pair, factor_pairs, merged
from peft_posthoc.layout import Layout, Place
from peft_posthoc.plan import Plan, by_flags, everything, make_plan
from peft_posthoc.svd import LowRank

NAME = "phlora"


class Phlora(GroupMergeMethod):  # type: ignore[misc]
    """Replaces a fine-tune by base + `b @ a`, with the factors that `peft_posthoc.extract` finds for the same pair."""

    spec = MergeMethodSpec(
        name=NAME,
        parameters=PARAMETERS,
        contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2, max_inputs=2),
        pretty_name="PHLoRA",
        reference_url="https://arxiv.org/abs/2509.10971",
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
    )

    def __init__(self) -> None:
        self._known: Mapping[str, LowRank] | None = None

    @contextlib.contextmanager
    def knowing(self, factors: Mapping[str, LowRank]) -> Iterator[None]:
        """Merge with these factors, by weight: they are known already. What is not among them has not changed."""
        self._known = factors
        try:
            yield
        finally:
            self._known = None

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """One weight of the result, on the device and in the type of its inputs."""
        (other,) = group.non_base
        base: Tensor = group.base.tensor
        tuned: Tensor = other.tensor
        settings = Settings(**{parameter: values[other.id] for parameter, values in parameters.items()})
        places = self._places(group)
        chosen, _ = by_flags(embeddings=settings.embeddings, head=settings.head)(places)
        rule = settings.rule if chosen else None
        if rule is None:
            return base if settings.rest == "base" else tuned
        if self._known is not None:
            found = self._known.get(group.metadata.name)
        else:
            # What a plan is asked for one weight.
            header = Header(tuple(base.shape), base.dtype)
            name = group.metadata.name or "weight"
            plan = Plan(Layout("mergekit", {}), {name: tuple(places)}, {}, {}, {name: header})
            pairs = [Pair(name, base, tuned)]
            with factor_pairs(pairs, plan, {name: rule}, exact=settings.exact, device=base.device) as outcomes:
                (outcome,) = outcomes
            found = outcome.factors if isinstance(outcome, Layer) else None
        return base if found is None else merged(base, found, places[0].kind).to(base.dtype)

    def _execute_resolved(
        self,
        groups: Sequence[TensorGroup],
        parameters: Sequence[dict[str, Any]],
        *,
        dtype: torch.dtype | None = None,
        out_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        # mergekit promotes the inputs to one type and would save that, beside a config.json that names the base's.
        run = super()._execute_resolved
        return tuple(
            run((group,), [values], dtype=dtype, out_dtype=out_dtype or dtype or group.base.tensor.dtype, **options)[0]
            for group, values in zip(groups, parameters, strict=True)
        )

    def _places(self, group: TensorGroup) -> list[Place]:
        """Where the weight lives in its model; nothing if it is none that LoRA can carry."""
        name = group.metadata.name or "weight"
        folders = [folder_of(entry.id) for entry in (group.base, *group.non_base)]
        plan = plan_of(*folders) if None not in folders else _by_name(name, group)
        if name not in plan.headers:
            # Slices renumber layers: the same weight of another layer is of the same kind.
            name = next((other for other in plan.carried if _numberless(other) == _numberless(name)), name)
        return list(plan.carried.get(name) or _renamed(plan.layout, name, tuple(group.base.tensor.shape)))


def _renamed(layout: Layout, name: str, shape: tuple[int, ...]) -> list[Place]:
    """The places of a weight that the model has under another name on disk."""
    return [place for place in layout.places(name) if place.kind.size(shape) is not None]


def _by_name(name: str, group: TensorGroup) -> Plan:
    """A plan from a weight's name and shape, where the model is not known."""
    sides = [InMemory({name: entry.tensor}, label=str(entry.id)) for entry in (group.base, *group.non_base)]
    try:
        return make_plan(*sides, choose=everything)
    except NothingToCarryError as reason:
        return Plan(Layout("mergekit", {}), {}, {name: str(reason)}, {}, {})


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)


PHLORA = Phlora()
