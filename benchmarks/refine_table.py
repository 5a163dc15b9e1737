"""`refine_table.py` puts the table into docs/refine.md, out of the rows that `refine.py` has made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import ceil, floor
from pathlib import Path
from statistics import mean
from typing import Any

Row = Mapping[str, Any]
ROWS = Path(__file__).parent / "refine_rows"
PAGE = Path(__file__).parents[1] / "docs" / "refine.md"
_HEAD = "| pair | rank | adapter | seeds | task loss | of the gap closed | exact match | general KL | CPU seconds |"


def rows_in(folder: Path) -> list[Row]:
    """A file each, in a folder for each pair."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/*.json"))]


def table(rows: Iterable[Row]) -> Iterator[str]:
    """A row for every adapter; of several seeds the mean, and the least and the most in brackets."""
    found = list(rows)
    yield _HEAD
    yield "|---|--:|---|--:|--:|--:|--:|--:|--:|"
    for pair in dict.fromkeys(row["pair"] for row in found):
        own = [row for row in found if row["pair"] == pair]
        (tuned,) = (row for row in own if row["method"] == "tuned")
        (base,) = (row for row in own if row["method"] == "base")
        for title, row in (("base", base), ("tuned", tuned)):
            yield f"| {pair} | | {title} | | {row['loss']:.3f} | | {row['exact']:.1%} | {row['general']:.4f} | |"
        for rank in sorted({row["rank"] for row in own if row["method"] == "SVD"}):
            (svd,) = (row for row in own if row["method"] == "SVD" and row["rank"] == rank)
            yield f"| {pair} | {rank} | SVD | | {svd['loss']:.3f} | | {svd['exact']:.1%} | {svd['general']:.4f} | |"
            kinds = sorted({(row["method"], row["prompts"]) for row in own if row["rank"] == rank} - {("SVD", 0)})
            for method, prompts in kinds:
                same = [row for row in own if (row["method"], row["rank"], row["prompts"]) == (method, rank, prompts)]
                yield _line(pair, rank, f"{method}, {f'{prompts} prompts' if prompts else 'no data'}", same, svd, tuned)


def _line(pair: str, rank: int, title: str, rows: Sequence[Row], svd: Row, tuned: Row) -> str:
    closed = [(svd["loss"] - row["loss"]) / (svd["loss"] - tuned["loss"]) for row in rows]
    cells = [
        _cell([row["loss"] for row in rows], 3, ceil),
        _cell([100 * one for one in closed], 1, floor, " %"),
        _cell([100 * row["exact"] for row in rows], 1, floor, " %"),
        _cell([row["general"] for row in rows], 4, ceil),
        f"{ceil(mean(row['seconds'] for row in rows))}",
    ]
    return f"| {pair} | {rank} | {title} | {len(rows)} | {' | '.join(cells)} |"


def _cell(values: Sequence[float], digits: int, to: Callable[[float], int], unit: str = "") -> str:
    """The mean, rounded against us; of several seeds with the least and the most."""
    least, middle, most = (
        f"{to(x * 10**digits) / 10**digits:.{digits}f}" for x in (min(values), mean(values), max(values))
    )
    return f"{middle}{unit}" if len(values) == 1 else f"{middle}{unit} ({least} to {most})"


def put(lines: Iterable[str], page: Path) -> None:
    """Write the table into the place of the first one on the page."""
    above, _, below = page.read_text(encoding="utf-8").partition(_HEAD)
    _, blank, below = below.partition("\n\n")
    page.write_text(above + "\n".join(lines) + blank + below, encoding="utf-8")


if __name__ == "__main__":
    put(table(rows_in(ROWS)), PAGE)
