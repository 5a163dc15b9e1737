"""An adapter out of mergekit: `mergekit-phlora --no-model` beside `mergekit-extract-lora`. Writes MERGING.md.

Every command is a whole process, with its imports. Rounds alternate, and what is quoted is the median.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
from extraction import BIN, HERE, Line, alternate, machine, mergekit, ours, shortfall
from pairs import SHAPES, make

import mergekit_plugin.autoload
import mergekit_plugin.hook

# Stock PEFT, with every warning an error.
LOAD = """
import sys, warnings
import transformers
from peft import PeftModel
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
PeftModel.from_pretrained(model, sys.argv[2])
"""


def through(base: Path, tuned: Path, out: Path, *, method: str) -> list[str | Path]:
    """`mergekit-phlora --no-model` for a configuration of this method."""
    parameters = {"rank": 32} if method == "phlora" else {"weight": 1.0, "density": 1.0}
    config = {"merge_method": method, "base_model": str(base), "models": [{"model": str(tuned)}]}
    path = out.parent / f"{out.name}.yml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**config, "parameters": parameters}))
    rank = [] if method == "phlora" else ["--rank", "32"]
    return [BIN / "mergekit-phlora", path, out, "--no-model", *rank, "--quiet"]


def loads(base: Path, adapter: Path) -> str:
    """What stock PEFT says of the adapter."""
    ran = subprocess.run([sys.executable, "-c", LOAD, base, adapter], capture_output=True, text=True, check=False)
    return "yes" if ran.returncode == 0 else f"no: {ran.stderr.strip().splitlines()[-1].split(chr(10))[0][:100]}"


def start_up(rounds: int) -> tuple[float, float]:
    """Milliseconds that an interpreter takes to start: without the hook of `phlora mergekit enable`, and more with."""
    module = mergekit_plugin.autoload.MODULE
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{module}.py").write_text(Path(mergekit_plugin.hook.__file__).read_text())
        programs = ["pass", f"import sys; sys.path.insert(0, {folder!r}); import {module}; {module}.install()"]
        found: list[list[float]] = [[], []]
        for _ in range(rounds):
            for program, times in zip(programs, found, strict=True):
                start = time.perf_counter()
                subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True)
                times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found[0]), statistics.median(b - a for a, b in zip(*found, strict=True))


def table(lines: Sequence[Line], base: Path, tuned: Path, runs: int) -> list[str]:
    found = alternate(lines, runs)
    first = statistics.median(run.seconds for run in found[lines[0].title])
    rows = [
        "| command | seconds | against ours | memory | and mapped files | worst layer's loss | loads in stock PEFT |"
    ]
    rows += ["|---|--:|--:|--:|--:|--:|---|"]
    for line in lines:
        seconds, _, anonymous, resident = (statistics.median(values) for values in zip(*found[line.title], strict=True))
        assert line.out is not None
        rows.append(
            f"| {line.title} | {seconds:.1f} | {seconds / first:.1f} x | {anonymous / 1e9:.2f} GB "
            f"| {resident / 1e9:.2f} GB | {shortfall(base, tuned, line.out, 32):.1e} | {loads(base, line.out)} |"
        )
    return rows


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=".work/bench", show_default=True)
@click.option("--runs", default=3, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "MERGING.md", show_default=True)
def main(work: Path, runs: int, results: Path) -> None:
    """Measure, and write the table."""
    base, tuned = (path.absolute() for path in make(work / "llama-154m", **SHAPES["llama-154m"]))
    out = base.parent / "through-mergekit"
    lines = [
        Line(
            "mergekit-phlora --no-model, phlora", through(base, tuned, out / "phlora", method="phlora"), out / "phlora"
        ),
        Line("mergekit-phlora --no-model, ties", through(base, tuned, out / "ties", method="ties"), out / "ties"),
        Line("phlora extract", ours(base, tuned, out / "ours", 32), out / "ours"),
        Line("mergekit-extract-lora", mergekit(base, tuned, out / "mergekit", 32), out / "mergekit"),
    ]
    plain, more = start_up(50)
    text = ["# An adapter out of mergekit", "", "Written by `make bench`. " + machine(), ""]
    text += [" ".join((__doc__ or "").split("\n\n")[1].split()), ""]
    text += [f"A pair of 154M parameters, rank 32: {SHAPES['llama-154m']}.", "", *table(lines, base, tuned, runs), ""]
    text += [
        f"An interpreter takes {plain:.1f} ms to start; with the hook of `phlora mergekit enable` {more:.2f} ms more.",
        "",
    ]
    results.write_text("\n".join(text))
    click.echo("\n".join(text))


if __name__ == "__main__":
    main()
