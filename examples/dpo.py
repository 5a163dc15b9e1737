"""Post-hoc LoRA of SFT and of DPO, offline: both train all weights, both with the callback. What do adapters keep?

The base is a smaller sibling of the demo's. The SFT run teaches it the demo's task, bug reports in prose to JSON; the
DPO run goes on from there with pairs of a right answer and a wrong one that looks right.
"""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from datasets import Dataset, disable_progress_bars
from demo import KINDS, Kind, kept, percent, train_base
from demo_model import FULL as DEMO
from demo_model import PROMPT_END, Size, write_answers
from demo_task import Report, score, train_and_test
from dpo_pairs import Judgement, Pair, judge, write_pairs
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_callbacks import PosthocLoraCallback
from peft_posthoc import Adapter, LeftOutWarning, extract


class Plan(NamedTuple):
    """How large the model is, how long both runs are and what is measured."""

    size: Size
    pairs: int  # each is seen once
    dpo_lr: float
    beta: float
    saves: int  # checkpoints of each run
    rank: int  # of the callback's adapters
    background: bool  # whether the callback extracts in processes of its own


FULL = Plan(
    DEMO._replace(vocabulary=2048, width=128, base_steps=300, reports=4800, tune_lr=1.2e-3, ranks=(4, 16, 64)),
    pairs=1200,
    dpo_lr=1.2e-4,
    beta=0.5,
    saves=3,
    rank=16,
    background=True,
)
QUICK = FULL._replace(
    size=FULL.size._replace(
        vocabulary=512, width=32, layers=2, block=64, base_steps=8, reports=64, test_reports=8, ranks=(4, 16, 32)
    ),
    pairs=64,
    saves=2,
    rank=4,
    background=False,  # They would start for longer than this trains.
)


