"""Pages for people: the model card of an adapter, and the summary of a run's adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hf_callbacks.metrics import read_report
from peft_posthoc.adapters.config import read_config
from peft_posthoc.adapters.writer import CARD_MARK, REPORT
from peft_posthoc.refinement.refined import SAID
from peft_posthoc.text import share_of_all, size

_SERVE = """
```sh
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules tuned={place}
```
"""


def card(adapter: Path, *, step: int, repo_id: str | None = None, subfolder: str | None = None) -> str:
    """The model card of one adapter: where it comes from, what it holds, how to load it.

    Args:
        adapter: Its folder.
        step: When its checkpoint was saved.
        repo_id: The repository on the hub that the card is for, if it is for one.
        subfolder: Where in that repository the adapter lies; at its root if None.
    """
    report, config = read_report(adapter), read_config(adapter)
    provenance, totals = report["provenance"], report["totals"]
    base, revision = provenance["base"], provenance["base_revision"]
    on = provenance.get("for_base", base)
    header = ModelCardData(
        base_model=None if Path(on).is_absolute() else on,  # a path of this machine says nothing elsewhere
        library_name="peft",
        tags=["lora", "phlora", "post-hoc"],
    )
    place = "path/to/this/folder" if repo_id is None or subfolder is not None else repo_id
    loaded = f'"{place}"' if repo_id is None or subfolder is None else f'"{repo_id}", subfolder="{subfolder}"'
    generates = config.get("task_type") == "CAUSAL_LM"
    served = generates and provenance["options"]["form"] == "portable"
    serve = _SERVE.format(base=on, rank=config["r"], place=place) if served else ""
    at = f" at revision `{revision}`" if revision else ""
    warnings = "".join(f"- {warning}\n" for warning in report["warnings"])
    how, refined = ": nothing was trained to make it.", ""
    if "refined" in report:
        how = ", its factors then fitted to the fine-tune's outputs on unlabelled text. Energies are of those before."
        refined = "\n".join(["", *_refined(report), ""])
    cells = (
        totals["rank"],
        f"{totals['energy']:.1%}",
        share_of_all(totals["energy_of_all"], totals.get("unknown", 0.0)),
        f"{totals['relative_error']:.1%}",
        size(totals["bytes"]),
    )
    return f"""---
{header.to_yaml()}
---

# {provenance["tuned"]} as a LoRA adapter

The truncated SVD of the weight delta between `{base}`{at} and its full fine-tune at step {step}
(PHLoRA, [arXiv 2509.10971](https://arxiv.org/abs/2509.10971)){how}

| rank | energy kept of what is carried | of the whole fine-tune | relative error | size |
|--:|--:|--:|--:|--:|
| {" | ".join(map(str, cells))} |

{warnings}{refined}
A row for every tensor is in `{REPORT}`.

## Load it

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, {loaded})  # base_model: `{on}`
```
{serve}
{CARD_MARK}
"""


def summary(adapters: Mapping[int, Path], *, final: Path | None = None, picture: str | None = None) -> str:
    """A table of a run's adapters, by step.

    Args:
        adapters: Their folders.
        final: The folder of the last or best one; what refining made of it is told, if it was refined.
        picture: The file, beside the page, that shows them all.
    """
    lines = [
        "# Adapters of this run",
        "",
        "Energies are shares, of the weights that are carried and of the whole fine-tune; `|d|/|w|` is the size of the "
        "delta against the base.",
        "",
        *([f"![Energy and rank over steps]({picture})", ""] if picture else []),
        "| step | rank | energy | of whole | error | \\|d\\|/\\|w\\| | size | folder |",
        "|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for step, folder in sorted(adapters.items()):
        totals: Mapping[str, Any] = read_report(folder)["totals"]
        moved = "" if totals["relative_delta"] is None else f"{totals['relative_delta']:.2%}"
        lines.append(
            f"| {step} | {totals['rank']} | {totals['energy']:.1%} "
            f"| {share_of_all(totals['energy_of_all'], totals.get('unknown', 0.0))} "
            f"| {totals['relative_error']:.1%} | {moved} | {size(totals['bytes'])} | `{folder.name}` |"
        )
    report = read_report(final) if final is not None else {}
    if "refined" in report:
        lines += ["", "`final`, refined: its distance from the fine-tune.", "", *_refined(report)]
    return "\n".join([*lines, "", CARD_MARK, ""])


def _refined(report: Mapping[str, Any]) -> list[str]:
    """How far base + adapter is from the tuned model, before refining and now, as a table."""
    told = report["refined"]
    lines = [
        "| held-out text | KL, nats a token: base | before refining | now | same next token |",
        "|---|--:|--:|--:|--:|",
    ]
    for kind, words in SAID.items():
        if kind in told["after"]:
            kl = [f"{told[when][kind]['kl']:.4f}" for when in ("base", "before", "after")]
            lines.append(f"| {words} | {' | '.join(kl)} | {told['after'][kind]['top1']:.1%} |")
    return lines
