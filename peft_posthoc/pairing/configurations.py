"""Two configurations of one model, compared as its class reads them: by what changes outputs."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.models.by_class import check_counts
from peft_posthoc.models.remote_code import without_code
from peft_posthoc.pairing.difference import Difference, alike

# What does not change what a model computes, or is told elsewhere. Any other key that differs is told.
_BOOKKEEPING = re.compile(
    r"_.*|.*version|(torch_)?dtype|torchscript|(use_)?return_dict|architectures|auto_map|tokenizer_class"
    r"|.*attn_impl(ementation)?|.*experts_implementation|.*flash_attn.*|pretraining_tp|unsloth_.*|transformers\.js_.*"
    r"|label2id|num_labels|problem_type|finetuning_task|task_specific_params"
    r"|chunk_size_feed_forward|output_router_logits|keys_to_ignore_at_inference|use_cache"
    r"|vocab_size|quantization_config"  # the vocabulary's options, and the checkpoint's own check
)
_TRAINING = re.compile(
    # ESM and NLLB-MoE scale by `token_dropout` when they are not trained, too.
    r"(?!.*token_dropout).*(dropout|pdrop|layerdrop|droppath|drop_path|drop_rate|drop_connect).*"
    r"|.*(loss|jitter|initializer|label_smoothing|gradient_checkpointing|neftune).*|router_aux_.*|(.*_)?init(_.*)?"
    r"|apply_spec_augment|mask_(time|feature)_(prob|length|min_masks)|is_training"
)
_LENGTH = re.compile(
    r"max_position_embeddings|n_positions|n_ctx|seq_length|model_max_length|max_seq(uence)?_?len(gth)?"
)
# Rotary positions that depend on that length.
_BY_LENGTH = ("dynamic", "yarn", "longrope")


def configuration_differences(base: Checkpoint, tuned: Checkpoint) -> list[Difference]:
    """What differs between the configurations of two checkpoints, but for bookkeeping and what only training reads."""
    if base.config is None or tuned.config is None:
        return []
    before, after = _of_one_type(base.config, tuned.config)
    if _telling(before) == _telling(after):
        return []  # transformers is not even imported
    one, other = _as_read(before), _as_read(after)
    if one is not None and other is not None:
        before, after = one, other
    before, after = _telling(_one_spelling(before)), _telling(_one_spelling(after))
    others = _of_generation()
    if before.get("model_type") != after.get("model_type"):
        others |= before.keys() ^ after.keys()
    apart = _holds_its_head(base) or _holds_its_head(tuned)
    return [
        Difference.between("configuration", key, one, other, material=material)
        for key, one, other, material in _unlike(before, after, but=others)
        if not _same_function(one, other) and (apart or not key.endswith("tie_word_embeddings"))
    ]


def _of_one_type(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The two, or the part of one that is a model of the other's type: a language model taken out of a larger one."""

    def part(whole: Mapping[str, Any], of: Mapping[str, Any]) -> Mapping[str, Any]:
        inner = [one for one in whole.values() if isinstance(one, Mapping) and one.get("model_type")]
        same = [one for one in inner if one["model_type"] == of.get("model_type")]
        return same[0] if same and whole.get("model_type") != of.get("model_type") else whole

    return part(base, tuned), part(tuned, base)


def _telling(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without bookkeeping and what only training reads."""
    return {
        key: _telling(one) if key.endswith("_config") and isinstance(one, Mapping) else one
        for key, one in config.items()
        if not (_BOOKKEEPING.fullmatch(key) or _TRAINING.fullmatch(key))
    }


def _unlike(
    base: Mapping[str, Any], tuned: Mapping[str, Any], *, but: Collection[str], within: str = ""
) -> Iterator[tuple[str, Any, Any, bool]]:
    """By key: both values, and whether outputs depend on it."""
    rotary = str([side.get("rope_parameters") for side in (base, tuned)])
    for key in {**base, **tuned}:
        one, other = base.get(key), tuned.get(key)
        if key.endswith("_config") and isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _unlike(one, other, but=but, within=f"{within}{key}.")
        elif key not in but and not alike(one, other):
            length = _LENGTH.fullmatch(key) and not any(kind in rotary for kind in _BY_LENGTH)
            yield f"{within}{key}", one, other, not length and key != "id2label"


def _as_read(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the class makes of a configuration, with its defaults and in its spelling; None if it cannot, or is none."""
    try:
        check_counts(config)
        if name := config.get("_class_name"):
            return _of_diffusers(str(name)) | dict(config)
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of older spellings
            read: dict[str, Any] = CONFIG_MAPPING[config["model_type"]].from_dict(without_code(config)).to_dict()
    except Exception:
        # Each class fails in its own way on what it does not expect. The values are compared as they are written.
        return None
    return read


def _of_diffusers(name: str) -> dict[str, Any]:
    """The defaults of a component's class."""
    if find_spec("diffusers") is None:
        return {}
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def _one_spelling(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with rotary positions as transformers 5 spells them: all in `rope_parameters`."""
    found = dict(config)
    for key, one in config.items():
        if key.endswith("_config") and isinstance(one, Mapping):
            found[key] = _one_spelling(one)
    if all(str(name).startswith("LABEL_") for name in (found.get("id2label") or {}).values()):
        found.pop("id2label", None)  # nobody named them
    older = {key: found.pop(key) for key in ("rope_theta", "partial_rotary_factor") if found.get(key) is not None}
    parts = [found.pop(key, None) for key in ("rope_scaling", "rope_parameters")]
    rotary = older | {key: one for part in parts if isinstance(part, Mapping) for key, one in part.items()}
    oldest = rotary.pop("type", None)
    rotary.setdefault("rope_type", oldest or "default")
    if any(isinstance(one, Mapping) for one in rotary.values()):  # each kind of layer has its own
        del rotary["rope_type"]
    if rotary.get("partial_rotary_factor") == 1:
        del rotary["partial_rotary_factor"]
    return found | ({} if rotary == {"rope_type": "default"} else {"rope_parameters": rotary})


def _of_generation() -> set[str]:
    """The keys of generation, which older versions wrote into the model's configuration."""
    from transformers import GenerationConfig

    return set(GenerationConfig().to_dict())


def _same_function(base: Any, tuned: Any) -> bool:
    """Whether they are two names of one activation, such as `silu` and `swish`."""
    if not (isinstance(base, str) and isinstance(tuned, str)):
        return False
    from transformers.activations import ACT2FN

    x = torch.linspace(-4, 4, 33)
    return base in ACT2FN and tuned in ACT2FN and torch.allclose(ACT2FN[base](x), ACT2FN[tuned](x), atol=1e-5)


def _holds_its_head(checkpoint: Checkpoint) -> bool:
    """Whether there are two matrices with a row for each token: what a configuration says of ties counts only then."""
    config = checkpoint.config or {}
    rows = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return sum(len(one.shape) == 2 and one.shape[0] == rows for one in checkpoint.headers.values()) > 1
