"""Which weighting keeps the most of a fine-tune's task at equal bytes? `ranks.py WORK` prints docs/ranks.md's table.

Every weighting allocates ranks within the same file size, that of a uniform rank, in the `peft` form with all that it
carries. What is measured is the loss on batches of the task that no model has seen, as a share of what fine-tuning
gained: 0 is the tuned model, 100 the base.
"""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rank_pairs import Batch, Pair, make_pairs
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_posthoc import Adapter, Spectrum, extract
from peft_posthoc.adapters.factors import Factors
from peft_posthoc.extraction.sizing import FoundSizing
from peft_posthoc.ranks.budget import budget
from peft_posthoc.ranks.weighting import Weighting, balanced, depth, early, energy, relative

RANKS = (4, 8, 16, 32)
FILE = "model.safetensors"


@dataclass(frozen=True, eq=False)
class Proxy:
    """Relative energy, or energy, times numbers that are known of every layer from the base alone."""

    values: Mapping[str, float]
    within: Weighting = field(default_factory=relative)

    def __call__(self, spectra: Mapping[str, Spectrum]) -> dict[str, float]:
        inner = self.within(spectra)
        return {name: self.values[name] * inner[name] for name in spectra}


def over_base(spectra: Mapping[str, Spectrum]) -> dict[str, float]:
    """Energy as a share of the base weight's: how much the layer's output changes for inputs in all directions."""
    return {name: 1 / (one.base_norm or 1.0) ** 2 for name, one in spectra.items()}


def halfway(spectra: Mapping[str, Spectrum]) -> dict[str, float]:
    """Between energy and relative."""
    return {name: one.energy**-0.5 for name, one in spectra.items()}


def rules(adapter: Adapter, base: Mapping[str, Tensor]) -> dict[str, Callable[[int], budget]]:
    """By name, budgets of a size: what is compared."""
    gain = {name: _gain(name, base) for name in adapter.layers}
    top = {name: float(torch.linalg.matrix_norm(base[name].float(), 2)) ** -2 for name in adapter.layers}
    deep = {name: 1 + 3 * one for name, one in depth(adapter.spectra).items()}
    shallow = {name: 1 / one for name, one in deep.items()}
    roots = {name: math.sqrt(sum(one.shape)) for name, one in adapter.spectra.items()}
    weightings: dict[str, tuple[Weighting, float]] = {
        "energy": (energy(), 0.0),
        "energy, floor 3/4": (energy(), 0.75),
        "relative": (relative(), 0.0),
        "relative, floor 1/2": (relative(), 0.5),
        "relative, floor 3/4": (relative(), 0.75),
        "relative, root of cost, floor 1/2": (Proxy(roots), 0.5),
        "relative, root of cost, floor 3/4": (balanced(), 0.75),
        "halfway, root of cost, floor 3/4": (Proxy(roots, halfway), 0.75),
        "over base, floor 3/4": (over_base, 0.75),
        "over base's largest value, floor 3/4": (Proxy(top, energy()), 0.75),
        "norm's gain, floor 3/4": (Proxy(gain, energy()), 0.75),
        "relative, norm's gain, floor 3/4": (Proxy(gain), 0.75),
        "relative, deep first, floor 3/4": (Proxy(deep), 0.75),
        "relative, shallow first, floor 3/4": (Proxy(shallow), 0.75),
        "relative, shallow first, root of cost, floor 3/4": (early(), 0.75),
    }
    return {"uniform": lambda size: budget(size, weighting=None)} | {
        name: (lambda size, w=weighting, f=floor: budget(size, weighting=w, floor=f))
        for name, (weighting, floor) in weightings.items()
    }


def _gain(weight: str, base: Mapping[str, Tensor]) -> float:
    """The mean square of the gains of the norm in front of a layer; 1 where there is none."""
    norms = (
        (r"(.*)self_attn\.[qkv]_proj", "input_layernorm.weight"),
        (r"(.*)mlp\.(gate|up)_proj", "post_attention_layernorm.weight"),
        (r"(.*)attn\.c_attn", "ln_1.weight"),
        (r"(.*)mlp\.c_fc", "ln_2.weight"),
        (r"()lm_head", "model.norm.weight"),
    )
    for pattern, norm in norms:
        if found := re.match(pattern, weight):
            return float(base[found[1] + norm].float().square().mean())
    return 1.0


