"""Extraction side by side: time, memory and energy of ours and of the usual ways, in one run. Writes RESULTS.md.

Every command is a whole process, with its imports. Rounds alternate between the commands, and what is quoted is the
median, or the median of the ratios within a round: the machines that this runs on are shared. Of each run of phlora
0.3 s are saved by not searching for garbage in what importing PyTorch makes; the others, and the floor, search it.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import click
import torch
from pairs import SHAPES, make
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
RANKS = (16, 32, 128, 512)
OTHERS = (
    "Others: [against an earlier commit](BEFORE.md), [serving](SERVING.md), [resizing](RESIZING.md), "
    "[mergekit](MERGING.md), [callback](CALLBACK.md)."
)


class Run(NamedTuple):
    """One process."""

    seconds: float
    cpu: float
    anonymous: int
    """The most bytes of memory at any time, without pages of mapped files, which the system takes back as it likes."""
    resident: int
    """The most bytes at any time, with them."""


def measure(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end, as quietly as it can be."""
    words = [os.fspath(word) for word in command]
    quiet = os.open(os.devnull, os.O_WRONLY)
    start = time.perf_counter()
    actions = [(os.POSIX_SPAWN_DUP2, quiet, 1), (os.POSIX_SPAWN_DUP2, quiet, 2)]
    # What pip installs has its bytecode.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    process = os.posix_spawn(words[0], words, {**environment, **(env or {})}, file_actions=actions)
    anonymous = resident = 0
    while True:
        # Not `ru_maxrss`: a child inherits that of the process that started it.
        sizes = memory(process)
        anonymous, resident = max(anonymous, sizes.get("RssAnon", 0)), max(resident, sizes.get("VmRSS", 0))
        done, status, usage = os.wait4(process, os.WNOHANG)
        if done:
            break
        time.sleep(0.005)
    seconds = time.perf_counter() - start
    os.close(quiet)
    if status:
        raise click.ClickException(f"`{' '.join(words)}` ended with status {status}.")
    return Run(seconds, usage.ru_utime + usage.ru_stime, anonymous, resident)


def memory(process: int) -> dict[str, int]:
    """What the kernel says of a process' memory now, in bytes."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines if line.endswith("kB"))
    return {key: int(value.split()[0]) * 1024 for key, value in pairs}


def ours(base: Path, tuned: Path, out: Path, rank: int) -> list[str | Path]:
    return [BIN / "phlora", "extract", base, tuned, out, "--rank", str(rank), "--quiet"]


def torchrun(base: Path, tuned: Path, out: Path, rank: int) -> list[str | Path]:
    launcher: list[str | Path] = [BIN / "torchrun", "--nproc-per-node=2", "-m", "peft_posthoc"]
    return [*launcher, *ours(base, tuned, out, rank)[1:]]


def rival(method: str, base: Path, tuned: Path, out: Path, rank: int) -> list[str | Path]:
    return [sys.executable, HERE / "rivals.py", method, base, tuned, out, str(rank)]


def mergekit(base: Path, tuned: Path, out: Path, rank: int) -> list[str | Path]:
    options = ["--skip-undecomposable", "--max-rank", str(rank), "--quiet"]
    return [BIN / "mergekit-extract-lora", "--model", tuned, "--base-model", base, "--out-path", out, *options]


def floor(base: Path, tuned: Path) -> list[str | Path]:
    return [sys.executable, HERE / "floor.py", base, tuned]


def optimum(base: Path, tuned: Path) -> dict[str, torch.Tensor]:
    """The energies of all singular values of every delta, in float64, kept from one call to the next."""
    # Bound to the two files: the demo's pair is made again and again.
    made = "-".join(str((folder / "model.safetensors").stat().st_mtime_ns) for folder in (base, tuned))
    kept = base.parent / "exact-spectra" / f"{made}.safetensors"
    if not kept.is_file():
        shutil.rmtree(kept.parent, ignore_errors=True)
        kept.parent.mkdir()
        before, after = (safe_open(folder / "model.safetensors", "pt") for folder in (base, tuned))
        names = [name for name in before.keys() if "proj" in name]  # noqa: SIM118
        found = {}
        for name in tqdm(names, desc=f"Exact spectra of {base.parent.name}"):
            delta = after.get_tensor(name).double() - before.get_tensor(name).double()
            delta = delta if delta.shape[0] >= delta.shape[1] else delta.T
            found[name] = torch.linalg.eigvalsh(delta.T @ delta).flip(0).clamp(min=0)
        save_file(found, kept)
    return load_file(kept)


def shortfall(base: Path, tuned: Path, out: Path, rank: int) -> float:
    """The largest share, over all layers, of the best approximation's energy that the saved adapter misses."""
    energies = optimum(base, tuned)
    adapter = load_file(out / "adapter_model.safetensors")
    before, after = (safe_open(folder / "model.safetensors", "pt") for folder in (base, tuned))
    worst = -1.0
    for name, spectrum in energies.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (adapter[f"{module}.lora_{ab}.weight"].double() for ab in "AB")
        delta = after.get_tensor(name).double() - before.get_tensor(name).double()
        # ||delta||^2 - ||delta - b a||^2, without the product.
        captured = 2 * ((b.T @ delta) * a).sum() - ((b.T @ b) * (a @ a.T)).sum()
        worst = max(worst, float(1 - captured / spectrum[:rank].sum()))
    return worst


