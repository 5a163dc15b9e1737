"""Memory and time of `phlora refine --method compensated` on a model as wide as a 7B one: `refine_memory.py WORK`.

Four layers of Llama's 7B shape, in bfloat16 on disk. Each step runs in a process of its own, whose peak is its own; the
time is set against a forward pass of both models, whole and in float32, over the same number of tokens.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_posthoc import Given, compensated, extract, refine

VOCABULARY, TEXTS, LENGTH = 32000, 16, 64


def make(work: Path) -> None:
    """Write both models, and an adapter of rank 8 with the head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=4,
        num_attention_heads=32,
        bos_token_id=None,
        eos_token_id=None,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    for name in ("base", "tuned"):
        if name == "tuned":
            with torch.no_grad():
                for key, weight in model.named_parameters():
                    if weight.ndim == 2 and "embed" not in key:
                        weight += 0.3 * weight.std() * torch.randn_like(weight)
        model.save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
    del model
    extract(work / "base", work / "tuned", 8, head=True).save(work / "adapter", force=True)


def forward(work: Path) -> None:
    """Run both models over as many tokens as are fitted on."""
    ids = torch.randint(VOCABULARY, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(0))
    seconds = 0.0
    for name in ("base", "tuned"):
        model = AutoModelForCausalLM.from_pretrained(work / name, dtype=torch.float32, trust_remote_code=False).eval()
        start = time.monotonic()
        with torch.no_grad():
            for part in ids.split(8):
                model(input_ids=part, use_cache=False)
        seconds += time.monotonic() - start
        del model
    print(f"two forward passes over {ids.numel()} tokens: {seconds:.0f} s")


def run(work: Path) -> None:
    """Refine the adapter."""
    draw = torch.Generator().manual_seed(1)
    texts = [" ".join(f"w{i}" for i in torch.randint(VOCABULARY, (LENGTH,), generator=draw)) for _ in range(TEXTS)]
    start = time.monotonic()
    refined = refine(
        work / "adapter",
        work / "base",
        work / "tuned",
        texts=Given(texts),
        method=compensated(),
        sequences=TEXTS,
        length=LENGTH,
        progress=True,
    )
    print(refined.table())
    print(f"fitted, held-out text judged twice: {refined.seconds:.0f} s; in all {time.monotonic() - start:.0f} s")


STEPS: dict[str, Callable[[Path], None]] = {"make": make, "forward": forward, "run": run}

if __name__ == "__main__":
    work, *steps = Path(sys.argv[1]), *sys.argv[2:]
    if steps:
        STEPS[steps[0]](work)
        print(f"{steps[0]}: peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    else:
        for step in STEPS:
            if step != "make" or not (work / "adapter").is_dir():
                subprocess.run([sys.executable, __file__, str(work), step], check=True)
