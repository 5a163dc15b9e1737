"""Signs that base and tuned were given the wrong way round."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_posthoc.adapters.named_base import same_base
from peft_posthoc.checkpoints.checkpoint import Checkpoint, place_of
from peft_posthoc.files import regular

# What transformers' Trainer leaves beside a fine-tune's weights.
_OF_A_RUN = ("trainer_state.json", "optimizer.pt", "training_args.bin")
_LARGEST_CARD = 1_000_000


def swapped(base: Checkpoint, tuned: Checkpoint) -> str | None:
    """A question, where the base looks like the fine-tune and the tuned model does not; None where nothing does.

    Args:
        base: As it was opened.
        tuned: The same.
    """
    here, there = place_of(base), place_of(tuned)
    if here is None:
        return None
    ran = next((name for name in _OF_A_RUN if (here / name).is_file()), None)
    sign = f"`{base.label}` holds `{ran}` of a training run, and `{tuned.label}` does not" if ran else None
    if there is not None and any((there / name).is_file() for name in _OF_A_RUN):
        sign = None
    if named := next((one for one in _bases_of(here, base) if same_base(one, tuned.label)), None):
        sign = f"`{base.label}` names `{named}` as its own base"
    return f"Are base and tuned swapped? {sign}." if sign else None


def _bases_of(folder: Path, checkpoint: Checkpoint) -> Iterator[str]:
    """What a model says that it was made from: its configuration and its card."""
    told = [(checkpoint.config or {}).get("_name_or_path")]
    if (folder / "README.md").exists():
        found = _base_in_card(folder / "README.md")
        told += found if isinstance(found, list) else [found]
    own = {str(folder), checkpoint.label}
    yield from (one for one in told if isinstance(one, str) and one and one not in own)


def _base_in_card(card: Path) -> Any:
    """What a model's card says that it was made from; None where it cannot be read: it is for people."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        small = regular(card).stat().st_size <= _LARGEST_CARD
        return (metadata_load(card) or {}).get("base_model") if small else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
