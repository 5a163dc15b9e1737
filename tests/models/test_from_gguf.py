"""GGUF files as their models: names, values, and a configuration by which transformers computes the same."""

import gguf
import pytest
import torch
import transformers as tf

from peft_posthoc import CheckpointError, open_checkpoint
from peft_posthoc.adapters.named_base import same_base
from peft_posthoc.models.by_class import class_of
from peft_posthoc.models.from_gguf import ARCHITECTURES
from tests.make import gguf_files, models

QUANT = gguf.GGMLQuantizationType
WIDE = {"head_dim": 16, "rms_norm_eps": 1e-3}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Each with values that its class does not have anyway.
MODELS = {
    "llama": ("llama", lambda: models.llama(rms_norm_eps=1e-3)),
    "llama, tied": ("llama", lambda: models.llama(tie_word_embeddings=True)),
    "llama, biased": ("llama", lambda: models.llama(attention_bias=True, mlp_bias=True)),
    "llama, wide heads": ("llama", lambda: models.llama(**WIDE)),
    "mistral": ("llama", lambda: models.decoder("Mistral")),
    "mixtral": ("llama", lambda: models.decoder("Mixtral", num_local_experts=3, num_experts_per_tok=2)),
    "qwen2": ("qwen2", models.qwen2),
    "qwen3": ("qwen3", lambda: models.decoder("Qwen3", **WIDE)),
    "qwen2moe": ("qwen2moe", lambda: models.decoder("Qwen2Moe", shared_expert_intermediate_size=24, **EXPERTS)),
    "qwen3moe": ("qwen3moe", lambda: models.qwen3_moe(norm_topk_prob=True, **EXPERTS, **WIDE)),
    "phi3": ("phi3", lambda: models.decoder("Phi3", pad_token_id=0)),
    "gemma2": ("gemma2", lambda: models.gemma2(query_pre_attn_scalar=8, sliding_window=4, final_logit_softcapping=9.0)),
    "gemma3": ("gemma3", lambda: tf.Gemma3ForCausalLM(gemma3_config())),
    "gpt-oss": ("gpt-oss", lambda: tf.GptOssForCausalLM(gpt_oss_config())),
    "falcon": ("falcon", lambda: falcon(multi_query=True, num_kv_heads=1)),
    "falcon, groups": (
        "falcon",
        lambda: falcon(new_decoder_architecture=True, num_kv_heads=2, layer_norm_epsilon=1e-3),
    ),
    "falcon, one norm": (
        "falcon",
        lambda: falcon(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
    ),
    "bloom": (
        "bloom",
        lambda: tf.BloomForCausalLM(tf.BloomConfig(n_layer=2, n_head=4, **SMALL, layer_norm_epsilon=1e-3)),
    ),
    "gpt2": ("gpt2", models.gpt2),
    "starcoder2": ("starcoder2", lambda: models.decoder("Starcoder2", norm_epsilon=1e-3)),
    "nemotron": ("nemotron", lambda: models.decoder("Nemotron")),
}
SMALL = {"vocab_size": 96, "hidden_size": 32}
TOKENS = torch.arange(24)[None] * 7 % 96


def gemma3_config():
    sizes = models.gemma2().config.to_dict() | {"query_pre_attn_scalar": 8, "sliding_window": 4}
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return tf.Gemma3TextConfig(**{key: sizes[key] for key in kept}, num_hidden_layers=7, query_pre_attn_scalar=8)


def gpt_oss_config():
    sizes = {"intermediate_size": 24, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return tf.GptOssConfig(**SMALL, num_hidden_layers=2, **sizes, **heads, rms_norm_eps=1e-3)


def falcon(**changes):
    plain = {"bias": False, "alibi": False, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 128}
    return tf.FalconForCausalLM(tf.FalconConfig(**SMALL, **plain, **changes))


def made(name):
    """A model whose norms and biases are none of the usual."""
    torch.manual_seed(0)
    model = MODELS[name][1]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.3))
    return model


def computed(checkpoint):
    """What the model says that is built of the configuration, with the values read."""
    cls = class_of(checkpoint.config["architectures"][0])
    model = cls(cls.config_class.from_dict(checkpoint.config)).eval()
    values = {name: checkpoint.read(name) for name in checkpoint.headers}
    found = model.load_state_dict(values, strict=False)
    assert not found.unexpected_keys
    model.tie_weights()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", MODELS)
def test_names_values_and_what_is_computed_are_the_models_own(name, tmp_path):
    model, arch = made(name), MODELS[name][0]
    found = open_checkpoint(gguf_files.save(model, tmp_path / "a.gguf", arch))
    own = dict(model.named_parameters())
    assert found.headers.keys() == own.keys()
    for one, wanted in own.items():
        read = found.read(one)
        assert found.headers[one] == (read.shape, read.dtype) == (wanted.shape, torch.float32)
        # One added and taken away again is what it was, but for rounding.
        near = arch in gguf_files.NORMS_PLUS_ONE and one.endswith("norm.weight")
        assert torch.allclose(read, wanted, rtol=0, atol=2e-7) if near else torch.equal(read, wanted)
    with torch.no_grad():
        assert torch.allclose(computed(found), model(TOKENS).logits, atol=1e-5)


