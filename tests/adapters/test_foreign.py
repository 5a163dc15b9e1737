"""Adapters in other programs' formats: every command says which one it is, in one line, and what to do."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from peft_posthoc import AdapterError, CheckpointError, MismatchError, extract, open_checkpoint, resize
from peft_posthoc.adapters.foreign import format_of
from peft_posthoc.cli.main import main
from tests.make import models

KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
FILES = {
    "kohya's scripts (sd-scripts, musubi-tuner)": [
        f"{KOHYA}.lora_down.weight",
        f"{KOHYA}.lora_up.weight",
        f"{KOHYA}.alpha",
    ],
    "diffusers": ["transformer.blocks.0.attn.to_q.lora_A.weight", "transformer.blocks.0.attn.to_q.lora_B.weight"],
    "ComfyUI": ["diffusion_model.blocks.0.q.lora_up.weight", "diffusion_model.blocks.0.q.lora_down.weight"],
    "LyCORIS": [
        f"{KOHYA}.hada_w1_a",
        f"{KOHYA}.hada_w1_b",
        f"{KOHYA}.hada_w2_a",
        f"{KOHYA}.hada_w2_b",
        f"{KOHYA}.alpha",
    ],
    "MLX-LM": ["model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"],
    "another program": ["blocks.0.attn.to_q.lora_A.weight", "blocks.0.attn.to_q.lora_B.weight"],
    "PEFT": ["base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"],
}


READ = ("kohya's scripts (sd-scripts, musubi-tuner)", "diffusers", "ComfyUI")


def saved(program, folder):
    tensors = {name: torch.ones(() if name.endswith(".alpha") else (4, 4)) for name in FILES[program]}
    save_file(tensors, folder / "one.safetensors")
    return program, folder / "one.safetensors"


@pytest.fixture(params=FILES)
def file(request, tmp_path):
    return saved(request.param, tmp_path)


@pytest.fixture(params=sorted(FILES.keys() - {*READ, "LyCORIS"}))
def refused(request, tmp_path):
    return saved(request.param, tmp_path)


def test_loha_has_no_factors_to_resize(tmp_path):
    _, path = saved("LyCORIS", tmp_path)
    with pytest.raises(MismatchError, match=r"by no factors.* Extract from BASE and BASE\+ADAPTER"):
        resize(path, 2)


def test_a_single_file_is_called_by_its_program(refused, llama_pair, tmp_path):
    program, path = refused
    told = f"`{path}` is an adapter in the format of {program}, not a PEFT LoRA folder. "
    base, tuned = map(str, llama_pair)
    for line in (
        ["resize", path, tmp_path / "out", "--rank", "2"],
        ["combine", path, path, tmp_path / "out"],
        ["verify", path, "--base", base, "--tuned", tuned],
        ["export", path, tmp_path / "out", "--to", "merged", "--base", base],
        ["check", path],
        ["extract", base, f"{base}+{path}", tmp_path / "out", "--rank", "2"],
    ):
        result = CliRunner().invoke(main, [*map(str, line), "--quiet"])
        assert result.exit_code == 1, line
        assert result.stderr.startswith(f"phlora: error: {told}"), result.stderr
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_given_as_a_model_it_is_no_model(file, llama_pair):
    program, path = file
    with pytest.raises(CheckpointError, match="is no model but an adapter in the format of") as error:
        extract(llama_pair[0], path, 2)
    assert program in str(error.value)


def test_in_a_folder_it_is_found_beside_other_files(tmp_path):
    (tmp_path / "mlx").mkdir()
    save_file({name: torch.ones(4, 4) for name in FILES["MLX-LM"]}, tmp_path / "mlx/adapters.safetensors")
    (tmp_path / "mlx/adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora"}))
    with pytest.raises(AdapterError, match=r"adapters\.safetensors` is an adapter in the format of MLX-LM"):
        resize(tmp_path / "mlx", 2)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(AdapterError, match="is a GGUF file, which is not read here"):
        resize(tmp_path / "x.gguf", 2)


def test_models_and_adapters_of_peft_are_not_taken_for_others(tmp_path):
    for make in (models.llama, models.gpt2, models.bert, models.t5):
        assert format_of(make().state_dict()) is None
    wrapped = ["base_model.model.q.base_layer.weight", "base_model.model.q.lora_A.default.weight"]
    assert format_of(wrapped) is None
    base, tuned = models.save_pair(models.llama(), tmp_path)
    adapter = extract(base, tuned, 2).save(tmp_path / "a")
    assert open_checkpoint(f"{base}+{adapter}").headers
