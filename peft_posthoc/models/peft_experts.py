"""PEFT's reading of adapters that have the names of single experts."""

from __future__ import annotations


def names_of_experts(model_type: str) -> frozenset[str]:
    """The leaf names that PEFT takes for an expert's, wherever they occur; none if it does not stack their factors.

    PEFT 0.19 and newer turn factors of single experts into those of the stacked parameter where transformers 5 has one,
    for the models that it has in a table. Of all others it ignores factors of single experts in silence.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return frozenset()
    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, ()))
