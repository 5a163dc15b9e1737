"""The table of docs/refine.md, out of the rows that `refine.py` has made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import ceil, floor
from statistics import mean
from typing import Any

Row = Mapping[str, Any]


def table(rows: Iterable[Row]) -> Iterator[str]:
    """A row for every adapter; of several seeds the mean, and the least and the most in brackets."""
    found = list(rows)
    yield "| pair | rank | adapter | seeds | task loss | of the gap closed | exact match | general KL | CPU seconds |"
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
