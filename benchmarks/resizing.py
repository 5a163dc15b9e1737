"""A LoRA adapter of rank 128 to rank 32: `phlora resize` beside the ways that form the product. Writes RESIZING.md.

The shapes are Llama-2-7B's: q, k, v, o of 4096 x 4096, gate and up of 11008 x 4096, down of 4096 x 11008, 32 layers. In
the table one module of each size is timed; a layer's four and three, times 32, is what the column for all says. The
others use all threads for one module, ours one thread each for as many modules: here it has one to work with.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import click
import peft
import torch
from extraction import BIN, HERE, machine
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_posthoc import resize

BEFORE, AFTER = 128, 32
LAYERS = 32
SIZES = {"self_attn.q_proj": (1.0, 1.0), "mlp.up_proj": (2.6875, 1.0)}
SAME = {"self_attn.q_proj": 4, "mlp.up_proj": 3}
LAYER = {
    **{f"self_attn.{leaf}_proj": (1.0, 1.0) for leaf in "qkvo"},
    **{"mlp.gate_proj": (2.6875, 1.0), "mlp.up_proj": (2.6875, 1.0), "mlp.down_proj": (1.0, 2.6875)},
}
Pair = tuple[Tensor, Tensor]
Way = Callable[[Path], dict[str, Pair]]


def make(folder: Path, modules: dict[str, tuple[int, int]]) -> Path:
    """An adapter in bfloat16 whose product has a spectrum that falls off."""
    draw = torch.Generator().manual_seed(0)
    decay = (torch.arange(BEFORE) + 2.0) ** -0.5
    weights = {}
    for name, (m, n) in modules.items():
        a, b = torch.randn(BEFORE, n, generator=draw), torch.randn(m, BEFORE, generator=draw) * decay / m**0.5
        stem = f"base_model.model.{name}"
        weights |= {f"{stem}.lora_A.weight": a.bfloat16(), f"{stem}.lora_B.weight": b.bfloat16()}
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    leaves = sorted({name.rpartition(".")[2] for name in modules})
    config = {"peft_type": "LORA", "r": BEFORE, "lora_alpha": BEFORE, "target_modules": leaves}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def pairs(folder: Path) -> dict[str, Pair]:
    weights = load_file(folder / "adapter_model.safetensors")
    stems = [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]
    return {
        stem.removeprefix("base_model.model."): (weights[f"{stem}.lora_A.weight"], weights[f"{stem}.lora_B.weight"])
        for stem in stems
    }


def ours(folder: Path) -> dict[str, Pair]:
    """`peft_posthoc.resize`."""
    cuts = resize(folder, AFTER, dtype=torch.float32).cuts
    return {cut.module.name: (cut.parts[0].a, cut.parts[0].b) for cut in cuts}


def peft_s(folder: Path) -> dict[str, Pair]:
    """PEFT's `convert_to_lora`, which takes a loaded model: here of this one module."""
    found = {}
    for name, (a, b) in pairs(folder).items():
        model = nn.ModuleDict({"proj": nn.Linear(a.shape[1], len(b), bias=False, device="meta")}).to_empty(device="cpu")
        config = peft.LoraConfig(r=BEFORE, lora_alpha=BEFORE, target_modules=["proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        (layer,) = [one for one in adapted.modules() if hasattr(one, "lora_A")]
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a.float(), b.float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, state = convert_to_lora(adapted, AFTER)
        small = {key.rpartition("lora_")[2]: tensor for key, tensor in state.items()}
        found[name] = (small["A.weight"], small["B.weight"])
    return found


def kohya_s(folder: Path) -> dict[str, Pair]:
    """As sd-scripts' `resize_lora.py` went about it: the product, and all of its SVD with square U and V."""
    found = {}
    for name, (a, b) in pairs(folder).items():
        u, s, vh = torch.linalg.svd(b.float() @ a.float())
        found[name] = (vh[:AFTER].clone(), u[:, :AFTER] * s[:AFTER])
    return found


def randomized(folder: Path) -> dict[str, Pair]:
    """The product, and `torch.svd_lowrank` of it, as later versions do."""
    found = {}
    for name, (a, b) in pairs(folder).items():
        u, s, v = torch.svd_lowrank(b.float() @ a.float(), q=2 * AFTER, niter=2)
        found[name] = (v[:, :AFTER].mT, u[:, :AFTER] * s[:AFTER])
    return found


def excess(before: Pair, after: Pair) -> float:
    """The squared error above that of the best approximation, as a share of the delta's energy; from small cores."""
    (a, b), (c, d) = ((x.double(), y.double()) for x, y in (before, after))
    s = torch.linalg.svdvals(core(a, b))
    rest = core(torch.cat([a, c]), torch.cat([b, -d], dim=1))
    return float((rest.square().sum() - s[AFTER:].square().sum()) / s.square().sum())


def core(a: Tensor, b: Tensor) -> Tensor:
    """A small matrix with the singular values of `b @ a`."""
    r: Tensor = torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.mT, mode="r").R.mT
    return r


@click.command()
@click.option("--side", default=4096, show_default=True, help="Of the attention's matrices.")
@click.option("--layers", default=LAYERS, show_default=True, help="That ours resizes; the times are scaled to 32.")
@click.option("--rounds", default=3, show_default=True, help="Of the fast ways; the others run once.")
def main(side: int, layers: int, rounds: int) -> None:
    ways: dict[str, tuple[Way, int]] = {
        "`peft_posthoc.resize`": (ours, rounds),
        "`torch.svd_lowrank` of the product": (randomized, rounds),
        "PEFT's `convert_to_lora` (thin SVD of the product)": (peft_s, 1),
        "full SVD of the product, as sd-scripts'": (kohya_s, 1),
    }
    with tempfile.TemporaryDirectory(dir="/var/tmp") as temporary:
        work = Path(temporary)

        def shape(factors: tuple[float, float]) -> tuple[int, int]:
            return int(factors[0] * side), int(factors[1] * side)

        folders = {name: make(work / name.split(".")[1], {name: shape(size)}) for name, size in SIZES.items()}
        times: dict[str, dict[str, list[float]]] = {way: {name: [] for name in SIZES} for way in ways}
        worst = dict.fromkeys(ways, 0.0)
        for turn in range(rounds):
            for title, (way, count) in ways.items():
                for name, folder in folders.items() if turn < count else ():
                    start = time.perf_counter()
                    found = way(folder)
                    times[title][name].append(time.perf_counter() - start)
                    worst[title] = max(worst[title], excess(pairs(folder)[name], found[name]))
                    click.echo(f"{title} {name}: {times[title][name][-1]:.2f} s", err=True)
        every = {f"model.layers.{i}.{name}": shape(size) for i in range(layers) for name, size in LAYER.items()}
        whole = make(work / "whole", every)
        seconds = []
        for turn in range(rounds):
            start = time.perf_counter()
            subprocess.run(
                [BIN / "phlora", "resize", whole, work / f"out{turn}", "--rank", str(AFTER), "--quiet"], check=True
            )
            seconds.append((time.perf_counter() - start) * LAYERS / layers)
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    medians = {way: {name: statistics.median(found) for name, found in each.items()} for way, each in times.items()}
    sums = {way: LAYERS * sum(SAME[name] * one for name, one in each.items()) for way, each in medians.items()}
    first = sums["`peft_posthoc.resize`"]
    columns = [f"{m} x {n}" for m, n in map(shape, SIZES.values())]
    lines = [f"| way | {columns[0]} | {columns[1]} | 32 layers of 4 and 3 such | against ours | excess error |"]
    lines += ["|---|--:|--:|--:|--:|--:|"]
    for way, each in medians.items():
        cells = " | ".join(f"{one:.2f} s" for one in each.values())
        lines.append(f"| {way} | {cells} | {sums[way]:.0f} s | {sums[way] / first:.1f} x | {worst[way]:.0e} |")
    note = "" if layers == LAYERS else f" (measured with {layers}, scaled)"
    text = [
        "# Shrinking an adapter",
        "",
        f"Written by `benchmarks/resizing.py`. {machine()}",
        "",
        *(__doc__ or "").strip().split("\n\n")[1].splitlines(),
        "",
        f"Rank {BEFORE} to {AFTER}, factors in bfloat16. The machine was shared and not quiet: read the ratios. The",
        "excess is the squared error above the best approximation's, as a share of the delta's energy.",
        "",
        *lines,
        "",
        f"The whole command, `phlora resize --rank {AFTER}` on {LAYERS} layers{note}, with its start, reading and",
        f"writing: {statistics.median(seconds):.1f} s, {memory / 1e9:.2f} GB of memory at most, mapped files included.",
    ]
    (HERE / "RESIZING.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    click.echo("\n".join(text))


if __name__ == "__main__":
    sys.exit(main())