class Line(NamedTuple):
    """One command of a table."""

    title: str
    command: list[str | Path]
    out: Path | None = None
    rank: int = 0


def alternate(lines: Sequence[Line], runs: int) -> dict[str, list[Run]]:
    """Measure commands in turn, after one warm-up of the first."""
    found: dict[str, list[Run]] = {line.title: [] for line in lines}
    if lines[0].out is not None:
        shutil.rmtree(lines[0].out, ignore_errors=True)
    measure(lines[0].command)
    with tqdm(total=runs * len(lines), desc="Runs") as bar:
        for _ in range(runs):
            for line in lines:
                bar.set_postfix_str(line.title)
                if line.out is not None:
                    shutil.rmtree(line.out, ignore_errors=True)
                found[line.title].append(measure(line.command))
                bar.update()
    return found


def side_by_side(title: str, base: Path, tuned: Path, out: Path, runs: int, slow_runs: int) -> list[str]:
    """One pair: ours at every rank, and the others, against the streaming floor."""
    first = Line("streaming floor", floor(base, tuned))
    mine = [
        Line(f"phlora, rank {rank}", ours(base, tuned, out / f"ours{rank}", rank), out / f"ours{rank}", rank)
        for rank in RANKS
    ]
    lowrank = [
        Line(
            f"svd_lowrank, rank {rank}",
            rival("lowrank", base, tuned, out / f"low{rank}", rank),
            out / f"low{rank}",
            rank,
        )
        for rank in RANKS[:3]
    ]
    slow = [
        Line("linalg.svd, any rank", rival("svd", base, tuned, out / "svd", 32), out / "svd", 32),
        Line("mergekit-extract-lora, any rank", mergekit(base, tuned, out / "mergekit", 32), out / "mergekit", 32),
    ]
    table = [f"### {title}", ""]
    table += [
        "| command | against the floor | seconds | CPU seconds | memory | and mapped files | worst layer's loss |"
    ]
    table += ["|---|--:|--:|--:|--:|--:|--:|"]
    found = alternate([first, *mine, *lowrank], runs)
    table += [row(line, found[line.title], found[first.title], base, tuned) for line in (first, *mine, *lowrank)]
    if slow_runs:
        found = alternate([first, *slow], slow_runs)
        table += [row(line, found[line.title], found[first.title], base, tuned) for line in slow]
    return [*table, ""]


