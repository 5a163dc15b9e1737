import json
import re
import shutil
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import NothingToCarryError, extract
from peft_posthoc.ranks.rules import keep_energy
from tests.make import architectures, models, sweep_page

EPS = torch.finfo(torch.float32).eps
# What PEFT has no place for: parameters beside layers with factors, or of the model itself, by the end of their names.
BEYOND_PEFT = {
    "clip": {"logit_scale"},
    "convnext": {"layer_scale_parameter"},
    "falcon_h1": {"A_log", "D", "dt_bias"},
    "gemma3-images": {"probe"},
    "granitemoehybrid": {"A_log", "D", "dt_bias"},
    "jamba": {"A_log", "D"},
    "jetmoe": {"bias"},
    "llama4": {"class_embedding", "positional_embedding_vlm"},
    "mamba": {"A_log", "D"},
    "mamba2": {"A_log", "D", "dt_bias"},
    "qwen3_next": {"A_log", "dt_bias"},
    "siglip": {"probe"},
    "wav2vec2": {"masked_spec_embed"},
    "wavlm": {"gru_rel_pos_const", "masked_spec_embed"},
    "xlnet": {"mask_emb"},
}


class Case:
    """A pair of an architecture, and its adapter at full rank."""

    def __init__(self, name, folder):
        self.name, self.pair, self.folder = name, architectures.pair_of(name, folder), folder
        self.base = models.load(self.pair[0])
        self.adapter = extract(*self.pair, 4096, form="peft")
        self.out = self.adapter.save(folder / "out")

    @cached_property
    def model(self):
        """Stock PEFT's, of the base and the adapter."""
        return self.loaded()

    def loaded(self, out=None):
        return models.load_adapter(self.base, out or self.out, tied=True, unbiased=True)

    def error(self, model, adapter):
        """How far the model is from the tuned one, with the base's tensors in place of those left out."""
        tuned = self.pair[1]
        if left_out := left_out_of(adapter):
            before, after = self.tensors
            tuned = shutil.copytree(tuned, self.folder / "wanted", dirs_exist_ok=True)
            tensors = {name: (before if name in left_out else after)[name] for name in after}
            save_file(tensors, models.weights_of(tuned), metadata={"format": "pt"})
        return architectures.error(self.name, model, self.base, tuned)

    @property
    def tensors(self):
        """Of both checkpoints, by name."""
        return tuple(load_file(models.weights_of(folder)) for folder in self.pair)


