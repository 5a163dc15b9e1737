"""PEFT's own folder with its experts laid out the other way: one by one, or stacked (`target_parameters`).

Both are exact. One by one, gate and up are rows of the stacked delta and keep its `a`. Stacked, they are blocks of one
matrix: `[b_gate 0; 0 b_up] @ [a_gate; a_up]`, of the sum of their ranks, or `[b_gate; b_up] @ a` where they share `a`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from peft_posthoc.adapters.cast import cast
from peft_posthoc.adapters.config import CONFIG, WEIGHTS, adapter_config
from peft_posthoc.adapters.experts import pack, places_in_file, target_parameters
from peft_posthoc.adapters.factors import Factors
from peft_posthoc.adapters.names import PREFIX, target_modules
from peft_posthoc.adapters.on_model import AdapterOnModel, matrices
from peft_posthoc.adapters.writer import Contents, write_folder
from peft_posthoc.errors import AdapterError
from peft_posthoc.formats.only_factors import only_factors
from peft_posthoc.formats.result import Exported, Out
from peft_posthoc.models.kinds import LINEAR
from peft_posthoc.models.layout import Stack, is_of_an_expert
from peft_posthoc.progress import progress_bar
from peft_posthoc.text import asked


def write_per_expert(
    deltas: AdapterOnModel, out: Out, *, dtype: torch.dtype | None, force: bool, progress: bool
) -> Exported:
    """Write experts one by one, all of a layer and of all layers, as vLLM and SGLang read them: zeros where nothing is.

    Raises:
        AdapterError: The model's experts have no modules of their own, or there are other things in it than factors.
    """
    only_factors(deltas, "a serving engine")
    stacks = _stacks(deltas)
    if whole := [stack.name for stack in stacks if not stack.parts]:
        raise AdapterError(
            f"The experts of `{deltas.base.label}` are one parameter (`{whole[0]}`) and have no names of their own. "
            f"vLLM reads such experts stacked (`{asked('to', 'peft-moe')}`)."
        )
    dtype, rank = dtype or deltas.folder.dtype(), deltas.rank
    names = dict.fromkeys([*_others(deltas), *(name for stack in stacks for name in matrices(stack))])
    tensors: dict[str, Tensor] = {}
    for name in progress_bar(names, desc="Matrices", progress=progress):
        tensors |= deltas.slots[name].kind.tensors(f"{PREFIX}{name}", *deltas.padded(name, rank, dtype))
    notes = deltas.notes()
    if deltas.layout.mistaken or not deltas.layout.peft_takes_experts:
        notes.append("For serving engines only: PEFT on transformers 5 drops some or all of these factors in silence.")
    config = _config(deltas, names, (), rank)
    return _write("vllm-moe", deltas, out, tensors, config, dtype=dtype, notes=notes, force=force)


def write_stacked(
    deltas: AdapterOnModel, out: Out, *, dtype: torch.dtype | None, force: bool, progress: bool
) -> Exported:
    """Write experts stacked, as PEFT 0.19 and newer computes with them, padded to one rank; zeros where nothing is.

    Raises:
        AdapterError: There are factors in it that PEFT does not load beside stacked experts.
    """
    # PEFT 0.21 takes these for experts' by their names, and then reads a stack as of twice its rank.
    if mistaken := [name for name in deltas.names if name in deltas.layout.mistaken]:
        raise AdapterError(
            f"`{deltas.folder.label}` adapts `{mistaken[0]}`, which PEFT takes for an expert's beside stacked experts, "
            f"and loads neither rightly. Use `{asked('to', 'merged')}`."
        )
    if deltas.biases:
        raise AdapterError(
            f"`{deltas.folder.label}` adds to the bias of `{deltas.biases[0]}`; beside stacked experts PEFT's LoRA has "
            f"no biases. Use `{asked('to', 'merged')}`."
        )
    stacks = _stacks(deltas)
    dtype, names = dtype or deltas.folder.dtype(), _others(deltas)
    joined = {stack.name: [_joined(deltas, unit, dtype) for unit in _by_unit(stack)] for stack in stacks}
    ranks = [len(a) for each in joined.values() for a, _ in each]
    rank = max([*ranks, *map(deltas.rank_of, names)])
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= deltas.slots[name].kind.tensors(f"{PREFIX}{name}", *deltas.padded(name, rank, dtype))
    places = places_in_file(stacks)
    for stack in progress_bar(stacks, desc="Experts", progress=progress):
        factors = {unit: (a, b) for unit, (a, b) in zip(stack.units, joined.pop(stack.name), strict=True)}
        tensors |= LINEAR.tensors(f"{PREFIX}{places[stack.name]}", *pack(stack, factors, rank, dtype))
    notes = [*deltas.notes(), "Stacked experts (`target_parameters`) need PEFT 0.19, or an engine that takes them so."]
    if rank > deltas.rank:
        notes.insert(
            0, f"The rank is {rank} and not {deltas.rank}: gate and up of an expert are two blocks of one matrix."
        )
    tensors |= {key: deltas.folder.tensor(key) for key in (*deltas.whole.values(), *deltas.base_layers.values())}
    config = _config(deltas, names, stacks, rank)
    return _write("peft-moe", deltas, out, tensors, config, dtype=dtype, notes=notes, force=force)


def _stacks(deltas: AdapterOnModel) -> list[Stack]:
    """The experts to be written: in every layer, every parameter, if some in one have factors.

    Raises:
        AdapterError: No expert has factors.
    """
    if not deltas.of_experts():
        raise AdapterError(f"`{deltas.folder.label}` has no factors for experts: it is the same in both layouts.")
    with_factors = {stack.name for stack in deltas.of_experts()}
    return [stack for stack in deltas.stacks if len(stack.shape) == 3 or stack.name in with_factors]


def _others(deltas: AdapterOnModel) -> list[str]:
    """The matrices with factors that are no expert's."""
    of_stacks = {name for stack in deltas.stacks for name in matrices(stack)}
    return [name for name in deltas.names if name not in of_stacks]


