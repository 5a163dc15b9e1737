"""Rules about ranks, and what the product of the factors is multiplied with."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

from peft_posthoc.adapters.tensors import Factored
from peft_posthoc.ranks.safe import safe_rank
from peft_posthoc.serving.rules.rule import BOTH_READ, FIX, REFUSED, SGLANG_RUN, VLLM_HELPER, WARNING, WRONG, Rule
from peft_posthoc.serving.subject import Subject, leaf_of


def ranked(subject: Subject) -> list[tuple[str, Factored]]:
    """All modules but those of all experts at once, whose factors are stacked."""
    fused = {*subject.fused_experts}
    return [(module, own) for module, own in subject.modules.items() if module not in fused]


def misscaled(subject: Subject, scale: Callable[[Factored], float]) -> tuple[str, ...]:
    """Modules that an engine with this formula multiplies with something else than PEFT, and how much."""
    found = ((module, subject.scale(module), scale(own)) for module, own in ranked(subject))
    return tuple(
        f"{module} (by {got:.3g} instead of {wanted:.3g})"
        for module, wanted, got in found
        if not math.isclose(wanted, got, rel_tol=1e-6)
    )


def other_ranks(subject: Subject) -> tuple[str, ...]:
    """Modules whose rank is not the configuration's `r`."""
    found = ((module, own.rank) for module, own in ranked(subject) if own.rank != subject.r)
    return tuple(f"{module} ({rank} instead of {subject.r})" for module, rank in found)


def misranked(subject: Subject) -> tuple[str, ...]:
    """Modules whose rank is not what PEFT expects of the configuration."""
    found = ((module, own.rank, subject.configured_rank(module)) for module, own in ranked(subject))
    return tuple(f"{module} ({rank} instead of {wanted})" for module, rank, wanted in found if rank != wanted)


def mixed_leaves(subject: Subject) -> tuple[str, ...]:
    """Names whose layers have different ranks even after LoRAX and TGI pad them."""
    ranks: dict[str, set[int]] = defaultdict(set)
    for module, own in ranked(subject):
        ranks[leaf_of(module)].add(safe_rank(own.rank))
    return tuple(leaf for leaf, own in ranks.items() if len(own) > 1)


def padded_ranks(subject: Subject) -> tuple[str, ...]:
    """Ranks that LoRAX and TGI pad to another one than `r`, by which they scale every name but the first."""
    several = len({leaf_of(module) for module, _ in ranked(subject)}) > 1
    ranks = {own.rank for _, own in ranked(subject) if safe_rank(own.rank) != subject.r}
    return tuple(f"rank {rank}, r {subject.r}" for rank in sorted(ranks)) if several else ()


def _global(s: Subject) -> Callable[[Factored], float]:
    return lambda own: s.alpha / (math.sqrt(s.r) if s.rslora else s.r)


def _own_rank(s: Subject) -> Callable[[Factored], float]:
    return lambda own: s.alpha / (math.sqrt(own.rank) if s.rslora else own.rank)


def _llamacpp(s: Subject) -> Callable[[Factored], float]:
    return lambda own: s.alpha / own.rank if s.alpha else 1.0


