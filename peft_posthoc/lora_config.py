"""The PEFT surface: `LoraConfig.from_delta` and `get_peft_model(..., init="posthoc")`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Literal, Self

import peft
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from peft_posthoc.errors import LeftOutWarning
from peft_posthoc.extraction.extract import extract
from peft_posthoc.extraction.plan import by_flags
from peft_posthoc.extraction.reasons import LeftOut, told
from peft_posthoc.lora_layers import START, Delta, fill_what_peft_builds, plain_start
from peft_posthoc.models.layout import Place
from peft_posthoc.ranks.rules import Rank
from peft_posthoc.ranks.safe import safe_rank
from peft_posthoc.sources import Source, open_pair

# These change what a LoRA layer computes, or the base weights, so that factors of a delta would mean something else.
_NOT_A_DELTA = (
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")


class LoraConfig(peft.LoraConfig):  # type: ignore[misc]
    """PEFT's `LoraConfig`, which can also be made from two checkpoints. What it saves is plain PEFT.

    A model to which PEFT, or a library on top of it, gives an adapter by such a configuration has the delta in it.
    """

    delta: Delta | None = None
    """The findings of `from_delta`. No dataclass field: it is not part of the saved configuration."""

    @classmethod
    def from_delta(
        cls,
        base: Source,
        tuned: Source,
        r: Rank = 32,
        *,
        base_revision: str | None = None,
        tuned_revision: str | None = None,
        exact: bool = False,
        device: str = "cpu",
        progress: bool = False,
        **fields: Any,
    ) -> Self:
        """Extract LoRA factors from the difference of two models, and the configuration that goes with them.

        Args:
            base: The model before: a folder, a file, a hub id, a module or a state dict.
            tuned: The same model after any kind of full fine-tuning.
            r: An int is a rank; a float in (0, 1] is the share of every delta's energy to keep, or any other rule that
                `extract` takes as its `rank`. `r` becomes the largest rank that this needs, rounded up to one that
                every engine scales alike (8, or a multiple of 16).
            base_revision: Branch, tag or commit, where `base` is a hub id.
            tuned_revision: The same for `tuned`.
            exact: Use LAPACK's full SVD for every weight.
            device: Where to factor.
            progress: Show a progress bar on stderr.
            **fields: Any field of `peft.LoraConfig`. `target_modules`, `exclude_modules`, `layers_to_transform` and
                `rank_pattern` choose what is extracted (by default every linear layer but the head),
                `target_parameters` stacked experts beside it. `modules_to_save` get the tuned model's weights. The
                scale of `lora_alpha` (by default `r`), `alpha_pattern` and `use_rslora` is divided out of the factors,
                so that the layers add the delta whatever it is.

        Raises:
            CheckpointError: A checkpoint cannot be read.
            MismatchError: The two are not states of one model.
            NothingToCarryError: Nothing changed that these modules can carry.
            ValueError: A field asks for something that is not a plain LoRA.
        """
        strange = [name for name in _NOT_A_DELTA if fields.get(name)]
        init = fields.get("init_lora_weights", True)
        if strange or not any(init is plain or (isinstance(init, str) and init == plain) for plain in _PLAIN_INITS):
            what = ", ".join(f"`{name}`" for name in strange) or f"`init_lora_weights={init!r}`"
            raise ValueError(
                f"`from_delta` cannot honour {what}: its layers would not compute base + b @ a. Leave it out."
            )
        before, after = open_pair(base, tuned, base_revision=base_revision, tuned_revision=tuned_revision)
        asked = cls(r=r if isinstance(r, int) else 1, **fields)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LeftOutWarning)  # It is among what the report warns of.
            adapter = extract(
                before,
                after,
                r,
                choose=lambda places: _choose(asked, places),
                rank_pattern=asked.rank_pattern,
                experts="fused" if asked.target_parameters else "none",
                exact=exact,
                device=device,
                progress=progress,
            )
        if asked.target_parameters and not any(adapter.plan.slots[module].kind.stacked for module in adapter.factors):
            raise ValueError(
                f"`target_parameters={sorted(asked.target_parameters)}` names no stacked experts that changed."
            )
        rank = r if isinstance(r, int) else safe_rank(adapter.rank)
        fields.setdefault("lora_alpha", rank)
        fields.setdefault("task_type", adapter.plan.layout.task_type)
        fields["fan_in_fan_out"] = fields.get("fan_in_fan_out") or adapter.plan.layout.fan_in_fan_out
        if fields.get("target_modules") in (None, "all-linear"):
            fields["target_modules"] = adapter.file.target_modules
        config = cls(r=rank, **fields)
        config.delta = Delta.of(adapter, before, after, config)
        config.init_lora_weights = START
        fill_what_peft_builds()
        if adapter.report.warnings:
            warnings.warn(" ".join(adapter.report.warnings), LeftOutWarning, stacklevel=2)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration as a plain one of PEFT's."""
        with plain_start(self):
            super().save_pretrained(save_directory, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what a copy, or another process, was given."""
        self.__dict__.update(state)
        fill_what_peft_builds()


def _choose(config: LoraConfig, places: Sequence[Place]) -> tuple[Place, ...] | LeftOut:
    """The places that PEFT would adapt with this configuration."""
    if places[0].kind.stacked:
        if any(f".{places[0].parameter}".endswith(f".{end}") for end in config.target_parameters or ()):
            return tuple(places)
        return told("not among the parameters that the configuration targets")
    automatic = config.target_modules is None or config.target_modules == "all-linear"
    candidates = by_flags()(places) if automatic else tuple(places)
    if isinstance(candidates, LeftOut):
        return told(f"{' '.join(candidates.about)} (carried where `target_modules` names it)")

    def wanted(place: Place) -> bool:
        leaf = place.module.rpartition(".")[2]
        probe = dataclasses.replace(config, target_modules=[leaf]) if automatic else config
        return bool(check_target_module_exists(probe, place.module))

    chosen = tuple(place for place in candidates if wanted(place))
    return chosen or told("not among the modules that the configuration targets")


def get_peft_model(
    model: nn.Module,
    peft_config: peft.PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    init: Literal["posthoc"] | None = None,
    tuned: Source | None = None,
) -> peft.PeftModel:
    """PEFT's `get_peft_model`, which can also start the adapter from a delta.

    Args:
        model: The base model. Its weights are not changed.
        peft_config: As in PEFT. With `init="posthoc"`, one from `LoraConfig.from_delta`, or any LoRA configuration
            together with `tuned`.
        adapter_name: As in PEFT.
        mixed: As in PEFT.
        autocast_adapter_dtype: As in PEFT.
        revision: As in PEFT.
        low_cpu_mem_usage: As in PEFT.
        init: `"posthoc"` where the adapter must start from a delta; None where it may start as PEFT has it.
        tuned: The fine-tune to extract from, with `model` as its base.

    Returns:
        A `peft.PeftModel`. Capacity beyond the extracted rank keeps PEFT's start: zero in effect, but trainable.

    Raises:
        AdapterError: The factors do not fit the model.
        ValueError: `init` is unknown, or there is nothing to start from.
    """
    own = (mixed, autocast_adapter_dtype, revision, low_cpu_mem_usage)
    if init is None:
        if tuned is not None:
            raise ValueError('`tuned=` needs `init="posthoc"`.')
        return _peft_get_peft_model(model, peft_config, adapter_name, *own)
    if init != "posthoc":
        raise ValueError(f'`init` must be None or "posthoc". Got {init!r}.')
    if tuned is not None:
        if not isinstance(peft_config, peft.LoraConfig):
            raise ValueError(f"Only a LoRA configuration can hold a delta. Got {type(peft_config).__name__}.")
        with plain_start(peft_config):
            fields = {f.name: getattr(peft_config, f.name) for f in dataclasses.fields(peft_config) if f.init}
        peft_config = LoraConfig.from_delta(model, tuned, **fields)
    if isinstance(model, peft.PeftModel):
        raise ValueError("The model has an adapter already: `peft_posthoc.add_adapter` puts another one beside it.")
    if getattr(peft_config, "delta", None) is None:
        raise ValueError('`init="posthoc"` needs a configuration made by `LoraConfig.from_delta`, or `tuned=`.')
    return _peft_get_peft_model(model, peft_config, adapter_name, *own)


_peft_get_peft_model = peft.get_peft_model


def add_adapter(model: nn.Module, adapter_name: str, peft_config: peft.LoraConfig) -> None:
    """Give a model that has adapters one more, which starts from a delta.

    Args:
        model: A `peft.PeftModel`, or a model of transformers. On an error it is as it was.
        adapter_name: Of the new adapter, which is not made the active one of a `peft.PeftModel`.
        peft_config: From `LoraConfig.from_delta`.

    Raises:
        AdapterError: The factors do not fit the model, it holds the fine-tune already, or it has such an adapter.
        ValueError: The configuration holds no delta.
    """
    if getattr(peft_config, "delta", None) is None:
        raise ValueError("`add_adapter` needs a configuration made by `LoraConfig.from_delta`.")
    if isinstance(model, peft.PeftModel):
        model.add_adapter(adapter_name, peft_config)
        return
    had_adapters: Any = getattr(model, "_hf_peft_config_loaded", False)
    try:
        model.add_adapter(peft_config, adapter_name)  # type: ignore[operator]  # transformers' order
    except Exception:
        model._hf_peft_config_loaded = had_adapters  # It says so before it tries.
        raise


def patch_peft() -> None:
    """Put `from_delta` on `peft.LoraConfig` and `init=` on `peft.get_peft_model`, for those who want these names."""
    peft.LoraConfig.from_delta = LoraConfig.from_delta
    peft.get_peft_model = get_peft_model
