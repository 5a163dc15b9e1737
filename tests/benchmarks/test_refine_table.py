"""The table of docs/refine.md: what it makes of rows whose shares are known."""

from __future__ import annotations

from typing import Any

from benchmarks.refine_table import table


def _row(method: str, loss: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    known = {"pair": "pair", "method": method, "rank": 8, "prompts": 0, "seed": seed, "seconds": 0.5}
    return {**known, "loss": loss, "exact": 0.25, "general": 0.125, **more}


def test_a_share_of_the_gap_is_rounded_against_us() -> None:
    found = [
        _row("base", 9.0, rank=0),
        _row("tuned", 1.0, rank=0),
        _row("SVD", 5.0),
        _row("refined", 3.0),
        _row("refined", 2.0009, seed=1),
    ]
    *_, last = table(found)
    assert last == (
        "| pair | 8 | refined, no data | 2 | 2.501 (2.001 to 3.000) | 62.4 % (50.0 to 74.9) | 25.0 % (25.0 to 25.0) "
        "| 0.1250 (0.1250 to 0.1250) | 1 |"
    )
