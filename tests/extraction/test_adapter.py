import json
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from peft_posthoc import AdapterError, NothingToCarryError, extract
from peft_posthoc.adapters.reader import LoraFolder
from peft_posthoc.ranks.safe import safe_rank
from tests.make import models

# What PEFT 0.6.0's LoraConfig and its parents take; older loaders raise TypeError at anything else.
KNOWN_SINCE_0_6 = {
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r"),
    *("target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
}


@pytest.fixture
def saved(llama_pair, tmp_path):
    extract(*llama_pair, 6).save(tmp_path / "out")
    return tmp_path / "out"


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_the_scale_is_one_by_every_engine_s_formula(saved):
    config, tensors = config_of(saved), load_file(saved / "adapter_model.safetensors")
    ranks = {t.shape[0] for name, t in tensors.items() if "lora_A" in name}
    assert ranks | {t.shape[1] for name, t in tensors.items() if "lora_B" in name} == {config["r"]}
    assert config["lora_alpha"] == config["r"]
    assert '"lora_alpha": 8,' in (saved / "adapter_config.json").read_text()


@pytest.mark.parametrize(("rank", "padded"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (320, 320)])
def test_ranks_are_padded_to_what_no_engine_pads_further(rank, padded):
    # LoRAX and TGI raise r to 8 (one GPU) or else to the next multiple of 16, and then divide alpha by that.
    assert safe_rank(rank) == padded


def test_only_configuration_keys_that_every_peft_knows_are_written(saved):
    assert set(config_of(saved)) <= KNOWN_SINCE_0_6


def test_only_lora_tensors_are_written_for_every_layer_of_a_targeted_leaf(saved):
    names = set(load_file(saved / "adapter_model.safetensors"))
    leaves = config_of(saved)["target_modules"]
    assert leaves == sorted(leaves) == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    parts = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}
    assert names == {
        f"base_model.model.model.layers.{i}.{parts.get(leaf, 'mlp')}.{leaf}.lora_{ab}.weight"
        for i in range(2)
        for leaf in leaves
        for ab in "AB"
    }


def test_one_weight_alone_brings_its_group_and_its_leaf_as_zeros(llama_pair, tmp_path):
    extract(*llama_pair, 8, include=["layers.0.self_attn.q_proj"]).save(tmp_path / "out")
    assert config_of(tmp_path / "out")["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    deltas = models.lora_deltas(models.load_adapter(llama_pair[0], tmp_path / "out"))
    assert len(deltas) == 6
    assert [name for name, delta in deltas.items() if delta.any()] == ["model.layers.0.self_attn.q_proj"]


def test_a_leaf_name_that_means_other_modules_too_is_spelled_out(tmp_path):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(16, 16)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Block(), Block()])
            self.vision = torch.nn.ModuleList([Block()])

    base = Model()
    tuned = models.tuned_from(base, only=lambda name: name.startswith("layers"))
    adapter = extract(base, tuned, 4)
    assert adapter.file.config(adapter.provenance)["target_modules"] == ["layers.0.proj", "layers.1.proj"]


def factors_in(folder):
    """By module, the factors in an adapter folder."""
    read = LoraFolder(folder)
    return {module: factors for module in read.modules for factors in read.factors(module)}


