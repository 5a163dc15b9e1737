"""Rules about LoRAs of image models: each sees the file that breaks it, and none those that `export` writes."""

import pytest
import torch
from safetensors.torch import save_file

from peft_posthoc import AdapterError, check
from peft_posthoc.serving.image_engines import IMAGE_ENGINES
from peft_posthoc.serving.rules.images import RULES

Q = "transformer.transformer_blocks.0.attn.to_q"
WAN = "lora_unet_blocks_0_self_attn_q"
KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def factors(module, rank=4, a="lora_A", b="lora_B"):
    return {f"{module}.{a}.weight": (rank, 8), f"{module}.{b}.weight": (8, rank)}


def kohya(module, alpha=True):
    return factors(module, a="lora_down", b="lora_up") | ({f"{module}.alpha": ()} if alpha else {})


WRONG = {
    "peft-names-diffusers": factors("base_model.model.transformer_blocks.0.attn.to_q"),
    "peft-names-comfyui": factors("base_model.model.transformer_blocks.0.attn.to_q"),
    "peft-names-a1111": factors("base_model.model.transformer_blocks.0.attn.to_q"),
    "dotted-names": factors(Q),
    "mixed-ranks-without-alpha": factors(Q) | factors(Q.replace("to_q", "to_k"), 2),
    "no-alpha-wan": kohya(WAN) | kohya(WAN.replace("_q", "_k"), alpha=False),
    "alphas-of-qwen": kohya("transformer.transformer_blocks.0.txt_mod.1"),
    "differences": kohya(KOHYA) | {"lora_unet_conv_norm_out.diff": (8,)},
    "loha": {f"{KOHYA}.hada_w{side}": (8, 8) for side in ("1_a", "1_b", "2_a", "2_b")},
    "lokr": {f"{KOHYA}.lokr_w1": (2, 2), f"{KOHYA}.lokr_w2": (4, 4)},
    "set-weight": kohya(KOHYA) | {"lora_unet_conv_norm_out.set_weight": (8,)},
    "set-weight-strength": kohya(KOHYA) | {"lora_unet_conv_norm_out.set_weight": (8,)},
    "lora-bias": factors(Q) | {f"{Q}.lora_B.bias": (8,)},
    "bias-of-a-part": factors(Q) | {f"{Q}.diff_b": (8,)},
}


def save(shapes, folder, name="lora"):
    peft = any(key.startswith("base_model") for key in shapes)
    path = folder / ("adapter_model.safetensors" if peft else f"{name}.safetensors")
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, path)
    return folder if peft else path


def rules(place, engines):
    return {finding.rule for outcome in check(place, engines=engines).outcomes for finding in outcome.findings}


def test_every_rule_has_a_file_and_a_source():
    assert {rule.name for rule in RULES} == WRONG.keys()
    assert all(rule.source and rule.way_out and set(rule.engines) <= set(IMAGE_ENGINES) for rule in RULES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_sees_the_file_that_breaks_it(rule, tmp_path):
    place = save(WRONG[rule.name], tmp_path)
    for engine in IMAGE_ENGINES:
        assert (rule.name in rules(place, [engine])) == (engine in rule.engines)


def test_a_file_of_kohya_is_right_everywhere_and_those_engines_are_all(tmp_path):
    found = check(save(kohya(KOHYA), tmp_path, "style"))
    assert [outcome.engine for outcome in found.outcomes] == ["diffusers", "comfyui", "a1111"]
    assert not found.wrong
    assert "<lora:style:1>" in found.table()


def test_engines_for_text_do_not_take_a_file(tmp_path):
    with pytest.raises(AdapterError, match="in the format of diffusers, not a PEFT LoRA folder"):
        check(save(factors(Q), tmp_path), engines=["vllm"])


def test_a_bias_of_qwen_image_is_no_part_of_a_fused_one(tmp_path):
    mlp = "transformer.transformer_blocks.0.txt_mlp.net.2"
    place = save(factors(Q) | {f"{Q}.diff_b": (8,)} | factors(mlp), tmp_path)
    assert "bias-of-a-part" not in rules(place, ["comfyui"])