def _by_unit(stack: Stack) -> Iterable[tuple[str, ...]]:
    """The matrices that each expert's matrix in the stack is made of."""
    names = matrices(stack)
    each = len(names) // len(stack.units)
    return [names[start : start + each] for start in range(0, len(names), each)]


def _joined(deltas: AdapterOnModel, names: Sequence[str], dtype: torch.dtype) -> Factors:
    """The factors of one matrix that has these one above the other."""
    parts = [deltas.factors(name) for name in names]
    if all(torch.equal(parts[0].a, part.a) for part in parts[1:]):
        a, b = parts[0].a, torch.cat([part.b for part in parts])
    else:
        a, b = torch.cat([part.a for part in parts]), torch.block_diag(*(part.b for part in parts))
    return Factors(*cast(a, b, dtype, names[0]))


def _config(deltas: AdapterOnModel, modules: Iterable[str], stacks: Sequence[Stack], rank: int) -> dict[str, Any]:
    old, layout = deltas.folder.config, deltas.layout
    if stacks:  # Stacked, the experts have no modules of their own.
        layout = replace(layout, kinds={n: kind for n, kind in layout.kinds.items() if not is_of_an_expert(n)})
    return adapter_config(
        rank,
        target_modules(modules, layout),
        base=old.get("base_model_name_or_path") or deltas.base.label,
        revision=old.get("revision"),
        task_type=old.get("task_type"),
        auto_mapping=old.get("auto_mapping"),
        fan_in_fan_out=layout.fan_in_fan_out,
        bias=old.get("bias", "none") if deltas.whole else "none",
        whole=old.get("modules_to_save") or () if deltas.whole else (),
        stacked=target_parameters(stacks),
    )


def _write(
    to: str,
    deltas: AdapterOnModel,
    out: Out,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    *,
    dtype: torch.dtype,
    notes: Sequence[str],
    force: bool,
) -> Exported:
    count, files = sum(tensor.nbytes for tensor in tensors.values()), (WEIGHTS, CONFIG)
    exported = Exported.of(to, deltas, out, dtype=dtype, rank=config["r"], files=files, size=count, notes=notes)
    provenance = {
        "adapter": exported.adapter,
        "base": exported.base,
        "to": to,
        "versions": {"peft-posthoc": metadata.version("peft-posthoc")},
    }
    contents = Contents(tensors, config, exported.to_dict(), provenance)
    write_folder(out.place, contents, force=force, called=out.called)
    return exported
