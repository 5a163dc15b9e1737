"""What refining is compared with: whitening alone, and LoRA trained anew on the same text for as many steps."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from refine_models import CPU, Models
from transformers import AutoTokenizer

from peft_posthoc.adapters.open import open_adapter
from peft_posthoc.linalg.regression import damp, regress, root_of
from peft_posthoc.refinement.distil import distil
from peft_posthoc.refinement.layers import layers_of
from peft_posthoc.refinement.movable import factors_of
from peft_posthoc.running.live import Live, says
from peft_posthoc.running.load import with_adapter
from peft_posthoc.texts.distance import divergence
from peft_posthoc.texts.sequences import Tokens, batches, shuffled, split
from peft_posthoc.texts.writers import Writers

SEQUENCES = 960  # `refine`'s default
DAMPING = 0.03  # as in `compensated`
LR = 1e-3  # usual for LoRA; docs/refine.md says what others come to


class Text(NamedTuple):
    """How much is fitted on, and for how long; None is the default."""

    sequences: int | None = None
    minutes: float | None = None

    def options(self) -> dict[str, Any]:
        """As `refine` takes it."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def whitened(models: Models, rank: int, prompts: int, seed: int, text: Text) -> dict[str, Any]:
    """The best approximation of each delta in the metric of what the base's layer reads."""
    began = time.process_time()
    texts, start = _texts(models, prompts, seed, text), models.start(rank)
    live = Live(with_adapter(models.base(), start), models.tuned)
    factors = factors_of(live.adapted, live.name, open_adapter(start))
    layers = layers_of(live, factors).linear
    grams: dict[str, torch.Tensor] = {}

    def read(name: str) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            rows = inputs[0][counted].float()
            grams[name] = grams[name].addmm_(rows.mT, rows) if name in grams else rows.mT @ rows

        return hook

    hooks = [layer.base.register_forward_pre_hook(read(name)) for name, layer in layers.items()]
    with torch.no_grad(), live.adapted.disable_adapter():
        for batch in batches(texts, 8, device=CPU):
            counted = batch.mask.bool()
            says(live.adapted)(batch)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        delta = layer.delta()
        crosses = {name: grams[name] @ delta.mT}
        damp(grams[name], crosses, {name: delta}, DAMPING)
        found = regress(root_of(grams[name]), crosses[name], layer.rank)
        layer.put(found.a, found.b)
    seconds = time.process_time() - began
    return {**models.score(live.adapted), "seconds": seconds}


def from_start(start: bool | str, models: Models, rank: int, prompts: int, seed: int, text: Text) -> dict[str, Any]:
    """LoRA as PEFT starts it, trained by the same loss on the same texts with the same steps, at a rate of its own."""
    began = time.process_time()
    torch.manual_seed(seed)
    config = LoraConfig.from_pretrained(models.start(rank))
    config.init_lora_weights, config.inference_mode = start, False
    adapted = get_peft_model(models.base(), config).eval()
    fitted, method = split(_texts(models, prompts, seed, text)).fitted, distil()
    optimizer = torch.optim.Adam((own for own in adapted.parameters() if own.requires_grad), lr=0.0)
    steps = math.ceil(method.passes * len(fitted) / method.size)
    fitting = time.monotonic()
    for done, part in zip(range(steps), shuffled(fitted, method.size, seed), strict=False):
        share = done / steps
        if text.minutes is not None:
            share = max(share, (time.monotonic() - fitting) / (60 * text.minutes))
        if share >= 1:
            break
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (share + 0.01) / 0.05) * 0.5 * (1 + math.cos(math.pi * share))
        (batch,) = batches(part, method.size, device=CPU)
        with torch.no_grad():
            theirs = says(models.tuned)(batch)
        loss = divergence(says(adapted)(batch), theirs, batch.counted) / batch.counted.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.process_time() - began
    return {**models.score(adapted), "seconds": seconds}


def _texts(models: Models, prompts: int, seed: int, text: Text) -> list[Tokens]:
    """The texts that `refine` would fit on."""
    tokenizer = AutoTokenizer.from_pretrained(models.pair.base, trust_remote_code=False)
    writers = Writers(models.base(), models.tuned, tokenizer, len(tokenizer))
    count, length = text.sequences or SEQUENCES, models.pair.length
    return models.texts(prompts).write(writers, count=count, length=length, seed=seed, progress=False)