def sizes(adapter: Adapter) -> dict[int, int]:
    """The bytes of an adapter in which all layers have the same rank."""
    found = {}
    for rank in RANKS:
        cut = adapter.at(rank)
        # What a budget allows for digits it cannot know yet.
        ranks = {name: len(layer.factors.s) for name, layer in cut.layers.items()}
        slack = FoundSizing(cut, str(cut.provenance["options"]["rule"])).header(ranks, len(str(adapter.rank)) + 20) + 8
        found[rank] = slack + cut.file.bytes
    return found


@torch.no_grad()
def loss(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Of a batch, on average."""
    return statistics.mean(float(model(**batch._asdict()).loss) for batch in batches)


@torch.no_grad()
def put(model: PreTrainedModel, adapter: Adapter, base: Mapping[str, Tensor]) -> None:
    """Give the layers of a tuned model base + b @ a. All else is in the file whole."""
    own = model.state_dict()
    for name, layer in adapter.layers.items():
        own[name].copy_(Factors(layer.factors.a, layer.factors.b).added(base[name], adapter.plan.carried[name][0].kind))


def measure(pair: Pair) -> dict[str, list[float]]:
    """By weighting: the share of the gain that is lost, in percent, for each size."""
    before, model = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False).eval()
        for path in pair[3:5]
    )
    base = before.state_dict()
    worst, best = loss(before, pair.test), loss(model, pair.test)
    adapter = extract(str(pair.base), str(pair.tuned), 10**6, form="peft", dtype=torch.float32)
    print(f"\n{pair.title}, {pair.task}, {pair.lr:g}: loss {worst:.3f} before, {best:.3f} after", flush=True)
    rows: dict[str, list[float]] = {}
    for name, rule in rules(adapter, base).items():
        row = []
        for size in sizes(adapter).values():
            put(model, adapter.at(rule(size)), base)
            row.append(100 * (loss(model, pair.test) - best) / (worst - best))
        rows[name] = row
        print(f"{name:<50}", *(f"{share:8.2f}" for share in row), flush=True)
    return rows


def table(pairs: Sequence[Pair], found: Sequence[Mapping[str, Sequence[float]]]) -> Iterable[str]:
    """A row for every weighting, a column for every pair and size."""
    yield "| | " + " | ".join(f"{pair.title}, {pair.task}, {pair.lr:g}" for pair in pairs) + " | against uniform |"
    yield "|---|" + "---|" * (len(pairs) + 1)
    for name in found[0]:
        cells = [" / ".join(f"{share:.1f}" for share in one[name]) for one in found]
        ratios = [
            math.exp(
                statistics.mean(
                    math.log(max(a, 0.01) / max(b, 0.01)) for a, b in zip(one[name], one["uniform"], strict=True)
                )
            )
            for one in found
        ]
        yield f"| {name} | " + " | ".join(cells) + " | " + ", ".join(f"{ratio:.2f}" for ratio in ratios) + " |"


def automatic(pair: Pair) -> Iterable[str]:
    """Rows of what `--rank auto` finds, in the type that the pair was trained in and in those of saved models."""
    before, model = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False).eval()
        for path in pair[3:5]
    )
    worst, best = loss(before, pair.test), loss(model, pair.test)
    base, tuned = before.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        one, other = ({name: value.to(dtype) for name, value in load_file(path / FILE).items()} for path in pair[3:5])
        adapter = extract(one, other, "auto", form="peft")
        put(model, adapter, base)
        lost = 100 * (loss(model, pair.test) - best) / (worst - best)
        model.load_state_dict(tuned)
        rows = [row for row in adapter.report.rows if row.status == "extracted"]
        ranks = [row.rank for row in rows]
        noise = "" if rows[0].noise is None else f"{statistics.median(100 * row.noise for row in rows):.2f}"
        moved = statistics.median(100 * row.relative_delta for row in rows)
        yield (
            f"| {pair.title}, {pair.task}, {pair.lr:g} | {str(dtype).removeprefix('torch.')} | {moved:.1f} | {noise} | "
            f"{statistics.median(ranks):g} ({min(ranks)} to {max(ranks)}) | {100 * adapter.report.totals.energy:.1f} | "
            f"{lost:.2f} |"
        )


if __name__ == "__main__":
    pairs = list(make_pairs(Path(sys.argv[1])))
    print("\n".join(row for pair in pairs for row in automatic(pair)), flush=True)
    if "--auto" not in sys.argv:
        print("\n".join(table(pairs, [measure(pair) for pair in pairs])))
