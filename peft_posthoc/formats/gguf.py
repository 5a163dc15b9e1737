"""A GGUF file of an adapter, for llama.cpp and what is built on it (Ollama, LM Studio).

Names come from the `gguf` package; what llama.cpp's converter (`convert_lora_to_gguf.py`, in llama-cpp-python 0.3.36)
does to the rows of some weights is done here too, and checked against its output by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_posthoc.adapters.on_model import AdapterOnModel, matrices
from peft_posthoc.errors import AdapterError, MissingExtraError
from peft_posthoc.files import staged
from peft_posthoc.formats.only_factors import only_factors
from peft_posthoc.formats.result import Exported, Out
from peft_posthoc.models.config import architecture
from peft_posthoc.models.kinds import EMBEDDING
from peft_posthoc.progress import progress_bar
from peft_posthoc.text import asked


class Architecture(NamedTuple):
    """How llama.cpp holds models of a class."""

    name: str
    """In `gguf.MODEL_ARCH`."""
    interleaved: bool = False
    """Whether the rows of `q_proj` and `k_proj` are reordered for its rotary embedding."""


_LLAMA = Architecture("LLAMA", interleaved=True)

ARCHITECTURES: Mapping[str, Architecture] = {
    "Gemma2ForCausalLM": Architecture("GEMMA2"),
    "Gemma3ForCausalLM": Architecture("GEMMA3"),
    "Gemma3ForConditionalGeneration": Architecture("GEMMA3"),
    "GemmaForCausalLM": Architecture("GEMMA"),
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": _LLAMA,
    "Phi3ForCausalLM": Architecture("PHI3"),
    "Qwen2ForCausalLM": Architecture("QWEN2"),
    "Qwen2MoeForCausalLM": Architecture("QWEN2MOE"),
    "Qwen3ForCausalLM": Architecture("QWEN3"),
    "Qwen3MoeForCausalLM": Architecture("QWEN3MOE"),
}

_EXPERT = re.compile(r"(?<=\.experts)\.\d+(?=\.)")


def write(deltas: AdapterOnModel, out: Out, *, dtype: torch.dtype | None, force: bool, progress: bool) -> Exported:
    """Write the file.

    llama.cpp multiplies `b @ a` with `adapter.lora.alpha` over the tensor's own rank, and with one where alpha is zero
    (`src/llama-adapter.h`): all have one rank here, and alpha is it.

    Raises:
        AdapterError: llama.cpp does not read something in it, or it cannot be written.
        MissingExtraError: `gguf` is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(
            f"`{asked('to', 'gguf')}` needs the gguf package: `pip install 'peft-posthoc[gguf]'`."
        ) from error
    config = deltas.base.config or {}
    known = ARCHITECTURES.get(architecture(config))
    if known is None:
        raise AdapterError(
            f"The base `{deltas.base.label}` is a {architecture(config) or 'model without `architectures`'}; how "
            f"llama.cpp holds it is not known here. Known are {', '.join(ARCHITECTURES)}."
        )
    _check(deltas)
    text = {**config, **(config.get("text_config") or {})}
    arch = gguf.MODEL_ARCH[known.name]
    names = gguf.get_tensor_name_map(arch, int(text["num_hidden_layers"]))
    dtype, rank = dtype or deltas.folder.dtype(), deltas.rank
    heads = _heads(text) if known.interleaved else {}
    size = 0
    with staged(out.place, what="The GGUF file", called=out.called, force=force) as made:
        writer = gguf.GGUFWriter(made, gguf.MODEL_ARCH_NAMES[arch])
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
            for module, a, b in progress_bar(_modules(deltas, rank, dtype, heads), desc="Modules", progress=progress):
                name = names.get_name(_plain(module))
                if name is None:
                    raise AdapterError(f"`{deltas.folder.label}` adapts `{module}`, which llama.cpp has no name for.")
                for key, tensor in (("lora_a", a), ("lora_b", b)):
                    values, kind = _array(tensor, gguf)
                    writer.add_tensor(f"{name}.weight.{key}", values, raw_dtype=kind)
                    size += tensor.nbytes
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return Exported.of(
        "gguf", deltas, out, dtype=dtype, rank=rank, files=[out.place.name], size=size, notes=deltas.notes()
    )


def interleave(b: Tensor, heads: int) -> Tensor:
    """The rows of each head in llama.cpp's order: from the first half's and the second half's, one each by turns.

    Args:
        b: m x r, of `q_proj` or `k_proj`.
        heads: How many it is of.
    """
    halves: Tensor = b.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _check(deltas: AdapterOnModel) -> None:
    only_factors(deltas, "llama.cpp")
    tied = {module for owner, users in deltas.layout.ties.items() for module in (owner, *users)}
    if stuck := [name for name in deltas.names if name in tied]:
        raise AdapterError(
            f"`{deltas.folder.label}` adapts `{stuck[0]}`, which is one weight with another: llama.cpp aborts, or "
            f"refuses it. Use `{asked('to', 'merged')}`, and convert that."
        )
    if whole := [stack.name for stack in deltas.of_experts() if not stack.parts]:
        raise AdapterError(
            f"llama.cpp's adapters have no place for the experts `{whole[0]}`. Use `{asked('to', 'merged')}`."
        )


def _heads(config: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of heads that the rows of modules are of, by the end of the module's name."""
    heads = int(config["num_attention_heads"])
    return {"q_proj": heads, "k_proj": int(config.get("num_key_value_heads") or heads)}


def _modules(
    deltas: AdapterOnModel, rank: int, dtype: torch.dtype, heads: Mapping[str, int]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Factors as llama.cpp has them, by module: of stacked experts, experts x r x n and experts x m x r."""
    stacks = deltas.of_experts()
    of_stacks = {name for stack in stacks for name in matrices(stack)}
    for name in deltas.names:
        if name in of_stacks:
            continue
        a, b = deltas.padded(name, rank, dtype)
        leaf = name.rpartition(".")[2]
        if leaf in heads:
            b = interleave(b, heads[leaf])
        # It looks the rows of a token's embedding up in `a`.
        yield name, a.mT if deltas.slots[name].kind is EMBEDDING else a, b
    for stack in stacks:
        for column in zip(*stack.parts, strict=True):
            each = [deltas.padded(part.removesuffix(".weight"), rank, dtype) for part in column]
            module = _EXPERT.sub("", column[0].removesuffix(".weight"))
            yield module, torch.stack([a for a, _ in each]), torch.stack([b for _, b in each])


def _plain(module: str) -> str:
    """The name of a language model's module without the beginning that it has in a model that also sees."""
    return re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", module, count=1)


def _array(tensor: Tensor, gguf: Any) -> tuple[Any, Any]:
    tensor = tensor.contiguous()
    if tensor.dtype is torch.bfloat16:  # numpy has no such type: the bytes as they are.
        return tensor.view(torch.uint8).numpy(), gguf.GGMLQuantizationType.BF16
    return tensor.numpy(), None
