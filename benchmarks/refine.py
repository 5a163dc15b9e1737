"""How much of what a small rank loses comes back by refining? `refine.py WORK` prints docs/refine.md's table.

For each pair an adapter of the linear layers and the head is extracted and refined, without data and with 64 unlabelled
prompts out of the data that the pair was tuned on. Measured on batches of the task that no model has seen: the loss of
an answer's token, and how many answers are right in every token (the true tokens before each are given). And
KL(tuned || adapted) on general text that the base wrote and nothing was fitted on. Seconds are the processor's, writing
the text and judging included.

Every row is a file in `refine_rows`. Rows that are there are not made again, and the table is of those that are there,
so that the script may be stopped, and called again for other ranks, methods, seeds or pairs. An empty WORK trains the
models anew, which come out a little different on another machine: it needs `--rows` of its own. The pair of real
weights is among them where `TATQA` is set (`smollm2_pair.py`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from rank_pairs import Pair, make_pairs
from refine_models import Models
from refine_rivals import Text, from_start, whitened
from refine_table import ROWS, rows_in, table
from smollm2_pair import make_pair

from peft_posthoc import refine
from peft_posthoc.refinement.blocks import blocks
from peft_posthoc.refinement.compensated import compensated
from peft_posthoc.refinement.distil import distil
from peft_posthoc.refinement.method import Method
from peft_posthoc.running.load import with_adapter

PROMPTS = 64


class Case(NamedTuple):
    """A row of the table, but for what is measured."""

    method: str
    rank: int = 0
    prompts: int = 0
    seed: int = 0


def refined(method: Method | None, models: Models, case: Case, text: Text) -> dict[str, Any]:
    """What `refine` comes to, as it is called by users."""
    began = time.process_time()
    found = refine(
        models.start(case.rank),
        models.pair.base,
        models.pair.tuned,
        texts=models.texts(case.prompts),
        method=method,
        seed=case.seed,
        length=models.pair.length,
        **text.options(),
    )
    seconds = time.process_time() - began
    folder = models.work / "refined" / models.name
    found.save(folder, force=True)
    return {**models.score(with_adapter(models.base(), folder)), "seconds": seconds, "kept": found.kept}


METHODS: dict[str, Callable[[Models, Case, Text], dict[str, Any]]] = {
    "refined": lambda models, case, text: refined(None, models, case, text),
    "refined in bfloat16": lambda models, case, text: refined(distil(bf16=True), models, case, text),
    "blocks": lambda models, case, text: refined(blocks(), models, case, text),
    "compensated": lambda models, case, text: refined(compensated(), models, case, text),
    "whitened SVD": lambda models, case, text: whitened(models, case.rank, case.prompts, case.seed, text),
    "LoRA from zero": lambda models, case, text: from_start(True, models, case.rank, case.prompts, case.seed, text),
    "LoRA from PiSSA": lambda models, case, text: from_start("pissa", models, case.rank, case.prompts, case.seed, text),
}


def measured(models: Models, case: Case, text: Text) -> dict[str, Any]:
    """What a row says."""
    match case.method:
        case "base":
            return models.score(models.base())
        case "tuned":
            return models.score(models.tuned)
        case "SVD":
            return models.score(with_adapter(models.base(), models.start(case.rank)))
        case _:
            return METHODS[case.method](models, case, text)


def pairs(work: Path) -> Iterator[Pair]:
    """The six pairs of `rank_pairs.py`, and that of real weights."""
    yield from make_pairs(work)
    if os.environ.get("TATQA"):
        yield make_pair(work / "smollm2")


def main() -> None:
    """Make the rows that are asked for and not there yet, then print all that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="where models and adapters are kept")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 8, 16, 32])
    parser.add_argument("--methods", nargs="*", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--prompts", type=int, nargs="*", default=[0, PROMPTS])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--pairs", nargs="*", default=[""], help="what a pair's name holds, of those that are wanted")
    parser.add_argument("--sequences", type=int, help="texts, if not the default's")
    parser.add_argument("--minutes", type=float, help="when a fit ends at the latest")
    asked = parser.parse_args()
    text = Text(asked.sequences, asked.minutes)
    for pair in pairs(asked.work):
        models = Models(pair, asked.work)
        if not any(part in models.name for part in asked.pairs):
            continue
        cases = [Case("base"), Case("tuned"), *(Case("SVD", rank) for rank in asked.ranks)]
        cases += itertools.starmap(Case, itertools.product(asked.methods, asked.ranks, asked.prompts, asked.seeds))
        for case in sorted(cases, key=lambda case: case.seed):
            file = asked.rows / models.name / f"{'-'.join(map(str, case)).replace(' ', '-')}.json"
            if not file.exists():
                row = {"pair": f"{pair.title}, {pair.task}, {pair.lr:g}", **case._asdict(), **text.options()}
                row |= measured(models, case, text) | {"date": datetime.now(UTC).date().isoformat()}
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(row) + "\n", encoding="utf-8")
                print(row, flush=True)
    print("\n".join(table(rows_in(asked.rows))))


if __name__ == "__main__":
    main()
