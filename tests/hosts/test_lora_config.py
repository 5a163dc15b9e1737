import copy
import json
import subprocess
import sys

import peft
import pytest
import torch

from peft_posthoc import AdapterError, LoraConfig, get_peft_model
from peft_posthoc.ranks.safe import safe_rank
from tests.make import models

IDS = torch.arange(40)[None]
# The toys have changed as much as no fine-tune does, and in a head that is not carried by default.
pytestmark = pytest.mark.filterwarnings("ignore:.*(left out|base's norm|does not hold)")


def effective(model):
    """base + adapter of every adapted module, by module name."""
    base = {n: p for n, p in model.named_parameters() if "lora_" not in n}
    found = {}
    for name, delta in models.lora_deltas(model).items():
        found[name] = base[f"base_model.model.{name}.base_layer.weight"].detach() + delta
    return found


def assert_tuned(model, tuned, modules=None):
    weights = dict(models.load(tuned).named_parameters(remove_duplicate=False))
    got = effective(model)
    assert modules is None or set(got) == set(modules)
    assert got
    for name, weight in got.items():
        torch.testing.assert_close(weight, weights[f"{name}.weight"].detach(), rtol=0, atol=2e-6)


def test_a_config_is_a_plain_peft_configuration_to_stock_peft(llama_pair, tmp_path):
    config = LoraConfig.from_delta(*llama_pair, r=4, lora_dropout=0.1)
    assert isinstance(config, peft.LoraConfig)
    config.save_pretrained(tmp_path)
    read = peft.LoraConfig.from_pretrained(tmp_path)
    assert type(read) is peft.LoraConfig
    assert (read.r, read.lora_alpha, read.lora_dropout, read.task_type) == (4, 4, 0.1, "CAUSAL_LM")
    assert json.loads((tmp_path / "adapter_config.json").read_text()).keys() == peft.LoraConfig().to_dict().keys()


