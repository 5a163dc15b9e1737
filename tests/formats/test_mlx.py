"""MLX-LM's folder: what its loader looks for, under its names; and its own outputs, where it is installed."""

import json

import pytest
import torch
from safetensors.torch import load_file

from peft_posthoc import AdapterError, export, extract
from peft_posthoc.formats.open import open_deltas
from tests.make import architectures, lora, models


def test_factors_are_transposed_and_their_scale_is_one(tmp_path):
    base, _ = models.save_pair(models.qwen2(), tmp_path)
    adapter = lora.adapter(
        *(base, tmp_path / "a"),
        **{"r": 4, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
        **{"rank_pattern": {"down_proj": 2}},
    )
    export(adapter, tmp_path / "out", "mlx", base=base)
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    told = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    parameters = told["lora_parameters"]
    assert told["fine_tune_type"] == "lora"
    assert (parameters["rank"], parameters["scale"], parameters["dropout"]) == (4, 1.0, 0.0)
    wanted = models.lora_deltas(lora.served(base, adapter))
    assert parameters["keys"] == sorted(wanted)
    assert tensors.keys() == {f"{name}.lora_{which}" for name in wanted for which in "ab"}
    for name, delta in wanted.items():
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert a.shape[1] == b.shape[0] == 4
        # `x @ lora_a @ lora_b`; a token's embedding is a row of `lora_a @ lora_b`.
        product = a @ b if name == "model.embed_tokens" else (a @ b).T
        assert torch.allclose(product, delta, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("experts", ["per-expert", "fused"])
def test_experts_are_one_module_by_projection(name, experts, tmp_path):
    base, tuned = architectures.pair_of(name, tmp_path)
    adapter = extract(base, tuned, 2, experts=experts, dtype=torch.float32).save(tmp_path / "a")
    export(adapter, tmp_path / "out", "mlx", base=base)
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    mlp = "block_sparse_moe" if name == "mixtral" else "mlp"
    leaves = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    deltas = open_deltas(adapter, base, values=False)
    for leaf, own in leaves.items():
        a, b = (tensors[f"model.layers.1.{mlp}.switch_mlp.{leaf}.lora_{which}"] for which in "ab")
        assert (a.ndim, len(a), a.shape[1], b.shape[2]) == (3, 2, 8, 8)
        for expert in range(2):
            part = f"model.layers.1.{mlp}.experts.{expert}.{own if name == 'mixtral' else leaf}"
            found = deltas.factors(part)
            assert torch.allclose((b[expert] @ a[expert]).double(), found.b @ found.a, atol=1e-8)
    assert not any(".experts." in key for key in tensors)


def test_a_tied_weight_is_one_module_and_must_change_in_one_way(tied_pair, tmp_path):
    base, tuned = tied_pair
    both = extract(base, tuned, 2, embeddings=True, head=True).save(tmp_path / "both")
    export(both, tmp_path / "out", "mlx", base=base)
    names = load_file(tmp_path / "out" / "adapters.safetensors").keys()
    assert "model.embed_tokens.lora_a" in names
    assert "lm_head.lora_a" not in names
    head = lora.adapter(base, tmp_path / "head", r=2, target_modules=["lm_head"])
    with pytest.raises(AdapterError, match=r"one weight in MLX-LM\. Use `to='merged'`, which unties them"):
        export(head, tmp_path / "no", "mlx", base=base)


def test_models_whose_names_are_not_known_are_refused(tmp_path):
    base, tuned = models.save_pair(models.gpt2(), tmp_path)
    adapter = extract(base, tuned, 2).save(tmp_path / "a")
    with pytest.raises(AdapterError, match="of the type 'gpt2', whose modules in MLX-LM are not known here"):
        export(adapter, tmp_path / "out", "mlx", base=base)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "phi3", "mixtral"])
def test_in_mlx_itself_the_adapter_is_the_merged_model(name, tmp_path):
    """Where `mlx[cpu]` and `mlx-lm` are installed."""
    mx = pytest.importorskip("mlx.core")
    load_model = pytest.importorskip("mlx_lm.utils").load_model
    load_adapters = pytest.importorskip("mlx_lm.tuner.utils").load_adapters
    base, tuned = architectures.pair_of(name, tmp_path)
    experts = "per-expert" if name == "mixtral" else None
    adapter = extract(base, tuned, 7, embeddings=True, head=True, experts=experts, dtype=torch.float32)
    source = adapter.save(tmp_path / "a")
    export(source, tmp_path / "out", "mlx", base=base)
    export(source, tmp_path / "merged", "merged", base=base)

    def outputs(folder, adapters=None):
        model, _ = load_model(type(tmp_path)(folder))
        if adapters is not None:
            load_adapters(model, str(adapters))
            model.eval()
        return torch.tensor(model(mx.arange(20)[None]).astype(mx.float32).tolist())

    before, found, wanted = outputs(base), outputs(base, tmp_path / "out"), outputs(tmp_path / "merged")
    assert (found - wanted).abs().max() < 1e-5 < 1e-2 * (wanted - before).abs().max()
