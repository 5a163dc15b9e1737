"""The demo's model: a small Llama trained from scratch on the standard library's source, then fully fine-tuned."""

from __future__ import annotations

import math
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from demo_task import Report
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments

IGNORED = -100  # the label that transformers' loss leaves out
PROMPT_END = "\n"


class Size(NamedTuple):
    """How large the model is, how long it learns and what is measured."""

    vocabulary: int
    width: int
    layers: int
    block: int  # tokens of source in one sample
    batch: int
    base_steps: int
    base_lr: float
    reports: int  # each is seen once
    tune_batch: int
    tune_lr: float
    test_reports: int
    ranks: tuple[int, ...]

    @property
    def tune_steps(self) -> int:
        """One pass over the reports."""
        return math.ceil(self.reports / self.tune_batch)


FULL = Size(
    vocabulary=3072,
    width=256,
    layers=4,
    block=128,
    batch=8,
    base_steps=400,
    base_lr=2e-3,
    reports=8000,
    tune_batch=16,
    tune_lr=8e-4,
    test_reports=200,
    ranks=(8, 16, 32, 64),
)
QUICK = FULL._replace(
    vocabulary=512, width=32, layers=2, block=64, base_steps=8, reports=128, test_reports=4, ranks=(8, 16)
)
# A real model: it knows JSON, so that few reports are enough. Of the base's sizes none is used.
SMOLLM2 = FULL._replace(reports=320, tune_batch=8, tune_lr=1e-4, test_reports=40, ranks=(8, 32, 128))


class Batch(NamedTuple):
    """What one training step sees."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def source_files() -> list[str]:
    """The standard library's own source, in an order that mixes its packages and is always the same."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "__pycache__"}
    paths = sorted(p for p in root.rglob("*.py") if left_out.isdisjoint(p.relative_to(root).parts))
    random.Random(0).shuffle(paths)
    return [path.read_text(encoding="utf-8", errors="ignore") for path in paths]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as for real models: a word with the space before it, a run of punctuation, a digit."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]+|\s+(?!\S)|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, size: Size) -> LlamaForCausalLM:
    """An untrained Llama, the same at every call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.width,
            intermediate_size=2 * size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            initializer_range=size.width**-0.5,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def source_batches(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, size: Size) -> Iterator[Batch]:
    """One pass over the source: samples of `block` tokens, no token twice."""
    need = size.base_steps * size.batch * size.block
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text), tokenizer.eos_token_id]
        if len(ids) >= need:
            break
    samples = torch.tensor(ids[: len(ids) // size.block * size.block]).view(-1, size.block)
    samples = samples[torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))]
    for chunk in samples.split(size.batch)[: size.base_steps]:
        yield Batch(chunk, torch.ones_like(chunk), chunk)


def tuning_arguments(folder: Path, size: Size) -> TrainingArguments:
    """One pass over the reports in their order, AdamW, a short warm-up, then a cosine down to a tenth of the rate."""
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=size.tune_batch,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=size.tune_lr,
        adam_beta2=0.95,
        weight_decay=0.01,
        warmup_steps=max(1, size.tune_steps // 20),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        save_steps=math.ceil(size.tune_steps / 4),
        save_total_limit=1,
        save_only_model=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to=[],
        seed=0,
    )


def collate(reports: Sequence[Report], tokenizer: PreTrainedTokenizerFast) -> Batch:
    """Pad reports with their answers to one length, on the left as in generation."""
    prompts = [tokenizer.encode(report.prose + PROMPT_END) for report in reports]
    answers = [[*tokenizer.encode(report.answer), tokenizer.eos_token_id] for report in reports]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    shape = (len(reports), width)
    ids, labels = torch.full(shape, tokenizer.pad_token_id), torch.full(shape, IGNORED)
    mask = torch.zeros(shape, dtype=torch.long)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = torch.tensor(prompt + answer)
        ids[row, -len(whole) :], mask[row, -len(whole) :] = whole, 1
        labels[row, -len(answer) :] = whole[-len(answer) :]
    return Batch(ids, mask, labels)


def train(model: PreTrainedModel, batches: Iterable[Batch], *, steps: int, lr: float, title: str) -> None:
    """Train all weights with AdamW: a short warm-up, then a cosine down to a tenth of `lr`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    warm_up = max(1, steps // 20)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * (0.55 + 0.45 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for batch in (bar := tqdm(batches, total=steps, desc=title, unit="step")):
        loss = model(**batch._asdict()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


@torch.no_grad()
def write_answers(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, reports: Sequence[Report], title: str, batch: int = 50
) -> list[str]:
    """Greedy generation, batch by batch, each no longer than its longest true answer needs."""
    answers = []
    for start in tqdm(range(0, len(reports), batch), desc=title, unit="batch"):
        part = reports[start : start + batch]
        inputs = tokenizer([report.prose + PROMPT_END for report in part], return_tensors="pt", padding=True)
        longest = max(len(tokenizer.encode(report.answer)) for report in part)
        written = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=longest + 8,
            do_sample=False,
        )
        answers += tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers
