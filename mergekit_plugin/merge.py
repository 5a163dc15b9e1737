"""A merge that mergekit has planned: the base, and what the merge leads to, as two checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, reduce
from pathlib import Path

import torch
from mergekit.architecture import ModelArchitecture, get_architecture_info
from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import GatherTensors, LoaderCache, SaveTensor
from mergekit.merge import _model_out_config
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_plugin.method import NAME
from mergekit_plugin.models import Stored, folder_of
from mergekit_plugin.settings import Settings
from mergekit_plugin.stream import Stream, Taken, shape_of
from peft_posthoc.checkpoint import Checkpoint, Header
from peft_posthoc.errors import MismatchError, PosthocError
from peft_posthoc.folder import Folder
from peft_posthoc.layout import Place
from peft_posthoc.plan import by_flags, everything, make_plan
from peft_posthoc.rank import RankRule


class Merge:
    """What a configuration asks for, planned by mergekit; no tensor is read before it is asked for.

    Args:
        config: The configuration. It is changed, as by every plan of mergekit's.
        options: mergekit's.
        base: What the adapter is for; by default the configuration's `base_model`.

    Raises:
        PosthocError: There is no base.
        MismatchError: The result is no state of the base: no adapter leads there.
    """

    def __init__(self, config: MergeConfiguration, options: MergeOptions, *, base: str | None = None) -> None:
        self._config, self._options = config, options
        self._base = _plain(config.base_model if base is None else ModelReference.parse(base))
        arch = get_architecture_info(config, options)
        LoaderCache().setup(options=options)
        self._models = {model: self._open(model) for model in {*config.referenced_models(), self._base}}
        out = _model_out_config(config, arch, trust_remote_code=options.trust_remote_code)
        # mergekit 0.1.5's own plan without a folder fails on its types; nothing is written before the tasks are run.
        planned = MergePlanner(config, arch, options=options, out_model_config=out).plan_to_disk("")
        self._planned = {task.tensor_name: task for task in planned if isinstance(task, SaveTensor)}
        self._read: dict[ModelReference, Checkpoint] = {}
        self._same_layers(arch)

    @property
    def by_phlora(self) -> bool:
        """Whether the method is ours: then its parameters say what is carried, at which rank."""
        return bool(self._config.merge_method == NAME)

    @cached_property
    def base(self) -> Checkpoint:
        """The base as the merge reads it."""
        return self._as_read(self._base)

    @cached_property
    def result(self) -> Checkpoint:
        """The merge's result, made as it is read; under `phlora` the fine-tune, whose low-rank part is the result."""
        models = sorted(str(model) for model in self._models if model != self._base)
        label = f"{', '.join(models)}" if self.by_phlora else f"{self._config.merge_method} of {', '.join(models)}"
        found = {name: header for name in self._planned if (header := self._header(name)) is not None}
        return Stream([self._taken(name) for name in found], found, self._options, label=label, config=self.base.config)

    @cached_property
    def ranks(self) -> dict[str, RankRule]:
        """By weight, the rank rules of those that the parameters of `phlora` choose.

        Raises:
            PosthocError: They choose none.
        """
        chosen = (name for places, name in self._weights.items() if self.choose(places)[0])
        found = {name: rule for name in chosen if (rule := self._settings(name).rule) is not None}
        if not found:
            raise PosthocError(f"The parameters of `merge_method: {NAME}` give no weight a rank: there is no adapter.")
        return found

    def choose(self, places: Sequence[Place]) -> tuple[list[Place], str]:
        """Of the places of a weight those that the parameters of `phlora` choose; if none, why."""
        settings = self._settings(self._weights[tuple(places)])
        if settings.rule is None:
            return [], "rank 0 (parameters)"
        return by_flags(embeddings=settings.embeddings, head=settings.head)(places)

    @property
    def exact(self) -> bool:
        """Whether the parameters of `phlora` ask for LAPACK's full SVD."""
        return any(self._settings(name).exact for name in self._planned)

    @cached_property
    def _weights(self) -> dict[tuple[Place, ...], str]:
        """All weights that can be carried, by their places."""
        carried = make_plan(self.base, self.result, choose=everything).carried
        return {places: name for name, places in carried.items()}

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
        """What a tensor of the result will be; None if there will be none."""
        target = self._planned[name]
        models = [self._tuned(name)] if self.by_phlora else target.tensor_task.model_order
        headers = [header for model in models if (header := self._stored_header(model, name)) is not None]
        if not headers:
            return None
        inputs = target.tensor_task.gather_tensors
        shape = headers[0].shape if isinstance(inputs, GatherTensors) else shape_of(inputs, self._options)
        dtype = reduce(torch.promote_types, (header.dtype for header in headers))
        wanted = None if self.by_phlora else dtype_from_name(target.dtype)
        return Header(shape, wanted or dtype)

    def _stored_header(self, model: ModelReference, name: str) -> Header | None:
        headers, weight = self._as_read(model).headers, self._planned[name].tensor_task.output_weight
        return next((headers[one] for one in (name, *(weight.tied_names or ())) if one in headers), None)

    def _open(self, model: ModelReference) -> Folder:
        folder = Path(folder_of(model) or "")
        local = Path(model.model.path).exists()
        # A model of the hub lies in a folder that is named by its commit.
        return Folder(folder, label=str(model) if local else model.model.path, revision=None if local else folder.name)

    def _as_read(self, model: ModelReference) -> Checkpoint:
        """A model under the names, and in the type, in which the merge reads it."""
        if model not in self._read:
            stored, dtype = self._models[model], dtype_from_name(self._config.dtype)
            weights = [task.tensor_task.output_weight for task in self._planned.values()]
            read = Stored(stored, weights, dtype)
            self._read[model] = stored if read.headers == stored.headers else read
        return self._read[model]

    def _same_layers(self, arch: ModelArchitecture) -> None:
        for name, module in self._config.modules.items():
            layers = arch.modules[name].architecture.num_layers(
                self._base.config(trust_remote_code=self._options.trust_remote_code)
            )
            at = 0
            for piece in module.slices:
                for source in piece.sources:
                    if source.layer_range[0] != at:
                        raise MismatchError(
                            f"Slices renumber layers: layer {at} of the result is layer {source.layer_range[0]} of "
                            f"`{source.model}`. No adapter of `{self._base}` leads there."
                        )
                at += piece.sources[0].layer_range[1] - piece.sources[0].layer_range[0]
            if at != layers:
                raise MismatchError(
                    f"The result has {at} layers, `{self._base}` has {layers}. No adapter of it leads there."
                )


def _plain(base: ModelReference | None) -> ModelReference:
    if base is None:
        raise PosthocError("The configuration names no `base_model`. Say with `--base` which model the adapter is for.")
    if base.lora is not None:
        raise PosthocError(
            f"The base `{base}` is a model with an adapter; ours would need that one too. Merge the two first."
        )
    return base