def test_the_model_s_base_weights_are_never_changed(llama_pair):
    model = models.load(llama_pair[0])
    before = copy.deepcopy(model.state_dict())
    result = get_peft_model(model, LoraConfig.from_delta(*llama_pair, r=4), init="posthoc")
    after = result.unload().state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": 5},
        {"lora_alpha": 64, "use_rslora": True},
        {"alpha_pattern": {"q_proj": 3}},
        {"use_dora": True},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_the_adapter_is_the_delta_whatever_the_scale_and_the_start(llama_pair, fields):
    config = LoraConfig.from_delta(*llama_pair, r=32, **fields)
    model = get_peft_model(models.load(llama_pair[0]), config, init="posthoc").eval()
    tuned = models.load(llama_pair[0])
    wanted = models.load(llama_pair[1])
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "proj" in name:
                parameter.copy_(dict(wanted.named_parameters())[name])
        torch.testing.assert_close(model(IDS).logits, tuned(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "modules"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, ["q_proj 0", "q_proj 1", "v_proj 0", "v_proj 1"]),
        ({"target_modules": r".*layers\.1\..*(up|down)_proj"}, ["up_proj 1", "down_proj 1"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, ["q_proj 1"]),
        ({"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["o_proj"]}, ["q_proj 0", "q_proj 1"]),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, ["q_proj 0"]),
    ],
    ids=str,
)
def test_the_modules_that_peft_would_adapt_are_extracted(llama_pair, fields, modules):
    config = LoraConfig.from_delta(*llama_pair, r=32, **fields)
    parent = {"q_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}
    names = [f"model.layers.{i}.{parent.get(leaf, 'mlp')}.{leaf}" for leaf, i in (m.split() for m in modules)]
    assert_tuned(get_peft_model(models.load(llama_pair[0]), config, init="posthoc"), llama_pair[1], names)


def test_all_linear_means_what_peft_means_by_it(llama_pair):
    config = LoraConfig.from_delta(*llama_pair, r=32, target_modules="all-linear")
    stock = peft.get_peft_model(models.load(llama_pair[0]), peft.LoraConfig(target_modules="all-linear"))
    assert_tuned(
        get_peft_model(models.load(llama_pair[0]), config, init="posthoc"), llama_pair[1], models.lora_deltas(stock)
    )


def test_exclude_modules_works_without_target_modules(llama_pair):
    config = LoraConfig.from_delta(*llama_pair, r=4, exclude_modules=["o_proj"])
    assert "o_proj" not in config.target_modules
    assert "q_proj" in config.target_modules


def test_rank_pattern_gives_ranks_by_hand(llama_pair):
    config = LoraConfig.from_delta(*llama_pair, r=4, rank_pattern={"q_proj": 9})
    model = get_peft_model(models.load(llama_pair[0]), config, init="posthoc")
    for name, delta in models.lora_deltas(model).items():
        assert torch.linalg.matrix_rank(delta, rtol=1e-5) == (9 if "q_proj" in name else 4), name


def test_an_energy_share_becomes_the_largest_rank_it_needs(llama_pair):
    config = LoraConfig.from_delta(*llama_pair, r=0.5)
    ranks = [len(layer.factors.s) for layer in config.delta.adapter.layers.values()]
    assert config.r == config.lora_alpha == safe_rank(max(ranks))
    assert min(ranks) < max(ranks)


def test_modules_to_save_hold_the_tuned_weights(llama_pair):
    config = LoraConfig.from_delta(*llama_pair, r=4, modules_to_save=["lm_head"])
    model = get_peft_model(models.load(llama_pair[0]), config, init="posthoc")
    saved = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(saved, models.load(llama_pair[1]).lm_head.weight)


def test_lora_bias_carries_the_change_of_biases(tmp_path):
    base, tuned = models.save_pair(models.qwen2(), tmp_path)
    config = LoraConfig.from_delta(base, tuned, r=32, target_modules=["q_proj", "v_proj"], lora_bias=True)
    model = get_peft_model(models.load(base), config, init="posthoc")
    wanted, before = models.load(tuned), models.load(base)
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            path = name.removeprefix("base_model.model.")
            change = wanted.get_submodule(path).bias - before.get_submodule(path).bias
            torch.testing.assert_close(module.lora_B["default"].bias, change)


@pytest.mark.parametrize("plain", [peft.LoraConfig, LoraConfig])
def test_a_plain_configuration_and_a_tuned_model_are_enough(llama_pair, plain):
    config = plain(r=32, lora_alpha=16, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(models.load(llama_pair[0]), config, init="posthoc", tuned=models.load(llama_pair[1]))
    assert_tuned(model, llama_pair[1])


def test_without_init_it_is_peft_s_own_function(llama_pair):
    model = get_peft_model(models.load(llama_pair[0]), peft.LoraConfig(target_modules=["q_proj"]))
    assert all(not delta.any() for delta in models.lora_deltas(model).values())


def test_the_extracted_start_can_be_trained_and_what_is_beyond_its_rank_too(llama_pair):
    torch.manual_seed(0)
    config = LoraConfig.from_delta(*llama_pair, r=32)
    model = get_peft_model(models.load(llama_pair[0]), config, init="posthoc")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]
    # k_proj has 16 outputs: of its 32 columns of B the last 16 start at zero, and move.
    beyond = model.base_model.model.model.layers[0].self_attn.k_proj.lora_B["default"].weight[:, 16:]
    assert beyond.abs().sum() > 0


def test_low_cpu_mem_usage_gives_the_same_model(llama_pair):
    config = LoraConfig.from_delta(*llama_pair, r=32)
    model = get_peft_model(models.load(llama_pair[0]), config, init="posthoc", low_cpu_mem_usage=True)
    assert_tuned(model, llama_pair[1])
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_second_adapter_goes_beside_the_first(llama_pair):
    model = get_peft_model(models.load(llama_pair[0]), LoraConfig.from_delta(*llama_pair, r=4), "mine", init="posthoc")
    assert list(model.peft_config) == ["mine"]
    assert all(delta.any() for delta in models.lora_deltas(model, "mine").values())


@pytest.mark.parametrize("fields", [{"layer_replication": [(0, 1)]}, {"init_lora_weights": "pissa"}], ids=str)
def test_what_is_not_a_plain_lora_is_refused(llama_pair, fields):
    with pytest.raises(ValueError, match="cannot honour `" + next(iter(fields))):
        LoraConfig.from_delta(*llama_pair, r=4, **fields)


def test_a_model_that_the_factors_do_not_fit_is_refused(llama_pair):
    config = LoraConfig.from_delta(*llama_pair, r=4)
    with pytest.raises(AdapterError, match=r"no layer for 7 of the factors: model\.layers\.1"):
        get_peft_model(models.llama(num_hidden_layers=1), config, init="posthoc")
    with pytest.raises(AdapterError, match=r"has shape \[4, 64\] in the model, \[4, 32\] in the checkpoints"):
        get_peft_model(models.llama(hidden_size=64), config, init="posthoc")


def test_there_must_be_something_to_start_from(llama_pair):
    model = models.load(llama_pair[0])
    with pytest.raises(ValueError, match="from_delta"):
        get_peft_model(model, LoraConfig(), init="posthoc")
    with pytest.raises(ValueError, match='None or "posthoc"'):
        get_peft_model(model, LoraConfig(), init="pissa")
    with pytest.raises(ValueError, match='needs `init="posthoc"`'):
        get_peft_model(model, LoraConfig(), tuned=llama_pair[1])


def test_patch_peft_puts_the_names_on_peft_only_when_called(llama_pair):
    code = """
import sys, peft, peft_posthoc
peft_posthoc.LoraConfig
assert not hasattr(peft.LoraConfig, "from_delta")
peft_posthoc.patch_peft()
from transformers import LlamaForCausalLM
config = peft.LoraConfig.from_delta(*sys.argv[1:], r=4)
model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(sys.argv[1]), config, init="posthoc")
assert all(p.any() for n, p in model.named_parameters() if "lora_B" in n)
print(type(model).__name__)
"""
    run = subprocess.run([sys.executable, "-c", code, *llama_pair], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "PeftModelForCausalLM"


def test_parameters_that_are_no_experts_are_told(llama_pair):
    with pytest.raises(ValueError, match=r"`target_parameters=\['w'\]` names no stacked experts"):
        LoraConfig.from_delta(*llama_pair, 4, target_parameters=["w"])
