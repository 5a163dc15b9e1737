"""An adapter rewritten as every engine reads it, without loss; and what that leaves out, with its size."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.adapters.cast import cast, widest
from peft_posthoc.adapters.config import adapter_config
from peft_posthoc.adapters.names import PREFIX, own_name, target_modules
from peft_posthoc.adapters.plain import not_plain
from peft_posthoc.adapters.portable_rules import complete, targeted
from peft_posthoc.adapters.tensors import Factored
from peft_posthoc.adapters.writer import Contents, check_target, write_folder
from peft_posthoc.errors import AdapterError, noting
from peft_posthoc.linalg.norms import frobenius
from peft_posthoc.models.layout import ends
from peft_posthoc.models.model import Model
from peft_posthoc.models.slots import Slot
from peft_posthoc.progress import progress_bar
from peft_posthoc.ranks.safe import safe_rank
from peft_posthoc.serving.check import Check, check, chosen
from peft_posthoc.serving.rules.adapter_files import unknown_keys
from peft_posthoc.serving.rules.names import named_after_adapter, strangers, unfitting, without_prefix
from peft_posthoc.serving.rules.scale import misranked
from peft_posthoc.serving.subject import Subject
from peft_posthoc.text import as_flag, counted, size


@dataclass(frozen=True)
class LeftOut:
    """A tensor that has no place in an adapter that every engine serves."""

    tensor: str
    why: str
    bytes: int
    norm: float
    """Its own Frobenius norm."""
    change: float | None
    """||tensor - base|| / ||base||; None where no base tells, or where it is itself a change."""


@dataclass(frozen=True)
class Fixed:
    """The account of what `fix` wrote."""

    adapter: str
    out: str
    rewritten: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    rounding: float
    """The largest relative change of a factor by rounding to the saved dtype; 0 where the bits are the same."""
    check: Check
    """Of what was written."""

    def to_dict(self) -> dict[str, Any]:
        """The account as plain JSON values."""
        account = _account(self.adapter, self.rewritten, self.left_out, self.rounding)
        return {**account, "out": self.out, "check": self.check.to_dict()}

    def table(self) -> str:
        """The account for a terminal."""
        lines = ["Rewritten:", *(f"  {line}" for line in self.rewritten or ("nothing",))]
        if self.rounding:
            way_out = as_flag("dtype", "float32")
            lines.append(f"  rounded to the saved dtype, by at most {self.rounding:.1e} of a factor (`{way_out}`)")
        if self.left_out:
            lines += ["Left out, as no engine but PEFT loads it rightly:"]
        for row in self.left_out:
            change = "" if row.change is None else f", a change of {row.change:.2%}"
            lines.append(f"  {row.tensor}: {row.why}, {size(row.bytes)}, norm {row.norm:.4g}{change}")
        return "\n".join([*lines, "", self.check.table()])


def fix(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    engines: Iterable[str] = ("all",),
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: bool = False,
) -> Fixed:
    """Write an adapter again so that every engine computes what PEFT does with its factors.

    Scales (`lora_alpha`, rsLoRA, patterns) are folded into `b`, and all layers padded with zeros to one rank that no
    engine pads further, with `lora_alpha` equal to it: the scale is one by every formula. Names get PEFT's prefix and
    lose the adapter's name; the configuration gets the keys that all versions know. With the base, layers that engines
    miss are there as zeros. Whole weights, norms and biases are left out, and told with their sizes.

    Args:
        adapter: An adapter folder, by whatever tool.
        out: A folder that does not exist yet, or is empty.
        base: The folder of the model that it is to be served on.
        engines: Those that what was written is checked for, as in `check`.
        dtype: Of the saved factors; None for that of the adapter's.
        force: Replace an adapter that is there.
        progress: Show a progress bar on stderr.

    Raises:
        AdapterError: The adapter cannot be rewritten without loss, or not be written there. Nothing is written then.
        CheckpointError: The base cannot be read.
        ValueError: There is no such engine.
    """
    names, place = chosen(engines), Path(out).absolute()
    check_target(out, force=force)
    subject = Subject.read(adapter, base)
    _refuse(subject)
    rank = safe_rank(max(own.rank for own in subject.modules.values()))
    kinds = [subject.headers[name].dtype for own in subject.modules.values() for name in (own.a_name, own.b_name)]
    saved = dtype or widest(kinds)
    added = _absent(subject)
    tensors: dict[str, Tensor] = {}
    rounding = 0.0
    for module, own in progress_bar(subject.modules.items(), desc="Modules", progress=progress):
        factors, error = _rewritten(subject, module, own, rank, saved)
        tensors |= own.kind.tensors(f"{PREFIX}{module}", *factors)
        rounding = max(rounding, error)
    for module, slot in added.items():
        zeros = torch.zeros(rank, slot.n, dtype=saved), torch.zeros(slot.m, rank, dtype=saved)
        tensors |= slot.kind.tensors(f"{PREFIX}{module}", *zeros)
    config = _config(subject, rank, [*subject.modules, *added])
    extras = list(_extras(subject))
    left_out = tuple(row for row in extras if _matters(row))
    rewritten = tuple(_told(subject, rank, saved, added, config, len(extras) - len(left_out)))
    account = _account(subject.label, rewritten, left_out, rounding)
    provenance = {
        "fixed": subject.label,
        "base": config["base_model_name_or_path"],
        "versions": {name: metadata.version(name) for name in ("peft-posthoc", "safetensors", "torch")},
    }
    write_folder(place, Contents(tensors, config, account, provenance), force=force, called=out)
    with noting(f"The adapter is at `{out}`."):
        found = check(out, engines=names, base=base)
    return Fixed(subject.label, str(out), rewritten, left_out, rounding, found)


def _account(adapter: str, rewritten: Sequence[str], left_out: Sequence[LeftOut], rounding: float) -> dict[str, Any]:
    return {
        "format": 1,
        "adapter": adapter,
        "rewritten": list(rewritten),
        "left_out": [asdict(row) for row in left_out],
        "rounding": rounding,
    }


def _refuse(subject: Subject) -> None:
    """See that base + scale * `b @ a` is what PEFT computes, and that the base is the right one."""
    if why := not_plain(subject.config):
        raise AdapterError(f"`{subject.label}` is no plain LoRA delta: {why}. Nothing was written.")
    obstacles = {
        "holds vectors of DoRA (`use_dora`), which also rescales the base's weights": subject.magnitudes,
        "has other ranks than its configuration says, which PEFT does not load": misranked(subject),
        "holds factors of all experts at once": subject.fused_experts,
        "holds factors of convolutions": tuple(
            module for module, own in subject.modules.items() if len(own.a_shape) > 2
        ),
        "adapts what the base does not have": strangers(subject),
        "does not have the base's shapes": unfitting(subject, larger=True, smaller=True),
    }
    for what, culprits in obstacles.items():
        if culprits:
            raise AdapterError(
                f"`{subject.label}` cannot be rewritten without loss: it {what} (`{culprits[0]}`). Nothing was written."
            )


def _rewritten(
    subject: Subject, module: str, own: Factored, rank: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], float]:
    """The factors at that rank and scale one, and how much of them rounding changed."""
    # In float64 a product of a factor and a scale rounds by less than any saved dtype can tell.
    wanted = (
        subject.weights.read(own.a_name).double(),
        subject.weights.read(own.b_name).double() * subject.scale(module),
    )
    if not all(bool(torch.isfinite(exact).all()) for exact in wanted):
        raise AdapterError(f"The factors of `{module}` in `{subject.label}` hold NaN or infinity.")
    saved = cast(*wanted, dtype, module, rank=rank)
    a, b = saved[0][: own.rank], saved[1][:, : own.rank]
    return saved, max(_rounding(wanted[0], a.double()), _rounding(wanted[1].mT, b.double().mT))


def _rounding(exact: Tensor, saved: Tensor) -> float:
    """How much of a factor casting changed, but for the power of two that a row of it may have been moved by."""
    rows = torch.linalg.vector_norm(saved, dim=1) / torch.linalg.vector_norm(exact, dim=1)
    powers = rows.log2().round().nan_to_num(posinf=0, neginf=0)
    norm = frobenius(exact)
    return frobenius(torch.ldexp(saved, -powers[:, None]) - exact) / norm if norm else 0.0


def _absent(subject: Subject) -> dict[str, Slot]:
    """Modules that belong beside those in the file, by the base's class."""
    if subject.base is None:
        return {}
    base = subject.base
    held = subject.modules
    return {
        module: base.slots[module]
        for module in targeted(complete(held, base.slots), base.slots, base.layout)
        if module not in held
    }


