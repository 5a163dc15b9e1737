"""An adapter out of mergekit: `mergekit-phlora --no-model` beside `mergekit-extract-lora`. Writes MERGING.md.

Every command is a whole process, with its imports. Rounds alternate, and what is quoted is the median.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path

import click
from extraction import BIN, HERE, Line, alternate, machine, mergekit, ours, shortfall
from pairs import SHAPES, make

from mergekit_plugin import autoload

# Stock PEFT, with every warning an error.
LOAD = """
import sys, warnings
import transformers
from peft import PeftModel
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
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
    """Milliseconds that an interpreter takes to start: without `phlora mergekit enable`, and more with it."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python = Path(folder, "bin/python")
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = Path(subprocess.check_output([python, "-c", where], text=True).strip())
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        found: list[list[float]] = [[], []]
        for _ in range(rounds):
            for times, files in zip(found, ({}, autoload.contents()), strict=True):
                for suffix in autoload.contents():
                    packages.joinpath(f"{autoload.MODULE}{suffix}").unlink(missing_ok=True)
                for suffix, text in files.items():
                    packages.joinpath(f"{autoload.MODULE}{suffix}").write_text(text)
                for _ in range(2):  # the first time writes the byte code
                    start = time.perf_counter()
                    subprocess.run([python, "-c", "pass"], check=True, env=environment)
                    took = 1e3 * (time.perf_counter() - start)
                times.append(took)
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
        f"An interpreter takes {plain:.1f} ms to start; after `phlora mergekit enable` {more:.2f} ms more.",
        "",
    ]
    results.write_text("\n".join(text))
    click.echo("\n".join(text))


if __name__ == "__main__":
    main()
