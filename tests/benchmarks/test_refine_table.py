"""The table of docs/refine.md: what it makes of rows whose shares are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.refine_table import PAGE, ROWS, put, rows_in, table


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


def test_a_table_takes_the_place_of_the_one_that_is_there(tmp_path: Path) -> None:
    page, found = tmp_path / "page.md", [_row("base", 9.0, rank=0), _row("tuned", 1.0, rank=0), _row("SVD", 5.0)]
    head, *_ = old = list(table([]))
    page.write_text("\n".join(["Above", "", *old, "", "Below |", ""]), encoding="utf-8")
    put(table(found), page)
    text = page.read_text(encoding="utf-8")
    assert text.count(head) == 1
    assert text == "\n".join(["Above", "", *table(found), "", "Below |", ""])


def test_the_page_has_the_table_of_the_rows_that_are_kept() -> None:
    found = rows_in(ROWS)
    assert len({row["pair"] for row in found}) == 7
    assert "\n\n" + "\n".join(table(found)) + "\n\n" in PAGE.read_text(encoding="utf-8")
