"""SERVING.md out of what `serving.py` measured: the paper's claims, and the tables they rest on."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Tree = dict[str, Any]

PAGE = """\
# Serving

Written by `make bench-serving`. {about}

{how}

{claims}

## Load time and bytes

{large}. One tenant more becomes ready; PEFT's base serves an adapter already.

{loads}

transformers maps a checkpoint and reads a weight when it is first used, so that loading takes next to no time whatever
the size. PEFT builds modules for an adapter, and draws initial weights that it then replaces, unless
`low_cpu_mem_usage` is set. Bytes count where weights are copied, as they are to a device, or come from a disk.

## Many tenants in one process

{small}. From the start of the process until every tenant has given a token; the imports are in it
({imports}).

{tenants}

What adapters save in PEFT are mapped files, which the system can drop and read again. PEFT's `load_adapter` takes the
longer the more adapters the model has already: what many tenants save in memory they pay for with a slower start.

{tenants_in_vllm}## Throughput of eight tenants

The large model; prompts of 32 tokens, {tokens} new tokens each. All requests are one batch on base + adapters, or the
merged models answer one after the other, each its own, all loaded before. From disk, loading is in the time: in PEFT
that of base and adapters, against the merged checkpoints'; in vLLM `add_lora` against `reload_weights`, in a running
engine.

{throughput}

{said}

The paper quotes its factor of four from S-LoRA, which measured it on GPUs, and does not measure it itself. S-LoRA was
not run here.{kernel}

## Latency of one request

The large model, a prompt of 32 tokens, {tokens} tokens after the first.{latency_in_vllm}

{latency}
"""

TENANTS_IN_VLLM = """\
An engine of vLLM serves one full model: more are as many processes, and were not run. With adapters it has places for
eight at a time and one to spare (for one tenant: one, and one). Either way it has 1 GB for keys and values, of which
only the engine with adapters touches every page when it starts.

"""

KERNEL = """ \
vLLM has no kernel for adapters on a CPU: its fallback copies A and B once for every token of the batch
(`vllm/lora/ops/torch_ops/lora_ops.py`), so that its rows here say nothing of vLLM on a GPU."""

LATENCY_IN_VLLM = " vLLM's base is asked in the engine with adapters."


class Load(NamedTuple):
    """Seconds to make a tenant ready, by page cache."""

    what: str
    full: Tree
    adapter: Tree

    def ratio(self, cache: str) -> float:
        return ratio(self.full[cache], self.adapter[cache])


def page(measured: Tree) -> str:
    """The whole file."""
    engines, tenants, tokens = measured["engines"], measured["tenants"], measured["tokens"]
    vllm = "vLLM" in engines
    rows = loads(engines)
    said = (
        f"{engine}: the first token is the merged model's for {same(tree['said'], 'merged')} requests of the mixed "
        f"batch, and the base's for {same(tree['said'], 'base')}."
        for engine, tree in engines.items()
    )
    return PAGE.format(
        about=measured["about"],
        how=measured["how"],
        claims="\n".join(claims(rows, engines, tenants)),
        large=measured["large"],
        small=measured["small"],
        loads="\n".join(load_table(rows, *measured["bytes"])),
        imports="; ".join(imports(tenants)),
        tenants="\n".join(tenants_table(tenants)),
        tenants_in_vllm=TENANTS_IN_VLLM if vllm else "",
        tokens=tokens,
        throughput="\n".join(throughput_table(engines, measured["tenants_in_a_batch"] * tokens)),
        said="\n".join(said),
        kernel=KERNEL if vllm else "",
        latency_in_vllm=LATENCY_IN_VLLM if vllm else "",
        latency="\n".join(latency_table(engines)),
    )


def ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def times(value: float) -> str:
    return f"{value:.0f} x" if value >= 20 else f"{value:.1f} x" if value >= 2 else f"{value:.2f} x"


def span(values: Iterable[float]) -> str:
    low, high = (times(of(found)) for found in [list(values)] for of in (min, max))
    return low if low == high else f"{low} to {high}"


def table(head: str, rows: Iterable[Sequence[str]], *, words: int = 1) -> list[str]:
    """Rows of cells, of which so many columns are words, the others numbers."""
    columns = head.count("|") + 1
    lines = [f"| {head} |", "|" + "---|" * words + "--:|" * (columns - words)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def loads(engines: Tree) -> list[Load]:
    """What is compared of a full checkpoint and an adapter."""

    def side(engine: str, kind: str, key: str) -> Tree:
        return {cache: found[key] for cache, found in engines[engine][kind].items() if key in found}

    compared = [
        ("PEFT", "reading the files", "read", "read"),
        ("PEFT", "PEFT by default; transformers maps the checkpoint", "mapped", "default"),
        ("PEFT", "PEFT, `low_cpu_mem_usage=True`", "mapped", "lean"),
        ("PEFT", "the same, the checkpoint copied into memory", "copied", "lean"),
        ("PEFT", "the same, to the first token", "first", "first"),
        ("vLLM", "vLLM, a new engine against `add_lora`, to the first token", "started_first", "first"),
        ("vLLM", "vLLM, `reload_weights` against `add_lora`, in a running engine", "loaded", "loaded"),
        ("vLLM", "the same, to the first token", "first", "first"),
    ]
    return [
        Load(what, side(engine, "full", full), side(engine, "adapter", adapter))
        for engine, what, full, adapter in compared
        if engine in engines
    ]


def load_table(rows: Iterable[Load], full: int, adapter: int) -> list[str]:
    cells = [["bytes on disk", f"{full / 1e6:.1f} MB", f"{adapter / 1e6:.1f} MB", times(full / adapter), "", "", ""]]
    for row in rows:
        cells.append([row.what])
        for cache in ("warm", "cold"):
            if cache in row.full:
                seconds = (f"{statistics.median(side[cache]):.3f} s" for side in (row.full, row.adapter))
                cells[-1] += [*seconds, times(row.ratio(cache))]
            else:
                cells[-1] += ["", "", ""]
    return table("| full | adapter | ratio | cold: full | adapter | ratio", cells)


def imports(tenants: Tree) -> Iterable[str]:
    """What the engines' imports take."""
    for engine, counts in tenants.items():
        runs = [side for sides in counts.values() for side in sides.values()]
        seconds, size = (statistics.median(v for run in runs for v in run[key]) for key in ("imported", "libraries"))
        yield f"{engine}'s take {seconds:.1f} s and {size / 1e9:.2f} GB"


