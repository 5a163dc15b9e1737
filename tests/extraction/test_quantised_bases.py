"""Bases as GPTQ, AWQ and bitsandbytes store them: read as they compute, in files and in memory."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import (
    CheckpointError,
    LoraConfig,
    compensated,
    distil,
    extract,
    get_peft_model,
    open_checkpoint,
    refine,
    verify,
)
from peft_posthoc.running.load import load_model
from tests.make import coded, models

RANK = 4


def tuned_from(made, folder, like):
    """The fine-tune of what a quantised model computes, whose attention has changed by a rank of 4."""
    models.save(models.load(coded.dequantized(made, folder, like)), folder)
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if "self_attn" in name:
            m, n = value.shape
            weights[name] = value + torch.randn(m, RANK) @ torch.randn(RANK, n) / 50
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


class Pair:
    def __init__(self, scheme, where):
        torch.manual_seed(0)
        model = models.llama(hidden_size=64, intermediate_size=128, num_hidden_layers=1)
        self.plain = models.save(model, where / "plain")
        self.base = where / "base"
        self.made = coded.save(model, self.base, scheme)
        self.dequantized = coded.dequantized(self.made, where / "dequantized", model)
        self.tuned = tuned_from(self.made, where / "tuned", model)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Of a scheme, made once."""
    known = {}

    def of(scheme):
        if scheme not in known:
            known[scheme] = Pair(scheme, tmp_path_factory.mktemp("pair"))
        return known[scheme]

    return of


@pytest.mark.parametrize("scheme", coded.SCHEMES)
def test_a_base_reads_as_what_it_computes_to_the_last_bit(scheme, pair):
    of = pair(scheme)
    read = open_checkpoint(of.base)
    assert read.headers.keys() == of.made.keys()
    for name, wanted in of.made.items():
        found = read.read(name)
        assert (found.shape, found.dtype) == read.headers[name]
        assert torch.equal(found, wanted.to(found.dtype)), name


@pytest.mark.parametrize("scheme", coded.SCHEMES)
def test_what_was_put_on_the_base_is_found(scheme, pair):
    of = pair(scheme)
    found, wanted = (extract(base, of.tuned, "auto") for base in (of.base, of.dequantized))
    assert found.factors.keys() == wanted.factors.keys()
    for module, (a, b) in found.factors.items():
        assert "self_attn" in module
        assert a.shape[0] == RANK
        other = wanted.factors[module]
        assert torch.equal(b, other[1])
        assert torch.equal(a, other[0])


@pytest.mark.parametrize("scheme", coded.BITSANDBYTES)
def test_a_live_model_of_bitsandbytes_is_a_base(scheme, pair):
    of = pair(scheme)
    model = coded.live(of.plain, scheme)
    found = LoraConfig.from_delta(model, of.tuned, RANK).delta.adapter.factors
    wanted = LoraConfig.from_delta(of.dequantized, of.tuned, RANK).delta.adapter.factors
    assert found.keys() == wanted.keys()
    assert all(torch.equal(*two) for name in found for two in zip(found[name], wanted[name], strict=True))
    adapted = get_peft_model(model, peft.LoraConfig(r=RANK), init="posthoc", tuned=of.tuned)
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    wanted = found["model.layers.0.self_attn.q_proj"]
    assert torch.equal(layer.lora_A["default"].weight, wanted[0])
    # In use, 4 bits are computed with in bfloat16 where the processor has it; in training as the weights were.
    adapted.train()
    with torch.no_grad():
        said = adapted(torch.arange(8)[None]).logits
        tuned = models.load(of.tuned)(torch.arange(8)[None]).logits
    # 8 bits compute in float16, and round what they are given to 8 bits too.
    assert (said - tuned).norm() < (0.05 if scheme == "int8" else 1e-3) * tuned.norm()


def test_codes_of_four_bits_that_are_stored_as_another_type_are_read_without_a_configuration_too(pair, tmp_path):
    of = pair("nf4")
    model = coded.live(of.plain, "nf4", bnb_4bit_quant_storage=torch.bfloat16)
    model.save_pretrained(tmp_path)
    found = open_checkpoint(model), open_checkpoint(tmp_path), open_checkpoint(tmp_path / "model.safetensors")
    for read in found:
        assert read.headers.keys() == of.made.keys()
        assert all(torch.equal(read.read(name), wanted) for name, wanted in of.made.items())
    name = "model.layers.0.mlp.up_proj.weight"
    assert [read.coded_as(name) for read in found] == ["bitsandbytes, NF4", "bitsandbytes, NF4", "NF4"]
    assert all((read.steps(name) > 0).all() for read in found)


@pytest.mark.parametrize("scheme", ["gptq, 3 bits", "awq", "nf4", "int8"])
def test_what_it_says_is_compared_as_the_weights_say_it(scheme, pair, tmp_path):
    of = pair(scheme)
    extract(of.base, of.tuned, RANK).save(tmp_path / "adapter")
    found = verify(tmp_path / "adapter", of.base, of.tuned)
    wanted = verify(tmp_path / "adapter", of.dequantized, of.tuned)
    assert not found.failure
    assert found.base.kl == pytest.approx(wanted.base.kl, rel=1e-6)
    assert found.adapter.kl < 1e-6 < found.base.kl