def _config(subject: Subject, rank: int, modules: list[str]) -> dict[str, Any]:
    old, layout = subject.config, subject.base.layout if subject.base is not None else None
    return adapter_config(
        rank,
        _targets(subject, modules) if layout is None else target_modules(modules, layout),
        base=old.get("base_model_name_or_path"),
        revision=old.get("revision"),
        task_type=old.get("task_type"),
        auto_mapping=old.get("auto_mapping"),
        fan_in_fan_out=bool(old.get("fan_in_fan_out")) if layout is None else layout.fan_in_fan_out,
    )


def _targets(subject: Subject, modules: list[str]) -> list[str]:
    """The adapter's own list where it covers all that is in the file and no more is said; else full names."""
    old, filters = subject.config.get("target_modules"), ("exclude_modules", "layers_to_transform", "layers_pattern")
    if isinstance(old, list) and not any(subject.config.get(key) is not None for key in filters):
        names = {str(name) for name in old}
        if not any(names.isdisjoint(ends(module)) for module in modules):
            return sorted(names)
    return sorted(modules)


def _extras(subject: Subject) -> Iterable[LeftOut]:
    """Every tensor that is no factor."""
    kinds = {
        "a norm": subject.norms,
        "a bias": subject.biases,
        "a change of a bias": subject.lora_biases,
        "a whole weight": subject.whole,
        "the base's own weight": subject.base_copies,
    }
    for why, names in kinds.items():
        for name in names:
            value = subject.weights.read(name).double()
            before = None if name in subject.lora_biases else _before(subject.base, name)
            change = None
            if before is not None and before.shape == value.shape and (norm := frobenius(before)):
                change = frobenius(value - before) / norm
            yield LeftOut(name, why, subject.headers[name].bytes, frobenius(value), change)