class Run(NamedTuple):
    """One training run: what it started from and where it is."""

    title: str
    start: Path
    folder: Path

    @property
    def tuned(self) -> Path:
        """The last checkpoint."""
        return max(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-")))


class Row(NamedTuple):
    """One line of the table; None where there is nothing to say."""

    run: str
    model: str
    rank: int | None
    energy: float | None
    """E_r: the share of the carried deltas' energy that is kept."""
    energy_of_all: float | None
    """The same share of the whole run's energy, what is not carried included."""
    relative_delta: float | None
    """||delta|| / ||start|| over all matrices, for the tuned model."""
    kl: float
    """KL(tuned || this) per token of held-out answers, in nats."""
    accuracy: float | None
    """Share of held-out pairs whose chosen answer has the higher implicit reward; the reference is the start model."""
    margin: float
    """Mean of log p(chosen) - log p(rejected), less that of the start model, in nats: the reward's margin over beta."""
    likelier: float
    """Share of held-out pairs of which the chosen answer is the likelier one."""
    values: float
    """Share of the facts that generated answers have right."""


def settings(folder: Path, samples: int, plan: Plan) -> dict[str, Any]:
    """What both runs have in common."""
    steps = -(-samples // plan.size.tune_batch)
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": plan.size.tune_batch,
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 20),
        "save_strategy": "steps",
        "save_steps": -(-steps // plan.saves),
        "save_only_model": True,
        "logging_steps": -(-steps // 6),
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        # TRL's defaults for large models on GPUs.
        "bf16": False,
        "activation_checkpointing": False,
    }


def run_sft(run: Run, reports: Sequence[Report], plan: Plan) -> None:
    """Supervised fine-tuning of every weight, on right answers."""
    rows = [{"prompt": report.prose + PROMPT_END, "completion": report.answer} for report in reports]
    SFTTrainer(
        model=str(run.start),
        args=SFTConfig(**settings(run.folder, len(rows), plan), learning_rate=plan.size.tune_lr),
        train_dataset=Dataset.from_list(rows),
        callbacks=[PosthocLoraCallback(rank=plan.rank, base=run.start, background=plan.background)],
    ).train()


def run_dpo(run: Run, pairs: Sequence[Pair], plan: Plan) -> None:
    """Direct preference optimization of every weight; the reference is the model that it starts from."""
    rows = [
        {"prompt": right.prose + PROMPT_END, "chosen": right.answer, "rejected": wrong.answer} for right, wrong in pairs
    ]
    DPOTrainer(
        model=str(run.start),
        args=DPOConfig(**settings(run.folder, len(rows), plan), learning_rate=plan.dpo_lr, beta=plan.beta),
        train_dataset=Dataset.from_list(rows),
        callbacks=[PosthocLoraCallback(rank=plan.rank, base=run.start, background=plan.background)],
    ).train()


class Exam:
    """Held-out pairs, put to a run's start, its result and its adapters."""

    def __init__(self, run: Run, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerFast):
        self.run = run
        self.pairs = pairs
        self.tokenizer = tokenizer
        self.start = self.judge("start", load(run.start))
        self.tuned = self.judge("tuned", load(run.tuned))

    def judge(self, title: str, model: nn.Module) -> Judgement:
        """What a model says of the pairs."""
        return judge(model, self.tokenizer, self.pairs, f"{self.run.title}: pairs, {title}")

    def row(self, title: str, model: nn.Module, said: Judgement, known: Mapping[str, Any]) -> Row:
        """The line of one model."""
        reward = said.margin - self.start.margin
        reports = [pair.chosen for pair in self.pairs]
        doing = f"{self.run.title}: answers, {title}"
        written = write_answers(model, self.tokenizer, reports, doing, batch=len(reports))
        return Row(
            run=self.run.title,
            model=title,
            rank=known.get("rank"),
            energy=known.get("energy"),
            energy_of_all=known.get("energy_of_all"),
            relative_delta=known.get("relative_delta"),
            kl=self.tuned.kl(said),
            accuracy=share(reward > 0) if reward.any() else None,
            margin=float(reward.mean()),
            likelier=share(said.margin > 0),
            values=score(written, reports).values,
        )

    def rows(self, ranks: Sequence[int]) -> list[Row]:
        """The lines of the run: its start, its result, then adapters."""
        adapters = {(kind, rank): self.extract(kind, rank) for kind, rank in itertools.product(KINDS, ranks)}
        of_all = next(iter(adapters.values())).report.totals
        rows = [
            self.row("start", load(self.run.start), self.start, {}),
            self.row("tuned", load(self.run.tuned), self.tuned, {"relative_delta": of_all.relative_delta}),
        ]
        for (kind, rank), adapter in adapters.items():
            out = self.run.folder / "adapters" / f"{kind.folder}-r{rank}"
            adapter.save(out)
            model = PeftModel.from_pretrained(load(self.run.start), out).eval()
            totals = adapter.report.totals
            known = {"rank": rank, "energy": totals.energy, "energy_of_all": totals.energy_of_all}
            rows.append(self.row(kind.title, model, self.judge(f"{kind.title}, rank {rank}", model), known))
        return rows

    def extract(self, kind: Kind, rank: int) -> Adapter:
        """An adapter of the run's result."""
        carry = {flag.removeprefix("--"): True for flag in kind.flags}
        return extract(self.run.start, self.run.tuned, rank=rank, **carry)


def load(folder: Path) -> nn.Module:
    """A full checkpoint."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()


def share(truths: Any) -> float:
    """How many are true."""
    return float(truths.double().mean())


def along(run: Run) -> list[dict[str, Any]]:
    """What the callback's reports say, checkpoint by checkpoint."""
    reports = {int(path.parent.name[5:]): path for path in run.folder.glob("phlora/step-*/phlora_report.json")}
    return [{"step": step} | json.loads(path.read_text())["totals"] for step, path in sorted(reports.items())]


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown; shares in percent."""
    lines = [
        "| run | model | rank | E_r | of whole delta | delta / start "
        "| KL to tuned | reward accuracy | margin | likelier | right values |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = (
            row.run,
            row.model,
            row.rank or "",
            percent(row.energy),
            percent(row.energy_of_all),
            percent(row.relative_delta),
            f"{row.kl:#.2g}" if row.kl else "0",
            percent(row.accuracy),
            f"{row.margin:.2f}",
            percent(row.likelier),
            percent(row.values),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def table_along(runs: Sequence[Run]) -> str:
    """The callback's adapters in Markdown."""
    lines = ["| run | step | rank | E_r | of whole delta | delta / start |", "|---|--:|--:|--:|--:|--:|"]
    for run in runs:
        for row in along(run):
            shares = " | ".join(percent(row[name]) for name in ("energy", "energy_of_all", "relative_delta"))
            lines.append(f"| {run.title} | {row['step']} | {row['rank']} | {shares} |")
    return "\n".join(lines)


@click.command()
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), default=".work/dpo", show_default=True)
@click.option("--quick", is_flag=True, help="Tiny models and few steps: every part runs, the scores mean nothing.")
def main(work: Path, quick: bool) -> None:
    """Train a base, fine-tune it twice, extract, compare. A base that is in WORK from an earlier run is kept."""
    logging.disable_progress_bar()  # transformers' own, for every load
    disable_progress_bars()  # datasets'
    # PEFT asks the model by a name that transformers is about to change.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    warnings.simplefilter("ignore", LeftOutWarning)  # The table tells it.
    plan = QUICK if quick else FULL
    size = plan.size
    work.mkdir(parents=True, exist_ok=True)
    training, test = train_and_test(size.reports + plan.pairs, size.test_reports)
    base = kept(work / "base", size, lambda folder: train_base(folder, size))

    for name in ("sft", "dpo"):
        shutil.rmtree(work / name, ignore_errors=True)
    sft = Run("SFT", base, work / "sft")
    run_sft(sft, training[: size.reports], plan)
    dpo = Run("DPO", sft.tuned, work / "dpo")
    run_dpo(dpo, write_pairs(training[size.reports :]), plan)

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    pairs = write_pairs(test, seed=1)
    rows = [row for run in (sft, dpo) for row in Exam(run, pairs, tokenizer).rows(size.ranks)]
    text = f"{table(rows)}\n\n{table_along((sft, dpo))}\n"
    (work / "table.md").write_text(text)
    (work / "table.json").write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n")
    click.echo(f"\nA report: {test[0].prose}\nChosen:   {pairs[0].chosen.answer}\nRejected: {pairs[0].rejected.answer}")
    click.echo(f"\n{text}\nThe tables are in {work / 'table.md'}.")


if __name__ == "__main__":
    main()
