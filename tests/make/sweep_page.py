"""The table of the sweep (`tests/sweep.py`), as a part of `docs/architectures.md`."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs/architectures.md"
HEADING = "## Every class\n"

_TEXT = """
A small model of every class of transformers (one for each configuration) and of diffusers: {count} of the {all} build
by shrinking their configurations. Of each every parameter moved, as above; adapters of rank {rank} are extracted, stock
PEFT loads and merges them, and every parameter is compared with the tuned model's. The first number is what the report
tells of the whole fine-tune's energy, the second what PEFT's model has of it, in per cent; a weight that is used in
several places counts by the place where least of it arrived. `make sweep` makes this table, and fails where the two
are more than one per cent apart, where PEFT misses a key, and where anything raises. They are {apart:.2f} per cent
apart at most ({furthest}). PEFT {peft}, transformers {transformers}, diffusers {diffusers}.

| class | parameters | portable | with all options | peft |
|---|--:|--:|--:|--:|
"""

_MARKS = """
-: nothing of what changed has a form that these options allow. †: PEFT does the same with an adapter of its own: it
finds no embeddings in the model and raises, or cannot merge a convolution of this kind.

"""


def write(rows: Iterable[Mapping[str, Any]], rank: int, page: Path = PAGE) -> None:
    """Put the table of these rows at the end of the page."""
    before = page.read_text(encoding="utf-8").partition(HEADING)[0].rstrip()
    page.write_text(f"{before}\n\n{section(rows, rank)}", encoding="utf-8")


def kept(page: Path = PAGE) -> str:
    """The table as the page has it."""
    _, heading, text = page.read_text(encoding="utf-8").partition(HEADING)
    return f"\n{heading}{text}" if heading else ""


def section(rows: Iterable[Mapping[str, Any]], rank: int) -> str:
    """The rows of a sweep as a table, and what is not in it."""
    import diffusers
    import peft
    import transformers

    rows = sorted(rows, key=lambda row: row["class"].lower())
    swept = [row for row in rows if "forms" in row]
    apart, furthest = max(
        (abs(found["told"] - found["true"]), row["class"])
        for row in swept
        for found in row["forms"].values()
        if "true" in found
    )
    versions = {one.__name__: one.__version__ for one in (peft, transformers, diffusers)}
    head = _TEXT.format(count=len(swept), all=len(rows), rank=rank, apart=100 * apart, furthest=furthest, **versions)
    lines = "".join(f"| {row['class']} | {row['parameters']:,} | {' | '.join(_cells(row))} |\n" for row in swept)
    return f"{HEADING}{head}{lines}{_MARKS}{_others(rows)}"


def _cells(row: Mapping[str, Any]) -> Iterable[str]:
    for found in row["forms"].values():
        true = "†" if "host" in found else f"{100 * found.get('true', 0):.1f}"
        yield f"{100 * found['told']:.1f} {true}" if "told" in found else "-"


def _others(rows: Iterable[Mapping[str, Any]]) -> str:
    groups = defaultdict(list)
    for row in rows:
        if "not_kept" in row:
            groups["its library does not load what it saved"].append(row["class"])
        elif "not_built" in row:
            groups[_why(row["not_built"])].append(row["class"])
    lines = [f"- {why} ({len(names)}): {', '.join(names)}.\n" for why, names in sorted(groups.items())]
    return f"Not in the table:\n\n{''.join(lines)}" if lines else ""


def _why(reason: str) -> str:
    if "requires the" in reason:
        return f"needs {reason.partition('requires the ')[2].split()[0]}"
    return "does not build small by the general recipe"