def _matters(row: LeftOut) -> bool:
    """Tell whether the adapter does something by it, as far as is known."""
    return row.norm > 0 if row.why == "a change of a bias" else row.change != 0


def _before(base: Model | None, name: str) -> Tensor | None:
    """The base's own tensor of that name."""
    if base is None:
        return None
    plain = own_name(name)
    stored = next((disk for disk in base.checkpoint.headers if plain in base.layout.names_of(disk)), None)
    return None if stored is None else base.checkpoint.read(stored).double()


def _told(
    subject: Subject, rank: int, dtype: torch.dtype, added: Mapping[str, Slot], config: Mapping[str, Any], idle: int
) -> Iterable[str]:
    """Lines on what was rewritten."""
    scales = [subject.scale(module) for module in subject.modules]
    if {*scales} != {1.0}:
        yield f"scale {_range(scales)} folded into lora_B"
    ranks = [own.rank for own in subject.modules.values()]
    if {*ranks} != {rank}:
        yield f"rank {_range(ranks)} padded with zeros to {rank}"
    if added:
        number = counted(len(added), "module")
        yield f"added as zeros, as engines expect them: {number}, of which the first is {next(iter(added))}"
    if without_prefix(subject):
        yield f"{PREFIX} put before {counted(len(without_prefix(subject)), 'name')}"
    if named_after_adapter(subject):
        yield f"the adapter's name taken out of {counted(len(named_after_adapter(subject)), 'name')}"
    if not subject.weights_name.endswith(".safetensors"):
        yield f"{subject.weights_name} as safetensors"
    if behind := [*subject.others, *(["added_tokens.json"] if subject.added_tokens else [])]:
        yield f"left behind: {', '.join(behind)}"
    if idle:
        yield f"tensors dropped that change nothing: {idle}"
    if {subject.headers[name].dtype for own in subject.modules.values() for name in (own.a_name, own.b_name)} != {
        dtype
    }:
        yield f"factors saved in {str(dtype).removeprefix('torch.')}"
    old = subject.config
    if changed := [key for key in config if key in old and old[key] != config[key]]:
        yield f"in the configuration: {', '.join(changed)}"
    if unknown_keys(subject):
        yield f"out of the configuration, as PEFT 0.6 does not know them: {', '.join(unknown_keys(subject))}"


def _range(numbers: Iterable[float]) -> str:
    low, *_, high = sorted([*numbers] * 2)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
