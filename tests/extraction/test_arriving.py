"""What PEFT would drop is led to where it arrives, or left out and told."""

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_posthoc import check, extract, verify
from peft_posthoc.extraction.reasons import Reason
from tests.make import architectures, models

SIZES = {name: size for name, size in architectures.SIZES.items() if name != "max_position_embeddings"}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


def loaded(kind, base, adapter):
    """Stock PEFT's model. Its warning of missing keys is an error here."""
    return peft.PeftModel.from_pretrained(kind.from_pretrained(base), adapter)


def without_factors(model):
    return [name for name, one in model.named_parameters() if ".lora_B.default.weight" in name and not one.any()]


def left_out(adapter, cause):
    return {row.weight for row in adapter.report.rows if row.cause is cause}


@pytest.mark.parametrize("form", ["portable", "peft"])
def test_what_peft_renames_when_it_loads_is_filed_under_the_name_that_it_renames(form, tmp_path):
    base, tuned = models.save_pair(models.laguna(), tmp_path)
    adapter = extract(base, tuned, 8, form=form)
    rows = [row for row in adapter.report.rows if ".shared_expert" in row.weight]
    assert [row.status for row in rows] == ["extracted"] * 3
    model = loaded(transformers.LagunaForCausalLM, base, adapter.save(tmp_path / "a"))
    assert without_factors(model) == []
    # And is read so: by `verify` as by whatever holds an adapter against its base.
    seen = verify(tmp_path / "a", base, tuned, outputs=False).rows
    near = {row.weight for row in seen if ".shared_expert" in row.weight and row.delta_cosine > 0.5}
    assert near == {row.weight for row in rows}
    assert check(tmp_path / "a", base=base, engines=["peft"]).wrong == ()


def test_layers_whose_factors_peft_drops_under_any_name_are_left_out_or_whole(tmp_path):
    """Of a DeepSeek without a mixture PEFT takes the dense layers for experts that are not there."""
    model = architectures.ARCHITECTURES["deepseek_v3"].make()
    config = transformers.DeepseekV3Config(**model.config.to_dict() | {"first_k_dense_replace": 3})
    base, tuned = models.save_pair(transformers.DeepseekV3ForCausalLM(config), tmp_path)
    names = {f"model.layers.{n}.mlp.{leaf}_proj.weight" for n in range(3) for leaf in ("gate", "up", "down")}
    portable = extract(base, tuned, 4)
    assert left_out(portable, Reason.DROPPED) == names
    model = loaded(transformers.DeepseekV3ForCausalLM, base, portable.save(tmp_path / "portable"))
    assert without_factors(model) == []
    whole = extract(base, tuned, 4, form="peft")
    assert {row.weight for row in whole.report.rows if row.status == "whole"} > names
    model = loaded(transformers.DeepseekV3ForCausalLM, base, whole.save(tmp_path / "whole"))
    with safe_open(models.weights_of(tuned), "pt") as file:
        for name in names:
            kept = model.get_parameter(f"base_model.model.{name.replace('.weight', '.modules_to_save.default.weight')}")
            assert torch.equal(kept, file.get_tensor(name))


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings=True:UserWarning")
def test_a_module_of_which_a_checkpoint_has_not_all_is_not_kept_whole(tmp_path):
    text = {**architectures.SIZES, "head_dim": 8, "num_key_value_heads": 2, "moe_intermediate_size": 16}
    text |= {"n_routed_experts": 2, "num_experts_per_tok": 1, "share_expert_dim": 16, "pad_token_id": 0}
    text |= {"mlp_layer_types": ["dense", "sparse"], "layer_types": ["full_attention"] * 2}
    config = transformers.Step3p7Config(
        text_config={**text, "num_sliding_attention_heads": 4}, vision_config=VISION, image_token_id=90
    )
    base, tuned = models.save_pair(transformers.Step3p7ForConditionalGeneration(config), tmp_path)
    for folder in (base, tuned):
        held = {name: tensor for name, tensor in load_file(models.weights_of(folder)).items() if "in_proj" not in name}
        save_file(held, models.weights_of(folder), metadata={"format": "pt"})
    adapter = extract(base, tuned, 64, form="peft")
    assert len(left_out(adapter, Reason.NOT_LOADED)) == 2  # The scales of the layer around the attention.
    model = loaded(transformers.Step3p7ForConditionalGeneration, base, adapter.save(tmp_path / "a"))
    assert any(".layernorm_before.modules_to_save." in name for name in model.state_dict())


def test_a_norm_within_the_experts_is_left_out_where_peft_wraps_them(tmp_path):
    model = transformers.MuseSparkTextModel(
        transformers.MuseSparkTextConfig(
            **{**SIZES, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 8},
            **{"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
        )
    )
    base, tuned = models.save_pair(model, tmp_path)
    adapter = extract(base, tuned, 4, form="peft")
    assert left_out(adapter, Reason.NOT_LOADED) == {"layers.0.mlp.experts.post_expert_norm.weight"}
    loaded(transformers.MuseSparkTextModel, base, adapter.save(tmp_path / "a"))


@pytest.mark.parametrize("form", ["portable", "peft"])
def test_a_head_whose_name_means_a_layer_too_is_a_row_and_not_the_end(form, tmp_path):
    vision = VISION | {"intermediate_size": 48}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.GitConfig(**architectures.SIZES, **special, vision_config=vision)
    base, tuned = models.save_pair(transformers.GitForCausalLM(config), tmp_path)
    adapter = extract(base, tuned, 4, form=form, head=True)
    (reason,) = {row.reason for row in adapter.report.rows if row.cause is Reason.MISREAD}
    assert reason.startswith("PEFT would take the name of its module, `output`, to mean `git.encoder.layer.0.attention")
    assert without_factors(loaded(transformers.GitForCausalLM, base, adapter.save(tmp_path / "a"))) == []


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
def test_what_peft_does_not_keep_whole_is_left_out_and_the_rest_loads(tmp_path):
    """Reformer's positions are a list of parameters."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "feed_forward_size": 48, "num_attention_heads": 4}
    config = transformers.ReformerConfig(
        **{**sizes, "attention_head_size": 8, "attn_layers": ["local", "local"], "is_decoder": True},
        axial_pos_shape=[8, 8],
        axial_pos_embds_dim=[16, 16],
    )
    kind = transformers.ReformerModelWithLMHead
    base, tuned = models.save_pair(kind(config), tmp_path)
    adapter = extract(base, tuned, 32, form="peft")
    place = "reformer.embeddings.position_embeddings.weights"
    assert left_out(adapter, Reason.NOT_LOADED) == {f"{place}.0", f"{place}.1"}
    assert without_factors(loaded(kind, base, adapter.save(tmp_path / "a"))) == []
