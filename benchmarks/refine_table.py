"""`refine_table.py` puts the tables into docs/refine.md, out of the rows that `refine.py` has made."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import ceil, floor
from pathlib import Path
from statistics import mean
from typing import Any

Row = Mapping[str, Any]
ROWS = Path(__file__).parent / "refine_rows"
PAGE = Path(__file__).parents[1] / "docs" / "refine.md"
METHODS = ("whitened SVD", "compensated", "blocks", "refined", "LoRA from zero", "LoRA from PiSSA")
"""Those of `refine.py` that are compared, in this order."""


def rows_in(folder: Path) -> list[Row]:
    """A file each, in a folder for each pair."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/*.json"))]


def by_rank(rows: Sequence[Row], method: str = "refined") -> Iterator[str]:
    """By pair and text, the share of the gap that a method closes at each rank; of several seeds as in `table`."""
    ranks = sorted({row["rank"] for row in rows if row["method"] == method})
    return _side_by_side(rows, f"text, {method}", {f"rank {rank}": (method, rank) for rank in ranks})


def by_method(rows: Sequence[Row], rank: int = 8) -> Iterator[str]:
    """By pair and text, the share of the gap that each method closes at a rank."""
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    return _side_by_side(rows, f"text, rank {rank}", {method: (method, rank) for method in methods})


def _side_by_side(rows: Sequence[Row], text: str, columns: Mapping[str, tuple[str, int]]) -> Iterator[str]:
    """A table of shares, with a column for each method and rank under its title."""
    yield f"| pair | {text} | {' | '.join(columns)} |"
    yield f"|---|---|{'--:|' * len(columns)}"
    for pair in dict.fromkeys(row["pair"] for row in rows):
        own = [row for row in rows if row["pair"] == pair]
        for prompts in sorted({row["prompts"] for row in own if (row["method"], row["rank"]) in columns.values()}):
            closed = ([_closed(own, row) for row in _alike(own, *column, prompts)] for column in columns.values())
            cells = (_cell(shares, 1, floor, " %") if shares else "" for shares in closed)
            yield f"| {pair} | {_text(prompts)} | {' | '.join(cells)} |"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A row for every adapter; of several seeds the mean, and the least and the most in brackets."""
    yield "| pair | rank | adapter | seeds | task loss | of the gap closed | exact match | general KL | CPU seconds |"
    yield "|---|--:|---|--:|--:|--:|--:|--:|--:|"
    for pair in dict.fromkeys(row["pair"] for row in rows):
        own = [row for row in rows if row["pair"] == pair]
        for title in ("base", "tuned"):
            (row,) = _alike(own, title, 0)
            yield f"| {pair} | | {title} | | {row['loss']:.3f} | | {row['exact']:.1%} | {row['general']:.4f} | |"
        for rank in sorted({row["rank"] for row in own if row["method"] == "SVD"}):
            (svd,) = _alike(own, "SVD", rank)
            yield f"| {pair} | {rank} | SVD | | {svd['loss']:.3f} | | {svd['exact']:.1%} | {svd['general']:.4f} | |"
            kinds = sorted({(row["method"], row["prompts"]) for row in own if row["rank"] == rank} - {("SVD", 0)})
            for method, prompts in kinds:
                same = _alike(own, method, rank, prompts)
                cells = [
                    _cell([row["loss"] for row in same], 3, ceil),
                    _cell([_closed(own, row) for row in same], 1, floor, " %"),
                    _cell([100 * row["exact"] for row in same], 1, floor, " %"),
                    _cell([row["general"] for row in same], 4, ceil),
                    f"{ceil(mean(row['seconds'] for row in same))}",
                ]
                yield f"| {pair} | {rank} | {method}, {_text(prompts)} | {len(same)} | {' | '.join(cells)} |"


def _alike(own: Iterable[Row], method: str, rank: int, prompts: int = 0) -> list[Row]:
    """The rows of all seeds, out of those of a pair."""
    return [row for row in own if (row["method"], row["rank"], row["prompts"]) == (method, rank, prompts)]


def _closed(own: Sequence[Row], row: Row) -> float:
    """How much of the gap between the SVD's loss at its rank and the tuned model's is closed, in percent."""
    (tuned,), (svd,) = _alike(own, "tuned", 0), _alike(own, "SVD", row["rank"])
    return 100 * (svd["loss"] - row["loss"]) / (svd["loss"] - tuned["loss"])


def _text(prompts: int) -> str:
    return f"{prompts} prompts" if prompts else "no data"


def _cell(values: Sequence[float], digits: int, to: Callable[[float], int], unit: str = "") -> str:
    """The mean, rounded against us; of several seeds with the least and the most."""
    least, middle, most = (
        f"{to(x * 10**digits) / 10**digits:.{digits}f}" for x in (min(values), mean(values), max(values))
    )
    return f"{middle}{unit}" if len(values) == 1 else f"{middle}{unit} ({least} to {most})"


def put(lines: Iterable[str], page: Path) -> None:
    """Write a table into the place of the one on the page whose first two columns have the same names."""
    head, *rest = lines
    old = re.compile(re.escape("|".join(head.split("|")[:3])) + r".*\n(\|.*\n)*")
    new = "".join(f"{line}\n" for line in (head, *rest))
    page.write_text(old.sub(lambda _: new, page.read_text(encoding="utf-8"), count=1), encoding="utf-8")


if __name__ == "__main__":
    found = rows_in(ROWS)
    for lines in (by_rank(found), by_rank(found, "compensated"), by_method(found), table(found)):
        put(lines, PAGE)
