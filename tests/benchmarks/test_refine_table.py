"""The tables of docs/refine.md: what they make of rows whose shares are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.refine_table import PAGE, ROWS, by_method, by_rank, put, rows_in, table


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


def test_shares_at_all_ranks_stand_side_by_side() -> None:
    found = [_row("base", 9.0, rank=0), _row("tuned", 1.0, rank=0), _row("SVD", 5.0), _row("SVD", 3.0, rank=16)]
    found += [_row("refined", 3.0), _row("refined", 2.0, seed=1), _row("compensated", 1.5)]
    found += [_row("refined", 4.0, prompts=64, rank=16)]
    assert list(by_rank(found))[::2] == [
        "| pair | text, refined | rank 8 | rank 16 |",
        "| pair | no data | 62.5 % (50.0 to 75.0) |  |",
    ]
    assert list(by_rank(found))[1::2] == ["|---|---|--:|--:|", "| pair | 64 prompts |  | -50.0 % |"]
    assert list(by_rank(found, "compensated"))[::2] == [
        "| pair | text, compensated | rank 8 |",
        "| pair | no data | 87.5 % |",
    ]


def test_shares_of_all_methods_at_a_rank_stand_side_by_side() -> None:
    found = [_row("base", 9.0, rank=0), _row("tuned", 1.0, rank=0), _row("SVD", 5.0), _row("SVD", 3.0, rank=16)]
    found += [_row("refined", 3.0), _row("refined", 2.0, seed=1), _row("refined", 2.0, rank=16)]
    found += [_row("compensated", 7.0), _row("LoRA from zero", 4.0, prompts=64)]
    assert list(by_method(found)) == [
        "| pair | text, rank 8 | compensated | refined | LoRA from zero |",
        "|---|---|--:|--:|--:|",
        "| pair | no data | -50.0 % | 62.5 % (50.0 to 75.0) |  |",
        "| pair | 64 prompts |  |  | 25.0 % |",
    ]


def test_tables_take_the_places_of_those_that_are_there(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    found = [_row("base", 9.0, rank=0), _row("tuned", 1.0, rank=0), _row("SVD", 5.0), _row("refined", 3.0)]
    first, second, third = (list(one(found[:3])) for one in (by_rank, by_method, table))
    page.write_text("\n".join(["Above |", "", *first, "", "Between |", "", *second, "", *third, ""]), encoding="utf-8")
    for one in (by_rank, by_method, table):
        put(one(found), page)
    text = page.read_text(encoding="utf-8")
    assert text == "\n".join(
        ["Above |", "", *by_rank(found), "", "Between |", "", *by_method(found), "", *table(found), ""]
    )


def test_the_page_has_the_tables_of_the_rows_that_are_kept() -> None:
    found, text = rows_in(ROWS), PAGE.read_text(encoding="utf-8")
    assert len({row["pair"] for row in found}) == 7
    for lines in (by_rank(found), by_rank(found, "compensated"), by_method(found)):
        assert "\n\n" + "\n".join(lines) + "\n\n" in text
    assert text.endswith("\n\n" + "\n".join(table(found)) + "\n")
