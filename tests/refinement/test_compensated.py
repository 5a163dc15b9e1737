"""The closed form: each layer fitted to what the tuned layer gives, on what the adapted model lets it read."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from peft_posthoc import Sampled, blocks, compensated, extract, refine, truncated_svd
from peft_posthoc.models.kinds import LINEAR
from peft_posthoc.refinement.layers import Layer
from peft_posthoc.refinement.walk import Piece, Stretch

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA: dict[str, Any] = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3}
WINDOW: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA)),
    # Blocks that give tuples, Conv1D, learned positions.
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=2, n_positions=32)),
    # Two masks and two rotary tables.
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig(**LLAMA, **WINDOW)),
    # Projections before and behind the blocks.
    "opt": (OPTForCausalLM, OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16, init_std=0.3)),
    # Experts, which are not fitted.
    "mixtral": (MixtralForCausalLM, MixtralConfig(**LLAMA, num_local_experts=2)),
}
SMALL: dict[str, Any] = {"sequences": 128, "length": 16}


def _pair(folder: Path, name: str = "llama") -> tuple[Path, Path]:
    """A base, and one that every matrix but the embeddings of was moved."""
    cls, config = MODELS[name]
    torch.manual_seed(0)
    model = cls(config)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1 and not any(part in key for part in ("embed", "wte", "wpe")):
                weight += 0.4 * weight.std() * torch.randn_like(weight)
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def _adapter(pair: tuple[Path, Path], out: Path, **options: Any) -> Path:
    extract(*pair, **{"rank": 2, "dtype": torch.float32, **options}).save(out)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_a_fitted_adapter_is_nearer_on_text_it_has_not_seen(tmp_path: Path, name: str) -> None:
    pair = _pair(tmp_path, name)
    adapter = _adapter(pair, tmp_path / "svd", form="peft", experts="fused")
    refined = refine(adapter, *pair, method=compensated(), **SMALL)
    assert not refined.kept
    for kind in ("task", "general"):
        assert refined.after[kind].kl < refined.before[kind].kl
    before = load_file(adapter / "adapter_model.safetensors")
    moved = {key for key, x in before.items() if not torch.equal(x, refined.tensors[key])}
    left = {key for key in before if any(f"{name}." in key for name in refined.unmoved) or ".lora_" not in key}
    assert moved == before.keys() - left
    assert refined.steps == len(moved) / 2


class Linear:
    """Two linear layers; those of base + adapter have lost some of the first, and none of the second is there yet."""

    tokens, n, m, rank = 400, 12, 9, 3

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(3)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw)

        inputs = random(self.tokens, self.n) * torch.logspace(0.3, -0.3, self.n)
        first, second = random(self.n, self.n), random(self.m, self.n)
        self.read = (inputs @ (first + 0.5 * random(self.n, self.n)).mT, inputs @ first.mT)
        self.base, self.tuned = (torch.nn.Linear(self.n, self.m, bias=False) for _ in range(2))
        self.base.weight.data, self.tuned.weight.data = second + 0.2 * random(self.m, self.n), second
        self.a = torch.nn.Parameter(random(self.rank, self.n))
        self.b = torch.nn.Parameter(random(self.m, self.rank))
        self.layer = Layer("second", self.base, self.tuned, LINEAR, self.a, self.b, 2.0)

    @torch.no_grad()
    def fit(self, damping: float) -> torch.Tensor:
        """What the factors make together, once they are fitted."""
        run = (lambda: self.base(self.read[0][None]), lambda: self.tuned(self.read[1][None]))
        piece = Piece(run, torch.ones(self.tokens, dtype=torch.bool))
        with torch.no_grad():
            assert compensated(damping=damping)._fit(Stretch("block", lambda _: [piece], nullcontext), 1, [self.layer])
        return 2.0 * self.b.double() @ self.a.double()

    @property
    def lacking(self) -> torch.Tensor:
        """What the adapter should add to the outputs."""
        (mine, theirs), weights = self.read, (self.base.weight.detach(), self.tuned.weight.detach())
        return (theirs @ weights[1].mT - mine @ weights[0].mT).double()

    def best(self, wanted: torch.Tensor) -> torch.Tensor:
        """The matrix of the rank that gives outputs best, by the textbook: least squares, cut in the outputs' space."""
        mine = self.read[0].double()
        least = torch.linalg.lstsq(mine, wanted).solution.mT
        v = torch.linalg.svd(mine @ least.mT, full_matrices=False).Vh[: self.rank]
        found: torch.Tensor = v.mT @ v @ least
        return found

    def error(self, matrix: torch.Tensor) -> float:
        """What is lacking still."""
        return float(torch.linalg.norm(self.read[0].double() @ matrix.mT - self.lacking))


