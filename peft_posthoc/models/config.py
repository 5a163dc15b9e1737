"""Facts about a model that its configuration has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def architecture(config: Mapping[str, Any]) -> str:
    """The class that a configuration names, or nothing."""
    names = config.get("architectures") or [""]
    return str(names[0])


def task_type(class_name: str, *, encoder_decoder: bool) -> str | None:
    """PEFT's task type, for the tasks whose PEFT class adds nothing to the model."""
    if class_name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if class_name.endswith("ForConditionalGeneration") and encoder_decoder else None


def auto_mapping(cls: type) -> dict[str, str] | None:
    """What PEFT's auto classes find a model's class by, where no task says it; None where they would not import it."""
    known = cls.__module__.partition(".")[0] in ("transformers", "diffusers")
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__} if known else None


def of_plain_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that asks for no codes, those within it too."""
    return {
        key: of_plain_layers(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in ("quantization_config", "compression_config")
    }
