"""What is told before a fit is what it then takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import MptConfig, MptForCausalLM

from peft_posthoc import Given, PosthocError, Prompts, Sampled, blocks, compensated, distil, extract, refine
from peft_posthoc.cli.main import main
from peft_posthoc.refinement.preflight import _COPIES, _LOGITS, refine_preflight
from peft_posthoc.refinement.walk import Walk
from tests.make import models
from tests.make.architectures import ARCHITECTURES
from tests.make.launched import launched
from tests.make.texts import tokenizer

METHODS: list[Any] = [distil(), blocks(), compensated()]


@pytest.mark.parametrize("method", METHODS, ids=lambda one: type(one).__name__)
def test_memory_is_told_within_a_third(tmp_path: Path, method: Any) -> None:
    sizes = {"vocab_size": 8192, "hidden_size": 192, "intermediate_size": 512, "max_position_embeddings": 128}
    pair = models.save_pair(models.llama(**sizes), tmp_path, scale=0.01)
    extract(*pair, 8).save(tmp_path / "svd")
    command = ["refine", str(tmp_path / "svd"), str(tmp_path / "out"), "--base", pair[0], "--tuned", pair[1]]
    options = ["--sequences", "24", "--length", "128", "--quiet", "--method", type(method).__name__]
    ran = launched("tests.make.peak", *command, *options, count=1, OMP_NUM_THREADS="1")
    assert ran.returncode == 0, ran.stderr
    told = refine_preflight(tmp_path / "svd", *pair, method=method, sequences=24, length=128)
    if method == distil():
        # The process alone is half a gigabyte; this is more.
        assert told.work_bytes > 1e8
    assert 0.67 < told.memory_bytes / int(ran.stdout) < 1.5


def test_a_block_at_a_time_needs_less_the_more_blocks_there_are(tmp_path: Path) -> None:
    pair = models.save_pair(models.llama(num_hidden_layers=16), tmp_path)
    extract(*pair, 2).save(tmp_path / "svd")
    whole, *parts = (
        refine_preflight(tmp_path / "svd", *pair, method=one) for one in (distil(), compensated(), blocks())
    )
    for one in parts:
        assert one.models_bytes < 0.6 * whole.models_bytes
    # In bfloat16 a step keeps weights for its gradients as they were multiplied: of both models half are the base's.
    narrow, by_blocks = (refine_preflight(tmp_path / "svd", *pair, method=one(bf16=True)) for one in (distil, blocks))
    assert narrow.work_bytes - whole.work_bytes == whole.models_bytes // 4
    assert 0 < by_blocks.work_bytes - parts[1].work_bytes < whole.models_bytes // 4 / 16


@pytest.mark.parametrize("make", [models.gpt2, models.llama, models.mixtral, models.laguna])
def test_numbers_texts_and_steps_are_told(tmp_path: Path, make: object) -> None:
    pair = models.save_pair(make(), tmp_path)  # type: ignore[operator]
    adapter = extract(*pair, 2, dtype=torch.float32)
    adapter.save(tmp_path / "svd")
    command = ["refine", str(tmp_path / "svd"), str(tmp_path / "out"), "--base", pair[0], "--tuned", pair[1]]
    ran = CliRunner().invoke(
        main, [*command, "--sequences", "80", "--length", "500", "--passes", "2", "--dry-run", "--json"]
    )
    assert ran.exit_code == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert not (tmp_path / "out").exists()
    assert told["length"] == 64  # What the models can read.
    assert told["steps"] == 2 * 72 / distil().size
    assert told["factors"] == sum(x.numel() for name, x in adapter.tensors().items() if ".lora_" in name)
    values = [sum(own.numel() for own in models.load(folder).parameters()) for folder in pair]
    assert told["models_bytes"] == 4 * sum(values)
    assert told["disk_bytes"] > 16 * told["factors"]


@pytest.mark.parametrize("form", ["portable", "peft"])
@pytest.mark.parametrize("make", [models.gpt2, models.llama, models.mixtral])
def test_before_an_extraction_the_fit_is_told_as_after_it(tmp_path: Path, make: Any, form: str) -> None:
    pair = models.save_pair(make(), tmp_path)
    out, asked = str(tmp_path / "svd"), ["--sequences", "80", "--dry-run", "--json"]
    extracting = ["extract", *pair, out, "--rank", "2", "--form", form]
    ran = CliRunner().invoke(main, [*extracting, "--refine", "--method", "blocks", *asked])
    assert ran.exit_code == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert not Path(out).exists()
    assert told["adapter_bytes"] > 0
    shown = CliRunner().invoke(main, [*extracting, "--refine", "--dry-run"]).stdout
    assert "And then, to refine it:\nAt most 960 texts" in shown
    extract(*pair, 2, form=form).save(out)
    refining = ["refine", out, str(tmp_path / "out"), "--base", pair[0], "--tuned", pair[1], "--method", "blocks"]
    after = json.loads(CliRunner().invoke(main, [*refining, *asked]).stdout)
    free = {"disk_free", "temporary_free"}
    assert {name: one for name, one in told["refine"].items() if name not in free} == {
        name: one for name, one in after.items() if name not in free
    }


@pytest.mark.parametrize("method", METHODS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("make", [models.llama, models.mixtral, models.gpt2])
@pytest.mark.filterwarnings("ignore")  # What PEFT says of tied heads.
def test_steps_and_temporary_files_are_those_of_the_fit(tmp_path: Path, make: Any, method: Any) -> None:
    pair = models.save_pair(make(), tmp_path)
    extract(*pair, 2, form="peft", dtype=torch.float32).save(tmp_path / "svd")
    texts = Given([[i, *range(1, 8)] for i in range(20)])
    told = refine_preflight(tmp_path / "svd", *pair, method=method, sequences=24, length=8)
    taken: list[int] = []
    real = Walk.__exit__

    def measured(walk: Walk, *error: Any) -> None:
        taken.append(sum(file.stat().st_size for file in walk._folder.iterdir()))
        real(walk, *error)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Walk, "__exit__", measured)
        refined = refine(tmp_path / "svd", *pair, method=method, texts=texts, sequences=24, length=8)
    assert told.steps == pytest.approx(refined.steps, rel=0.1)  # Of 24 texts one or two are too short.
    assert bool(told.temporary_bytes) == method.streams
    if method == blocks():
        assert 0.8 * told.temporary_bytes < max(taken) < 1.2 * told.temporary_bytes + 2000 * len(taken)


@pytest.mark.parametrize("name", ["lfm2", "mamba2"])
def test_models_that_look_for_padding_in_a_mask_are_told_too(tmp_path: Path, name: str) -> None:
    pair = models.save_pair(ARCHITECTURES[name].make(), tmp_path)
    extract(*pair, 2).save(tmp_path / "svd")
    told = refine_preflight(tmp_path / "svd", *pair, sequences=24, length=8)
    logits, factors = _LOGITS * 4 * 4 * 8 * 96, _COPIES * 4 * told.factors
    # Of 32 tokens each of two layers keeps what it read, of 32 features, and more.
    assert told.work_bytes - logits - factors > 2 * 4 * 32 * 32
    assert told.steps == refine(tmp_path / "svd", *pair, sequences=24, length=8).steps


def test_whatever_a_configuration_calls_the_longest_text_it_is_no_longer(tmp_path: Path) -> None:
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=16, vocab_size=96)
    pair = models.save_pair(MptForCausalLM(config), tmp_path)
    extract(*pair, 2).save(tmp_path / "svd")
    assert refine_preflight(tmp_path / "svd", *pair, sequences=24, length=40).length == 16
    assert refine(tmp_path / "svd", *pair, sequences=24, length=40).steps


def test_fewer_texts_than_are_asked_for_are_told(tmp_path: Path) -> None:
    pair = models.save_pair(models.llama(), tmp_path)
    extract(*pair, 2).save(tmp_path / "svd")
    texts = Given([[i, *range(1, 8)] for i in range(20)])
    for method in (distil(), blocks()):
        told = refine_preflight(tmp_path / "svd", *pair, method=method, texts=texts, sequences=160, length=8)
        assert told.sequences == 40
        assert told.steps == refine(tmp_path / "svd", *pair, method=method, texts=texts, sequences=160, length=8).steps


def test_the_length_is_what_the_fit_will_take(tmp_path: Path) -> None:
    """By the tokenizer beside the tuned model, whose template puts three tokens around a turn."""
    pair = models.save_pair(models.llama(max_position_embeddings=512), tmp_path)
    own = tokenizer()
    own.chat_template = "w1 w2 {{ messages[0].content }} w3"
    own.save_pretrained(pair[1])
    extract(*pair, 2).save(tmp_path / "svd")
    for texts, length in (
        (None, 131),
        (Sampled(), 131),
        (Sampled("w5"), 128),
        (Given(["w6"]), 128),
        (Prompts(["w7 " * 197]), 264),
    ):
        assert refine_preflight(tmp_path / "svd", *pair, texts=texts).length == length
    assert refine_preflight(tmp_path / "svd", *pair, length=20).length == 20


@pytest.mark.parametrize(
    ("texts", "length", "told"),
    [
        (None, 4, "What stands around a prompt has 3 tokens, which leaves no room in texts of 4 tokens"),
        (Sampled("w1 w2 w4 w5"), 5, "What stands around a prompt has 4 tokens"),
        (Prompts(["w7 w7 w7", "w8 w8 w8 w8"]), 6, "Every prompt has 6 tokens or more"),
    ],
)
def test_what_has_no_room_for_an_answer_is_told_as_the_fit_tells_it(
    tmp_path: Path, texts: Any, length: int, told: str
) -> None:
    pair = models.save_pair(models.llama(), tmp_path)
    own = tokenizer()
    own.chat_template = "w1 w2 {{ messages[0].content }} w3"
    own.save_pretrained(pair[1])
    extract(*pair, 2).save(tmp_path / "svd")
    for run in (refine, refine_preflight):
        with pytest.raises(PosthocError, match=told):
            run(tmp_path / "svd", *pair, texts=texts, sequences=12, length=length)
    refine_preflight(tmp_path / "svd", *pair, texts=texts, sequences=12, length=length + 1)
