"""What the Trainer's callback adds to a training step: the demo's model, with and without it. Writes CALLBACK.md.

Runs alternate. Blocked is the time that training waits in the callback's own events; the end of the run, where it waits
for what is left, is apart. Beside that, the other process competes for the processor, at the lowest priority: what that
costs shows in the time of a step.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from extraction import machine
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_callbacks import PosthocLoraCallback

HERE = Path(__file__).parent


class Watch(TrainerCallback):
    """Takes the time of every step, from one end to the next."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.last = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self.last:
            self.steps.append(now - self.last)
        self.last = now


def blocked(callback: PosthocLoraCallback) -> list[float]:
    """The seconds that training spends in each of a callback's events, as they come."""
    spent: list[float] = []

    def timed(event: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            event(*args, **kwargs)
            spent.append(time.perf_counter() - start)

        return run

    for name in ("on_step_end", "on_save"):
        setattr(callback, name, timed(getattr(callback, name)))
    return spent


def run(base: Path, steps: int, saves: int, callback: PosthocLoraCallback | None) -> tuple[Watch, float]:
    """Train the base on random tokens; return the times of all steps and the seconds until the last one's end."""
    watch = Watch()
    vocabulary = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False).config.vocab_size
    rows = torch.randint(0, vocabulary, (16 * steps, 128), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                save_steps=steps // saves,
                save_total_limit=1,
                per_device_train_batch_size=16,
                learning_rate=1e-4,
                use_cpu=True,
                dataloader_pin_memory=False,
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[watch, *([callback] if callback else [])],
        )
        trainer.train()
    return watch, sum(watch.steps)


@click.command()
@click.option("--demo", type=click.Path(exists=True, path_type=Path), default=".work/demo", help="What it left.")
@click.option("--steps", default=120, show_default=True)
@click.option("--saves", default=3, show_default=True)
@click.option("--runs", default=3, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "CALLBACK.md", show_default=True)
def main(demo: Path, steps: int, saves: int, runs: int, results: Path) -> None:
    """Measure, and write the table."""
    logging.disable_progress_bar()
    shares, ratios, seconds = [], [], []
    for _ in range(runs):
        _, without = run(demo / "base", steps, saves, None)
        callback = PosthocLoraCallback(rank=32, embeddings=True, head=True, strict=True)
        spent = blocked(callback)
        _, together = run(demo / "base", steps, saves, callback)
        shares.append(sum(spent) / together)
        ratios.append(together / without)
        seconds.append(without / steps)
    text = [
        "# The callback",
        "",
        f"Written by `make bench`. {machine()}",
        "",
        " ".join((__doc__ or "").split("\n\n")[1].split()),
        "",
        f"{steps} steps of {statistics.median(seconds):.3f} s, {saves} saves, {runs} runs of each; medians.",
        "",
        "| blocked, of a step | a run with it, against one without |",
        "|--:|--:|",
        f"| {statistics.median(shares):.3%} | {statistics.median(ratios):.3f} x |",
        "",
    ]
    results.write_text("\n".join(text), encoding="utf-8")
    click.echo("\n".join(text))


if __name__ == "__main__":
    main()
