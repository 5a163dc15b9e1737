"""compressed-tensors' whole numbers, packed and not, as it decodes them itself."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

from peft_posthoc import CheckpointError
from peft_posthoc.checkpoints.memory import InMemory
from peft_posthoc.sources import open_checkpoint

M, N = 20, 96


def scheme(bits, kind="int", **how):
    return QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=bits, type=kind, **{"symmetric": True, **how})
    )


def compressed(form, plan, weight):
    """What the library stores of a weight, and what it decodes."""
    args, library = plan.weights, BaseCompressor.get_value_from_registry(form)
    match args.strategy:
        case "group":
            parts = weight.unflatten(1, (-1, args.group_size))
        case "channel":
            parts = weight[:, None]
        case "block":
            rows, columns = args.block_structure
            filled = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
            parts = filled.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
        case _:
            parts = weight.flatten()[None, None]
    scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), args)
    state = {"weight": weight, "weight_scale": scale.to(weight.dtype)}
    stored = library.compress(state if args.symmetric else {**state, "weight_zero_point": zero}, plan)
    return stored, library.decompress(stored, plan)["weight"]


def opened(stored, plan=None, dtype=torch.bfloat16, **more):
    source = InMemory({f"x.{name}": tensor for name, tensor in stored.items()}, label="model")
    groups = {"group_0": plan.model_dump(mode="json")} if plan else {}
    told = {"quant_method": "compressed-tensors", "config_groups": groups}
    source.config = {"dtype": str(dtype).removeprefix("torch."), "quantization_config": told, **more}
    return source


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("how", [{"strategy": "channel"}, {"strategy": "group", "group_size": 32}], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_words_are_what_compressed_tensors_decodes(bits, how, symmetric, dtype):
    plan = scheme(bits, symmetric=symmetric, **how)
    stored, wanted = compressed("pack-quantized", plan, torch.randn(M, N, dtype=dtype))
    for said in (plan, None):
        source = open_checkpoint(opened(stored, said, dtype))
        assert source.headers.keys() == {"x.weight"}
        assert source.headers["x.weight"] == (wanted.shape, dtype)
        assert torch.equal(source.read("x.weight"), wanted)


def test_a_row_that_fills_no_whole_word():
    plan = scheme(4, strategy="channel")
    stored, wanted = compressed("pack-quantized", plan, torch.randn(M, 21, dtype=torch.bfloat16))
    assert torch.equal(open_checkpoint(opened(stored, plan)).read("x.weight"), wanted)


@pytest.mark.parametrize("how", [{"strategy": "channel"}, {"strategy": "group", "group_size": 32}], ids=str)
def test_what_is_still_to_be_fetched_is_told_by_its_configuration(how):
    plan = scheme(4, **how)
    stored, wanted = compressed("pack-quantized", plan, torch.randn(M, N, dtype=torch.bfloat16))
    source = opened(stored, plan)
    source.to_fetch, read = 1, source.read
    source.read = None  # Opening reads nothing.
    found = open_checkpoint(source)
    assert found.headers["x.weight"].shape == (M, N)
    source.read = read
    assert torch.equal(found.read("x.weight"), wanted)


def test_columns_have_the_groups_that_an_order_gives_them():
    plan = scheme(4, strategy="group", group_size=32)
    weight, order = torch.randn(M, N, dtype=torch.bfloat16), torch.randperm(N)
    # Columns of one group lie anywhere.
    stored, made = compressed("pack-quantized", plan, weight)
    back = order.argsort()
    numbers = unpack_from_int32(stored["weight_packed"], 4, torch.Size((M, N)))[:, back]
    stored |= {"weight_packed": pack_to_int32(numbers, 4), "weight_g_idx": (torch.arange(N) // 32)[back].int()}
    assert torch.equal(open_checkpoint(opened(stored, plan)).read("x.weight"), made[:, back])


@pytest.mark.parametrize(
    "how", [{"strategy": "tensor"}, {"strategy": "channel"}, {"strategy": "group", "group_size": 32}], ids=str
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_are_what_compressed_tensors_decodes(how, symmetric):
    plan = scheme(8, symmetric=symmetric, **how)
    stored, wanted = compressed("int-quantized", plan, torch.randn(M, N, dtype=torch.bfloat16))
    assert stored["weight"].dtype is torch.int8
    source = open_checkpoint(opened(stored, plan))
    assert source.headers.keys() == {"x.weight"}
    assert torch.equal(source.read("x.weight"), wanted)
    assert source.coded_as("x.weight").startswith("compressed-tensors, INT8")


@pytest.mark.parametrize(
    "how",
    [{"strategy": "tensor"}, {"strategy": "channel"}, {"strategy": "block", "block_structure": [16, 40]}],
    ids=str,
)
def test_eight_bit_floats_are_what_compressed_tensors_decodes(how):
    plan = scheme(8, "float", **how)
    stored, wanted = compressed("float-quantized", plan, torch.randn(M, N, dtype=torch.bfloat16))
    assert torch.equal(open_checkpoint(opened(stored, plan)).read("x.weight"), wanted)


def test_words_that_nothing_fits_are_refused():
    stored = {"weight_packed": torch.zeros(4, 3, dtype=torch.int32), "weight_scale": torch.ones(4, 1)}
    with pytest.raises(CheckpointError, match=r"do not fit"):
        open_checkpoint(opened({**stored, "weight_shape": torch.tensor([4, 77])}))


def test_codes_whose_scales_are_missing_are_refused():
    stored = {"weight_packed": torch.zeros(4, 4, dtype=torch.int32), "weight_scale": torch.ones(4, 1)}
    source = {f"x.{name}": tensor for name, tensor in stored.items()}
    with pytest.raises(
        CheckpointError, match=r"`y.weight_packed` of `state dict` holds codes \(int32\) and lacks the scales"
    ):
        open_checkpoint({**source, "x.weight_shape": torch.tensor([4, 32]), "y.weight_packed": torch.ones(4, 4).int()})


def test_packed_words_of_a_stack_are_refused_as_such():
    layer = {"weight_packed": torch.zeros(4, 4, dtype=torch.int32), "weight_scale": torch.ones(4, 1)}
    stack = {f"stack.{name}": tensor.expand(3, *tensor.shape).contiguous() for name, tensor in layer.items()}
    source = {f"x.{name}": tensor for name, tensor in layer.items()} | {"x.weight_shape": torch.tensor([4, 32])}
    with pytest.raises(CheckpointError, match=r"`stack.weight_packed` .* \(int32\) as \[3, 4, 4\], a form that is not"):
        open_checkpoint({**source, **stack})
