"""The model card of an adapter, whichever way it was made: where it comes from, what it holds, how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from peft_posthoc.adapters.config import read_config
from peft_posthoc.checkpoints.hub import repo_and_file
from peft_posthoc.errors import brief
from peft_posthoc.files import regular
from peft_posthoc.json_file import read_json
from peft_posthoc.text import percent, share_of_all, size

CARD = "README.md"
REPORT = "phlora_report.json"
MARK = "<!-- Made with the adapter by phlora, and replaced with it. -->"
"""In every model card of ours: a card without it is somebody else's."""
KINDS: dict[Literal["task", "general"], str] = {"task": "like the task's", "general": "general"}
"""Kinds of held-out text in words."""
MODELS = "models--"
"""What the names of models' folders in the hub's cache begin with."""
# By PEFT's task: the class of transformers that loads the base.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
_CITE = """```bibtex
@article{phlora2025,
  author  = {Vasani, Bhoomit and FitzGerald, Jack and Fang, Anjie and Vaish, Sushmit},
  title   = {PHLoRA: data-free Post-hoc Low-Rank Adapter extraction from full-rank checkpoint},
  journal = {arXiv preprint arXiv:2509.10971},
  year    = {2025}
}
```"""


def card(
    config: Mapping[str, Any],
    report: Mapping[str, Any],
    *,
    step: int | None = None,
    repo_id: str | None = None,
    subfolder: str | None = None,
) -> str:
    """The model card of one adapter.

    Args:
        config: Its configuration.
        report: Its report, as plain JSON values.
        step: When the checkpoint of the fine-tune was saved.
        repo_id: The repository on the hub that the card is for, if it is for one.
        subfolder: Where in that repository the adapter lies; at its root if None.
    """
    made = first = report
    while isinstance(first.get("start"), Mapping):  # it was refined: shares are of the factors before
        first = first["start"]
    provenance = {**first.get("provenance", {}), **made.get("provenance", {})}
    base = base_of(config, provenance)
    on = "for_base" if provenance.get("for_base") else "base"
    # What an extraction took from the hub it took at a commit; of others' adapters only the name is known.
    known = "tuned" not in provenance or provenance.get(f"{on}_revision") or MODELS in base
    hub_id = hub_id_of(base) if known else None
    handed_on = repo_id is not None
    called = _called(base, handed_on)
    place = "path/to/this/folder" if repo_id is None or subfolder is not None else repo_id
    loaded = f'"{place}"' if repo_id is None or subfolder is None else f'"{repo_id}", subfolder="{subfolder}"'
    task = config.get("task_type")
    tuned = provenance.get("tuned")
    sections = [
        f"---\n{_head(hub_id, task)}\n---",
        f"# {_called(tuned, handed_on)} as a LoRA adapter" if tuned else "# A LoRA adapter",
        _origin(provenance, first, step=step, refined="refined" in made, handed_on=handed_on),
        *([] if hub_id else [_NO_BASE.format(base=called)]),
        *_energy(first),
        *_left_out(first),
        *_refined(made),
        *_warnings(first),
        f"A row for every tensor is in `{REPORT}`." if first.get("rows") else "",
        *_how(provenance, handed_on),
        "## Load it",
        how_to_load(called, loaded, task),
        *_serve(config, provenance, called, place),
        "## Cite",
        _CITE,
        MARK,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def card_of(folder: Path, *, step: int | None = None, repo_id: str | None = None, subfolder: str | None = None) -> str:
    """The model card of the adapter in a folder, whoever made it; as `card`.

    Raises:
        AdapterError: Its configuration cannot be read.
    """
    try:
        report = read_json(folder / REPORT)
    except (OSError, ValueError):
        report = None
    report = report if isinstance(report, dict) else {}
    return card(read_config(folder), report, step=step, repo_id=repo_id, subfolder=subfolder)


def base_of(config: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """What an adapter is loaded onto: the base that it is served on, or the one that it was made from."""
    named = config.get("base_model_name_or_path")
    return str(provenance.get("for_base") or named or provenance.get("base") or "the base")


def hub_id_of(name: str) -> str | None:
    """The hub id of a model, by what it is called or by where it lies in the hub's cache; None where none is known."""
    within = next((part for part in Path(name).parts if part.startswith(MODELS) and part.count("--") == 2), None)
    if within:
        return within.removeprefix(MODELS).replace("--", "/")
    repo = repo_and_file(name)
    try:
        return repo[0] if repo and not Path(name).exists() else None
    except OSError:
        return None


def how_to_load(base: str, loaded: str, task: object) -> str:
    """Python that loads an adapter by PEFT.

    Args:
        base: What it is loaded onto.
        loaded: The adapter, as Python writes it.
        task: PEFT's name of what the model does.
    """
    found = _CLASSES.get(str(task))
    how = (
        [f"from transformers import {found}", "", f'base_model = {found}.from_pretrained("{base}")']
        if found
        else ["", f"base_model = ...  # `{base}`, as its library loads it"]
    )
    lines = ["```python", "from peft import PeftModel", *how]
    return "\n".join([*lines, f"model = PeftModel.from_pretrained(base_model, {loaded})", "```"])


def is_our_card(page: Path) -> bool:
    """Tell whether a page is there and was made by this program."""
    try:
        return MARK in regular(page).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def refined_table(report: Mapping[str, Any]) -> list[str]:
    """How far base + adapter is from the tuned model, before refining and now, as lines of a table."""
    told = report["refined"]
    lines = [
        "| held-out text | KL, nats a token: base | before refining | now | same next token |",
        "|---|--:|--:|--:|--:|",
    ]
    for kind, words in KINDS.items():
        if kind in told["after"]:
            kl = [f"{told[when][kind]['kl']:.4f}" for when in ("base", "before", "after")]
            lines.append(f"| {words} | {' | '.join(kl)} | {told['after'][kind]['top1']:.1%} |")
    return lines


_NO_BASE = (
    "The base is `{base}`, which is not known to be on the hub. If it is, add `base_model` and `base_model_relation: "
    "adapter` to the head of this page."
)


def _head(base: str | None, task: object) -> str:
    from huggingface_hub import ModelCardData

    tags = ["lora", "phlora", "post-hoc"]
    if base is None:
        return str(ModelCardData(library_name="peft", tags=tags).to_yaml())
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag="text-generation" if task == "CAUSAL_LM" else None,
        tags=tags,
    )
    return str(data.to_yaml())


def _called(label: object, handed_on: bool) -> str:
    """A model in words; where the page goes to others, without the folders of this machine."""
    text = brief(str(label))
    return Path(text).name if handed_on and hub_id_of(text) is None and len(Path(text).parts) > 1 else text


def _origin(
    provenance: Mapping[str, Any], first: Mapping[str, Any], *, step: int | None, refined: bool, handed_on: bool
) -> str:
    def said(name: str) -> str:
        revision = provenance.get(f"{name}_revision")
        return f"`{_called(provenance[name], handed_on)}`" + (f" at revision `{revision}`" if revision else "")

    paper = "(PHLoRA, [arXiv 2509.10971](https://arxiv.org/abs/2509.10971))"
    how = (
        ", its factors then fitted to the fine-tune's outputs on unlabelled text. Energies are of those before."
        if refined
        else ": nothing was trained to make it."
    )
    if "tuned" in provenance and "totals" in first:
        at = "" if step is None else f" at step {step}"
        tuned = "its full fine-tune" if step is not None else f"its fine-tune {said('tuned')}"
        return f"The truncated SVD of the weight delta between {said('base')} and {tuned}{at}\n{paper}{how}"
    adapters = [one["adapter"] for one in provenance.get("adapters", ())]
    sources = adapters or [provenance[key] for key in ("fixed", "adapter", "refined") if provenance.get(key)]
    names = ", ".join(f"`{_called(one, handed_on)}`" for one in sources)
    if not names:
        return "A LoRA adapter."
    what = "fitted to the fine-tune's outputs on unlabelled text" if refined else "from its factors alone"
    return f"Made of the LoRA adapter{'s' if len(sources) > 1 else ''} {names}, {what}."


def _energy(report: Mapping[str, Any]) -> Iterator[str]:
    totals = report.get("totals")
    if not isinstance(totals, Mapping):
        return
    heads = ["rank", "energy kept of what is carried"]
    cells = [str(totals["rank"]), f"{totals['energy']:.1%}"]
    if "energy_of_all" in totals:
        heads.append("of the whole fine-tune")
        cells.append(share_of_all(totals["energy_of_all"], totals.get("unknown", 0.0)))
    heads += ["relative error", "size"]
    cells += [f"{totals['relative_error']:.1%}", size(totals["bytes"])]
    yield _table(heads, [cells])
    at = totals.get("energy_at") or {}
    if at:
        shares = [f"{share:.1%}" for share in at.values()]
        yield "Cut to a smaller rank, it would keep:\n\n" + _table(["rank", *map(str, at)], [["energy", *shares]])
    kinds = report.get("by_kind")
    if kinds:
        rows = [
            [
                f"`{brief(one['kind'])}`",
                str(one["weights"]),
                _ranks(one),
                percent(one["energy"]),
                percent(one["of_all"]),
                size(one["bytes"]),
            ]
            for one in kinds
        ]
        yield _table(["modules", "weights", "rank", "energy kept", "share of the whole change", "size"], rows)


def _ranks(kind: Mapping[str, Any]) -> str:
    if not kind["rank"]:
        return "whole"
    return str(kind["rank"]) if kind["least"] == kind["rank"] else f"{kind['least']} to {kind['rank']}"


def _left_out(report: Mapping[str, Any]) -> Iterator[str]:
    groups = report.get("by_reason")
    if groups:
        yield "## What is left out"
        rows = [
            [brief(one["reason"]), str(one["tensors"]), ("about " if one["about"] else "") + percent(one["of_all"])]
            for one in groups
        ]
        yield _table(["not carried", "tensors", "of the whole fine-tune's energy"], rows)


def _refined(report: Mapping[str, Any]) -> Iterator[str]:
    if "refined" in report:
        yield "\n".join(refined_table(report))


def _warnings(report: Mapping[str, Any]) -> Iterator[str]:
    warnings = report.get("warnings")
    if warnings:
        yield "\n".join(f"- {brief(warning)}" for warning in warnings)


def _how(provenance: Mapping[str, Any], handed_on: bool) -> Iterator[str]:
    version = provenance.get("versions", {}).get("peft-posthoc")
    if version is None:
        return
    told = [
        f"- `{name}`: `{_option(value, handed_on)}`"
        for name, value in provenance.get("options", {}).items()
        if value and name != "device"
    ]
    yield "## How it was made"
    yield f"With peft-posthoc {version}" + (":" if told else ".")
    yield "\n".join(told)


def _option(value: Any, handed_on: bool) -> str:
    return _called(value, handed_on) if isinstance(value, str) and Path(value).is_absolute() else brief(str(value))


def _serve(config: Mapping[str, Any], provenance: Mapping[str, Any], base: str, place: str) -> Iterator[str]:
    portable = "fixed" in provenance or provenance.get("options", {}).get("form") == "portable"
    if config.get("task_type") == "CAUSAL_LM" and portable:
        yield "## Serve it"
        yield (
            f"```sh\nvllm serve {base} --enable-lora --max-lora-rank {config['r']} --lora-modules tuned={place}\n```"
        )
    yield "`phlora check` tells what each serving engine does with it."


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
