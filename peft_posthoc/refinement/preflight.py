"""Before a fit: how much text and how many steps, and what memory and disk it takes; from headers alone."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor, nn

from peft_posthoc.adapters.open import open_adapter
from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.checkpoints.checkpoint import Checkpoint
from peft_posthoc.compute.device import pick_device
from peft_posthoc.errors import CheckpointError
from peft_posthoc.files import free_at
from peft_posthoc.models.by_class import build
from peft_posthoc.refinement.chain import blocks_of
from peft_posthoc.refinement.compensated import compensated
from peft_posthoc.refinement.method import Method
from peft_posthoc.refinement.sharded import check_processes
from peft_posthoc.refinement.usual import Usual
from peft_posthoc.refinement.walk import AT_ONCE
from peft_posthoc.running.live import check_sides, rows_brought, tokenizer_beside
from peft_posthoc.sources import Source, open_pair
from peft_posthoc.text import size
from peft_posthoc.texts.sequences import places_of
from peft_posthoc.texts.texts import Sampled, Texts, check_room, held_out, shares, usual_length
from peft_posthoc.texts.writers import Writers

# Python, PyTorch, transformers and PEFT alone.
_PROCESS = 480e6
# Tensors of the size of the logits that are alive at once, measured: both models give some, the divergence makes more.
_LOGITS = 14
# Of a factor, in float32: as it was, as it is, the best, the gradient and Adam's two moments; and as it is in the file.
_COPIES = 7


@dataclass(frozen=True)
class RefinePreflight:
    """What a fit will do, and what it needs."""

    method: str
    sequences: int
    """Texts, at most."""
    length: int
    """Tokens of one, at most; no more than the models can read."""
    steps: int
    """As many as the account of the fit tells, if there is time for all; of `compensated`, the modules that it fits."""
    factors: int
    """Numbers that are fitted."""
    models_bytes: int
    """Of what is in memory of both models at once: all, in float32; split among processes, each one's part, with one
    whole model in the type of its files, which writes; or of each the largest block, and no less than that one."""
    work_bytes: int
    """Of what is computed for a batch, with copies of the factors."""
    memory_bytes: int
    """About the most that is taken at once: on the device, less half a gigabyte, where that is not the CPU."""
    disk_bytes: int
    """At the adapter's folder: the adapter, and what an interrupted run goes on from."""
    disk_free: int | None
    """None where no folder was named."""
    temporary_bytes: int
    """In the folder of temporary files, while it runs: what goes from a block to the next."""
    temporary_free: int
    """There."""
    processes: int
    """Each takes that much memory."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"format": 1, **asdict(self)}

    def table(self) -> str:
        """For a terminal."""
        free = "" if self.disk_free is None else f" of {size(self.disk_free)} that are free"
        both = f"both models {size(self.models_bytes)}, a batch and copies of the factors {size(self.work_bytes)}"
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        lines = [
            f"At most {self.sequences} texts of {self.length} tokens; {self.method}, {self.steps} steps on "
            f"{self.factors} numbers.",
            f"Memory: about {size(self.memory_bytes)}{each} ({both}). Disk needed: {size(self.disk_bytes)}{free}.",
        ]
        if self.temporary_bytes:
            lines.append(
                f"While it runs, in `{gettempdir()}`: {size(self.temporary_bytes)} of {size(self.temporary_free)} that "
                "are free."
            )
        return "\n".join(lines)


def refine_preflight(
    adapter: str | os.PathLike[str] | AdapterFile,
    base: Source,
    tuned: Source,
    *,
    texts: Texts | None = None,
    method: Method | Usual | None = None,
    sequences: int = 960,
    length: int | None = None,
    out: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    tuned_revision: str | None = None,
    device: str = "cpu",
    processes: int = 1,
) -> RefinePreflight:
    """See what `refine` with the same arguments will do and need; no tensor is read.

    Args:
        adapter: A PEFT LoRA folder of `base`; or the plan of one that is not extracted yet.
        base: The model before.
        tuned: The model after.
        texts: As in `refine`; none is written.
        method: As in `refine`.
        sequences: How many texts.
        length: How many tokens each has at most; by default as `refine` takes it, by the tokenizer.
        out: Where the adapter would be written.
        base_revision: Branch, tag or commit, where `base` is a hub id.
        tuned_revision: The same for `tuned`.
        device: As in `refine`.
        processes: How many share the work.

    Raises:
        AdapterError: The folder is no plain LoRA adapter.
        CheckpointError: A model cannot be read, or is of no class that is known.
        MismatchError: The two are not of one class, or know other tokens.
        PosthocError: No text of that length has room for an answer.
    """
    file: AdapterFile = open_adapter(adapter) if isinstance(adapter, str | os.PathLike) else adapter
    where = pick_device(device)
    pair = open_pair(base, tuned, base_revision=base_revision, tuned_revision=tuned_revision)
    chosen = method or Usual()
    if isinstance(chosen, Usual):
        chosen = chosen.method(*pair, device=where, processes=processes)
    check_sides(*pair)
    models = [_built(one) for one in pair]
    apart = chosen.streams or getattr(chosen, "shard", False)
    sides = [(one.label, model) for one, model in zip(pair, models, strict=True)]
    rows_brought(file, *sides, whole=not apart)
    places, given = places_of(models[0].config), texts or Sampled()
    writers = Writers(None, None, tokenizer_beside(None, *reversed(pair)), 0)
    length = length or usual_length(given, writers)
    length = min(length, places or length)
    check_room(given, writers, length)
    fitted = sum(shares(given, sequences)) - held_out(given, sequences)
    sequences = sum(shares(given, sequences))
    names = [name for module in file.modules.values() for name in module.tensor_names()]
    factors = sum(math.prod(file.headers[name].shape) for name in names)
    models_bytes, temporary = sum(map(_bytes, models)), 0
    written = max(sum(header.bytes for header in one.headers.values()) for one in pair)
    if getattr(chosen, "shard", False):
        check_processes(processes)
        models_bytes = models_bytes // processes + max(written, *map(_unsplit, models))
    if chosen.streams:
        models_bytes = max(written, sum(map(_largest, models)))
        # Hidden states in float32, of both models. `compensated` has none of held-out text while it fits.
        config = models[0].config.get_text_config()
        hidden = getattr(config, "hidden_size", None) or models[0].get_input_embeddings().weight.shape[1]
        temporary = 8 * hidden * sequences * length
    if isinstance(chosen, compensated):
        steps, work = _closed_form(models[0], file, chosen.size * length, models_bytes)
    else:
        steps, work = _by_gradients(models[0], file, chosen, fitted, length)
        work += _COPIES * 4 * factors
    return RefinePreflight(
        method=type(chosen).__name__,
        sequences=sequences,
        length=length,
        steps=steps,
        factors=factors,
        models_bytes=models_bytes,
        work_bytes=work,
        memory_bytes=int(_PROCESS + models_bytes + work),
        # Factors, the best, Adam's two moments; and the text.
        disk_bytes=sum(header.bytes for header in file.headers.values()) + 16 * factors + 8 * sequences * length,
        disk_free=None if out is None else free_at(Path(out)),
        temporary_bytes=temporary,
        temporary_free=free_at(Path(gettempdir())),
        processes=processes,
    )


def _bytes(model: Any) -> int:
    return sum(4 * own.numel() for own in model.parameters())


def _largest(model: Any) -> int:
    """Bytes of what is the most of a model that is in memory when it runs a block at a time, in float32."""
    parts = [*blocks_of(model), model.get_input_embeddings(), model.get_output_embeddings()]
    return max(map(_bytes, parts))


def _unsplit(model: Any) -> int:
    """Bytes of what a process has as a whole of a model that is split: a block, the next one, what is around them."""
    parts = list(map(_bytes, blocks_of(model)))
    return _bytes(model) - sum(parts) + 2 * max(parts)


def _closed_form(model: Any, file: AdapterFile, tokens: int, models_bytes: int) -> tuple[int, int]:
    """Modules that are fitted in closed form, and the bytes that it takes."""
    sizes = [module.size for module in file.modules.values() if module.kind == "linear"]
    # For each input a row and a column of float64, twice, while no block is in memory; of outputs what is lacking.
    fit = max((12 * m * n + max(4 * n * n, 16 * n * n - models_bytes) for m, n in sizes), default=0)
    return len(sizes), max(fit, _logits(model, min(tokens, AT_ONCE)))


def _by_gradients(model: Any, file: AdapterFile, chosen: Method, texts: int, length: int) -> tuple[int, int]:
    """Steps of an optimiser on so many texts, and the bytes that one takes."""
    passes, tokens = getattr(chosen, "passes", 1.0), chosen.size * length
    part = max(blocks_of(model), key=_bytes) if chosen.streams else model
    kept = _activations(model, chosen.size, length, part)
    if getattr(chosen, "bf16", False):
        kept += _bytes(part) // 2  # Gradients want the weights as they were multiplied.
    if not chosen.streams:
        return max(1, math.ceil(passes * texts / chosen.size)), kept + _logits(model, tokens)
    parts, fits_head = _stretches(model, file.modules)
    steps = max(1, math.ceil(passes * math.ceil(texts / chosen.size))) * (parts + fits_head)
    return steps, max(kept, _logits(model, tokens if fits_head else min(tokens, AT_ONCE)))


def _logits(model: Any, tokens: int) -> int:
    """Bytes of the logits of some tokens, and of what is made of them."""
    return _LOGITS * 4 * tokens * int(model.get_output_embeddings().weight.shape[0])


def _stretches(model: Any, modules: Collection[str]) -> tuple[int, bool]:
    """How many blocks have one of the modules; and whether the head is one."""
    names = {module: name for name, module in model.named_modules(remove_duplicate=False)}
    head, within = names[model.get_output_embeddings()], f"{names[blocks_of(model)]}."
    parts = {name.removeprefix(within).partition(".")[0] for name in modules if name.startswith(within)}
    return len(parts), head in modules


def _built(checkpoint: Checkpoint) -> Any:
    model = build(checkpoint.config or {})
    if model is None:
        raise CheckpointError(f"`{checkpoint.label}` is no language model of transformers: it cannot be refined for.")
    return model


def _activations(model: Any, texts: int, length: int, part: nn.Module) -> int:
    """Bytes that a part keeps of a step for its gradients, in float32: asked of the model without values."""
    model.set_attn_implementation("eager")  # The others look at the values of a mask.
    model.to(torch.bfloat16)  # So experts in one product want it.
    weights = {own.untyped_storage()._cdata for own in model.parameters()}
    kept: dict[int, Tensor] = {}

    inside = [False]
    part.register_forward_pre_hook(lambda *_: inside.append(True))
    part.register_forward_hook(lambda *_: inside.append(False))

    def keep(x: Tensor) -> Tensor:
        if inside[-1] and (storage := x.untyped_storage()._cdata) not in weights:
            kept[storage] = x
        return x

    ids = torch.zeros(texts, length, dtype=torch.int64, device="meta")

    def step(mask: Tensor) -> None:
        kept.clear()
        inside[:] = [False]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(input_ids=ids, attention_mask=mask, use_cache=False)

    try:
        step(torch.ones_like(ids))
    except RuntimeError:  # Convolutions along the text look for padding in it.
        step(torch.ones(ids.shape, dtype=torch.int64))
    return sum(x.untyped_storage().nbytes() * (2 if x.dtype == torch.bfloat16 else 1) for x in kept.values())
