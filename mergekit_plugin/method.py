"""The merge method `phlora`: base + the low-rank part of what a fine-tune changed."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
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
from mergekit_plugin.patch_resolver import patch_resolver
from mergekit_plugin.settings import PARAMETERS, Settings
from peft_posthoc.adapters.factors import Factors
from peft_posthoc.checkpoints.memory import InMemory
from peft_posthoc.errors import NothingToCarryError, PosthocError
from peft_posthoc.extraction.delta import Pair
from peft_posthoc.extraction.fate import Factored
from peft_posthoc.extraction.outcomes import Layer
from peft_posthoc.extraction.plan import Plan, by_flags, everything, make_plan
from peft_posthoc.extraction.work import factor_pairs
from peft_posthoc.linalg.lowrank import LowRank
from peft_posthoc.models.layout import Layout, Place
from peft_posthoc.text import asked_on

NAME = "phlora"
NO_BASE = f"`merge_method: {NAME}` needs `base_model`: the model that the fine-tune started from."
logger = logging.getLogger(__name__)


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
        self._unknown: Collection[str] = ()
        self._told: set[str] = set()

    @contextlib.contextmanager
    def knowing(self, factors: Mapping[str, LowRank], *, but: Collection[str]) -> Iterator[None]:
        """Merge with these factors, by weight: they are known already.

        Args:
            factors: Of all that is carried.
            but: The weights of which nothing is known.
        """
        self._known, self._unknown = factors, but
        try:
            yield
        finally:
            self._known, self._unknown = None, ()

    def validate_inputs(self, input_ids: Sequence[Hashable], base_id: Hashable | None = None, **named: Any) -> None:
        """As mergekit does it, before anything is planned.

        Raises:
            PosthocError: There is no base, or not one fine-tune of it.
        """
        patch_resolver(NAME)
        try:
            super().validate_inputs(input_ids, base_id, **named)
        except ValueError as error:
            if base_id is None:
                raise PosthocError(NO_BASE) from error
            others = ", ".join(f"`{one}`" for one in input_ids if one != base_id) or "none"
            raise PosthocError(
                f"`merge_method: {NAME}` takes one fine-tune of `{base_id}` among `models`. Got {others}."
            ) from error

    @asked_on("mergekit")
    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """One weight of the result, on the device and in the type of its inputs."""
        (other,) = group.non_base
        base: Tensor = group.base.tensor
        tuned: Tensor = other.tensor
        settings = Settings(**{parameter: values[other.id] for parameter, values in parameters.items()})
        places = self._places(group)
        chosen = by_flags(embeddings=settings.embeddings, head=settings.head)(places) if places else ()
        rule = settings.rule if isinstance(chosen, tuple) and chosen else None
        name = group.metadata.name or "weight"
        known = self._known is not None and name not in self._unknown
        if rule is None or (known and name not in (self._known or ())):
            if settings.rest == "tuned":
                return tuned
            if not places:
                self._tell_loss(name, base, tuned)
            return base
        found = self._known[name] if self._known is not None and known else None
        if not known:
            fates = {name: Factored(tuple(places), rule)}
            pairs = [Pair(name, base, tuned)]
            with factor_pairs(pairs, fates, exact=settings.exact, device=base.device) as outcomes:
                (outcome,) = outcomes
            found = outcome.lowrank if isinstance(outcome, Layer) else None
        return base if found is None else Factors(found.a, found.b).added(base, places[0].kind).to(base.dtype)

    def _tell_loss(self, name: str, base: Tensor, tuned: Tensor) -> None:
        """Warn, once for all layers, of a matrix or a stack of them whose change is dropped for want of a form."""
        kind = _numberless(name)
        if base.ndim > 1 and kind not in self._told and not torch.equal(base, tuned):
            self._told.add(kind)
            logger.warning(
                "phlora: `%s` has changed and has no LoRA form that is known here: in the merge it is the base's. "
                "`rest: tuned` takes the fine-tune's.",
                name,
            )

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
        if name in plan.headers:
            return list(plan.carried.get(name, ()))
        # Slices renumber layers: the same weight of another layer is of the same kind.
        twin = next((other for other in plan.carried if _numberless(other) == _numberless(name)), None)
        return list(plan.carried[twin]) if twin else _renamed(plan.layout, name, tuple(group.base.tensor.shape))


def _renamed(layout: Layout, name: str, shape: tuple[int, ...]) -> list[Place]:
    """The places of a weight that the model has under another name on disk."""
    return [place for place in layout.places(name) if place.kind.size(shape) is not None]


def _by_name(name: str, group: TensorGroup) -> Plan:
    """A plan from a weight's name and shape, where the model is not known."""
    sides = [InMemory({name: entry.tensor}, label=str(entry.id)) for entry in (group.base, *group.non_base)]
    try:
        return make_plan(*sides, choose=everything)
    except NothingToCarryError:
        return Plan({}, Layout("mergekit", {}), {}, {})


def _numberless(name: str) -> str:
    return re.sub(r"\d+", "#", name)


PHLORA = Phlora()
