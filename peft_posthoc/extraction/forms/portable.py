"""The portable form: an adapter that computes the same in PEFT, vLLM, SGLang, LoRAX, TGI, TensorRT-LLM and llama.cpp.

One rank for the whole file and `lora_alpha` equal to it make the scale exactly one by every engine's formula; only
`lora_A` and `lora_B` tensors are in it, and only configuration keys that PEFT has known since 0.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from peft_posthoc.adapters.experts import targeted_stacks
from peft_posthoc.adapters.portable_rules import complete, targeted
from peft_posthoc.extraction.forms.layout import FileLayout
from peft_posthoc.extraction.plan import Plan
from peft_posthoc.models.layout import Layout, is_of_an_expert
from peft_posthoc.ranks.safe import safe_rank
from peft_posthoc.text import as_flag


def portable(plan: Plan, ranks: Mapping[str, int], dtype: torch.dtype) -> FileLayout:
    """The layout of a file in which every layer is padded with zeros to one rank.

    Args:
        plan: What is carried.
        ranks: By module with factors.
        dtype: Of the factors.

    Raises:
        AdapterError: PEFT cannot be told to adapt these modules without others that have no LoRA form.
    """
    layout, rank = plan.layout, safe_rank(max(ranks.values(), default=0))
    plain = [module for module in ranks if not plan.slots[module].kind.stacked]
    stacks = tuple(targeted_stacks(ranks, layout))
    found = FileLayout(
        form="portable",
        rank=rank,
        # Layers that must be there as zeros beside those with factors are among them.
        ranks=dict.fromkeys(targeted(complete(plain, plan.slots), plan.slots, layout), rank),
        stacks=stacks,
        slots=plan.slots,
        model=layout,
        dtype=dtype,
        called=plan.called,
        padding=0,
        warnings=_warnings(layout, ranks, stacked=bool(stacks)),
    )
    own = sum(rank * (plan.slots[module].m + plan.slots[module].n) for module, rank in ranks.items())
    return replace(found, padding=found.bytes - own * dtype.itemsize)


def _warnings(layout: Layout, modules: Mapping[str, int], *, stacked: bool) -> tuple[str, ...]:
    """Where the adapter cannot be for all engines."""
    if stacked:
        return ("Stacked experts (`target_parameters`) need PEFT 0.19, and an engine that takes them so.",)
    # PEFT stacks the factors of single experts of some models, and of those only where it mistakes no layer for one.
    dropped = layout.stacks and (layout.mistaken or not layout.peft_takes_experts)
    if dropped and any(map(is_of_an_expert, modules)):
        lost = "the dense MLPs beside the experts" if layout.mistaken else "the experts"
        return (
            f"For serving engines only: PEFT on transformers 5 drops the factors of {lost}, in silence. For PEFT, "
            f"`{as_flag('form', 'peft')}`.",
        )
    return ()