def test_what_is_written_holds_the_product_to_the_rounding_of_its_dtype(llama_pair, tmp_path):
    adapter = extract(*llama_pair, 8, dtype=torch.bfloat16)
    adapter.save(tmp_path / "out")
    for module, (a, b) in factors_in(tmp_path / "out").items():
        own_a, own_b = adapter.factors[module]
        whole = own_b @ own_a
        # Two roundings of relative size eps / 2 in every product.
        assert (b @ a - whole).norm() <= 2 * torch.finfo(torch.bfloat16).eps * whole.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_adapter_has_the_tuned_checkpoint_s_dtype(dtype, tmp_path):
    base, tuned = models.save_pair(models.llama(), tmp_path, dtype=dtype)
    extract(base, tuned, 4).save(tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {dtype}


def test_rank_is_capped_by_each_layer_s_smaller_side_and_then_padded(llama_pair):
    adapter = extract(*llama_pair, 32)
    ranks = {name.split(".")[-2]: len(layer.factors.s) for name, layer in adapter.layers.items()}
    assert ranks["k_proj"] == 16
    assert ranks["gate_proj"] == adapter.rank == adapter.file.rank == 32


def test_the_folder_says_where_it_comes_from(saved, llama_pair):
    with safe_open(saved / "adapter_model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    details = json.loads(metadata["phlora"])
    assert metadata["format"] == "pt"
    assert (details["base"], details["tuned"]) == llama_pair
    assert details["options"]["rule"] == "fixed(rank=6)"
    assert details["versions"]["torch"] == torch.__version__


def test_the_folder_holds_four_files_that_others_may_read(saved):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}
    assert modes.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors", "phlora_report.json"}
    assert len(set(modes.values())) == 1


def test_tied_embeddings_are_carried_in_both_places_by_either_flag(tied_pair, tmp_path):
    for flag in ("embeddings", "head"):
        extract(*tied_pair, 32, **{flag: True}).save(tmp_path / flag)
        deltas = models.lora_deltas(models.load_adapter(tied_pair[0], tmp_path / flag, tied=True))
        true = models.true_deltas(*tied_pair)["model.embed_tokens.weight"]
        torch.testing.assert_close(deltas["model.embed_tokens"], true, rtol=0, atol=1e-6)
        torch.testing.assert_close(deltas["lm_head"], true, rtol=0, atol=1e-6)


def test_every_place_of_a_weight_that_t5_shares_is_adapted(tmp_path):
    base, tuned = models.save_pair(models.t5(), tmp_path, only=lambda name: name == "shared.weight")
    extract(base, tuned, 32, embeddings=True).save(tmp_path / "out")
    ids = torch.arange(20)[None]
    wanted, alone, got = (
        model(input_ids=ids, decoder_input_ids=ids).logits
        for model in (models.load(tuned), models.load(base), models.load_adapter(base, tmp_path / "out", tied=True))
    )
    assert (got - wanted).norm() <= 1e-4 * (alone - wanted).norm()


def test_gpt2_is_fan_in_fan_out(tmp_path):
    base, tuned = models.save_pair(models.gpt2(), tmp_path)
    assert config_of(extract(base, tuned, 4).save(tmp_path / "out"))["fan_in_fan_out"] is True


def test_an_overflow_of_the_saved_dtype_is_an_error_that_leaves_nothing(tmp_path):
    base = {"layer.weight": torch.zeros(16, 16)}
    tuned = {"layer.weight": torch.eye(16) * 1e12}
    with pytest.raises(AdapterError, match=r"`layer` overflow torch\.float16"):
        extract(base, tuned, 16, dtype=torch.float16).save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_change_in_what_is_left_out_alone_is_told_with_the_largest(tmp_path):
    model = models.llama()
    tuned = models.tuned_from(model, only=lambda name: name == "lm_head.weight")
    with pytest.raises(NothingToCarryError, match=r"`lm_head.weight`: head \(carried with head=True\)"):
        extract(model, tuned, 4)


def test_force_replaces_an_adapter_and_nothing_else(llama_pair, saved, tmp_path):
    before = (saved / "adapter_model.safetensors").read_bytes()
    adapter = extract(*llama_pair, 2)
    with pytest.raises(AdapterError, match="force=True"):
        adapter.save(saved)
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    adapter.save(saved, force=True)
    assert (saved / "adapter_model.safetensors").read_bytes() != before
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(AdapterError, match="not an adapter folder"):
        adapter.save(tmp_path / "home", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "home"}


def test_scales_of_adapters_from_elsewhere_are_folded_in(llama_pair, saved):
    config = config_of(saved)
    plain = factors_in(saved)
    (saved / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 4}))
    halved = factors_in(saved)
    (saved / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    stabilized = factors_in(saved)
    for module in plain:
        torch.testing.assert_close(halved[module].b, plain[module].b / 2)
        torch.testing.assert_close(stabilized[module].b, plain[module].b * 8**0.5)
    (saved / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(AdapterError, match="use_dora"):
        factors_in(saved)


def test_what_a_target_s_name_also_means_is_in_the_file_as_zeros(tmp_path):
    class Aux(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = torch.nn.Linear(16, 16)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.aux = torch.nn.Linear(16, 16), Aux()

    base = Model()
    adapter = extract(base, models.tuned_from(base, only=lambda name: name == "proj.weight"), 4)
    assert set(adapter.file.bytes_by_module) == {"proj", "aux.proj"}


def test_a_base_that_ties_and_a_tuned_that_does_not_share_no_delta(tmp_path):
    base = models.llama(tie_word_embeddings=True)
    tuned = models.llama(tie_word_embeddings=False)
    tuned.load_state_dict(base.state_dict())
    tuned = models.tuned_from(tuned)
    adapter = extract(models.save(base, tmp_path / "base"), models.save(tuned, tmp_path / "tuned"), 8, embeddings=True)
    assert "model.embed_tokens" in adapter.factors
    assert "lm_head" not in adapter.factors
    assert any("only in tuned" in warning and "lm_head.weight" in warning for warning in adapter.report.warnings)


def test_layers_that_peft_takes_for_experts_are_left_out_and_counted(tmp_path):
    import transformers

    config = transformers.Qwen3MoeConfig(
        **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4},
        mlp_only_layers=[0],
    )
    base, tuned = models.save_pair(transformers.Qwen3MoeForCausalLM(config), tmp_path)
    adapter = extract(base, tuned, 8)
    assert {module.rpartition(".")[2] for module in adapter.factors} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert any("layer beside experts" in warning for warning in adapter.report.warnings)
    deltas = models.lora_deltas(models.load_adapter(base, adapter.save(tmp_path / "out")))
    assert all(delta.any() for delta in deltas.values())
