"""This tree beside an earlier commit, at each rank, in CPU seconds of one thread. Writes BEFORE.md.

Whole processes, with their imports, in turn. CPU seconds, as other programs on a shared machine change them little.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from extraction import HERE, RANKS, floor, machine, measure
from pairs import SHAPES, make

# By rank: CPU seconds of the commit before and of this tree; of rank 0, of the floor.
Found = Mapping[int, Sequence[Sequence[float]]]


def rounds(base: Path, tuned: Path, before: Path, count: int) -> Found:
    """Measure in turn: the floor, and at each rank both trees."""
    found: dict[int, list[list[float]]] = {0: [], **{rank: [] for rank in RANKS}}
    out = base.parent / "out-before"
    for _ in range(count):
        found[0].append([measure(floor(base, tuned), {"OMP_NUM_THREADS": "1"}).cpu])
        for rank in RANKS:
            options = ["--rank", str(rank), "--quiet", "--force"]
            command = [sys.executable, "-m", "peft_posthoc", "extract", base, tuned, out, *options]
            # Not the folder that this runs in: that is this tree.
            same = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
            found[rank].append(
                [measure(command, {"PYTHONPATH": str(tree), **same}).cpu for tree in (before, HERE.parent)]
            )
    return found


def table(title: str, found: Found) -> list[str]:
    """The medians, against each other and against the floor."""
    (least,) = (statistics.median(of) for of in zip(*found[0], strict=True))
    lines = [f"## {title}", "", f"The streaming floor takes {least:.2f} CPU seconds.", ""]
    lines += ["| rank | before | now | now / before | now / floor |", "|--:|--:|--:|--:|--:|"]
    for rank, times in found.items():
        if rank and times:
            old, new = (statistics.median(of) for of in zip(*times, strict=True))
            lines.append(f"| {rank} | {old:.2f} | {new:.2f} | {new / old:.2f} | {new / least:.2f} x |")
    return [*lines, ""]


@click.command()
@click.argument("commit")
@click.option("--work", type=click.Path(path_type=Path), default=".work/bench", show_default=True)
@click.option("--runs", default=3, show_default=True, help="Rounds.")
def main(commit: str, work: Path, runs: int) -> None:
    """Measure against COMMIT, and write the tables."""
    lines = ["# Against an earlier commit", "", f"This tree beside `{commit}`. {machine()}", ""]
    lines += [" ".join((__doc__ or "").split("\n\n")[1].split()), ""]
    with tempfile.TemporaryDirectory() as folder:
        command = ["git", "-C", str(HERE.parent), "archive", commit, "peft_posthoc"]
        archive = subprocess.run(command, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        for name, shape in SHAPES.items():
            lines += table(name, rounds(*make(work / name, **shape), Path(folder), runs))
    (HERE / "BEFORE.md").write_text("\n".join(lines))
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
