from . import callbacks as callbacks
from .adapters.push import push
from .checkpoints.checkpoint import Checkpoint
from .errors import (
    AdapterError,
    CheckpointError,
    LeftOutWarning,
    MismatchError,
    MissingExtraError,
    NothingToCarryError,
    PosthocError,
)
from .extraction.adapter import Adapter
from .extraction.extract import extract
from .extraction.preflight import Preflight, preflight
from .extraction.report import Report
from .extraction.series import Series
from .fleet.extract_many import extract_many, preflight_many
from .fleet.fleet import Fleet
from .formats.export import export
from .formats.result import Exported
from .inspection.inspection import Inspection, inspect
from .linalg.lowrank import LowRank
from .linalg.spectrum import RankRule, Spectrum
from .linalg.svd import truncated_svd
from .lineage.whose import Whose, whose
from .lora_config import LoraConfig, add_adapter, get_peft_model, patch_peft
from .ranks.budget import budget
from .ranks.rules import above_noise, fixed, keep_energy, keep_error, limited, several
from .refinement.blocks import blocks
from .refinement.compensated import compensated
from .refinement.distil import distil
from .refinement.refine import refine
from .refinement.refined import Refined
from .resizing.report import ResizeReport
from .resizing.resize import combine, resize, spectra
from .resizing.resized import Resized
from .serving.check import Check, check
from .serving.fix import Fixed, fix
from .sources import open_checkpoint
from .texts.texts import Given, Prompts, Sampled
from .verification.findings import Verification
from .verification.verify import verify

__all__ = [
    "Adapter",
    "AdapterError",
    "Check",
    "Checkpoint",
    "CheckpointError",
    "Exported",
    "Fixed",
    "Fleet",
    "Given",
    "Inspection",
    "LeftOutWarning",
    "LoraConfig",
    "LowRank",
    "MismatchError",
    "MissingExtraError",
    "NothingToCarryError",
    "PosthocError",
    "Preflight",
    "Prompts",
    "RankRule",
    "Refined",
    "Report",
    "ResizeReport",
    "Resized",
    "Sampled",
    "Series",
    "Spectrum",
    "Verification",
    "Whose",
    "above_noise",
    "add_adapter",
    "blocks",
    "budget",
    "callbacks",
    "check",
    "combine",
    "compensated",
    "distil",
    "export",
    "extract",
    "extract_many",
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
    "preflight_many",
    "push",
    "refine",
    "resize",
    "several",
    "spectra",
    "truncated_svd",
    "verify",
    "whose",
]
