"""From twenty fine-tunes of one base to one base with twenty adapters, offline: extracted, checked, served by PEFT.

One batch asks every tenant, and the base, the same questions. Then one adapter is loaded and one deleted while the
others serve on. `serve_many.md` has the same for vLLM, SGLang, NIM, llama.cpp and LoRAX.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from peft import PeftModel
from tenants import ANSWER, HOME, THINGS, Rooms, answer, make_tenants, question
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from peft_posthoc import LeftOutWarning, check, extract

NO_ADAPTER = "__base__"  # PEFT's name for it in a mixed batch
ROUNDING = 1e-4  # nats: a row of a batch of another size is computed in another order


class Answers(NamedTuple):
    """What one tenant is told."""

    rooms: list[str]
    log_probabilities: Tensor  # of all tokens at all steps

    def right(self, rooms: Rooms) -> int:
        """How many are this tenant's own."""
        return sum(said == answer(rooms[thing]) for said, thing in zip(self.rooms, THINGS, strict=True))

    def gap(self, other: Answers) -> float:
        """The largest difference of two log-probabilities, in nats."""
        return float((self.log_probabilities - other.log_probabilities).abs().max())


class Row(NamedTuple):
    """One line of the table."""

    tenant: str
    tuned: int
    """Right answers of the tenant's own model, all weights."""
    mixed: int
    """Right answers of its adapter, in one batch with all others."""
    gap: float
    """What the others in the batch change: the largest difference of log-probabilities from the adapter alone."""


class Server:
    """The base with adapters, in stock PEFT."""

    def __init__(self, folder: Path, names: Sequence[str]):
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "base", trust_remote_code=False)
        base, first = AutoModelForCausalLM.from_pretrained(folder / "base", trust_remote_code=False), names[0]
        self.model = PeftModel.from_pretrained(base, folder / "adapters" / first, adapter_name=first).eval()
        for name in names[1:]:
            self.load(name)

    def load(self, name: str) -> None:
        """Add one adapter; those that are there serve on."""
        self.model.load_adapter(self.folder / "adapters" / name, adapter_name=name, low_cpu_mem_usage=True)

    def mixed(self, names: Sequence[str]) -> dict[str, Answers]:
        """All questions for all of these, in one batch."""
        rows = [name for name in names for _ in THINGS]
        return dict(zip(names, ask(self.model, self.tokenizer, len(names), adapter_names=rows), strict=True))

    def alone(self, name: str) -> Answers:
        """All questions for one of these, or for the base."""
        if name == NO_ADAPTER:
            with self.model.disable_adapter():
                return ask(self.model, self.tokenizer)[0]
        self.model.set_adapter(name)
        return ask(self.model, self.tokenizer)[0]


def ask(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerFast, times: int = 1, **options: Any
) -> list[Answers]:
    """Ask all questions so many times, in one batch."""
    inputs = tokenizer([question(thing) for thing in THINGS] * times, return_tensors="pt")
    said = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=ANSWER,
        min_new_tokens=ANSWER,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    texts = tokenizer.batch_decode(said.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    logits = torch.stack(said.logits, dim=1).log_softmax(-1)
    starts = range(0, len(texts), len(THINGS))
    return [Answers(texts[start : start + len(THINGS)], logits[start : start + len(THINGS)]) for start in starts]


def build(folder: Path, count: int, rank: int) -> None:
    """The base, the fine-tunes and their adapters. The list of tenants is written last: with it the folder is whole."""
    tenants = make_tenants(folder, count)
    for name in tqdm(tenants, desc="Extract", unit="adapter"):
        extract(folder / "base", folder / "tuned" / name, rank=rank).save(folder / "adapters" / name)
    (folder / "tenants.json").write_text(json.dumps(tenants, indent=2) + "\n")


def weights_size(*folders: Path) -> int:
    return sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))


def serve(folder: Path, tenants: dict[str, Rooms], server: Server) -> list[Row]:
    """A line for every tenant that is served, and one for the base."""
    names = [*server.model.peft_config, NO_ADAPTER]
    mixed, rows = server.mixed(names), []
    for name in tqdm(names, desc="Ask", unit="tenant"):
        own = folder / "base" if name == NO_ADAPTER else folder / "tuned" / name
        tuned = ask(AutoModelForCausalLM.from_pretrained(own, trust_remote_code=False).eval(), server.tokenizer)[0]
        right = (said.right(tenants.get(name, HOME)) for said in (tuned, mixed[name]))
        rows.append(Row(name, *right, gap=mixed[name].gap(server.alone(name))))
    return rows