def test_every_architecture_is_tested():
    assert {arch for arch, _ in MODELS.values()} == ARCHITECTURES.keys()
    assert ARCHITECTURES.keys() <= set(gguf.MODEL_ARCH_NAMES.values())


def test_rows_of_queries_and_keys_are_halves_again(tmp_path):
    """llama.cpp has row i of a head beside row i + half; transformers has the halves one after the other."""
    model = models.llama(hidden_size=8, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1)
    tensors = gguf_files.as_llama_cpp_has_it(model, "llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.copy_(torch.arange(8.0)[:, None])
    assert gguf_files.by_turns(torch.arange(8), 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    rows = torch.tensor([0.0, 4, 1, 5, 2, 6, 3, 7])[:, None].expand(8, 8).contiguous()
    more = tensors | {"blk.0.attn_q.weight": rows}
    path = gguf_files.save(model, tmp_path / "a.gguf", "llama", more=more)
    assert open_checkpoint(path).read("model.layers.0.self_attn.q_proj.weight")[:, 0].tolist() == list(range(8))


@pytest.mark.parametrize(
    "rotary",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        {
            **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=lambda rotary: rotary["rope_type"],
)
def test_scaled_rotary_embeddings_are_in_the_configuration(rotary, tmp_path):
    torch.manual_seed(0)
    model = models.llama(rope_parameters={"rope_theta": 5000.0, **rotary}, head_dim=16).eval()
    more, metadata = {}, {"rope.scaling.type": rotary["rope_type"], "rope.scaling.factor": rotary["factor"]}
    if rotary["rope_type"] == "llama3":
        plain = 5000.0 ** (-torch.arange(0, 16, 2) / 16)
        more, metadata = {"rope_freqs.weight": plain / model.model.rotary_emb.inv_freq}, {}
    elif before := rotary.get("original_max_position_embeddings"):
        metadata["rope.scaling.original_context_length"] = before
    found = open_checkpoint(gguf_files.save(model, tmp_path / "a.gguf", "llama", more=more, metadata=metadata))
    assert found.config["rope_parameters"] == {"rope_theta": 5000.0, **rotary}
    with torch.no_grad():
        assert torch.allclose(computed(found), model(TOKENS).logits, atol=1e-5)


def test_rotary_frequencies_of_no_known_kind_are_refused(tmp_path):
    path = gguf_files.save(
        models.llama(), tmp_path / "a.gguf", "llama", more={"rope_freqs.weight": torch.arange(1.0, 5)}
    )
    with pytest.raises(CheckpointError, match=r"The rotary frequencies of `.*` are none of Llama 3's"):
        open_checkpoint(path)


def test_long_and_short_factors_of_phi_are_in_the_configuration(tmp_path):
    factors = {"long_factor": [1.0, 2.0, 3.0], "short_factor": [1.0, 1.5, 2.0]}
    rotary = {"rope_type": "longrope", "rope_theta": 5000.0, "partial_rotary_factor": 0.75, **factors}
    model = models.decoder("Phi3", pad_token_id=0, rope_parameters=rotary, original_max_position_embeddings=16).eval()
    more = {f"rope_factors_{key}.weight": torch.tensor(factors[f"{key}_factor"]) for key in ("long", "short")}
    metadata = {"rope.scaling.original_context_length": 16, "rope.dimension_count": 6}
    found = open_checkpoint(gguf_files.save(model, tmp_path / "a.gguf", "phi3", more=more, metadata=metadata))
    with torch.no_grad():
        assert torch.allclose(computed(found), model(TOKENS).logits, atol=1e-5)


def test_quantised_and_half_precision_values_are_those_of_their_types(tmp_path):
    model = models.llama(hidden_size=64, intermediate_size=96)
    kinds = {"blk.0.ffn_up.weight": QUANT.F16, "blk.0.ffn_gate.weight": QUANT.BF16, "token_embd.weight": QUANT.Q5_1}
    path = gguf_files.save(model, tmp_path / "a.gguf", "llama", kind=QUANT.Q8_0, kinds=kinds)
    found, stored = open_checkpoint(path), gguf_files.as_llama_cpp_has_it(model, "llama")
    k_proj = found.read("model.layers.1.self_attn.k_proj.weight")
    coded = gguf.quantize(stored["blk.1.attn_k.weight"].numpy(), QUANT.Q8_0)
    assert torch.equal(gguf_files.by_turns(k_proj, 16), torch.tensor(gguf.dequantize(coded, QUANT.Q8_0)))
    mlp = "model.layers.0.mlp"
    assert found.headers[f"{mlp}.up_proj.weight"].dtype is torch.float16
    assert torch.equal(found.read(f"{mlp}.up_proj.weight"), model.model.layers[0].mlp.up_proj.weight.half())
    assert torch.equal(found.read(f"{mlp}.gate_proj.weight"), model.model.layers[0].mlp.gate_proj.weight.bfloat16())


def test_a_scale_beside_a_weight_is_multiplied_in(tmp_path):
    """NVFP4 has one for the tensor, or for each expert."""
    model = models.decoder("Mixtral", num_local_experts=3, num_experts_per_tok=2, intermediate_size=64)
    plain = open_checkpoint(gguf_files.save(model, tmp_path / "plain.gguf", "llama", kind=QUANT.Q8_0))
    each = torch.tensor([1.0, 2.0, 4.0])
    more = {
        "blk.0.attn_v.scale": torch.tensor([2.0]),
        "blk.1.ffn_down_exps.scale": each,
        "blk.1.ffn_up_exps.scale": each,
        "blk.1.ffn_up_exps.input_scale": each,
    }
    found = open_checkpoint(gguf_files.save(model, tmp_path / "a.gguf", "llama", kind=QUANT.Q8_0, more=more))
    assert found.headers.keys() - plain.headers.keys() == {"blk.1.ffn_up_exps.input_scale"}
    v_proj, experts = "model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.experts"
    each = each[:, None, None]
    for read in (lambda one: one.read, lambda one: one.steps):
        before, after = read(plain), read(found)
        assert torch.equal(after(v_proj), 2 * before(v_proj))
        assert torch.equal(after(f"{experts}.down_proj"), each * before(f"{experts}.down_proj"))
        gate, up = before(f"{experts}.gate_up_proj").chunk(2, dim=1)
        assert torch.equal(after(f"{experts}.gate_up_proj"), torch.cat([gate, each * up], dim=1))


def test_steps_of_the_grid_are_in_the_models_order(tmp_path):
    model = models.llama(hidden_size=64, intermediate_size=96)
    found = open_checkpoint(gguf_files.save(model, tmp_path / "a.gguf", "llama", kind=QUANT.Q8_0))
    name = "model.layers.1.self_attn.k_proj.weight"
    # Of Q8_0 a block of 32 has one step, which its largest value is 127 of.
    wanted = found.read(name).unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1) / 127
    assert torch.allclose(found.steps(name), wanted, rtol=1e-3)
    assert found.steps("model.norm.weight") is None


def test_what_does_not_fit_is_refused_in_a_line(tmp_path):
    def refused(message, model=None, arch="llama", **how):
        path = gguf_files.save(model or models.llama(), tmp_path / "a.gguf", arch, **how)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)

    refused("is a GGUF of the architecture `baichuan`; how its tensors differ .* Known are bloom, ", arch="baichuan")
    refused("is no model: by its own word it is of type `adapter`", metadata={"general.type": "adapter"})
    refused(
        "holds no `blk.1.ffn_up.weight`, of which `model.layers.1.mlp.up_proj.weight` of a LlamaForCausalLM is made",
        leave_out=["blk.1.ffn_up.weight"],
    )
    refused("holds `cls.weight`, for which a LlamaForCausalLM has no place", more={"cls.weight": torch.ones(4)})
    refused(
        r"holds `blk.0.attn_q.weight` as \[32, 8\]; `model.layers.0.self_attn.q_proj.weight` of a LlamaForCausalLM "
        r"with its metadata is \[32, 32\]",
        more={"blk.0.attn_q.weight": torch.ones(32, 8)},
    )
    refused("holds no `token_embd.weight`", leave_out=["token_embd.weight"])
    refused("transformers makes no configuration of", metadata={"block_count": "many"})


def test_the_one_model_of_a_folder_is_opened_and_of_several_none(tmp_path):
    model = models.llama()
    gguf_files.save(model, tmp_path / "small.gguf", "llama")
    (tmp_path / "mmproj-small.gguf").write_bytes(b"what sees pictures for it")
    assert open_checkpoint(tmp_path).headers.keys() == dict(model.named_parameters()).keys()
    gguf_files.split(gguf_files.save(model, tmp_path / "large.gguf", "llama"))
    with pytest.raises(CheckpointError, match=r"2 models in GGUF: large-00001-of-00002.gguf, small.gguf. Give one of"):
        open_checkpoint(tmp_path)
    (tmp_path / "small.gguf").unlink()
    assert open_checkpoint(tmp_path).headers.keys() == dict(model.named_parameters()).keys()
    models.save(models.qwen2(), tmp_path)
    assert open_checkpoint(tmp_path).config["model_type"] == "qwen2"


def test_two_types_of_a_model_in_one_folder_are_two_bases(tmp_path):
    for name, kind in (("one", QUANT.F32), ("two", QUANT.F16)):
        gguf_files.save(models.llama(), tmp_path / f"{name}.gguf", "llama", kind=kind)
    one, two = (str(tmp_path / f"{name}.gguf") for name in ("one", "two"))
    assert same_base(one, one)
    assert not same_base(one, two)
