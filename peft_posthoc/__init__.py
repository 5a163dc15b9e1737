"""Post-hoc LoRA extraction (PHLoRA, arXiv 2509.10971): two checkpoints in, a portable adapter and its account out."""

from typing import TYPE_CHECKING, Any

from peft_posthoc.adapter import Adapter
from peft_posthoc.budget import budget
from peft_posthoc.check import Check, check
from peft_posthoc.checkpoint import Checkpoint, open_checkpoint
from peft_posthoc.errors import (
    AdapterError,
    CheckpointError,
    MismatchError,
    MissingExtraError,
    NothingToCarryError,
    PosthocError,
)
from peft_posthoc.export import export
from peft_posthoc.exported import Exported
from peft_posthoc.extract import extract
from peft_posthoc.fix import Fixed, fix
from peft_posthoc.inspection import Inspection, inspect
from peft_posthoc.preflight import Preflight, preflight
from peft_posthoc.rank import RankRule, Spectrum, above_noise, fixed, keep_energy, keep_error, limited, several
from peft_posthoc.report import Report
from peft_posthoc.resize import combine, resize, spectra
from peft_posthoc.resized import Resized, ResizeReport
from peft_posthoc.series import Series
from peft_posthoc.svd import LowRank, truncated_svd
from peft_posthoc.verify import Verification, verify

if TYPE_CHECKING:
    from peft_posthoc.config import LoraConfig, get_peft_model, patch_peft

__all__ = [
    "Adapter",
    "AdapterError",
    "Check",
    "Checkpoint",
    "CheckpointError",
    "Exported",
    "Fixed",
    "Inspection",
    "LoraConfig",
    "LowRank",
    "MismatchError",
    "MissingExtraError",
    "NothingToCarryError",
    "PosthocError",
    "Preflight",
    "RankRule",
    "Report",
    "ResizeReport",
    "Resized",
    "Series",
    "Spectrum",
    "Verification",
    "above_noise",
    "budget",
    "check",
    "combine",
    "export",
    "extract",
    "fix",
    "fixed",
    "get_peft_model",
    "inspect",
    "keep_energy",
    "keep_error",
    "limited",
    "open_checkpoint",
    "patch_peft",
    "preflight",
    "resize",
    "several",
    "spectra",
    "truncated_svd",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Importing peft takes seconds: only when it is asked for.
    if name not in ("LoraConfig", "get_peft_model", "patch_peft"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from peft_posthoc import config

    return getattr(config, name)