@pytest.fixture(scope="module", params=architectures.ARCHITECTURES)
def case(request, tmp_path_factory):
    if request.param.startswith("diffusers-"):
        pytest.importorskip("diffusers", reason="diffusers is not installed.", exc_type=ImportError)
    return Case(request.param, tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return Case("qwen2", tmp_path_factory.mktemp("qwen2"))


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def status_of(adapter):
    return {row.weight: row.status for row in adapter.report.rows}


def left_out_of(adapter):
    return {row.weight for row in adapter.report.rows if row.status == "left out"}


def test_at_full_rank_the_outputs_are_the_tuned_ones_but_for_what_is_left_out(case):
    assert {name.rpartition(".")[2] for name in left_out_of(case.adapter)} == BEYOND_PEFT.get(case.name, set())
    assert case.error(case.model, case.adapter) < 100 * EPS


def test_so_are_those_of_the_portable_form(case, tmp_path):
    adapter = extract(*case.pair, 4096, **architectures.EVERYTHING)
    model = models.load_adapter(case.base, adapter.save(tmp_path / "out"), tied=True)
    assert case.error(model, adapter) < 100 * EPS


def test_every_tensor_of_both_checkpoints_is_accounted_for_once(case):
    report = case.adapter.report
    before, after = case.tensors
    of_experts = case.adapter.plan.layout.of_experts
    rows = [row.weight for row in report.rows if not of_experts(row.weight.partition("[")[0])]
    assert sorted(rows) == sorted(name for name in after if not of_experts(name))
    # Those of experts are matrices of one expert, however they are stored: together they are the tensors.
    energies = sum((after[name].double() - before[name].double()).norm() ** 2 for name in after)
    assert sum(row.delta_norm**2 for row in report.rows) == pytest.approx(float(energies), rel=1e-6)
    assert sum(row.base_norm**2 for row in report.rows) == pytest.approx(
        sum(float(before[name].double().norm()) ** 2 for name in before), rel=1e-6
    )
    reasons = {row.reason.partition(" (")[0] for row in report.rows if row.status == "left out"}
    assert reasons <= {"a parameter of a module that holds layers with factors", "a parameter of the model itself"}
    assert report.totals.energy_of_all == pytest.approx(1, abs=1e-6 if not reasons else 0.05)
    assert not reasons or report.totals.energy_of_all < 1 - 1e-6


def test_the_rows_bytes_are_the_file_s(case):
    assert case.adapter.report.totals.bytes == sum(tensor.nbytes for tensor in tensors_of(case.out).values())


# PEFT takes its own biases, where it gives them back, for something else.
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*have invalid shape")
def test_peft_takes_every_tensor_of_the_file(case):
    from peft import get_peft_model_state_dict

    found, tensors = get_peft_model_state_dict(case.model, save_embedding_layers=False), tensors_of(case.out)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("part", ["lora_B.bias", "layernorm"])
def test_without_its_biases_or_its_norms_it_is_not_the_tuned_model(part, qwen2, tmp_path):
    config = config_of(qwen2.out)
    if part == "lora_B.bias":
        config["lora_bias"] = False
    else:
        config["modules_to_save"] = [name for name in config["modules_to_save"] if part not in name]
    tensors = {name: tensor for name, tensor in tensors_of(qwen2.out).items() if part not in name}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    assert len(tensors) < len(tensors_of(qwen2.out))
    assert architectures.error("qwen2", qwen2.loaded(tmp_path), *qwen2.pair) > 1e-2


def test_every_layer_has_its_own_rank_and_a_scale_of_one(llama_pair, tmp_path):
    adapter = extract(*llama_pair, keep_energy(0.8), form="peft")
    out = adapter.save(tmp_path / "out")
    ranks = {row.modules[0]: row.rank for row in adapter.report.rows if row.status == "extracted"}
    assert len(set(ranks.values())) > 3
    from peft.tuners.lora import LoraLayer

    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in models.load_adapter(llama_pair[0], out).named_modules()
        if isinstance(module, LoraLayer)
    }
    assert {name: layer.r["default"] for name, layer in layers.items()} == ranks
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}
    config = config_of(out)
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert all(re.fullmatch(key, re.sub(r"\\(.)", r"\1", key)) for key in config["rank_pattern"])


