"""An adapter that is refined: nearer to the tuned model on text that it was not fitted on, in the same file layout."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft_posthoc import (
    AdapterError,
    CheckpointError,
    Given,
    MismatchError,
    PosthocError,
    Sampled,
    blocks,
    compensated,
    distil,
    extract,
    refine,
)
from peft_posthoc.refinement.distil import _loss as loss_of
from peft_posthoc.refinement.method import Fit, better
from peft_posthoc.refinement.preflight import refine_preflight
from peft_posthoc.refinement.streamed import Streamed
from peft_posthoc.running.live import Live
from peft_posthoc.texts.distance import Distance
from peft_posthoc.texts.sequences import Tokens
from tests.make import models
from tests.make.texts import tokenizer

CONFIG = LlamaConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
SMALL: dict[str, Any] = {"sequences": 128, "length": 16}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and one that every weight of was moved: at rank 2 most of it is lost."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def _adapter(pair: tuple[Path, Path], out: Path, **options: Any) -> Path:
    extract(*pair, **{"rank": 2, "head": True, "dtype": torch.float32, **options}).save(out)
    return out


def _distance(pair: tuple[Path, Path], adapter: Path) -> float:
    """KL(tuned || base + adapter) per token on random tokens, by stock PEFT and PyTorch alone."""
    ids = torch.randint(48, (64, 16), generator=torch.Generator().manual_seed(9))
    adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(pair[0]), adapter)
    with torch.no_grad():
        said, wanted = (
            torch.distributions.Categorical(logits=model(ids).logits.double())
            for model in (adapted, LlamaForCausalLM.from_pretrained(pair[1]))
        )
    return float(torch.distributions.kl_divergence(wanted, said).mean())


@pytest.mark.parametrize("form", ["portable", "peft"])
def test_a_refined_adapter_is_nearer_on_text_it_has_not_seen(
    pair: tuple[Path, Path], tmp_path: Path, form: str
) -> None:
    adapter = _adapter(pair, tmp_path / "svd", form=form)
    refined = refine(adapter, *pair, method=distil(passes=6), **SMALL)
    refined.save(tmp_path / "refined")
    assert not refined.kept
    for kind in ("task", "general"):
        assert refined.after[kind].kl < refined.before[kind].kl
    assert refined.after["task"].kl < refined.base["task"].kl
    assert _distance(pair, tmp_path / "refined") < 0.85 * _distance(pair, adapter)


def test_names_shapes_types_and_configuration_stay(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = _adapter(pair, tmp_path / "svd", dtype=torch.bfloat16, embeddings=True)
    refine(adapter, *pair, **SMALL).save(tmp_path / "refined")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "refined"))
    assert {name: (x.shape, x.dtype) for name, x in before.items()} == {
        name: (x.shape, x.dtype) for name, x in after.items()
    }
    assert any(not torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, tmp_path / "refined")]
    assert configs[0] == configs[1]


def test_padding_stays_zero(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = _adapter(pair, tmp_path / "svd", rank_pattern={"down_proj": 1})
    refine(adapter, *pair, **SMALL).save(tmp_path / "refined")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "refined"))
    padded = [name for name, x in before.items() if (x == 0).any()]
    assert padded
    for name in padded:
        assert torch.equal(before[name] == 0, after[name] == 0)


def test_the_same_seed_gives_the_same_adapter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = _adapter(pair, tmp_path / "svd")
    first, second, other = (refine(adapter, *pair, **SMALL, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, second.tensors[name]) for name, x in first.tensors.items())
    assert any(not torch.equal(x, other.tensors[name]) for name, x in first.tensors.items())


def test_the_random_numbers_of_the_caller_are_left_alone(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = _adapter(pair, tmp_path / "svd")
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    refine(adapter, *pair, sequences=8, length=4)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("method", [distil(), compensated(), blocks()], ids=str)
def test_what_is_exact_already_stays_as_it_is(pair: tuple[Path, Path], tmp_path: Path, method: Any) -> None:
    adapter = _adapter(pair, tmp_path / "svd", rank=32)
    refined = refine(adapter, *pair, method=method, **SMALL)
    before = load_file(adapter / "adapter_model.safetensors")
    assert refined.after["general"].kl <= refined.before["general"].kl < 1e-6
    for name, x in before.items():
        torch.testing.assert_close(refined.tensors[name], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lr", [0.5, 50.0])
def test_where_steps_lead_away_smaller_ones_follow_from_the_start(
    pair: tuple[Path, Path], tmp_path: Path, lr: float
) -> None:
    """At neither rate alone is anything ever nearer than the start."""
    refined = refine(_adapter(pair, tmp_path / "svd"), *pair, method=distil(lr=lr), **SMALL)
    assert not refined.kept
    assert not refined.unmoved
    assert all(refined.after[kind].kl < 0.9 * refined.before[kind].kl for kind in ("task", "general"))


def test_without_prompts_it_says_that_the_task_was_not_seen(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = _adapter(pair, tmp_path / "svd")
    for texts, said in ((None, True), (Sampled("a"), False)):
        refined = refine(adapter, *pair, texts=texts, tokenizer=tokenizer(), sequences=16, length=8)
        assert ("`texts=Prompts([...])`" in refined.table()) == said


def test_steps_are_smaller_where_the_task_is_guessed_at(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter, options = _adapter(pair, tmp_path / "svd"), {"tokenizer": tokenizer(), **SMALL}
    usual, same = (refine(adapter, *pair, method=distil(lr=lr), **options) for lr in (None, 0.02))
    assert not usual.kept
    assert usual.to_dict()["lr"] == 0.02
    assert all(torch.equal(x, same.tensors[name]) for name, x in usual.tensors.items())
    for texts in (Sampled("a"), Given([[i, i + 1] for i in range(20)])):
        assert refine(adapter, *pair, texts=texts, **options).lr == 0.05


def test_steps_that_lead_away_are_not_kept(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = _adapter(pair, tmp_path / "svd")
    refined = refine(adapter, *pair, method=distil(lr=1e12), **SMALL)
    before = load_file(adapter / "adapter_model.safetensors")
    assert refined.kept
    assert not refined.unmoved
    assert refined.after == refined.before
    assert all(torch.equal(refined.tensors[name], x) for name, x in before.items())
    assert "as it was" in refined.table()


@dataclass(frozen=True)
class Boasts:
    """A method that spoils the factors and says that they are better."""

    size: int = 8
    streams: ClassVar[bool] = False

    def __call__(self, live: Any, factors: Any, texts: Any, **_: Any) -> Fit:
        before = live.distances(texts.held_out, size=8)
        with torch.no_grad():
            for factor in factors.values():
                factor *= 3
        return Fit(before, {kind: replace(one, kl=0.0) for kind, one in before.items()}, False, 1, 0.0)


def test_what_is_written_is_judged_whatever_a_method_says(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = _adapter(pair, tmp_path / "svd")
    refined = refine(adapter, *pair, method=Boasts(), **SMALL)
    before = load_file(adapter / "adapter_model.safetensors")
    assert refined.kept
    assert refined.after == refined.before
    assert all(torch.equal(refined.tensors[name], x) for name, x in before.items())


def test_too_few_texts_to_judge_each_kind_by_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    class OneKind:
        def write(self, writers: Any, **_: Any) -> list[Tokens]:
            return [Tokens((i, i + 1), "task") for i in range(20)]

    adapter = _adapter(pair, tmp_path / "svd")
    with pytest.raises(PosthocError, match="of each kind"):
        refine(adapter, *pair, texts=OneKind(), **SMALL)


def test_the_account_says_that_the_old_shares_are_of_the_old_factors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = _adapter(pair, tmp_path / "svd")
    refined = refine(adapter, *pair, **SMALL)
    refined.save(tmp_path / "refined")
    report = json.loads((tmp_path / "refined" / "phlora_report.json").read_text())
    assert report["start"] == json.loads((adapter / "phlora_report.json").read_text())
    assert report["refined"] == json.loads(json.dumps(refined.to_dict()))
    assert "totals" not in report


def test_a_teacher_of_no_numbers_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = _adapter(pair, tmp_path / "svd")
    model = LlamaForCausalLM.from_pretrained(pair[1])
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    model.save_pretrained(tmp_path / "spoiled")
    with pytest.raises(PosthocError, match="no number"):
        refine(adapter, pair[0], tmp_path / "spoiled", **SMALL)


def test_a_teacher_of_another_vocabulary_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = _adapter(pair, tmp_path / "svd")
    model = LlamaForCausalLM.from_pretrained(pair[1])
    model.resize_token_embeddings(56, mean_resizing=False)
    model.save_pretrained(tmp_path / "larger")
    with pytest.raises(MismatchError, match=r"knows 48 tokens, .* 56"):
        refine(adapter, pair[0], tmp_path / "larger", **SMALL)


def test_a_prefix_without_a_tokenizer_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = _adapter(pair, tmp_path / "svd")
    with pytest.raises(PosthocError, match="tokenizer"):
        refine(adapter, *pair, texts=Sampled("Report:"), **SMALL)


@pytest.mark.parametrize(
    "wrong", [{"sequences": 3}, {"length": 1}, {"minutes": 0.0}, {"seed": 2**64}, {"seed": -(2**63) - 1}]
)
def test_senseless_numbers_are_refused(pair: tuple[Path, Path], tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        refine(tmp_path, *pair, **{**SMALL, **wrong})


@pytest.mark.parametrize("make", [distil, blocks, compensated])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_settings_of_a_method_are_more_than_nothing_and_finite(make: Any, value: float) -> None:
    for name in {field.name for field in fields(make)} - {"shard", "bf16"}:
        with pytest.raises(ValueError, match=f"`{name}` must be more than 0, and finite"):
            make(**{name: value})


@pytest.mark.parametrize("kinds", [("task", "general"), ("general", "task")])
def test_nothing_is_better_that_is_further_off_on_one_kind(kinds: tuple[Any, Any]) -> None:
    def score(one: float, other: float) -> Any:
        return {kinds[0]: Distance(one, 1.0, 10), kinds[1]: Distance(other, 1.0, 10)}

    start = score(1.0, 1.0)
    assert not better(score(0.1, 1.01), start, start)
    assert better(score(0.9, 1.0), start, start)
    assert not better(score(0.9, 1.0), score(0.8, 1.0), start)


@pytest.mark.parametrize("method", [blocks(), compensated()])
@pytest.mark.parametrize("sizes", [{"hidden_size": 48}, {"num_hidden_layers": 3}])
def test_a_teacher_with_other_blocks_is_refused_where_blocks_are_compared(
    llama_pair: tuple[str, str], tmp_path: Path, method: Any, sizes: dict[str, int]
) -> None:
    tuned = models.save(models.llama(**sizes), tmp_path / "tuned")
    adapter = extract(*llama_pair, 2).save(tmp_path / "svd")
    with pytest.raises(PosthocError, match=r"The base has .* blocks of .* features, and the tuned model .*`distil`"):
        refine(adapter, llama_pair[0], tuned, method=method, out=tmp_path / "out", **SMALL)
    assert {path.name for path in tmp_path.iterdir()} == {"tuned", "svd"}


def test_a_model_is_no_teacher_of_itself(llama_pair: tuple[str, str], tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(models.load(llama_pair[0]), extract(*llama_pair, 2).save(tmp_path / "svd"))
    with pytest.raises(ValueError, match="`tuned` is the model that the adapter is on"):
        refine(model, tuned=model.get_base_model(), **SMALL)


@pytest.mark.parametrize("wrong", [{"method": "distil"}, {"texts": "prompts.txt"}, {"texts": ["a", "b"]}])
def test_a_method_or_texts_by_name_alone_are_told_how_they_are_given(pair: tuple[Path, Path], wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"refine\((method|texts)=...\)"):
        refine("adapter", *pair, **wrong)


def test_whatever_the_method_two_vocabularies_are_told_by_the_models_names(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(pair[1])
    model.resize_token_embeddings(56, mean_resizing=False)
    model.save_pretrained(tmp_path / "tuned")
    adapter = _adapter(pair, tmp_path / "adapter", head=False)
    for method in (distil(), compensated()):
        with pytest.raises(MismatchError, match=rf"{pair[0]}` knows 48 tokens, `{tmp_path / 'tuned'}` 56"):
            refine(adapter, pair[0], tmp_path / "tuned", method=method)


@pytest.mark.parametrize("method", [distil(), compensated()])
@pytest.mark.parametrize("side", [0, 1])
def test_a_model_that_lacks_a_weight_is_not_given_a_random_one(
    pair: tuple[Path, Path], tmp_path: Path, method: Any, side: int
) -> None:
    adapter, name = _adapter(pair, tmp_path / "adapter"), "model.layers.1.mlp.up_proj.weight"
    spoiled = tmp_path / "spoiled"
    shutil.copytree(pair[side], spoiled)
    weights = load_file(spoiled / "model.safetensors")
    del weights[name]
    save_file(weights, spoiled / "model.safetensors", {"format": "pt"})
    sides = [spoiled if i == side else one for i, one in enumerate(pair)]
    with pytest.raises(CheckpointError, match=rf"`{spoiled}` (lacks|holds no).*{name}"):
        refine(adapter, *sides, method=method, **SMALL)


def test_rows_that_an_adapter_brings_are_for_models_as_a_whole(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(pair[1])
    model.resize_token_embeddings(56, mean_resizing=False)
    model.save_pretrained(tmp_path / "tuned")
    both = pair[0], tmp_path / "tuned"
    extract(*both, 2, vocab="extend", form="peft").save(tmp_path / "adapter")
    assert refine(tmp_path / "adapter", *both, **SMALL).after
    for method in (compensated(), blocks()):
        with pytest.raises(MismatchError, match=r"brings rows for the 56 tokens.*`distil` refines it"):
            refine(tmp_path / "adapter", *both, method=method, **SMALL)
        with pytest.raises(MismatchError, match="brings rows for the 56 tokens"):
            refine_preflight(tmp_path / "adapter", *both, method=method, **SMALL)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # PEFT's own words for it.
@pytest.mark.parametrize("method", [distil(), compensated(), blocks()])
def test_a_module_that_the_model_has_not_is_one_line(pair: tuple[Path, Path], tmp_path: Path, method: Any) -> None:
    adapter = _adapter(pair, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    odd = {name.replace("layers.1.", "layers.7."): x for name, x in weights.items()}
    save_file(odd, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match=r"PEFT does not hold .*layers\.7.*it is not refined"):
        refine(adapter, *pair, method=method, **SMALL)


def test_where_no_factor_has_a_size_there_is_nothing_to_refine(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = _adapter(pair, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    nothing = {name: torch.zeros_like(x) for name, x in weights.items()}
    save_file(nothing, adapter / "adapter_model.safetensors", {"format": "pt"})
    for method in (distil(), blocks()):
        with pytest.raises(PosthocError, match="Every factor of the adapter is zero"):
            refine(adapter, *pair, method=method, **SMALL)


def test_an_adapter_of_other_models_is_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = _adapter(pair, tmp_path / "adapter")
    for sides, wrong in ((pair, False), (pair[::-1], True)):
        found = refine(adapter, *sides, method=distil(passes=0.1), sequences=320, length=8)
        assert (found.before["task"].kl > found.base["task"].kl) == wrong
        assert ("in this order?" in found.table()) == wrong
        assert any("in this order?" in note for note in found.to_dict()["notes"]) == wrong


@pytest.mark.parametrize(("count", "told"), [(48, "4 like the task's and 1 general"), (160, None)])
def test_few_judges_are_told(pair: tuple[Path, Path], tmp_path: Path, count: int, told: str | None) -> None:
    adapter = _adapter(pair, tmp_path / "adapter")
    table = refine(adapter, *pair, method=distil(passes=0.1), sequences=count, length=8).table()
    assert ("Few texts judge" in table) == (told is not None)
    assert told is None or told in table


@pytest.mark.filterwarnings("ignore:Careful")  # PEFT's own words for it.
def test_biases_that_stay_where_an_adapter_is_switched_off_are_told(pair: tuple[Path, Path], tmp_path: Path) -> None:
    sides = [tmp_path / name for name in ("base", "tuned")]
    config = LlamaConfig(**{**CONFIG.to_dict(), "attention_bias": True})
    for side in sides:
        LlamaForCausalLM(config).save_pretrained(side)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(sides[0]), LoraConfig(r=2, target_modules=["q_proj"], bias="all")
    )
    with torch.no_grad():
        for name, own in model.named_parameters():
            if "lora_" in name or name.endswith("bias"):
                own.normal_()
    model.save_pretrained(tmp_path / "adapter")
    found = refine(tmp_path / "adapter", *sides, method=distil(passes=0.1), **SMALL)
    assert "Its biases stay on the base" in found.table()


def test_factors_that_are_zero_and_stay_so_are_told_of(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(pair[0])
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1])).save_pretrained(tmp_path)
    for method in (distil(passes=1), blocks(passes=1)):
        found = refine(tmp_path, *pair, method=method, sequences=16, length=8)
        assert found.kept
        assert list(found.unmoved) == ["model.layers.1.self_attn.q_proj"]
        assert "is zero" in found.table()
    assert not refine(tmp_path, *pair, method=compensated(), sequences=64, length=8).unmoved


def test_steps_are_not_for_what_comes_before_a_fixed_token() -> None:
    """A model and another one that are apart in what they say after the first token alone."""
    ids = [(1, 2, 3), (1, 2)]
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    wanted = torch.zeros(2, 3, 4)
    wanted[:, 0, 0] = 20.0
    for fixed, count in (((), 5), ((0, 1), 3)):
        texts = [Tokens(own, "task", fixed) for own in ids]
        loss, tokens = loss_of(lambda _: logits, lambda _: wanted, texts, torch.device("cpu"))
        assert tokens == count
        assert (loss.item() > 2) == (not fixed)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert bool(gradient[:, 0].any()) == (not fixed)


@pytest.mark.parametrize("method", [distil(bf16=True), blocks(bf16=True), distil()])
def test_bf16_is_of_what_is_written_and_fitted_and_never_of_what_is_judged(
    method: Any, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, found, phase = _adapter(pair, tmp_path / "svd"), defaultdict[str, set[torch.dtype]](set), ["opened"]

    def within(name: str, call: Any) -> Any:
        def wrapped(*given: Any, **named: Any) -> Any:
            phase.append(name)
            try:
                return call(*given, **named)
            finally:
                phase.pop()

        return wrapped

    def record(module: Any, _: Any, output: Any) -> None:
        if isinstance(module, torch.nn.Linear):
            found[phase[-1]].add(output.dtype)

    monkeypatch.setattr(type(method), "__call__", within("fitted", type(method).__call__))
    for live in (Live, Streamed):
        monkeypatch.setattr(live, "distances", within("judged", live.distances))
    monkeypatch.setattr(Sampled, "write", within("written", Sampled.write))
    hook = torch.nn.modules.module.register_module_forward_hook(record)
    try:
        refined = refine(adapter, *pair, method=method, **SMALL)
    finally:
        hook.remove()
    assert found["judged"] == {torch.float32}
    narrow = {torch.bfloat16} if method.bf16 else {torch.float32}
    if isinstance(method, distil):
        assert found["written"] == found["fitted"] == narrow
    else:  # The models that write are loaded in the files' type; whether a block came nearer is judged too.
        assert found["written"] == {torch.float32}
        assert found["fitted"] == {torch.float32, torch.bfloat16}
    assert not refined.kept
    assert refined.options["method"]["bf16"] is method.bf16
    assert {x.dtype for x in refined.tensors.values()} == {torch.float32}