@pytest.mark.parametrize("method", [distil(passes=2), compensated()], ids=["whole", "in blocks"])
def test_an_adapter_is_refined_on_the_base_that_is_served(method, pair, tmp_path):
    of = pair("nf4")
    extract(of.base, of.tuned, 2, dtype=torch.float32).save(tmp_path / "adapter")
    sizes = {"sequences": 48, "length": 12, "method": method}
    found, wanted = (refine(tmp_path / "adapter", base, of.tuned, **sizes) for base in (of.base, of.dequantized))
    assert found.before["task"].kl < found.base["task"].kl
    for mine, theirs in ((found.base, wanted.base), (found.before, wanted.before), (found.after, wanted.after)):
        assert mine["task"].kl == pytest.approx(theirs["task"].kl, rel=1e-4)


def test_a_model_of_decoded_codes_writes_as_its_folder_says(pair, tmp_path):
    of = pair("awq")
    for path in of.base.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    loaded = load_model(open_checkpoint(tmp_path), type(models.load(of.tuned)), torch.device("cpu"))
    assert loaded.generation_config.eos_token_id == 7
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_a_quantised_base_with_an_adapter_on_it_is_a_model(pair, tmp_path):
    of = pair("awq")
    extract(of.base, of.tuned, RANK, dtype=torch.float32).save(tmp_path / "adapter")
    assert extract(f"{of.base}+{tmp_path / 'adapter'}", of.tuned, RANK, exact=True).report.totals.energy is not None


@pytest.mark.parametrize("scheme", ["gptq, 4 bits", "awq", "nf4", "int8"])
def test_a_layer_that_is_not_converted_is_read_as_it_is(scheme, pair, tmp_path):
    of = pair(scheme)
    tensors = load_file(of.base / "model.safetensors")
    kept = "model.layers.0.self_attn.q_proj"
    tensors = {name: value for name, value in tensors.items() if not name.startswith(f"{kept}.")}
    tensors[f"{kept}.weight"] = torch.randn(64, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((of.base / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["q_proj"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = open_checkpoint(tmp_path)
    assert read.headers.keys() == of.made.keys()
    assert torch.equal(read.read(f"{kept}.weight"), tensors[f"{kept}.weight"])
    other = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(read.read(other), of.made[other].to(read.headers[other].dtype))


def test_layers_of_other_bits_than_the_configuration_says_are_read_by_their_shapes(pair, tmp_path):
    of = pair("gptq, 3 bits")
    (tmp_path / "model.safetensors").symlink_to(of.base / "model.safetensors")
    config = json.loads((of.base / "config.json").read_text())
    config["quantization_config"]["bits"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = open_checkpoint(tmp_path)
    assert all(torch.equal(read.read(name), wanted) for name, wanted in of.made.items())


@pytest.mark.parametrize(
    ("scheme", "change", "words"),
    [
        ("gptq, 4 bits", {"checkpoint_format": "marlin"}, "marlin"),
        ("gptq, 4 bits", {"checkpoint_format": "gptq_p"}, "gptq_p"),
        ("awq", {"version": "gemv_fast"}, "gemv_fast"),
        ("awq", {"bits": 8}, "8"),
    ],
)
def test_a_form_that_is_not_read_is_refused_by_its_name(scheme, change, words, pair, tmp_path):
    of = pair(scheme)
    (tmp_path / "model.safetensors").symlink_to(of.base / "model.safetensors")
    config = json.loads((of.base / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        extract(tmp_path, of.tuned, RANK)


@pytest.mark.parametrize(
    ("scheme", "leaf", "spoil"),
    [
        ("gptq, 4 bits", "g_idx", lambda x: x + 900),
        ("gptq, 4 bits", "qweight", lambda x: x[1:]),
        ("gptq, 4 bits", "scales", lambda x: x[0]),
        ("awq", "scales", lambda x: x[:3]),
        ("awq", "qzeros", lambda x: x[:, :1].contiguous()),
        ("awq gemv", "qweight", lambda x: x[1:]),
        ("nf4", "weight", lambda x: x[1:]),
        ("nf4", "weight.absmax", lambda x: x[1:]),
        ("nf4", "weight.quant_state.bitsandbytes__nf4", lambda x: x[1:]),
        ("nf4, nested", "weight.nested_quant_map", None),
        ("int8", "SCB", lambda x: x[1:]),
        ("int8", "weight_format", lambda x: x + 2),
    ],
)
def test_codes_that_do_not_fit_what_lies_beside_them_are_refused(scheme, leaf, spoil, pair, tmp_path):
    of = pair(scheme)
    tensors = load_file(of.base / "model.safetensors")
    name = f"model.layers.0.self_attn.q_proj.{leaf}"
    value = tensors.pop(name)
    save_file(tensors if spoil is None else tensors | {name: spoil(value)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").symlink_to(of.base / "config.json")
    with pytest.raises(CheckpointError, match="q_proj"):
        extract(tmp_path, of.tuned, RANK)
