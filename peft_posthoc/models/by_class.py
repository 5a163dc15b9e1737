"""The class that a configuration names, of transformers or diffusers, and its model without values."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peft_posthoc.errors import CheckpointError, PosthocError
from peft_posthoc.models.config import architecture
from peft_posthoc.models.remote_code import without_code


def class_of(name: str) -> Any:
    """The class of models that transformers has by this name; None if it has none."""
    import transformers

    cls = getattr(transformers, name, None)
    is_model = isinstance(cls, type) and issubclass(cls, nn.Module)
    return cls if is_model and getattr(cls, "config_class", None) is not None else None


# How configurations call the number of their layers, blocks or experts, and the most that are built.
_COUNT = re.compile(r"(?!.*size).*(layers?|blocks|experts|depth)")
MOST = 10_000


def build(config: Mapping[str, Any]) -> nn.Module | None:
    """The model of a configuration, without values, if transformers has its class, or diffusers.

    Raises:
        CheckpointError: The class cannot be built with what the configuration says.
    """
    check_counts(config)
    try:
        return _built(config)
    except PosthocError:
        raise
    except Exception as error:
        # Every class of the two libraries fails in its own way on numbers and names that it does not expect.
        what = architecture(config) or config.get("_class_name")
        raise CheckpointError(
            f"A {what} cannot be built as its configuration says: {type(error).__name__}: {error}"
        ) from error


def check_counts(config: Mapping[str, Any]) -> None:
    """Refuse more layers or experts than anybody can wait for.

    Raises:
        CheckpointError: The configuration has more.
    """
    for part in (config, *(own for own in config.values() if isinstance(own, dict))):
        for key, value in part.items():
            if isinstance(value, int) and value > MOST and _COUNT.fullmatch(key):
                raise CheckpointError(f"The configuration says `{key}` is {value}; more than {MOST} are not built.")


def _built(config: Mapping[str, Any]) -> nn.Module | None:
    name = architecture(config)
    if not name:
        return _component(config)
    cls = class_of(name)
    if cls is None:
        return None
    with torch.device("meta"):
        model: nn.Module = cls(cls.config_class.from_dict(without_code(config)))
    return model


def _component(config: Mapping[str, Any]) -> nn.Module | None:
    name = config.get("_class_name")
    if not isinstance(name, str) or importlib.util.find_spec("diffusers") is None:
        return None
    import diffusers

    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        return None
    with torch.device("meta"):
        model: nn.Module = cls.from_config(without_code(config))  # type: ignore[attr-defined]
    return model
