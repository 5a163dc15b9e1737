"""Layers to a PEFT adapter folder, and back to factors.

The form written here is portable: it loads and computes the same in PEFT, vLLM, SGLang, LoRAX, TGI, TensorRT-LLM, NIM
and llama.cpp. One rank for the whole file and `lora_alpha` equal to it make the scale exactly one by every engine's
formula; only `lora_A` and `lora_B` tensors are in it, and only configuration keys that PEFT has known since 0.6.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_posthoc.checkpoint import Checkpoint
from peft_posthoc.errors import AdapterError, NothingToCarryError
from peft_posthoc.factor import Layer, Skipped
from peft_posthoc.layout import KINDS, LayerKind, target_modules
from peft_posthoc.plan import Plan
from peft_posthoc.report import Report

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
REPORT = "phlora_report.json"

# Engines fuse these into one kernel and expect all of a group or none.
_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
)


@dataclass(frozen=True)
class Adapter:
    """The factors of every carried weight, and an account of everything else."""

    layers: Mapping[str, Layer]
    """By weight name."""
    skipped: Mapping[str, Skipped]
    """By weight name."""
    plan: Plan
    dtype: torch.dtype
    """Of the saved factors."""
    provenance: Mapping[str, Any]
    """Base and tuned with revisions, options, library versions."""

    @classmethod
    def of(
        cls,
        base: Checkpoint,
        tuned: Checkpoint,
        plan: Plan,
        outcomes: Iterable[Layer | Skipped],
        *,
        dtype: torch.dtype | None,
        options: Mapping[str, Any],
    ) -> Adapter:
        """Put together what the loop found.

        Raises:
            NothingToCarryError: No layer was factored.
        """
        rows = list(outcomes)
        _require_change(rows, base.label, tuned.label)
        layers = {row.weight: row for row in rows if isinstance(row, Layer)}
        return cls(
            layers=layers,
            skipped={row.weight: row for row in rows if isinstance(row, Skipped)},
            plan=plan,
            dtype=dtype or tuned.headers[next(iter(layers))].dtype,
            provenance={
                "base": base.label,
                "base_revision": base.revision,
                "tuned": tuned.label,
                "tuned_revision": tuned.revision,
                "layout": plan.layout.origin,
                "options": dict(options),
                "versions": {
                    "peft-posthoc": metadata.version("peft-posthoc"),
                    "python": platform.python_version(),
                    "safetensors": metadata.version("safetensors"),
                    "torch": torch.__version__,
                },
            },
        )

    @property
    def rank(self) -> int:
        """The largest rank that a layer keeps."""
        return max(len(layer.factors.s) for layer in self.layers.values())

    @property
    def file_rank(self) -> int:
        """The one rank of the file, to which every layer is padded with zeros."""
        return safe_rank(self.rank)

    @cached_property
    def factors(self) -> dict[str, tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]]:
        """By module: `a` and `b` at their true ranks, in float32, for every module that something is carried in."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for layer in self.layers.values():
            first = layer.places[0].kind
            for place in layer.places:
                a, b = layer.factors.a, layer.factors.b
                # A tied weight is stored one way in the embedding and the other way in the head.
                turned = place.kind.transposed != first.transposed
                found[place.module] = (b.mT, a.mT) if turned else (a, b)
        return found

    @cached_property
    def report(self) -> Report:
        """What is carried and how well, what is left out, why, and how large that is."""
        return Report.of(self)

    def modules(self) -> list[str]:
        """Every module in the file: those with factors, and those that must be there as zeros beside them."""
        return _complete(self.factors, self.plan)

    def tensors(self) -> dict[str, Tensor]:
        """The file's tensors, padded to one rank, in the saved dtype, on the CPU.

        Raises:
            AdapterError: A factor overflows the dtype.
        """
        rank = self.file_rank
        tensors: dict[str, Tensor] = {}
        for module in self.modules():
            kind, m, n = self.plan.slots[module]
            a, b = torch.zeros(rank, n, dtype=self.dtype), torch.zeros(m, rank, dtype=self.dtype)
            if module in self.factors:
                own_a, own_b = self.factors[module]
                a[: len(own_a)] = own_a.to(self.dtype)
                b[:, : len(own_a)] = own_b.to(self.dtype)
                if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                    raise AdapterError(f"The factors of `{module}` overflow {self.dtype}. Choose another `--dtype`.")
            tensors |= kind.tensors(f"{PREFIX}{module}", a, b)
        return tensors

    def config(self) -> dict[str, Any]:
        """The file's configuration."""
        layout = self.plan.layout
        return {
            "base_model_name_or_path": self.provenance["base"],
            "bias": "none",
            "fan_in_fan_out": layout.fan_in_fan_out,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": self.file_rank,
            "lora_dropout": 0.0,
            "modules_to_save": None,
            "peft_type": "LORA",
            "r": self.file_rank,
            "revision": self.provenance["base_revision"],
            "target_modules": target_modules(self.modules(), layout),
            "task_type": layout.task_type,
        }

    def save(self, folder: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the adapter: all of it, or nothing.

        Args:
            folder: A folder that does not exist yet, or is empty.
            force: Replace an adapter that is there.

        Raises:
            AdapterError: The folder holds something, or cannot be written.
        """
        target = Path(folder)
        check_target(target, force=force)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # Beside the target, so that moving it into place is a rename within one file system.
            staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        except OSError as error:
            raise AdapterError(f"Cannot write to `{target.parent}`: {error.strerror or error}.") from error
        try:
            made = staging / "new"
            made.mkdir()
            details = json.dumps(self.provenance, sort_keys=True)
            save_file(self.tensors(), made / WEIGHTS, metadata={"format": "pt", "phlora": details})
            _sort_metadata(made / WEIGHTS)
            _write_json(made / CONFIG, self.config())
            _write_json(made / REPORT, self.report.to_dict())
            # safetensors makes files that only their owner can read; servers often run as somebody else.
            (made / WEIGHTS).chmod((made / CONFIG).stat().st_mode)
            if target.exists():
                target.rename(staging / "old")
            made.rename(target)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise AdapterError(
                f"The adapter could not be written to `{target}`: {reason}. Nothing was left."
            ) from error
        finally:
            if (staging / "old").exists() and not target.exists():
                (staging / "old").rename(target)
            shutil.rmtree(staging, ignore_errors=True)
        return target


def _require_change(outcomes: Iterable[Layer | Skipped], base: str, tuned: str) -> None:
    """Raise unless something was carried.

    Raises:
        NothingToCarryError: Base and tuned are equal, or differ only in what is left out.
    """
    rows = list(outcomes)
    if any(isinstance(row, Layer) for row in rows):
        return
    changed = [row for row in rows if isinstance(row, Skipped) and row.delta_norm]
    if not changed:
        raise NothingToCarryError(f"`{base}` and `{tuned}` hold the same weights: there is nothing to extract.")
    worst = max(changed, key=lambda row: row.delta_norm or 0.0)
    raise NothingToCarryError(
        f"No weight that is carried differs between `{base}` and `{tuned}`. {len(changed)} others do; the largest "
        f"change is in `{worst.weight}`: {worst.reason}."
    )


def safe_rank(rank: int) -> int:
    """The smallest rank of at least `rank` that every engine scales by one: 8, or a multiple of 16.

    LoRAX and TGI pad other ranks themselves and then divide `lora_alpha` by the padded rank.
    """
    return 8 if rank <= 8 else -(-rank // 16) * 16


def check_target(folder: str | os.PathLike[str], *, force: bool = False) -> None:
    """See before the work whether an adapter may be written there.

    Raises:
        AdapterError: Something is there that must not be replaced.
    """
    target = Path(folder)
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise AdapterError(f"`{target}` exists and is not a folder.")
    if not any(target.iterdir()):
        return
    if not force:
        raise AdapterError(f"`{target}` exists and is not empty. Choose another folder, or replace it with `--force`.")
    if not (target / CONFIG).is_file():
        raise AdapterError(f"`{target}` is not an adapter folder; `--force` replaces nothing else.")


def _complete(carried: Iterable[str], plan: Plan) -> list[str]:
    """The carried modules, every other layer of the same name, and the members of the groups they belong to."""
    chosen = set(carried)
    by_pattern: dict[str, list[str]] = {}
    for module in plan.slots:
        by_pattern.setdefault(_pattern(module), []).append(module)
    for module in list(chosen):
        stem, dot, leaf = module.rpartition(".")
        for group in _TOGETHER:
            if leaf in group:
                chosen |= {sibling for part in group if (sibling := f"{stem}{dot}{part}") in plan.slots}
    for pattern in {_pattern(module) for module in chosen}:
        chosen.update(by_pattern.get(pattern, ()))
    return [module for module in plan.slots if module in chosen]


def _pattern(module: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def _sort_metadata(path: Path) -> None:
    """Make the file's header deterministic: safetensors writes the metadata's keys in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise AdapterError(f"The header of `{path}` has an unknown form.")
        file.seek(8)
        file.write(text.ljust(length))


class Factors(NamedTuple):
    """What an adapter folder holds for one module, its scale folded into `b`."""

    kind: LayerKind
    a: Float[Tensor, "r n"]
    b: Float[Tensor, "m r"]


def load_factors(folder: str | os.PathLike[str]) -> dict[str, Factors]:
    """Read the factors of any PEFT LoRA folder, by module.

    Raises:
        AdapterError: The folder is no LoRA adapter, or one whose scale this reader does not know.
    """
    where = Path(folder)
    try:
        config = json.loads((where / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(where / WEIGHTS)
        scale = _scale(config)
    except (OSError, ValueError, SafetensorError, KeyError, TypeError) as error:
        raise AdapterError(f"`{where}` is not a readable LoRA adapter: {error}.") from error
    found: dict[str, Factors] = {}
    seen: set[str] = set()
    for kind in KINDS:
        for name, a in tensors.items():
            if name.endswith(f".{kind.a_key}") and name not in seen:
                stem = name.removesuffix(kind.a_key)
                b = tensors.get(f"{stem}{kind.b_key}")
                if b is None:
                    raise AdapterError(f"`{where}` holds `{name}` without `{stem}{kind.b_key}`.")
                seen |= {name, f"{stem}{kind.b_key}"}
                found[stem.removeprefix(PREFIX).removesuffix(".")] = Factors(kind, a.float(), b.float() * scale)
    strangers = sorted(set(tensors) - seen)
    if strangers or not found:
        names = ", ".join(strangers[:5]) or "nothing else"
        raise AdapterError(f"`{where}` holds tensors that are no LoRA factors: {names}.")
    return found


def _scale(config: Mapping[str, Any]) -> float:
    for key in ("rank_pattern", "alpha_pattern", "use_dora", "lora_bias"):
        if config.get(key):
            raise ValueError(f"its configuration sets `{key}`, which is not supported here")
    r, alpha = int(config["r"]), float(config["lora_alpha"])
    return alpha / (r**0.5 if config.get("use_rslora") else r)
