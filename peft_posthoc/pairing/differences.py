"""What differs between two states of one model beside tensors, and what people are told of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.pairing.configurations import configuration_differences
from peft_posthoc.pairing.difference import Difference
from peft_posthoc.pairing.tokenizers import tokenizer_differences
from peft_posthoc.text import asked

_MOST = 8
# Characters of a command's argument that anybody copies.
_LONGEST = 500


def differences(base: Checkpoint, tuned: Checkpoint) -> tuple[Difference, ...]:
    """What no adapter carries, since it is in no tensor: of configuration, tokenizer and generation.

    Args:
        base: As it was opened: a view of it may have lost its folder.
        tuned: The same.

    Raises:
        CheckpointError: A file on the hub could not be fetched.
    """
    return (*configuration_differences(base, tuned), *tokenizer_differences(base, tuned))


def told_as_warnings(found: Iterable[Difference]) -> list[str]:
    """A sentence on what changes outputs, and what can be done."""
    material = [one for one in found if one.material]
    warnings = []
    if configured := [one for one in material if one.of == "configuration"]:
        warnings.append(
            "Outputs depend on the configuration too, which no adapter carries: the base keeps its own. Base -> tuned: "
            f"{_listed(configured)}. {_served(configured)}"
        )
    if worded := [one for one in material if one.of != "configuration"]:
        files = sorted({"its tokenizer" if one.of == "tokenizer" else "its generation_config.json" for one in worded})
        warnings.append(
            "An adapter is used with the tokenizer and the generation settings of the base, and the tuned model has "
            f"others. Base -> tuned: {_listed(worded)}. Give {' and '.join(files)} to whatever serves the adapter "
            f"(`{asked('with_tokenizer', True)}` copies it beside it)."
        )
    return warnings


def told_as_notes(found: Iterable[Difference]) -> list[str]:
    """A sentence on what else is not the same: limits, defaults, names."""
    others = [one for one in found if not one.material]
    return [f"Also other in tuned than in base, and not in an adapter: {_listed(others)}."] if others else []


def _listed(found: Sequence[Difference]) -> str:
    more = f", and {len(found) - _MOST} more" if len(found) > _MOST else ""
    return ", ".join(one.told for one in found[:_MOST]) + more


def _served(found: Sequence[Difference]) -> str:
    """How an engine gets the tuned model's configuration."""
    wanted: dict[str, Any] = {}
    for one in found:
        *within, key = one.key.split(".")
        part = wanted
        for name in within:
            part = part.setdefault(name, {})
        part[key] = one.tuned
    text = json.dumps(wanted, sort_keys=True)
    if len(text) > _LONGEST or "'" in text or "`" in text:
        return "Serve the base with these values in its config.json."
    return f"Serve the base with `vllm serve --hf-overrides '{text}'`, or with these values in its config.json."