def exchange(server: Server, tenants: dict[str, Rooms], newcomer: str) -> dict[str, Any]:
    """Load one adapter and delete another between two batches: what the others notice of it."""
    leaver, *others = server.model.peft_config
    before = server.mixed([leaver, *others])
    server.load(newcomer)
    server.model.delete_adapter(leaver)
    after = server.mixed([*others, newcomer])
    return {
        "loaded": newcomer,
        "right": after[newcomer].right(tenants[newcomer]),
        "deleted": leaver,
        "gap": max(before[name].gap(after[name]) for name in others),
    }


def faults(found: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    change = found["exchange"]
    return [
        *(f"{name} would go wrong in {', '.join(engines)}" for name, engines in found["wrong"].items()),
        *(f"the fine-tune of {row.tenant} answers wrongly" for row in found["rows"] if row.tuned < len(THINGS)),
        *(f"the adapter of {row.tenant} answers wrongly" for row in found["rows"] if row.mixed < len(THINGS)),
        *(f"{row.tenant} depends on the rest of the batch" for row in found["rows"] if row.gap > ROUNDING),
        *([f"{change['loaded']}, loaded last, answers wrongly"] if change["right"] < len(THINGS) else []),
        *(["an exchange of adapters changed the others"] if change["gap"] > ROUNDING else []),
    ]


def table(found: dict[str, Any]) -> str:
    """What was found, for a terminal."""
    every, sizes, change = len(THINGS), found["bytes"], found["exchange"]
    lines = [
        f"{row.tenant:<12}{row.tuned:>6} of {every}{row.mixed:>12} of {every}{row.gap:>18.0e} nats"
        for row in found["rows"]
    ]
    return "\n".join(
        [
            f"{'right:':<12}{'fine-tune':>11}{'adapter, mixed':>17}{'off it alone by':>22}",
            *lines,
            f"\n{len(lines) - 1} checkpoints: {sizes['checkpoints'] / 1e6:.1f} MB. "
            f"The base and as many adapters: {(sizes['base'] + sizes['adapters']) / 1e6:.1f} MB.",
            f"{change['loaded']} loaded meanwhile: {change['right']} of {every} right. {change['deleted']} deleted. "
            f"The others changed by {change['gap']:.0e} nats at most.",
        ]
    )


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=".work/serve_many")
@click.option("--tenants", "count", type=click.IntRange(min=2), default=20, show_default=True)
@click.option("--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Of all adapters.")
@click.option("--json", "json_to", type=click.Path(path_type=Path, dir_okay=False), help="Write what was found.")
def main(folder: Path, count: int, rank: int, json_to: Path | None) -> None:
    """Fine-tune, extract and serve. What an earlier run left in FOLDER is served as it is."""
    logging.disable_progress_bar()  # transformers' own, for every load
    torch.set_num_threads(1)  # The model is so small that threads would wait for each other.
    # PEFT asks the model by a name that transformers is about to change.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    warnings.simplefilter("ignore", LeftOutWarning)  # The table tells it.
    if not (folder / "tenants.json").is_file():
        if folder.exists() and any(folder.iterdir()):
            raise click.ClickException(f"`{folder}` is not empty, and no whole earlier run. Delete it or name another.")
        build(folder, count + 1, rank)
    tenants = json.loads((folder / "tenants.json").read_text())
    *served, newcomer = tenants
    verdicts = {name: check(folder / "adapters" / name, base=folder / "base").wrong for name in tenants}
    server = Server(folder, served)
    found = {
        "rows": serve(folder, tenants, server),
        "wrong": {name: engines for name, engines in verdicts.items() if engines},
        "exchange": exchange(server, tenants, newcomer),
        "bytes": {
            "checkpoints": weights_size(*(folder / "tuned" / name for name in served)),
            "base": weights_size(folder / "base"),
            "adapters": weights_size(*(folder / "adapters" / name for name in served)),
        },
    }
    click.echo(table(found))
    found["faults"] = faults(found)
    if json_to is not None:
        json_to.write_text(json.dumps(found | {"rows": [row._asdict() for row in found["rows"]]}, indent=2) + "\n")
    if found["faults"]:
        raise click.ClickException("; ".join(found["faults"]) + ".")


if __name__ == "__main__":
    main()
