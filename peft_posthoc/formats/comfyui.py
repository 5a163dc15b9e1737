"""A LoRA file for ComfyUI, exact: what has no factors is in it as a difference (`.diff`, `.diff_b`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peft_posthoc.adapters.factors import Factors
from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.formats.comfyui_names import Place, bias_of, of_file, parameter_of, weight_of
from peft_posthoc.formats.components import Component, components, factors_of, filed, summands
from peft_posthoc.formats.kohya import weight
from peft_posthoc.formats.result import Exported, Out
from peft_posthoc.formats.single_file import account, metadata_of, write_file
from peft_posthoc.models.original_modules import swapped
from peft_posthoc.progress import progress_bar
from peft_posthoc.text import counted


def write(
    deltas: AdapterOnModel,
    out: Out,
    *,
    dtype: torch.dtype | None,
    force: bool,
    progress: bool,
    more: Sequence[AdapterOnModel] = (),
) -> Exported:
    """Write the file: factors by the names that ComfyUI knows each model's modules by, the rest as float32 differences.

    Args:
        deltas: The adapter of one component.
        out: Where.
        dtype: Of the factors.
        force: Replace an earlier export.
        progress: Show a progress bar.
        more: Adapters of other components.

    Raises:
        AdapterError: A model is none that ComfyUI has names for which are known here, something in an adapter has none,
            or the file cannot be written.
    """
    single = None if more else of_file(deltas)
    parts = [single] if single else components([deltas, *more], named=False)
    dtype = dtype or deltas.folder.dtype()
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= _tensors(part, dtype, progress)
    ranks = [int(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")]
    exported = account("comfyui", parts, out, tensors, dtype=dtype, rank=max(ranks, default=0), notes=_notes(tensors))
    write_file(out, tensors, metadata_of(parts, exported), what="The LoRA for ComfyUI", force=force)
    return exported


def _notes(tensors: dict[str, Tensor]) -> list[str]:
    count = sum(name.endswith((".diff", ".diff_b")) for name in tensors)
    number = counted(
        count, "tensor without factors is in it as a difference", "tensors without factors are in it as differences"
    )
    return [f"{number}, which ComfyUI alone reads."] if count else []


def _tensors(part: Component, dtype: torch.dtype, progress: bool) -> dict[str, Tensor]:
    """A component's tensors, by key.

    Raises:
        AdapterError: ComfyUI has no name for one of them.
    """
    deltas, more = part.deltas, summands(part.deltas)
    weights = dict.fromkeys([*deltas.names, *_with(more, "weight")])
    found: dict[str, Tensor] = {}
    for place in progress_bar({weight_of(part, one): None for one in weights}, desc=part.name, progress=progress):
        found |= _weight(part, place, more, dtype)
    for place in {bias_of(part, one): None for one in _with(more, "bias")}:
        rows = [more[name] if (name := f"{one}.bias") in more else _zeros(deltas, one) for one in place.modules]
        found[f"{place.key}.diff_b"] = _turned(torch.cat(rows).float(), place)
    for name, delta in more.items():
        if not name.endswith((".weight", ".bias")):
            found[f"{parameter_of(part, name)}.diff"] = delta.float()
    return found


def _with(summands: Mapping[str, Tensor], leaf: str) -> list[str]:
    return [name.removesuffix(f".{leaf}") for name in summands if name.endswith(f".{leaf}")]


def _zeros(deltas: AdapterOnModel, module: str) -> Tensor:
    return torch.zeros(deltas.slots[module].m, dtype=torch.float64)


def _turned(rows: Tensor, place: Place) -> Tensor:
    return swapped(rows) if place.turned else rows


def _weight(part: Component, place: Place, more: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The factors of a weight; or what is added to it, where a part of it has no factors."""
    deltas, (key, modules, _) = part.deltas, place
    if any(f"{one}.weight" in more for one in modules):
        rows = [_dense(deltas, one, more.get(f"{one}.weight")) for one in modules]
        return {f"{key}.diff": _turned(torch.cat(rows) if len(rows) > 1 else rows[0], place)}
    if deltas.slots[modules[0]].kind.transposed:  # An embedding's weight is the other way round.
        found = factors_of(deltas, modules[0])
        a, b = filed(key, Factors(found.b.mT, found.a.mT), (), None, dtype)
        alpha = torch.tensor(float(len(a)), dtype=torch.float32)
        return {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": alpha}
    return weight(part, place, dtype)


def _dense(deltas: AdapterOnModel, module: str, added: Tensor | None) -> Tensor:
    """All that is added to a module's weight."""
    if not deltas.rank_of(module) and added is not None:
        return added.float()
    found = deltas.factors(module)
    product = (found.b @ found.a).mT if deltas.slots[module].kind.transposed else found.b @ found.a
    return (product if added is None else product.reshape(added.shape) + added).float()