def test_the_factors_are_the_best_of_their_rank() -> None:
    model = Linear()
    torch.testing.assert_close(model.fit(1e-7), model.best(model.lacking), rtol=1e-3, atol=1e-3)


def test_what_a_bias_of_the_factors_adds_they_need_not() -> None:
    model = Linear()
    model.layer = replace(model.layer, bias=torch.nn.Parameter(torch.arange(9.0)))
    wanted = model.lacking - 2.0 * torch.arange(9.0).double()
    torch.testing.assert_close(model.fit(1e-7), model.best(wanted), rtol=1e-3, atol=1e-3)


def test_the_metric_alone_does_not_make_up_for_what_was_lost_before() -> None:
    model = Linear()
    delta = (model.tuned.weight - model.base.weight).detach().double()
    weighted = model.best(model.read[0].double() @ delta.mT)
    assert model.error(model.fit(1e-7)) < 0.5 * model.error(weighted)


def test_where_nothing_was_lost_and_inputs_are_alike_it_is_the_svd() -> None:
    model = Linear()
    alike = torch.linalg.qr(torch.randn(model.tokens, model.n, generator=torch.Generator().manual_seed(4))).Q
    model.read = (alike, alike)
    delta = (model.tuned.weight - model.base.weight).detach()
    found = truncated_svd(delta, model.rank, exact=True)
    torch.testing.assert_close(model.fit(0.03).float(), found.b @ found.a, rtol=1e-4, atol=1e-5)


def test_at_full_rank_nothing_changes_beyond_rounding(tmp_path: Path) -> None:
    pair = _pair(tmp_path)
    adapter = _adapter(pair, tmp_path / "svd", rank=32, head=True)
    before = load_file(adapter / "adapter_model.safetensors")
    refined = refine(adapter, *pair, method=compensated(), sequences=24, length=12)
    assert refined.after["general"].kl <= refined.before["general"].kl < 1e-6
    for key in (key for key in before if "lora_A" in key):
        old, new = (one[key.replace("lora_A", "lora_B")] @ one[key] for one in (before, refined.tensors))
        torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "method", "told"),
    [(Sampled(), compensated(), True), (Sampled(prefix=""), compensated(), False), (Sampled(), blocks(), False)],
    ids=["guessed", "told", "blocks"],
)
def test_without_a_word_of_the_task_it_says_what_loses_less(
    tmp_path: Path, given: Sampled, method: Any, told: bool
) -> None:
    pair = _pair(tmp_path)
    refined = refine(_adapter(pair, tmp_path / "svd"), *pair, texts=given, method=method, sequences=24, length=12)
    assert any("Without prompts `blocks`," in note for note in refined.notes) == told


def test_padding_stays_zero(tmp_path: Path) -> None:
    pair = _pair(tmp_path)
    adapter = _adapter(pair, tmp_path / "svd", rank_pattern={"down_proj": 1})
    refined = refine(adapter, *pair, method=compensated(), **SMALL)
    before = load_file(adapter / "adapter_model.safetensors")
    assert not refined.kept
    for name, x in before.items():
        assert torch.equal((x == 0).all(dim=0), (refined.tensors[name] == 0).all(dim=0))
        assert torch.equal((x == 0).all(dim=1), (refined.tensors[name] == 0).all(dim=1))


def test_damping_that_leaves_nothing_of_the_text_is_refused() -> None:
    assert compensated(damping=1e6).damping == 1e6
    with pytest.raises(ValueError, match="`damping` must be at most 1e\\+06"):
        compensated(damping=1e38)
