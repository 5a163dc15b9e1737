"""What the engines are given: four bases with their fine-tunes, right adapters of these, and spoiled ones.

Sizes are those that all engines take: heads of 32 (vLLM's attention on CPU), rows a multiple of 32 (llama.cpp).
"""

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peft
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import extract
from peft_posthoc.adapters.names import PREFIX
from peft_posthoc.serving.subject import Subject
from tests.make import models, wrong_adapters

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
# llama.cpp has no other kind of Qwen3-MoE than with `norm_topk_prob`.
EXPERTS = {
    **{"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "norm_topk_prob": True,
}
MIXTURES = ("qwen3-moe",)
BASES: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: models.llama(**SIZES),
    "qwen2": lambda: models.qwen2(**SIZES),
    "qwen3": lambda: models.decoder("Qwen3", head_dim=32, **SIZES),
    "gemma": lambda: models.decoder("Gemma", head_dim=32, **SIZES),
    "qwen3-moe": lambda: models.qwen3_moe(**SIZES, **EXPERTS),
}
# One head: the width of `tests/make/wrong_adapters.py`'s adapters, 32, is then that of vLLM's smallest head.
ONE_HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1}
SPOILED_BASES: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: models.llama(**ONE_HEAD),
    "tied": lambda: models.llama(tie_word_embeddings=True, **ONE_HEAD),
    "qwen2": lambda: models.qwen2(**ONE_HEAD),
}


def _ranked(own: dict[str, int] | None = None, **settings: object) -> wrong_adapters.Spoil:
    """Rank 8, or another by the leaf's name."""

    def spoil(parts: wrong_adapters.Parts) -> None:
        parts.cut(settings.get("r", 8))
        for leaf, rank in (own or {}).items():
            parts.cut(rank, only=leaf)
        parts.configure(**{"r": 8, "lora_alpha": 8} | settings)

    return spoil


QKV, MLP = dict.fromkeys(("q_proj", "k_proj", "v_proj"), 4), dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 4)
# Ranks and scales, which every engine reads in its own way.
SCALED = {
    "rank 8": _ranked(),
    "alpha 16": _ranked(lora_alpha=16),
    "alpha 0": _ranked(lora_alpha=0),
    "rank 12": _ranked(r=12, lora_alpha=12),
    "own ranks": _ranked(QKV, rank_pattern=QKV),
    "own ranks and alphas": _ranked(QKV, rank_pattern=QKV, alpha_pattern=QKV),
    "mlp of its own rank and alpha": _ranked(MLP, rank_pattern=MLP, alpha_pattern=MLP),
}
# Of `tests/make/wrong_adapters.py`, what can be served on a dense language model of a small vocabulary that is not
# quantised; no engine looks at which base an adapter names.
SPOILED = {
    name: case
    for name, case in wrong_adapters.CASES.items()
    if not {"expert", "experts", "towers", "vocabulary", "dropped", "refused", "another", "fp8"} & {*name.split("-")}
    and case.base not in wrong_adapters.QUANTISED
} | {name: wrong_adapters.Case(spoil) for name, spoil in SCALED.items()}
# Where an engine does otherwise than `check` says, and why.
UNLIKE = {
    ("peft", "init-vllm"): "the base is another for as long as the adapter is loaded: in `check` a warning",
    ("peft", "variants"): "the base has other layers for as long as the adapter is loaded: what the setting asks for",
    ("sglang", "target-all-linear"): "SGLang resolves it by its own model classes, which need a GPU",
}
MORE_THAN_FACTORS = ("use_dora", "layer_replication", "modules_to_save")
# Spoiled on purpose, so that a comparison which does not see it is worth nothing.
WRONG: dict[str, wrong_adapters.Spoil] = {
    "alpha twice": lambda parts: parts.configure(lora_alpha=2 * parts.config["r"]),
    "a layer missing": lambda parts: parts.drop("layers.1.self_attn.o_proj"),
    "no prefix": lambda parts: parts.rename("base_model.model.", ""),
    "another prefix": lambda parts: parts.rename("base_model.model.model.", "base_model.model.model.language_model."),
}


