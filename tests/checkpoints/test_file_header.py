import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.checkpoints.file_header import header_bytes

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
DTYPES += [torch.bool, torch.complex64]
words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)
shapes = st.lists(st.integers(0, 12), max_size=3).map(tuple)
tensors = st.dictionaries(words, st.builds(Header, shapes, st.sampled_from(DTYPES)), max_size=8)


def written(headers, metadata):
    """The bytes before the numbers, as safetensors itself writes them."""
    file = save({name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in headers.items()}, metadata=metadata)
    return 8 + int.from_bytes(file[:8], "little")


@given(tensors, st.dictionaries(words, words, max_size=3))
def test_it_is_as_long_as_safetensors_writes_it(headers, metadata):
    headers.pop("__metadata__", None)
    assert header_bytes(headers, metadata) == written(headers, metadata)


def test_types_lie_in_the_order_of_safetensors_which_decides_the_digits_of_their_places():
    for first in DTYPES:
        for second in DTYPES:
            # Were they the other way round, the places between the two would have other digits.
            headers = {"a": Header((7,), first), "b": Header((1000,), second), "c": Header((90000,), torch.uint8)}
            assert header_bytes(headers, {"format": "pt"}) == written(headers, {"format": "pt"})
