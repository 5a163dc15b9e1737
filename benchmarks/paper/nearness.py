"""How near adapters are to the tuned model on the task's own answers, and how near each is to what is right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from tqdm import tqdm

from .answering import tokens
from .experiment import Experiment

SCALE = 0.9
"""Of logits, where a model is surer than it is right."""
_HEAD = (
    "answers' tokens",
    "KL from the tuned model",
    "same next token",
    "entropy",
    "loss",
    "less the first adapter's",
    f"loss, scaled by {SCALE}",
)


def nearness(made: Experiment, adapters: Sequence[Path], every: int) -> Iterator[str]:
    """Lines of a table: of the tuned model and each adapter, a mean over the tokens of every so-manieth test answer.

    What a loss is less the first adapter's has its standard error over the questions, of which the tokens are clusters.

    Args:
        made: Of a task whose answers are generated.
        adapters: Folders of PEFT.
        every: 1 is all.
    """
    rows = [tokens(question, made.processor) for question in made.sets.test[::every]]
    right = torch.tensor([label for row in rows for label in row["labels"] if label != -100])
    lengths = [sum(label != -100 for label in row["labels"]) for row in rows]
    wanted = _logits(made.kind.load(made.tuned), rows)
    first: Tensor | None = None
    yield f"| {' | '.join(_HEAD)} |"
    yield f"|---|{'--:|' * (len(_HEAD) - 1)}"
    yield _line("tuned", wanted, wanted, right, "")
    for folder in adapters:
        said = _logits(PeftModel.from_pretrained(made.kind.load(made.base), folder), rows)
        losses = cross_entropy(said, right, reduction="none")
        first = losses if first is None else first
        yield _line(folder.name, said, wanted, right, _with_error(losses - first, lengths))


def _with_error(differences: Tensor, lengths: Sequence[int]) -> str:
    """The mean of the tokens' differences, and its standard error where questions, not tokens, are drawn."""
    mean = differences.mean()
    by_question = torch.stack([part.sum() for part in (differences - mean).split(list(lengths))])
    return f"{mean:+.4f} ± {by_question.square().sum().sqrt() / len(differences):.4f}"


def _line(name: str, said: Tensor, wanted: Tensor, right: Tensor, against: str) -> str:
    mine, theirs = said.log_softmax(-1), wanted.log_softmax(-1)
    cells = (
        f"{kl_div(mine, theirs, reduction='batchmean', log_target=True).abs():.4f}",
        f"{100 * (said.argmax(-1) == wanted.argmax(-1)).double().mean():.1f} %",
        f"{-(mine.exp() * mine).sum(-1).mean():.3f}",
        f"{cross_entropy(said, right):.3f}",
        against,
        f"{cross_entropy(SCALE * said, right):.3f}",
    )
    return f"| {name} | {' | '.join(cells)} |"


@torch.no_grad()
def _logits(model: Any, rows: Sequence[dict[str, list[int]]]) -> Tensor:
    """What a model says before each token of the answers, `tokens x vocabulary`, float32."""
    said = []
    for row in tqdm(rows, desc="answers", disable=None):
        answer = torch.tensor(row["labels"])[1:] != -100
        said.append(model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1][answer].float())
    return torch.cat(said)
