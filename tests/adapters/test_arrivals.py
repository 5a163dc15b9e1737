"""What PEFT is asked, against what it does: stock PEFT loads the same file into a model with weights."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

from peft_posthoc.adapters.arrivals import ask
from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.models.by_class import build
from peft_posthoc.models.decoders import PLAIN_DECODERS
from tests.make import architectures, models

# Decoders, encoders, encoder-decoders, vision, sound, several modalities; mixtures, of which PEFT drops something.
NAMES = [
    *("llama", "gemma2", "gpt_neox", "bert", "t5", "bart", "whisper", "vit", "swin", "wav2vec2", "modernbert"),
    *("albert", "clip", "llava", "qwen3_vl", "convnext", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"),
    *("qwen3_next", "phimoe", "llama4", "siglip", "switch", "xlnet"),
]


def config_of(model, **more):
    return {**model.config.to_dict(), "architectures": [type(model).__name__], **more}


def pair(module, rank, m, n):
    return {
        f"base_model.model.{module}.lora_A.weight": (rank, n),
        f"base_model.model.{module}.lora_B.weight": (m, rank),
    }


def by_stock_peft(model, config, shapes, folder):
    """By tensor of the file, the parameters of PEFT's model in which its own number is found after loading."""
    # Numbers that no start of PEFT's has, and that survive being put together.
    tensors = {name: torch.full(shape, 7.0 + index) for index, (name, shape) in enumerate(shapes.items())}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    loaded = peft.PeftModel.from_pretrained(model, folder)
    held = {name: set(values.unique().tolist()) for name, values in loaded.state_dict().items()}
    return {
        name: tuple(sorted(parameter for parameter, numbers in held.items() if 7.0 + index in numbers))
        for index, name in enumerate(shapes)
    }


def asked(model, config, shapes):
    tensors = {name: Header(shape, torch.float32) for name, shape in shapes.items()}
    return ask(build(config_of(model)), config, tensors)


def everything(model):
    """Factors for every linear layer and embedding, by one rank for all, and all norms whole."""
    shapes, whole, targets = {}, [], []
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear and name.rpartition(".")[2] != "lm_head":
            shapes |= pair(name, 2, *module.weight.shape)
            targets.append(name)
        elif type(module) is torch.nn.LayerNorm:
            shapes |= {f"base_model.model.{name}.{own}": tuple(p.shape) for own, p in module.named_parameters()}
            whole.append(name)
    return {"r": 2, "lora_alpha": 2, "target_modules": targets, "modules_to_save": whole or None}, shapes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_the_answer_is_what_stock_peft_does(name, tmp_path):
    model = architectures.ARCHITECTURES[name].make()
    config, shapes = everything(model)
    found = asked(model, config, shapes)
    assert found.error == ""
    stock = by_stock_peft(model, config, shapes, tmp_path / "a")
    assert {tensor: tuple(sorted(parameters)) for tensor, parameters in found.parameters.items()} == stock


@pytest.mark.parametrize("model_type", PLAIN_DECODERS)
def test_all_factors_of_common_decoders_arrive(model_type):
    """An extraction does not ask about them."""
    sizes = {**architectures.SIZES, "num_key_value_heads": 4, "pad_token_id": 0, "head_dim": 8}
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = asked(model, *everything(model))
    assert (found.error, found.lost) == ("", [])


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:Found missing adapter keys")
def test_factors_that_peft_renames_away_are_lost_and_under_the_name_on_disk_they_arrive(tmp_path):
    model, own, disk = (
        models.laguna(),
        "model.layers.0.mlp.shared_experts.up_proj",
        "model.layers.0.mlp.shared_expert.up_proj",
    )
    config = {"r": 2, "lora_alpha": 2, "target_modules": [own]}
    found = asked(model, config, pair(own, 2, 16, 32))
    assert found.lost == [*pair(own, 2, 16, 32)]
    assert set(by_stock_peft(model, config, pair(own, 2, 16, 32), tmp_path / "own").values()) == {()}
    assert found.empty == tuple(name.replace("_A.", "_A.default.").replace("_B.", "_B.default.") for name in found.lost)
    renamed = asked(model, config, pair(disk, 2, 16, 32))
    assert not renamed.lost
    assert renamed.parameters == by_stock_peft(models.laguna(), config, pair(disk, 2, 16, 32), tmp_path / "disk")


def test_what_peft_looks_for_and_does_not_find_is_absent(tmp_path):
    model = models.llama()
    shapes = pair("model.layers.0.self_attn.q_proj", 2, 32, 32)
    config = {
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["layers.0.self_attn.q_proj"],
        "modules_to_save": ["model.norm"],
    }
    found = asked(model, config, shapes)
    assert found.absent == ("base_model.model.model.norm.weight",)
    with pytest.raises(KeyError, match=r"base_model\.model\.model\.norm\.weight"):
        by_stock_peft(model, config, shapes, tmp_path / "a")


def test_a_tensor_of_another_shape_is_a_misfit(tmp_path):
    model, (a, b) = models.llama(), pair("model.layers.0.self_attn.q_proj", 2, 32, 32)
    config, shapes = (
        {"r": 2, "lora_alpha": 2, "target_modules": ["layers.0.self_attn.q_proj"]},
        {a: (3, 32), b: (32, 2)},
    )
    found = asked(model, config, shapes)
    assert (found.misfits, found.lost) == ((a,), [a])
    with pytest.raises(RuntimeError, match="size mismatch"):
        by_stock_peft(model, config, shapes, tmp_path / "a")


def test_what_peft_raises_before_it_reads_a_tensor_is_told(tmp_path):
    model, shapes = models.llama(), pair("model.layers.0.nothing", 2, 32, 32)
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["nothing"]}
    found = asked(model, config, shapes)
    assert found.lost == [*shapes]
    with pytest.raises(ValueError, match="not found in the base model") as raised:
        by_stock_peft(model, config, shapes, tmp_path / "a")
    assert found.error == f"{type(raised.value).__name__}: {raised.value}"
