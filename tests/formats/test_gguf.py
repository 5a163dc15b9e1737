"""GGUF read back is the adapter: the same factors under llama.cpp's names, in the order of rows that it has."""

import gguf
import numpy as np
import pytest
import torch

from peft_posthoc import AdapterError, export, extract
from peft_posthoc.formats.gguf import ARCHITECTURES, interleave
from peft_posthoc.formats.open import open_deltas
from tests.make import architectures, lora, models

# By model, the architecture's name, and how many pairs of tensors a layer has beside embeddings and head.
DENSE = {
    "llama": ("llama", 7),
    "mistral": ("llama", 7),
    "qwen2": ("qwen2", 7),
    "qwen3": ("qwen3", 7),
    "phi3": ("phi3", 4),
}
LEAVES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def read(path):
    """A file's fields and tensors, the latter in float64."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {
        t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type), dtype=torch.float64) for t in reader.tensors
    }


def in_order(rows, heads):
    """llama.cpp's rows back in the order that transformers has them: by turns to half by half."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_read_back_it_is_the_adapter(name, dtype, tmp_path):
    base, tuned = architectures.pair_of(name, tmp_path)
    adapter = extract(base, tuned, 3, embeddings=True, head=True, dtype=torch.float32).save(tmp_path / "a")
    export(adapter, tmp_path / "out.gguf", "gguf", base=base, dtype=dtype)
    arch, count = DENSE[name]
    fields, tensors = read(tmp_path / "out.gguf")
    assert fields["general.type"] == "adapter"
    assert (fields["general.architecture"], fields["adapter.type"]) == (arch, "lora")
    # llama.cpp: alpha over the tensor's own rank, which is one.
    assert fields["adapter.lora.alpha"] == 8.0
    assert len(tensors) == 2 * (2 * count + 2)
    deltas = open_deltas(adapter, base, values=False)
    heads = {"q_proj": 4, "k_proj": 2} if arch == "llama" else {}
    for module in deltas.names:
        a, b = deltas.padded(module, 8, dtype)
        layer, _, leaf = module.removeprefix("model.layers.").partition(".")
        own = {"model.embed_tokens": "token_embd", "lm_head": "output"}.get(module) or f"blk.{layer}.{LEAVES[leaf]}"
        got_a, got_b = (tensors[f"{own}.weight.lora_{which}"] for which in "ab")
        if module.rpartition(".")[2] in heads:
            got_b = in_order(got_b, heads[module.rpartition(".")[2]])
        assert torch.equal(got_a.mT if own == "token_embd" else got_a, a.double())
        assert torch.equal(got_b, b.double())


def test_rows_are_reordered_as_the_rotary_embedding_needs_it():
    """Transformers turns row i of a head with row i + half; llama.cpp's order has these beside one another."""
    rows = torch.arange(8)[:, None]
    assert interleave(rows, 1).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert interleave(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("experts", ["per-expert", "fused"])
def test_experts_are_stacked_by_projection_however_the_adapter_has_them(experts, tmp_path):
    base, tuned = architectures.pair_of("mixtral", tmp_path)
    adapter = extract(base, tuned, 3, experts=experts, dtype=torch.float32).save(tmp_path / "a")
    export(adapter, tmp_path / "out.gguf", "gguf", base=base)
    _, tensors = read(tmp_path / "out.gguf")
    assert tensors["blk.0.ffn_gate_exps.weight.lora_a"].shape == (2, 8, 32)
    assert tensors["blk.0.ffn_down_exps.weight.lora_b"].shape == (2, 32, 8)
    deltas = open_deltas(adapter, base, values=False)
    for leaf, own in {"w1": "gate", "w2": "down", "w3": "up"}.items():
        a, b = (tensors[f"blk.1.ffn_{own}_exps.weight.lora_{which}"] for which in "ab")
        for expert in range(2):
            factors = deltas.factors(f"model.layers.1.block_sparse_moe.experts.{expert}.{leaf}")
            assert torch.allclose(b[expert] @ a[expert], factors.b @ factors.a, atol=1e-9)


def test_scales_and_ranks_of_every_kind_are_folded_in(tmp_path):
    base, _ = models.save_pair(models.qwen2(), tmp_path)
    adapter = lora.adapter(
        *(base, tmp_path / "a"),
        **{"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": ["v_proj", "down_proj", "o_proj"]},
        **{"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"o_proj": 3}},
    )
    found = export(adapter, tmp_path / "out.gguf", "gguf", base=base)
    assert (found.rank_before, found.rank, found.dtype) == (4, 4, "float32")
    fields, tensors = read(tmp_path / "out.gguf")
    wanted = models.lora_deltas(lora.served(base, adapter))
    assert len(tensors) == 2 * len(wanted) == 12
    for module, delta in wanted.items():
        layer, _, leaf = module.removeprefix("model.layers.").partition(".")
        a, b = (tensors[f"blk.{layer}.{LEAVES[leaf]}.weight.lora_{which}"] for which in "ab")
        scale = fields["adapter.lora.alpha"] / b.shape[1]
        assert np.allclose(scale * (b @ a), delta.double(), atol=1e-6)


def test_what_llama_cpp_does_not_read_is_refused(tied_pair, tmp_path):
    base, tuned = tied_pair
    tied = extract(base, tuned, 2, embeddings=True).save(tmp_path / "tied")
    with pytest.raises(AdapterError, match=r"adapts `.*`, which is one weight with another"):
        export(tied, tmp_path / "out.gguf", "gguf", base=base)
    whole = extract(base, tuned, 2, form="peft").save(tmp_path / "whole")
    with pytest.raises(AdapterError, match=r"whole, which llama\.cpp does not read"):
        export(whole, tmp_path / "out.gguf", "gguf", base=base)
    gpt2 = models.save_pair(models.gpt2(), tmp_path / "gpt2")
    other = extract(*gpt2, 2).save(tmp_path / "other")
    with pytest.raises(AdapterError, match=r"is a GPT2LMHeadModel; how llama\.cpp holds it is not known here"):
        export(other, tmp_path / "out.gguf", "gguf", base=gpt2[0])
    base, tuned = architectures.pair_of("qwen3_moe", tmp_path / "qwen3_moe")
    dense = extract(base, tuned, 2, experts="per-expert").save(tmp_path / "dense")
    with pytest.raises(AdapterError, match=r"`model.layers.0.mlp.*`, which llama\.cpp has no name for"):
        export(dense, tmp_path / "out.gguf", "gguf", base=base)
    qwen2 = models.save(models.qwen2(), tmp_path / "qwen2")
    biased = lora.adapter(qwen2, tmp_path / "biased", r=2, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(AdapterError, match=r"\(`lora_bias`\), which llama\.cpp does not read"):
        export(biased, tmp_path / "out.gguf", "gguf", base=qwen2)
    assert not list(tmp_path.glob("*out.gguf*"))


def test_every_architecture_named_here_is_one_of_the_package_and_of_transformers():
    import transformers

    for name, (arch, _) in ARCHITECTURES.items():
        assert hasattr(transformers, name)
        assert hasattr(gguf.MODEL_ARCH, arch)


def test_without_the_package_one_line_says_what_to_install(llama_pair, tmp_path, monkeypatch):
    import sys

    from peft_posthoc import MissingExtraError

    adapter = extract(*llama_pair, 2).save(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'peft-posthoc\[gguf\]'"):
        export(adapter, tmp_path / "out.gguf", "gguf", base=llama_pair[0])
