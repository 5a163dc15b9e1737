"""Experts one by one and stacked: what is added to every expert's matrices is the same either way, exactly."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import AdapterError, export, extract
from peft_posthoc.formats.open import open_deltas
from tests.make import architectures, lora, models

EPS = torch.finfo(torch.float32).eps
PER_EXPERT = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")


@pytest.fixture(scope="module", params=PER_EXPERT)
def mixture(request, tmp_path_factory):
    """A mixture's name, base and fine-tune."""
    return request.param, *architectures.pair_of(request.param, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return architectures.pair_of("mixtral", tmp_path_factory.mktemp("mixtral"))


def added(adapter, base):
    """By matrix, what an adapter adds to it."""
    deltas = open_deltas(adapter, base, values=False)
    return {name: b @ a for name in deltas.names for a, b in [deltas.factors(name)]}


def assert_same(one, other):
    """Two sets of deltas, of which either may have zeros where the other has none."""
    for name in one.keys() | other.keys():
        found, wanted = one.get(name), other.get(name)
        if found is None or wanted is None:
            assert not (wanted if found is None else found).any(), name
        else:
            assert (found - wanted).norm() <= 4 * EPS * wanted.norm(), name


def config(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_from_one_by_one_to_stacked(mixture, tmp_path):
    _, base, tuned = mixture
    # PEFT does not load dense MLPs beside stacked experts.
    experts = r"\.experts\.|self_attn"
    source = extract(base, tuned, 3, experts="per-expert", include=[experts], dtype=torch.float32).save(tmp_path / "a")
    found = export(source, tmp_path / "out", "peft-moe", base=base)
    wanted = added(source, base)
    assert len([one for one in wanted if ".experts." in one]) >= 6
    assert_same(added(tmp_path / "out", base), wanted)
    # Gate and up have factors of their own: two blocks.
    assert (found.rank_before, found.rank) == (8, 16)
    assert any("two blocks" in note for note in found.notes)
    assert config(tmp_path / "out")["r"] == config(tmp_path / "out")["lora_alpha"] == 16


def test_stock_peft_computes_with_the_stacked_ones_what_it_does_one_by_one(mixtral, tmp_path):
    base, tuned = mixtral
    source = extract(base, tuned, 3, experts="per-expert", dtype=torch.float32).save(tmp_path / "a")
    export(source, tmp_path / "out", "peft-moe", base=base)
    export(source, tmp_path / "merged", "merged", base=base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        found = lora.logits(models.load_adapter(base, tmp_path / "out"))
    wanted, before = lora.logits(models.load(tmp_path / "merged")), lora.logits(models.load(base))
    assert (found - wanted).abs().max() < 1e-5 < 1e-2 * (wanted - before).abs().max()


def test_from_stacked_to_one_by_one(mixture, tmp_path):
    _, base, tuned = mixture
    source = extract(base, tuned, 3, experts="fused", dtype=torch.float32).save(tmp_path / "a")
    found = export(source, tmp_path / "out", "vllm-moe", base=base)
    assert_same(added(tmp_path / "out", base), added(source, base))
    assert found.rank == found.rank_before
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert not any(".base_layer." in name or name.endswith(".experts.lora_A.weight") for name in tensors)
    assert "target_parameters" not in config(tmp_path / "out")
    # As the model's own tensors are called on disk.
    modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in tensors}
    assert modules <= {name.removesuffix(".weight") for name in load_file(f"{base}/model.safetensors")}


def test_there_and_back_is_the_same_file(mixture, tmp_path):
    _, base, tuned = mixture
    source = extract(base, tuned, 8, experts="fused").save(tmp_path / "a")
    export(source, tmp_path / "there", "vllm-moe", base=base)
    # Gate and up share what comes in: the rank does not grow.
    found = export(tmp_path / "there", tmp_path / "back", "peft-moe", base=base)
    assert found.rank == 8
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path / "back"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert config(source) == config(tmp_path / "back")


def test_all_experts_of_a_layer_are_there_if_one_is(mixtral, tmp_path):
    base, tuned = mixtral
    only = r"layers\.1\.block_sparse_moe\.experts\.0\.w3"
    source = extract(base, tuned, 3, experts="per-expert", include=[only]).save(tmp_path / "a")
    for name in list(added(source, base)):
        assert ".experts." in name
    export(source, tmp_path / "f", "peft-moe", base=base)
    export(tmp_path / "f", tmp_path / "p", "vllm-moe", base=base)
    names = {n for n in load_file(tmp_path / "p" / "adapter_model.safetensors") if n.endswith("lora_A.weight")}
    assert len(names) == 2 * 2 * 3  # layers, experts, w1 to w3
    assert_same(added(tmp_path / "p", base), added(source, base))


def test_whole_tensors_stay_in_peft_s_own_layout_and_go_nowhere_else(mixtral, tmp_path):
    base, tuned = mixtral
    source = extract(base, tuned, 4, form="peft", experts="fused").save(tmp_path / "a")
    whole = [name for name in load_file(source / "adapter_model.safetensors") if "norm" in name]
    assert whole
    export(source, tmp_path / "out", "peft-moe", base=base)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path / "out"))
    assert all(torch.equal(one[name], other[name]) for name in whole)
    with pytest.raises(AdapterError, match=r"whole, which a serving engine does not read\. Use `to='merged'`"):
        export(source, tmp_path / "no", "vllm-moe", base=base)


def test_what_cannot_be_laid_out_so_is_told(llama_pair, tmp_path):
    dense = extract(*llama_pair, 2).save(tmp_path / "dense")
    for to in ("vllm-moe", "peft-moe"):
        with pytest.raises(AdapterError, match="no factors for experts"):
            export(dense, tmp_path / "out", to, base=llama_pair[0])
    gpt_oss = architectures.pair_of("gpt_oss", tmp_path / "gpt_oss")
    stacked = extract(*gpt_oss, 2, experts="fused").save(tmp_path / "stacked")
    with pytest.raises(AdapterError, match=r"are one parameter .* no names of their own"):
        export(stacked, tmp_path / "out", "vllm-moe", base=gpt_oss[0])
    qwen = architectures.pair_of("qwen3_moe", tmp_path / "qwen")
    shared = extract(*qwen, 2, experts="per-expert").save(tmp_path / "shared")
    with pytest.raises(AdapterError, match=r"mlp\.\w+_proj`, which PEFT takes for an expert's"):
        export(shared, tmp_path / "out", "peft-moe", base=qwen[0])
    with pytest.raises(AdapterError, match="no stacked experts there"):
        export(stacked, tmp_path / "out", "merged", base=llama_pair[0])
    assert not (tmp_path / "out").exists()


def test_peft_does_not_load_dense_mlps_beside_stacked_experts(tmp_path):
    """What is refused here for PEFT's sake; were it mended, this would tell."""
    base, tuned = architectures.pair_of("qwen3_moe", tmp_path)
    source = extract(base, tuned, 2, experts="per-expert", include=[r"\.experts\."], dtype=torch.float32)
    out = tmp_path / "out"
    export(source.save(tmp_path / "a"), out, "peft-moe", base=base)
    told, tensors = config(out), load_file(out / "adapter_model.safetensors")
    for leaf, (m, n) in {"gate_proj": (48, 32), "up_proj": (48, 32), "down_proj": (32, 48)}.items():
        name = f"model.layers.0.mlp.{leaf}"
        told["target_modules"].append(name)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(told["r"], n)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(m, told["r"])
    lora.served(base, out)
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(RuntimeError, match="size mismatch"):
        lora.served(base, out)
