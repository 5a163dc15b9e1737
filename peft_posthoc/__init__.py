"""Post-hoc LoRA extraction (PHLoRA, arXiv 2509.10971): two checkpoints in, a portable adapter and its account out."""

from typing import TYPE_CHECKING, Any

from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.errors import (
    AdapterError,
    CheckpointError,
    MismatchError,
    MissingExtraError,
    NothingToCarryError,
    PosthocError,
)
from peft_posthoc.extraction.adapter import Adapter
from peft_posthoc.extraction.extract import extract
from peft_posthoc.extraction.preflight import Preflight, preflight
from peft_posthoc.extraction.report import Report
from peft_posthoc.extraction.series import Series
from peft_posthoc.formats.export import export
from peft_posthoc.formats.result import Exported
from peft_posthoc.inspection.inspection import Inspection, inspect
from peft_posthoc.linalg.lowrank import LowRank
from peft_posthoc.linalg.spectrum import RankRule, Spectrum
from peft_posthoc.linalg.svd import truncated_svd
from peft_posthoc.ranks.budget import budget
from peft_posthoc.ranks.rules import above_noise, fixed, keep_energy, keep_error, limited, several
from peft_posthoc.resizing.resize import combine, resize, spectra
from peft_posthoc.resizing.resized import Resized, ResizeReport
from peft_posthoc.serving.check import Check, check
from peft_posthoc.serving.fix import Fixed, fix
from peft_posthoc.sources import open_checkpoint
from peft_posthoc.verification.verify import Verification, verify

if TYPE_CHECKING:
    from peft_posthoc.lora_config import LoraConfig, get_peft_model, patch_peft

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
    from peft_posthoc import lora_config as config

    return getattr(config, name)
