"""Rules about mixtures of experts: one pair of factors for all experts, or one for each."""

from __future__ import annotations

import re
from collections import defaultdict

from peft_posthoc.serving.rules.modules import not_of_model, of_model
from peft_posthoc.serving.rules.rule import BOTH_READ, CONVERT, REFUSED, SGLANG_RUN, TRT_READ, WARNING, WRONG, Rule
from peft_posthoc.serving.subject import EXPERT, Subject

# vLLM classes with `is_3d_moe_weight` (0.32).
_STACKED_EXPERTS = ("gpt_oss", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe", "interns1_pro")
_DENSE = re.compile(r".+\.(mlp|shared_experts?|feed_forward)\.(gate_proj|up_proj|down_proj)")


def dense_beside_experts(subject: Subject) -> tuple[str, ...]:
    """Dense or shared MLPs in a file that holds single experts too."""
    return tuple(module for module in subject.modules if _DENSE.fullmatch(module)) if subject.experts else ()


def partial_experts(subject: Subject) -> tuple[str, ...]:
    """Single experts of which some, but not all three projections are there."""
    held: dict[str, set[str]] = defaultdict(set)
    for match in filter(None, map(EXPERT.fullmatch, subject.experts)):
        held[f"{match['experts']}.{match['index']}"].add(match["leaf"])
    full = ({"gate_proj", "up_proj", "down_proj"}, {"w1", "w2", "w3"})
    return tuple(expert for expert, leaves in held.items() if not any(leaves >= names for names in full))


RULES: tuple[Rule, ...] = (
    Rule(
        name="fused-experts-peft",
        engines=("peft",),
        severity=WARNING,
        finds=lambda s: s.fused_experts,
        message="PEFT before 0.19 reads the factors of `target_parameters` with in and out swapped",
        way_out="use PEFT 0.19 or later",
        source="run: wheels 0.17.1 to 0.21.0",
        versions="0.17 and 0.18",
    ),
    Rule(
        name="fused-experts-vllm",
        engines=("vllm",),
        severity=REFUSED,
        finds=lambda s: not_of_model(s, s.fused_experts, *_STACKED_EXPERTS),
        message="expects factors for each expert, but with `--enable-mixed-moe-lora-format`",
        way_out="write factors for each expert",
        source="read; vllm PRs #41384, #52194",
    ),
    Rule(
        name="fused-experts",
        engines=("sglang", "trtllm", "llamacpp"),
        severity=REFUSED,
        finds=lambda s: s.fused_experts,
        message="expects factors for each expert",
        way_out="write factors for each expert",
        source=f'{SGLANG_RUN}; run: {CONVERT} ("Unprocessed experts"); {TRT_READ}',
    ),
    Rule(
        name="fused-experts-ignored",
        engines=("lorax", "tgi"),
        severity=WRONG,
        finds=lambda s: s.fused_experts,
        message="takes the modules that it knows by name, and no experts",
        way_out="serve the merged model",
        source=BOTH_READ,
    ),
    Rule(
        name="single-experts-unread",
        engines=("lorax", "tgi"),
        severity=WARNING,
        finds=lambda s: s.experts,
        message="takes the modules that it knows; whether experts are among them was not looked at",
        way_out="compare its answers with PEFT's, or serve the merged model",
        source="not read",
    ),
    Rule(
        name="single-experts-stacked",
        engines=("vllm",),
        severity=REFUSED,
        finds=lambda s: of_model(s, s.experts, *_STACKED_EXPERTS),
        message="expects one pair of factors for all experts of this model, but with `--enable-mixed-moe-lora-format`",
        way_out="write factors for all experts at once (PEFT's `target_parameters`)",
        source="read: `is_3d_moe_weight`",
        needs_base=True,
    ),
    Rule(
        name="dense-beside-experts",
        engines=("peft",),
        severity=WRONG,
        finds=dense_beside_experts,
        message="with transformers 5 takes a dense or shared MLP for an expert's, or the other way, and drops factors",
        way_out="write factors for all experts at once, or leave either out",
        source="run: Qwen2-MoE, Qwen3-MoE with `mlp_only_layers`",
    ),
    Rule(
        name="partial-experts",
        engines=("vllm", "peft"),
        severity=REFUSED,
        finds=partial_experts,
        message="needs gate, up and down of an expert together",
        way_out="write zeros for the others",
        source="run: PEFT raises ValueError at gate without up; read: vLLM",
    ),
    Rule(
        name="expert-names-trtllm",
        engines=("trtllm",),
        severity=WRONG,
        finds=lambda s: tuple(module for module in s.experts if module.rpartition(".")[2] not in ("w1", "w2", "w3")),
        message="knows experts as w1, w2, w3 by default, and skips others with a warning",
        way_out="map the names with `trtllm_modules_to_hf_modules`",
        source="read: tensorrt_llm/_torch/peft/lora/config.py",
    ),
)