class Pair(NamedTuple):
    """A base and its fine-tune, in which everything changed, norms and biases too."""

    base: Path
    tuned: Path


def prompts() -> list[list[int]]:
    """Token ids: eight prompts of 5 to 19 tokens."""
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 96, (5 + 2 * i,), generator=draw).tolist() for i in range(8)]


def save_pair(make: Callable[[], torch.nn.Module], folder: Path) -> Pair:
    """A base whose outputs are far from uniform, and a fine-tune far from it."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    base, tuned = models.save_pair(model, folder, scale=0.05)
    return Pair(Path(base), Path(tuned))


def right_adapters(pair: Pair, folder: Path) -> dict[str, Path]:
    """Adapters as `phlora extract` writes them."""
    asked = {
        "full rank": {"rank": 64},
        "rank 8": {"rank": 8},
        "full rank, embeddings and head": {"rank": 64, "embeddings": True, "head": True},
    }
    return {
        name: extract(pair.base, pair.tuned, experts="per-expert", **options).save(
            folder / name.replace(",", "").replace(" ", "-")
        )
        for name, options in asked.items()
    }


def spoiled_adapters(good: Path, folder: Path) -> dict[str, Path]:
    """The adapter, spoiled in each of the ways."""
    return {name: wrong_adapters.make(wrong_adapters.Case(spoil), good, folder / name) for name, spoil in WRONG.items()}


# What should come out.


@torch.no_grad()
def next_token(model: torch.nn.Module) -> np.ndarray:
    """The log-probabilities of the next token after each prompt, by transformers."""
    rows = [model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1) for prompt in prompts()]
    return torch.stack(rows).numpy()


def held(pair: Pair, adapter: Path, folder: Path) -> Path:
    """The tuned model with everything that the adapter does not carry put back to the base."""
    carried = {f"{module}.weight" for module in Subject.read(adapter).modules}
    before, after = (load_file(models.weights_of(one)) for one in pair)
    folder.mkdir()
    (folder / "config.json").write_text((pair.base / "config.json").read_text())
    weights = {name: after[name] if name in carried else before[name] for name in before}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def by_peft(adapter: Path, base: Path) -> torch.nn.Module:
    """The base with the adapter, in PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(models.load(base), adapter).eval()


def meant(adapter: Path, base: Path, good: Path) -> torch.nn.Module:
    """The base with what a spoiled file says in it.

    Factors and whole tensors are added by our own reading of them; where there is more (DoRA, ...) PEFT tells what is
    meant; and the good adapter does where the file's names or shapes fit nothing.
    """
    subject = Subject.read(adapter)
    taken_out = isinstance(subject.config.get("init_lora_weights"), str)
    if taken_out or subject.base_copies or subject.setting(*MORE_THAN_FACTORS):
        with contextlib.suppress(KeyError, RuntimeError):
            return by_peft(adapter, base)
    return _with(subject, base) or _with(Subject.read(good), base)


@torch.no_grad()
def _with(subject: Subject, base: Path) -> torch.nn.Module | None:
    model = models.load(base)
    if "lm_head" in subject.modules and model.config.tie_word_embeddings:
        # Each of the two has factors of its own.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    weights = dict(model.named_parameters())
    for name in (*subject.norms, *subject.biases, *subject.whole):
        weight = weights.get(name.removeprefix(PREFIX))
        if weight is None:
            return None
        weight.copy_(subject.weights.read(name))
    for name, own in subject.modules.items():
        weight = weights.get(f"{name}.weight")
        product = own.kind.matrix(subject.weights.read(own.b_name).float() @ subject.weights.read(own.a_name).float())
        if weight is None or weight.shape != product.shape:
            return None
        weight += subject.scale(name) * product
    return model