def tenants_table(tenants: Tree) -> list[str]:
    rows = []
    for engine, counts in tenants.items():
        for count, sides in counts.items():
            for side, title in (("adapters", "one base + adapters"), ("models", "full models")):
                if side not in sides:
                    rows.append([engine, count, title, "not run", "", "", "", ""])
                    continue
                of = sides[side]
                seconds, own, resident = (statistics.median(of[key]) for key in ("ready", "anonymous", "resident"))
                ratios = ["", ""]
                if side == "adapters" and "models" in sides:
                    ratios = [times(ratio(sides["models"][key], of[key])) for key in ("resident", "ready")]
                sizes = [f"{size / 1e9:.2f} GB" for size in (own, resident)]
                rows.append([engine, count, title, f"{seconds:.1f} s", *sizes, *ratios])
    head = "engine | tenants | side | ready after | own memory | and mapped files | less memory | ready sooner"
    return table(head, rows, words=3)


def throughput_table(engines: Tree, each_makes: int) -> list[str]:
    rows = []
    for engine, tree in engines.items():
        for each, found in tree["throughput"].items():
            rows.append([engine, each])
            for suffix in ("", "_loading"):
                mixed, merged = found[f"mixed{suffix}"], found[f"merged{suffix}"]
                made = int(each) * each_makes
                rows[-1] += [f"{made / statistics.median(of):.1f} tokens/s" for of in (mixed, merged)]
                rows[-1].append(times(ratio(merged, mixed)))
    head = "engine | requests a tenant | mixed batch | merged, in turn | ratio | from disk: mixed | merged | ratio"
    return table(head, rows)


def latency_table(engines: Tree) -> list[str]:
    rows = []
    for engine, tree in engines.items():
        merged = tree["latency"]["merged"]
        for kind, title in (("base", "base"), ("merged", "merged"), ("routed", "base + adapter, unmerged")):
            found = tree["latency"][kind]
            rows.append([engine, title])
            rows[-1] += [f"{1e3 * statistics.median(found[key]):.1f} ms" for key in ("first", "next")]
            rows[-1] += [times(ratio(found[key], merged[key])) for key in ("first", "next")]
    return table("engine | model | first token | each further | to merged's: first | further", rows, words=2)


def same(said: Tree, other: str) -> str:
    """How many requests of the mixed batch begin as this model's answer does."""
    pairs = list(zip(said["mixed"], said[other], strict=True))
    return f"{sum(one[0] == two[0] for one, two in pairs)} of {len(pairs)}"


def claims(rows: Sequence[Load], engines: Tree, tenants: Tree) -> list[str]:
    """The paper's words, and what this run has to say."""
    found = [row.ratio(cache) for row in rows[1:] for cache in row.full]
    above = sum(one > 10 for one in found)
    lines = [
        ['"cut model-load latency by over 10x"', f"{span(found)}; above 10 in {above} of {len(found)} comparisons"],
    ]
    for engine, tree in engines.items():
        said = '"up to 4-fold compared to merged adapter inference" (inference cost)'
        memory, disk = (
            span(ratio(one[f"merged{kind}"], one[f"mixed{kind}"]) for one in tree["throughput"].values())
            for kind in ("", "_loading")
        )
        lines.append([said, f"{engine}: {memory} in memory, {disk} from disk"])
    for engine, tree in engines.items():
        base, merged, routed = (tree["latency"][kind] for kind in ("base", "merged", "routed"))
        against = span(ratio(merged[key], base[key]) for key in ("first", "next"))
        lines.append(['merged: "no runtime adapter overhead"', f"{engine}: {against} of the base's latency"])
        against = span(ratio(routed[key], merged[key]) for key in ("first", "next"))
        lines.append(['routed: "a modest runtime latency penalty"', f"{engine}: {against} of the merged model's"])
    for engine, counts in tenants.items():
        both = [count for count, sides in counts.items() if len(sides) == 2]
        if both and int(both[-1]) > 1:
            sides = counts[both[-1]]
            less = times(ratio(sides["models"]["resident"], sides["adapters"]["resident"]))
            said = '"a single server to host adapters for hundreds or thousands of users"'
            lines.append([said, f"{engine}: {both[-1]} tenants in {less} less memory than as full models"])
    return table("the paper | here", lines, words=2)
