"""The header of a GGUF file by itself, which readers are given for the file."""

import gguf
import pytest
import torch
import transformers

from peft_posthoc import open_checkpoint
from peft_posthoc.checkpoints.gguf import Gguf
from peft_posthoc.checkpoints.gguf_header import header_alone
from tests.make import gguf_files, models

TOKENS = [f"token {number}" for number in range(96)]
SAID = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": list(range(96)),
    "tokenizer.ggml.bos_token_id": 3,
    "general.tags": ["one", "two"],
}


@pytest.fixture
def path(tmp_path):
    return gguf_files.save(models.llama(), tmp_path / "a.gguf", "llama", metadata=SAID)


def test_the_header_says_all_but_the_tokenizers_lists(path):
    whole = gguf.GGUFReader(path)
    with header_alone(path) as (short, gone):
        found = gguf.GGUFReader(short)
        assert list(found.fields) == list(whole.fields)
        for name, field in found.fields.items():
            lists = name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
            assert field.contents() == ([] if lists else whole.fields[name].contents())
        for own, wanted in zip(found.tensors, whole.tensors, strict=True):
            assert own.data_offset + gone == wanted.data_offset
            assert (own.name, own.shape.tolist(), own.n_bytes) == (wanted.name, wanted.shape.tolist(), wanted.n_bytes)
    assert not short.parent.exists()


def test_the_configuration_is_what_transformers_makes_of_the_whole_file(path, caplog):
    wanted = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    caplog.clear()
    found = open_checkpoint(path).config
    assert not caplog.records
    assert {key: found[key] for key in ("vocab_size", "bos_token_id")} == {"vocab_size": 96, "bos_token_id": 3}
    same = wanted.keys() & found.keys() - {"architectures", "rms_norm_eps"}
    assert {key: found[key] for key in same} == {key: wanted[key] for key in same}


@pytest.mark.parametrize("alignment", [32, 256])
def test_tensors_are_those_of_the_file_itself(alignment, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(alignment)
    writer.add_array("tokenizer.ggml.tokens", TOKENS)
    wanted = {name: torch.randn(3, 5) for name in ("one", "two")}
    for name, tensor in wanted.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = Gguf(tmp_path / "a.gguf", label="a")
    assert all(torch.equal(found.read(name), tensor) for name, tensor in wanted.items())


def test_a_file_of_another_machine_is_none(path):
    swapped = bytearray(path.read_bytes())
    swapped[4:8] = swapped[4:8][::-1]
    path.write_bytes(swapped)
    with pytest.raises(ValueError, match="order of another machine"), header_alone(path):
        pass
