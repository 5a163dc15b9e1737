"""A merge that mergekit has planned: the base, and what the merge leads to, as two checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, reduce

import torch
from mergekit import merge_methods
from mergekit.architecture import get_architecture_info
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import GatherTensors, LoaderCache, SaveTensor
from mergekit.merge import _model_out_config
from mergekit.merge_methods import OptionalTensorPolicy
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_plugin.inputs import base_of, check_layers, is_narrower, opened
from mergekit_plugin.method import NAME
from mergekit_plugin.models import AsMerged
from mergekit_plugin.settings import Settings
from mergekit_plugin.stream import Stream, Taken, aligned
from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.errors import CheckpointError, MismatchError, PosthocError
from peft_posthoc.extraction.plan import by_flags, everything, make_plan
from peft_posthoc.extraction.reasons import LeftOut, told
from peft_posthoc.linalg.spectrum import RankRule
from peft_posthoc.models.layout import Place


class Merge:
    """The merge that a configuration asks for, planned by mergekit; no tensor is read before it is asked for.

    Args:
        config: The configuration. It is changed, as by every plan of mergekit's.
        options: mergekit's.
        base: What the adapter is for; by default the configuration's `base_model`.
        stored: Whether the result is written. If not, nothing is rounded to a type narrower than the files'.
        vocab: What becomes of embeddings and a head of which the merge has other rows, as `extract` takes it; None to
            leave them out.

    Raises:
        PosthocError: There is no base.
        MismatchError: The result is no state of the base: no adapter leads there.
    """

    def __init__(
        self,
        config: MergeConfiguration,
        options: MergeOptions,
        *,
        base: str | None = None,
        stored: bool = True,
        vocab: str | None = None,
    ) -> None:
        self._config, self._options, self._vocab = config, options, vocab
        LoaderCache().setup(options=options)
        self._base = base_of(config, base)
        # Sorted: a set of names has another order in every process, and what comes first decides in `dtype`, `_beside`.
        merged = {*config.referenced_models()}
        models = sorted({*merged, self._base}, key=str)
        self._models = {model: opened(model, merged=model in merged) for model in models}
        self.narrow = [
            model.label for model in self._models.values() if is_narrower(dtype_from_name(config.dtype), model)
        ]
        if not stored:
            config.dtype, config.out_dtype = (None if self.narrow else config.dtype), None
        arch = get_architecture_info(config, options)
        out = _model_out_config(config, arch, trust_remote_code=False)
        # mergekit 0.1.5's own plan without a folder fails on its types; nothing is written before the tasks are run.
        planned = MergePlanner(config, arch, options=options, out_model_config=out).plan_to_disk("")
        self._planned = {task.tensor_name: task for task in planned if isinstance(task, SaveTensor)}
        self._read: dict[ModelReference, Checkpoint] = {}
        check_layers(config, arch, self._base)

    @property
    def by_phlora(self) -> bool:
        """True where the method is ours: then its parameters say what is carried, at which rank."""
        return bool(self._config.merge_method == NAME)

    @cached_property
    def base(self) -> Checkpoint:
        """The base as the merge reads it."""
        return self._as_read(self._base)

    @cached_property
    def result(self) -> Checkpoint:
        """The merge's result, made as it is read; under `phlora` the fine-tune, whose low-rank part is the result."""
        models = sorted(model.label for ref, model in self._models.items() if ref != self._base)
        label = f"{', '.join(models)}" if self.by_phlora else f"{self._config.merge_method} of {', '.join(models)}"
        found = {name: header for name in self._planned if (header := self._header(name)) is not None}
        return Stream(
            [self._taken(name) for name in found],
            found,
            self._options,
            label=label,
            config=self.base.config,
            beside=self._beside if self.by_phlora else {},
        )

    @cached_property
    def leave_out(self) -> dict[str, str]:
        """By name, what has no place in an adapter, and why."""
        unknown = [name for name in (*self.base.headers, *self._beside) if name not in self._planned]
        moved = [name for name in self._planned if name in self.base.headers and self._has_other_rows(name)]
        return {
            **dict.fromkeys(unknown, "mergekit does not merge this tensor"),
            **dict.fromkeys(moved, "the merge changes the vocabulary"),
        }

    def _has_other_rows(self, name: str) -> bool:
        """Tell whether rows of the base's tensor are other tokens' in the merge, or missing, and of no use to `vocab`.

        As far as that can be seen: mergekit puts rows where it wants them before it merges.
        """
        inputs = self._planned[name].tensor_task.gather_tensors
        if isinstance(inputs, GatherTensors):
            return False
        before, after = self.base.read(name), aligned(inputs, self._options).get(self._base)
        if after is None:
            return True
        if len(before) != len(after) and self._vocab != "truncate":
            return self._vocab is None
        rows = min(len(before), len(after))
        return not torch.equal(before[:rows], after[:rows].to(before))

    @property
    def dtype(self) -> torch.dtype:
        """Of an adapter, where none is asked for: that of the fine-tune's files, or of the base's."""
        models = [model for ref, model in self._models.items() if (ref == self._base) != self.by_phlora]
        return next(header.dtype for header in models[0].headers.values() if header.dtype.is_floating_point)

    @cached_property
    def ranks(self) -> dict[str, RankRule]:
        """By weight, the rank rules of those that the parameters of `phlora` choose.

        Raises:
            PosthocError: They choose none.
        """
        chosen = (name for places, name in self._weights.items() if not isinstance(self.choose(places), LeftOut))
        found = {name: rule for name in chosen if (rule := self._settings(name).rule) is not None}
        if not found:
            raise PosthocError(f"The parameters of `merge_method: {NAME}` give no weight a rank: there is no adapter.")
        return found

    def choose(self, places: Sequence[Place]) -> tuple[Place, ...] | LeftOut:
        """Of the places of a weight those that the parameters of `phlora` choose; if none, why."""
        settings = self._settings(self._weights[tuple(places)])
        if settings.rule is None:
            return told("rank 0 (parameters)")
        return by_flags(embeddings=settings.embeddings, head=settings.head)(places)

    @property
    def exact(self) -> bool:
        """True where the parameters of `phlora` ask for LAPACK's full SVD, of any weight."""
        return any(self._settings(name).exact for name in self._planned)

    @cached_property
    def _weights(self) -> dict[tuple[Place, ...], str]:
        """All weights that can be carried, by their places."""
        carried = make_plan(self.base, self.result, choose=everything, leave_out=self.leave_out).carried
        return {places: name for name, places in carried.items()}

    @cached_property
    def _beside(self) -> dict[str, Checkpoint]:
        """Checkpoints, by name of a tensor that mergekit does not merge, of the models that hold it."""
        others = [self._as_read(model) for model in self._models if model != self._base]
        return {name: model for model in reversed(others) for name in model.headers if name not in self._planned}

    def _settings(self, name: str) -> Settings:
        parameters = self._planned[name].tensor_task.input_parameters[self._tuned(name)]
        return Settings(**dict(parameters.items()))

    def _tuned(self, name: str) -> ModelReference:
        """The fine-tune that a weight comes from, under `phlora`."""
        task = self._planned[name].tensor_task
        if task.base_model != self._base:
            raise MismatchError(
                f"`{name}` is made from the base `{task.base_model}`, not `{self._base}`: no adapter of one base "
                "leads there."
            )
        (tuned,) = (model for model in task.model_order if model != self._base)
        return tuned

    def _taken(self, name: str) -> Taken:
        target = self._planned[name]
        if self.by_phlora:
            return Taken(name=name, source=target.tensor_task.gather_tensors, model=self._tuned(name))
        return Taken(name=name, source=target.tensor_task, dtype=target.dtype)

    def _header(self, name: str) -> Header | None:
        """Shape and type of a tensor of the result; None if there will be none.

        Raises:
            CheckpointError: A model lacks a weight that mergekit will ask it for.
        """
        target = self._planned[name]
        task = target.tensor_task
        models = [self._tuned(name)] if self.by_phlora else task.model_order
        found = {model: self._stored_header(model, name) for model in models}
        headers = [header for header in found.values() if header is not None]
        if not target.optional and len(headers) < len(models):
            lacking = next(model for model, header in found.items() if header is None)
            raise CheckpointError(
                f"mergekit's table of this architecture has a weight `{name}`, which `{lacking}` does not: it cannot "
                "merge such a model."
            )
        spec = merge_methods.get(task.method_name).spec
        skipped = (
            spec.optional_tensor_policy == OptionalTensorPolicy.BASE_OR_SKIP
            and len(headers) < spec.contract.min_inputs
            and found.get(task.base_model) is None
        )
        if not headers or (target.optional and skipped):
            return None
        inputs = task.gather_tensors
        shape = headers[0].shape
        if not isinstance(inputs, GatherTensors):
            shape = tuple(next(iter(aligned(inputs, self._options).values())).shape)
        dtype = reduce(torch.promote_types, (header.dtype for header in headers))
        wanted = None if self.by_phlora else dtype_from_name(target.dtype)
        return Header(shape, wanted or dtype)

    def _stored_header(self, model: ModelReference, name: str) -> Header | None:
        headers, weight = self._as_read(model).headers, self._planned[name].tensor_task.output_weight
        return next((headers[one] for one in (name, *(weight.tied_names or ())) if one in headers), None)

    def _as_read(self, model: ModelReference) -> Checkpoint:
        """A model under the names, and in the type, in which the merge reads it."""
        if model not in self._read:
            on_disk, dtype = self._models[model], dtype_from_name(self._config.dtype)
            weights = [task.tensor_task.output_weight for task in self._planned.values()]
            merged = AsMerged(on_disk, weights, dtype)
            self._read[model] = on_disk if merged.headers == on_disk.headers else merged
        return self._read[model]
