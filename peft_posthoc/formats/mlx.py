"""MLX-LM's adapter folder: `adapters.safetensors` with transposed factors, and a configuration of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from peft_posthoc.adapters.on_model import AdapterOnModel, matrices
from peft_posthoc.errors import AdapterError
from peft_posthoc.files import staged
from peft_posthoc.formats.only_factors import only_factors
from peft_posthoc.formats.result import Exported, Out, files_of, write_report
from peft_posthoc.progress import progress_bar
from peft_posthoc.text import asked

# Whose modules MLX-LM 0.32 names as transformers does, but for stacked experts.
_MODEL_TYPES = (
    *("cohere", "gemma", "gemma2", "gemma3_text", "glm4", "granite", "llama", "mistral", "mixtral", "olmo2", "phi3"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2"),
)
# Mixtral's own names, in MLX those of the others.
_EXPERT_LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def write(deltas: AdapterOnModel, out: Out, *, dtype: torch.dtype | None, force: bool, progress: bool) -> Exported:
    """Write the folder.

    A linear layer has `lora_a` (n x r) and `lora_b` (r x m), an embedding the same with n its rows, stacked experts
    `lora_a` (experts x r x n) and `lora_b` (experts x m x r); MLX-LM 0.32, `mlx_lm/tuner/lora.py`.

    Raises:
        AdapterError: MLX-LM has no place for something in it, or it cannot be written.
    """
    check(deltas)
    dtype, rank = dtype or deltas.folder.dtype(), deltas.rank
    tensors: dict[str, Tensor] = {}
    for module, a, b in progress_bar(_modules(deltas, rank, dtype), desc="Modules", progress=progress):
        tensors |= {f"{module}.lora_a": a.contiguous(), f"{module}.lora_b": b.contiguous()}
    keys = sorted({name.rpartition(".")[0] for name in tensors})
    config = {
        "fine_tune_type": "lora",
        # Of layers whose modules are named from there; these keys are whole names.
        "num_layers": 0,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
        "model": deltas.base.label,
    }
    files = ("adapters.safetensors", "adapter_config.json")
    count = sum(tensor.nbytes for tensor in tensors.values())
    exported = Exported.of("mlx", deltas, out, dtype=dtype, rank=rank, files=files, size=count, notes=deltas.notes())
    ours = files_of(out.place)
    with staged(out.place, what="The MLX adapter", called=out.called, force=force, ours=ours) as made:
        made.mkdir()
        save_file(tensors, made / files[0], metadata={"format": "mlx"})
        (made / files[1]).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_report(Path(made), exported)
        (made / files[0]).chmod((made / files[1]).stat().st_mode)
    return exported


def check(deltas: AdapterOnModel) -> None:
    """See that MLX-LM has a place for all of an adapter.

    Raises:
        AdapterError: Something in the adapter has none.
    """
    only_factors(deltas, "MLX-LM")
    kind = (deltas.base.config or {}).get("model_type")
    if kind not in _MODEL_TYPES:
        raise AdapterError(
            f"The base `{deltas.base.label}` is of the type {kind!r}, whose modules in MLX-LM are not known here. "
            f"Known are {', '.join(_MODEL_TYPES)}. Use `{asked('to', 'merged')}`, and convert that with "
            "`mlx_lm.convert`."
        )
    for owner, users in deltas.layout.ties.items():
        for user in users:
            if not deltas.alike(f"{owner}.weight", f"{user}.weight"):
                raise AdapterError(
                    f"`{deltas.folder.label}` adds one thing to `{owner}` and another to `{user}`, which are one "
                    f"weight in MLX-LM. Use `{asked('to', 'merged')}`, which unties them."
                )


def _modules(deltas: AdapterOnModel, rank: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The factors as MLX-LM stores them, by its names."""
    stacks = deltas.of_experts()
    of_stacks = {name for stack in stacks for name in matrices(stack)}
    # MLX has one module for both.
    users = {user for users in deltas.layout.ties.values() for user in users}
    for name in deltas.names:
        if name not in of_stacks and name not in users:
            a, b = deltas.padded(name, rank, dtype)
            yield name, a.mT, b.mT
    for stack in stacks:
        if not stack.parts:
            raise AdapterError(f"The experts `{stack.name}` have no modules of their own, as MLX-LM's have.")
        for column in zip(*stack.parts, strict=True):
            names = [part.removesuffix(".weight") for part in column]
            each = [deltas.padded(name, rank, dtype) for name in names]
            before, _, leaf = names[0].rpartition(".experts.0.")
            module = f"{before}.switch_mlp.{_EXPERT_LEAVES.get(leaf, leaf)}"
            yield module, torch.stack([a for a, _ in each]), torch.stack([b for _, b in each])
