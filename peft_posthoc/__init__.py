"""Post-hoc LoRA extraction (PHLoRA, arXiv 2509.10971): two checkpoints in, a portable adapter and its account out."""

from typing import TYPE_CHECKING, Any

from peft_posthoc.adapter import Adapter
from peft_posthoc.checkpoint import Checkpoint, open_checkpoint
from peft_posthoc.errors import (
    AdapterError,
    CheckpointError,
    MismatchError,
    MissingExtraError,
    NothingToCarryError,
    PosthocError,
)
from peft_posthoc.extract import extract
from peft_posthoc.rank import RankRule, Spectrum, fixed, keep_energy
from peft_posthoc.report import Report
from peft_posthoc.svd import LowRank, truncated_svd

if TYPE_CHECKING:
    from peft_posthoc.config import LoraConfig, get_peft_model, patch_peft
    from peft_posthoc.verify import verify

__all__ = [
    "Adapter",
    "AdapterError",
    "Checkpoint",
    "CheckpointError",
    "LoraConfig",
    "LowRank",
    "MismatchError",
    "MissingExtraError",
    "NothingToCarryError",
    "PosthocError",
    "RankRule",
    "Report",
    "Spectrum",
    "extract",
    "fixed",
    "get_peft_model",
    "keep_energy",
    "open_checkpoint",
    "patch_peft",
    "truncated_svd",
    "verify",
]

# These import peft or transformers, which takes seconds: only when they are asked for.
_LAZY = {"LoraConfig": "config", "get_peft_model": "config", "patch_peft": "config", "verify": "verify"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