RULES: tuple[Rule, ...] = (
    Rule(
        name="rank-not-as-configured",
        engines=("peft",),
        severity=REFUSED,
        finds=misranked,
        message="builds the layers from `r` and `rank_pattern`, and finds tensors of another size",
        way_out="correct `r` or `rank_pattern` in the configuration",
        source="run",
    ),
    Rule(
        name="patterns-before-0.32",
        engines=("vllm",),
        severity=WARNING,
        finds=lambda s: misscaled(s, _global(s)),
        message=(
            "vLLM before 0.32 never reads `rank_pattern` and `alpha_pattern`, and scales these layers wrongly in "
            "silence"
        ),
        way_out=FIX,
        source=f"read: {VLLM_HELPER} of 0.11.0 to 0.31.0",
        versions="0.11 to 0.31",
    ),
    Rule(
        name="mixed-ranks",
        engines=("sglang",),
        severity=REFUSED,
        finds=other_ranks,
        message=(
            "its buffers have one rank: an assertion stops the scheduler when a batch is prepared, or `torch.cat` fails"
        ),
        way_out=FIX,
        source=SGLANG_RUN,
    ),
    Rule(
        name="scale-sglang",
        engines=("sglang",),
        severity=WRONG,
        finds=lambda s: misscaled(s, lambda own: s.alpha / s.r),
        message="multiplies every layer by lora_alpha / r; it reads neither `use_rslora` nor the patterns",
        way_out=FIX,
        source=f"{SGLANG_RUN}; sglang #40835",
        versions="0.5.23; later sources refuse patterns when they load (srt/lora/lora_config.py)",
    ),
    Rule(
        name="scale-lorax",
        engines=("lorax", "tgi"),
        severity=WRONG,
        finds=lambda s: misscaled(s, _global(s)),
        message="multiplies every layer by one scale; it does not read the patterns",
        way_out=FIX,
        source=BOTH_READ,
    ),
    Rule(
        name="mixed-ranks-of-a-leaf",
        engines=("lorax", "tgi"),
        severity=REFUSED,
        finds=mixed_leaves,
        message="stacks all layers of a name, which must have one rank after padding (`torch.stack` fails)",
        way_out=FIX,
        source=BOTH_READ,
    ),
    Rule(
        name="padded-rank",
        engines=("lorax", "tgi"),
        severity=WRONG,
        finds=padded_ranks,
        message="pads ranks to 8 or a multiple of 16, and from the second name on divides lora_alpha by the padded one",
        way_out=FIX,
        source=f"{BOTH_READ} (`config.r` is overwritten)",
    ),
    Rule(
        name="rank-for-one-gpu",
        engines=("lorax", "tgi"),
        severity=WARNING,
        finds=lambda s: (f"rank {s.r}",) if s.r == safe_rank(s.r) < 16 else (),
        message="is right on one GPU; on N it pads the rank to 8 N and scales by the padded one",
        way_out="write a rank that is a multiple of 16 and at least 8 N",
        source=BOTH_READ,
    ),
    Rule(
        name="rank-above-128",
        engines=("lorax", "tgi"),
        severity=WARNING,
        finds=lambda s: (f"rank {s.max_rank}",) if s.max_rank > 128 else (),
        message="has kernels for ranks up to 128 (on every GPU)",
        way_out="cut the adapter to a lower rank",
        source="read: lorax_server/utils/sgmv.py",
    ),
    Rule(
        name="rslora-lorax",
        engines=("lorax",),
        severity=WRONG,
        finds=lambda s: misscaled(s, lambda own: s.alpha / s.r) if s.rslora else (),
        message="LoRAX's lockfile pins PEFT 0.4.0, which drops `use_rslora`: the scale is lora_alpha / r",
        way_out=FIX,
        source="read: LoRAX's server lockfile",
    ),
    Rule(
        name="scale-trtllm",
        engines=("trtllm",),
        severity=WRONG,
        finds=lambda s: misscaled(s, _own_rank(s)),
        message="divides lora_alpha by the tensor's own rank; it does not read `alpha_pattern`",
        way_out=FIX,
        source="read: tensorrt_llm/_torch/peft/lora/manager.py (`load_from_hf`); TensorRT-LLM #1668",
    ),
    Rule(
        name="scale-llamacpp",
        engines=("llamacpp",),
        severity=WRONG,
        finds=lambda s: misscaled(s, _llamacpp(s)),
        message=(
            "divides lora_alpha by the tensor's own rank, and takes 0 to mean 1; a GGUF has neither rsLoRA nor patterns"
        ),
        way_out=f"`phlora export --to gguf` folds the scale in; {FIX}",
        source="run: src/llama-adapter.h (`get_scale`)",
    ),
    Rule(
        name="rank-above-512",
        engines=("vllm",),
        severity=REFUSED,
        finds=lambda s: (f"rank {s.max_rank}",) if s.max_rank > 512 else (),
        message="takes ranks up to 512",
        way_out="cut the adapter to a lower rank",
        source="run: vLLM",
    ),
)