def row(line: Line, of: Sequence[Run], floors: Sequence[Run], base: Path, tuned: Path) -> str:
    """A command's line of the table."""
    ratio = statistics.median(run.seconds / one.seconds for run, one in zip(of, floors, strict=True))
    seconds, cpu, anonymous, resident = (statistics.median(values) for values in zip(*of, strict=True))
    missed = "" if line.out is None else f"{shortfall(base, tuned, line.out, line.rank):.1e}"
    sizes = f"{anonymous / 1e9:.2f} GB | {resident / 1e9:.2f} GB"
    return f"| {line.title} | {ratio:.2f} x | {seconds:.2f} | {cpu:.2f} | {sizes} | {missed} |"


def growth(work: Path, runs: int) -> list[str]:
    """How time and memory grow with layers."""
    table = ["### Growth with layers: hidden 1024, intermediate 4096, rank 32", ""]
    table += ["| layers | seconds | CPU seconds | memory |", "|--:|--:|--:|--:|"]
    for layers in (2, 4, 8):
        base, tuned = make(work / f"layers{layers}", hidden=1024, intermediate=4096, layers=layers, vocab=512)
        out = base.parent / "out"
        (of,) = alternate([Line("ours", ours(base, tuned, out, 32), out)], runs).values()
        seconds, cpu, anonymous, _ = (statistics.median(values) for values in zip(*of, strict=True))
        table.append(f"| {layers} | {seconds:.2f} | {cpu:.2f} | {anonymous / 1e9:.2f} GB |")
    return [*table, ""]


def processes(work: Path, runs: int) -> list[str]:
    """What a second process does; torchrun takes seconds to start, other launchers start processes and no more."""
    table = ["### One process and two, seconds", ""]
    table += ["| pair | rank | one process, two threads | two, started at once | two, by torchrun |"]
    table += ["|---|--:|--:|--:|--:|"]
    for name, shape in SHAPES.items():
        base, tuned = make(work / name, **shape)
        for rank in (32, 512):
            outs = [base.parent / "out" / of for of in ("one", "two", "torchrun")]
            lines = [
                Line("one", ours(base, tuned, outs[0], rank), outs[0]),
                Line("two", [sys.executable, HERE / "two.py", *ours(base, tuned, outs[1], rank)], outs[1]),
                Line("torchrun", torchrun(base, tuned, outs[2], rank), outs[2]),
            ]
            found = alternate(lines, runs)
            seconds = (f"{statistics.median(run.seconds for run in of):.2f}" for of in found.values())
            table.append(f"| {name} | {rank} | {' | '.join(seconds)} |")
    return [*table, ""]


def machine() -> str:
    """What this runs on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    names = ("torch", "safetensors", "mergekit", "peft-posthoc")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    python = platform.python_version()
    return f"{os.cpu_count()} cores ({model}), Python {python}, {versions}; {time.strftime('%Y-%m-%d')}."


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=".work/bench", show_default=True)
@click.option("--demo", type=click.Path(path_type=Path), default=".work/demo", show_default=True, help="What it left.")
@click.option("--runs", default=5, show_default=True, help="Rounds of the quick commands.")
@click.option("--slow-runs", default=1, show_default=True, help="Rounds of mergekit and of the full SVD; 0 for none.")
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "RESULTS.md", show_default=True)
def main(work: Path, demo: Path, runs: int, slow_runs: int, results: Path) -> None:
    """Measure, and write the tables."""
    work.mkdir(parents=True, exist_ok=True)
    text = ["# Results", "", "Written by `make bench`. " + machine(), ""]
    text += [OTHERS, "", " ".join((__doc__ or "").split("\n\n")[1].split()), "", "## Extraction", ""]
    for name, shape in SHAPES.items():
        pair = make(work / name, **shape)
        title = f"{name}: {', '.join(f'{key} {value}' for key, value in shape.items())}"
        text += side_by_side(title, *pair, work / name / "out", runs, slow_runs)
    if (demo / "tuned").is_dir():
        title = "the demo's pair: a real fine-tune of 4M parameters, hidden 256"
        text += side_by_side(title, demo / "base", demo / "tuned", work / "demo", runs, slow_runs)
    text += growth(work, min(runs, 3)) + processes(work, max(slow_runs, 1))
    results.write_text("\n".join(text))
    click.echo("\n".join(text))


if __name__ == "__main__":
    main()