class Net(torch.nn.Module):
    """Modules by their names."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class Scaled(Net):
    """A module with a parameter of its own beside other modules."""

    def __init__(self, **modules):
        super().__init__(**modules)
        self.scale = torch.nn.Parameter(torch.ones(4))


def linear():
    return torch.nn.Linear(8, 8, bias=False)


def loaded_into(base, out):
    import peft

    model = peft.PeftModel.from_pretrained(base, out)
    return {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if ".default" in name
    }


def low_rank(rank):
    return torch.randn(8, rank) @ torch.randn(rank, 8)


@pytest.mark.parametrize("ranks", [{"proj": 3, "aux.proj": 2}, {"proj": 2, "aux.proj": 3}], ids=str)
def test_a_name_that_others_end_in_keeps_its_own_rank(ranks, tmp_path):
    # Two more layers of rank 2, so that 2 is the file's and 3 the pattern's.
    ranks = {**ranks, "a": 2, "b": 2}
    base = Net(proj=linear(), aux=Net(proj=linear()), a=linear(), b=linear())
    tuned = {name: weight + low_rank(ranks[name.removesuffix(".weight")]) for name, weight in base.state_dict().items()}
    out = extract(base, tuned, ranks := {f"{name}.weight": rank for name, rank in ranks.items()}, form="peft").save(
        tmp_path / "out"
    )
    found = loaded_into(base, out)
    assert {
        f"{name}.weight": len(found[f"{name}.lora_A.default.weight"]) for name in ("proj", "aux.proj", "a", "b")
    } == ranks


def test_the_dots_of_a_name_mean_dots(tmp_path):
    base = Net(a=Net(b=linear()), aXb=linear(), c=linear(), d=linear())
    ranks = {"a.b.weight": 3, "aXb.weight": 2, "c.weight": 2, "d.weight": 2}
    tuned = {name: weight + low_rank(ranks[name]) for name, weight in base.state_dict().items()}
    found = loaded_into(base, extract(base, tuned, ranks, form="peft").save(tmp_path / "out"))
    assert len(found["aXb.lora_A.default.weight"]) == 2
    assert len(found["a.b.lora_A.default.weight"]) == 3


def test_what_did_not_change_is_not_in_the_file(tmp_path):
    base, tuned = models.save_pair(models.llama(), tmp_path, only=lambda name: "layers.0" in name)
    out = extract(base, tuned, 4, form="peft").save(tmp_path / "out")
    assert all("layers.0" in name for name in tensors_of(out))
    assert config_of(out)["modules_to_save"] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
    ]


def test_a_layer_of_which_only_the_bias_changed_gets_its_bias(tmp_path):
    moved = ("model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.k_proj.weight")
    base, tuned = models.save_pair(models.qwen2(), tmp_path, only=moved.__contains__, scale=1.0)
    adapter = extract(base, tuned, 32, form="peft")
    out = adapter.save(tmp_path / "out")
    assert {name for name, status in status_of(adapter).items() if status != "unchanged"} == set(moved)
    assert architectures.error("qwen2", models.load_adapter(base, out, unbiased=True), base, tuned) < 100 * EPS


def test_a_bias_is_saved_as_its_difference(qwen2):
    true, tensors = models.true_deltas(*qwen2.pair), tensors_of(qwen2.out)
    module = "model.layers.1.self_attn.v_proj"
    assert torch.equal(tensors[f"base_model.model.{module}.lora_B.bias"], true[f"{module}.bias"])
    assert not tensors["base_model.model.model.layers.1.self_attn.o_proj.lora_B.bias"].any()


def test_a_change_of_norms_alone_is_none_for_the_portable_form(tmp_path):
    base = models.llama()
    tuned = models.tuned_from(base, only=lambda name: "norm" in name)
    with pytest.raises(NothingToCarryError, match=r"5 others do; .*norm.*: norm or other vector"):
        extract(base, tuned, 4)


def test_what_is_excluded_is_not_kept_either(llama_pair, tmp_path):
    adapter = extract(*llama_pair, 4, form="peft", exclude=["norm"])
    assert not any("norm" in name for name in tensors_of(adapter.save(tmp_path / "out")))
    left_out = {row.weight for row in adapter.report.rows if row.status == "left out"}
    assert left_out == {row.weight for row in adapter.report.rows if "norm" in row.weight}


def test_what_is_not_included_is_not_kept_either(llama_pair):
    status = status_of(extract(*llama_pair, 4, form="peft", include=[r"layers\.0\.(self_attn\.q|input)"]))
    assert {name: how for name, how in status.items() if how != "left out"} == {
        "model.layers.0.self_attn.q_proj.weight": "extracted",
        "model.layers.0.input_layernorm.weight": "whole",
    }


def test_a_layer_that_is_given_no_rank_is_not_kept_whole(llama_pair):
    weight = "model.layers.0.mlp.up_proj.weight"
    status = status_of(extract(*llama_pair, {weight: 4}, form="peft"))
    assert status[weight] == "extracted"
    assert {name for name, how in status.items() if how == "whole"} == {name for name in status if "norm" in name}


def test_of_modules_in_one_another_the_outermost_is_kept_with_all_in_it(tmp_path):
    base = Net(block=Scaled(norm=torch.nn.LayerNorm(4)), proj=linear())
    tuned = models.tuned_from(base, only=lambda name: name != "block.norm.bias")
    out = extract(base, tuned, 8, form="peft").save(tmp_path / "out")
    assert config_of(out)["modules_to_save"] == ["block"]
    found = loaded_into(base, out)
    for name in ("scale", "norm.weight", "norm.bias"):
        assert torch.equal(found[f"block.modules_to_save.default.{name}"], tuned.state_dict()[f"block.{name}"])


def test_what_peft_takes_along_is_there_whole(tmp_path):
    # PEFT looks for the end of a name, and not only at its dots.
    base = Net(norm=torch.nn.LayerNorm(4), prenorm=torch.nn.LayerNorm(4), proj=linear())
    tuned = models.tuned_from(base, only=lambda name: "prenorm" not in name)
    out = extract(base, tuned, 8, form="peft").save(tmp_path / "out")
    found = loaded_into(base, out)
    assert torch.equal(found["prenorm.modules_to_save.default.weight"], base.prenorm.weight)
    assert torch.equal(found["norm.modules_to_save.default.weight"], tuned.norm.weight)


def test_what_peft_would_take_along_and_cannot_is_left_out_and_told(tmp_path):
    base = Net(norm=torch.nn.LayerNorm(4), prenorm=Net(proj=linear()))
    adapter = extract(base, models.tuned_from(base), 8, form="peft")
    adapter.save(tmp_path / "out")
    reasons = {row.weight: row.reason for row in adapter.report.rows if row.status == "left out"}
    why = "PEFT would take the name of its module, `norm`, to mean `prenorm` too"
    assert reasons == {"norm.weight": why, "norm.bias": why}
    assert status_of(adapter)["prenorm.proj.weight"] == "extracted"


def test_whole_tensors_keep_their_dtype(llama_pair, tmp_path):
    out = extract(*llama_pair, 4, form="peft", dtype=torch.bfloat16).save(tmp_path / "out")
    dtypes = {name: tensor.dtype for name, tensor in tensors_of(out).items()}
    assert {dtype for name, dtype in dtypes.items() if "norm" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "norm" not in name} == {torch.bfloat16}


def test_a_checkpoint_of_the_bare_model_is_kept_under_the_model_s_names(tmp_path):
    base, tuned = architectures.pair_of("gpt2", tmp_path)
    for folder in (base, tuned):
        path = f"{folder}/model.safetensors"
        bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
        save_file(bare, path, metadata={"format": "pt"})
    adapter = extract(base, tuned, 4096, form="peft")
    assert "left out" not in status_of(adapter).values()
    loaded = models.load_adapter(base, adapter.save(tmp_path / "out"), tied=True, unbiased=True)
    assert architectures.error("gpt2", loaded, base, tuned) < 100 * EPS


def test_the_report_says_what_is_whole_and_what_the_form_is_not_for(qwen2):
    report = qwen2.adapter.report
    assert report.totals.whole == sum(row.status == "whole" for row in report.rows) == 12
    assert "whole:      12 norms, biases and the like" in report.table()
    only_peft, unmerged = report.warnings[:2]
    assert only_peft.startswith("The `peft` form is for PEFT alone")
    assert "has no bias, but LoRA's: PEFT's `merge_and_unload` refuses" in unmerged
    with pytest.raises(RuntimeError, match="Impossible to merge"):
        qwen2.loaded().merge_and_unload()


def test_an_adapter_without_biases_merges_into_the_tuned_model(llama_pair, tmp_path):
    adapter = extract(*llama_pair, 4096, form="peft")
    assert not any("merge_and_unload" in warning for warning in adapter.report.warnings)
    merged = models.load_adapter(llama_pair[0], adapter.save(tmp_path / "out")).merge_and_unload()
    assert architectures.error("llama", merged, *llama_pair) < 100 * EPS


def test_an_unknown_form_is_an_error():
    with pytest.raises(ValueError, match="`form` must be one of portable, peft"):
        extract({}, {}, form="exact")


def test_the_page_of_architectures_has_a_row_for_each():
    page = (Path(__file__).parents[2] / "docs/architectures.md").read_text().partition(sweep_page.HEADING)[0]
    assert re.findall(r"^\| ([a-z][\w-]+) \| \d", page, re.MULTILINE) == list(architectures.ARCHITECTURES)
