"""Every class of transformers and diffusers that builds small, in both forms, held against stock PEFT: `make sweep`.

Of each class a small model and a fine-tune of it in which every parameter moved are saved, an adapter is extracted,
PEFT loads and merges it, and every parameter is compared with the tuned model's. What the report tells of the whole
fine-tune's energy must be what PEFT's model has of it. A class is a row in a file of JSON lines: an interrupted sweep
of the same code goes on where it was; `--again` repeats what failed alone. The table in `docs/architectures.md` is made
of the rows.
"""

import argparse
import copy
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers

import peft_posthoc
from peft_posthoc import NothingToCarryError
from tests.make import small, sweep_page
from tests.make.architectures import EVERYTHING

FORMS: Mapping[str, Mapping[str, Any]] = {"portable": {}, "everything": EVERYTHING, "peft": {"form": "peft"}}
RANK = 64
# How far what is told may be from what is true, of the whole fine-tune's energy.
TOLERANCE = 0.01
SECONDS, BYTES = 180, 6 << 30


def check(name: str, folder: Path) -> dict[str, Any]:
    """What is told and what is true of one class's adapters."""
    try:
        base, tuned = pair(name, folder)
        (before, lost), (after, also_lost) = load(name, base), load(name, tuned)
    except small.NotBuilt:
        raise
    except Exception as error:
        return {"class": name, "not_kept": f"{type(error).__name__}: {error}"[:200]}
    if lost or also_lost:
        return {"class": name, "not_kept": ", ".join(sorted({*lost, *also_lost})[:3])}
    size = sum(values.numel() for values in after.parameters())
    row: dict[str, Any] = {"class": name, "parameters": size, "forms": {}}
    for form, options in FORMS.items():
        started = time.perf_counter()
        found = row["forms"][form] = outcome(name, base, tuned, folder / form, before, after, options)
        found["seconds"] = round(time.perf_counter() - started, 1)
    return row


def outcome(
    name: str, base: Path, tuned: Path, out: Path, before: Any, after: Any, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What is told and what is true of one adapter, or what went wrong."""
    stage, told = "extract", None
    try:
        try:
            adapter = peft_posthoc.extract(base, tuned, RANK, **options)
        except NothingToCarryError as nothing:
            return {"nothing": str(nothing)[:300]}
        told = adapter.report.totals.energy_of_all
        adapter.save(out)
        stage = "peft"
        return {"told": told, **arrived(name, base, out, before, after)}
    except Exception as error:
        if stage == "peft" and (theirs := without_us(name, base, out)):
            return {"told": told, "host": theirs}
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).parent.name}/{Path(last.filename).name}:{last.lineno}"
        return {"failed": f"{stage}: {type(error).__name__}: {error}"[:500], "at": where}


def arrived(name: str, base: Path, adapter: Path, before: Any, after: Any) -> dict[str, Any]:
    """The share of the fine-tune that stock PEFT's model has with an adapter, and what PEFT complains about."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(load(name, base)[0], adapter)
    missing = [str(one.message) for one in said if "missing adapter keys" in str(one.message)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Each use of a tied weight by itself: merged into the one weight, each would get the deltas of all.
        untie(model)
        without_zero_biases(model)
        merged = model.merge_and_unload()
    true, lost = share(before, after, merged)
    return {"true": true, "lost": lost, **({"missing": missing[0][:300]} if missing else {})}


def without_us(name: str, base: Path, out: Path) -> str:
    """What PEFT raises with an adapter of its own, of a layer of each kind of this model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(name, base)[0]
        kinds = {
            (type(module), getattr(module, "kernel_size", None)): layer
            for layer, module in model.named_modules()
            if type(module) in (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
        }
        try:
            config = peft.LoraConfig(target_modules=list(kinds.values()))
            peft.get_peft_model(model, config).save_pretrained(out / "theirs")
            peft.PeftModel.from_pretrained(load(name, base)[0], out / "theirs").merge_and_unload()
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:300]
    return ""


def without_zero_biases(model: Any) -> None:
    """Let PEFT merge where an adapter has biases of LoRA, which are zero, for layers that have none themselves."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and module.lora_bias.get("default"):
            bias = getattr(module.lora_B["default"], "bias", None)
            if getattr(module.get_base_layer(), "bias", None) is None and bias is not None and not bias.any():
                module.lora_bias["default"] = False


def untie(module: torch.nn.Module, seen: set[int] | None = None) -> None:
    """Give every module, and every parameter of it, to one parent only."""
    seen = set() if seen is None else seen
    for own in (module._modules, module._parameters):
        for name, one in own.items():
            if id(one) in seen:
                own[name] = copy.deepcopy(one)
            if own[name] is not None:
                seen.add(id(own[name]))
    for child in module._modules.values():
        if child is not None:
            untie(child, seen)


def share(before: Any, after: Any, merged: Any) -> tuple[float, dict[str, float]]:
    """How much of what changed `merged` has, and the parameters that it has least of, as shares of the whole.

    A parameter that is used in several places counts once, by the place where it is furthest from the tuned one.
    """
    base, tuned, got = (dict(one.named_parameters(remove_duplicate=False)) for one in (before, after, merged))
    if base.keys() != tuned.keys() or base.keys() != got.keys():
        odd = sorted((base.keys() ^ tuned.keys()) | (base.keys() ^ got.keys()))
        raise LookupError(f"Other parameters: {', '.join(odd[:3])}")
    changed: dict[int, float] = {}
    apart: dict[int, tuple[float, str]] = {}
    for name, wanted in tuned.items():
        key = id(wanted)
        changed[key] = float((wanted.detach().double() - base[name].detach().double()).abs().pow(2).sum())
        error = float((wanted.detach().double() - got[name].detach().double()).abs().pow(2).sum())
        apart[key] = max(apart.get(key, (0.0, name)), (error, name))
    whole = sum(changed.values())
    most = sorted(apart.values(), reverse=True)[:4]
    lost = {name: round(error / whole, 4) for error, name in most if error > TOLERANCE / 4 * whole}
    return 1 - sum(error for error, _ in apart.values()) / whole, lost


@torch.no_grad()
def pair(name: str, folder: Path) -> tuple[Path, Path]:
    """Folders of a small model of a class and of a fine-tune of it in which every parameter moved."""
    torch.manual_seed(0)
    model = small.make(name)
    for values in model.parameters():
        # Some classes leave memory as they found it, or start with what hides a difference in rounding.
        if not bool((values.abs() <= 10).all()):
            values.copy_(0.1 * torch.randn_like(values))
    model.save_pretrained(folder / "base")
    for values in model.parameters():
        if values.is_floating_point():
            values += 0.02 * torch.randn_like(values)
    model.save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned"


def load(name: str, folder: Path) -> tuple[Any, list[str]]:
    """The model in a folder, in float32, and its parameters that the folder does not have."""
    kind = small.kind(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kwargs = {"dtype": torch.float32} if hasattr(kind, "config_class") else {}
        model, info = kind.from_pretrained(folder, output_loading_info=True, **kwargs)
    own = dict(model.named_parameters(remove_duplicate=False))
    return model.eval(), [key for key in info["missing_keys"] if key in own]


def failure(row: Mapping[str, Any]) -> str:
    """What is wrong with a class's row; nothing if all is right."""
    if "crashed" in row:
        return str(row["crashed"])
    for form, found in row.get("forms", {}).items():
        if "failed" in found:
            return f"{form}: {found['failed']}"
        if "missing" in found:
            return f"{form}: {found['missing']}"
        if "true" in found and not abs(found["told"] - found["true"]) <= TOLERANCE:
            return f"{form}: told {found['told']:.1%}, true {found['true']:.1%}"
    return ""


def in_a_process(name: str, folder: str, pipe: Any) -> None:
    """Check one class, and send its row."""
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        try:
            row = check(name, Path(folder))
        except small.NotBuilt as error:
            row = {"class": name, "not_built": str(error)}
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        row = {
            "class": name,
            "crashed": f"{type(error).__name__}: {error}"[:300],
            "at": f"{last.filename}:{last.lineno}",
        }
    pipe.send(row)


def sweep(names: Iterable[str], processes: int) -> Iterable[dict[str, Any]]:
    """The rows of classes, as they are done: each in a process of its own, which may crash or be ended."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(names)[::-1], {}
    if len(waiting) > processes:
        with tempfile.TemporaryDirectory() as folder:
            # What it imports, all others find imported.
            check("LlamaForCausalLM", Path(folder))
    while waiting or running:
        while waiting and len(running) < processes:
            name, folder = waiting.pop(), tempfile.mkdtemp()
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=in_a_process, args=(name, folder, there))
            process.start()
            there.close()
            running[here] = (name, folder, process, time.monotonic() + SECONDS)
        ready = multiprocessing.connection.wait(list(running), timeout=1)
        for pipe in list(running):
            name, folder, process, end = running[pipe]
            if pipe not in ready and time.monotonic() < end:
                continue
            try:
                row = pipe.recv() if pipe in ready else {"class": name, "crashed": f"more than {SECONDS} seconds"}
            except EOFError:
                process.join()
                row = {"class": name, "crashed": f"ended with {process.exitcode}"}
            process.kill()
            process.join()
            shutil.rmtree(folder, ignore_errors=True)
            del running[pipe]
            yield row


def main() -> None:
    """Sweep, and write the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("classes", nargs="*", help="[default: all]")
    arguments.add_argument("--rows", type=Path, default=Path(".work/sweep.jsonl"), help="[default: %(default)s]")
    arguments.add_argument("--again", action="store_true", help="Repeat only what failed, with any code.")
    arguments.add_argument("--processes", type=int, default=os.cpu_count())
    given = arguments.parse_args()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    given.rows.parent.mkdir(parents=True, exist_ok=True)
    rows = read(given.rows)
    names = given.classes or small.classes()
    now = code()
    done = {name for name, row in rows.items() if (not failure(row) if given.again else row.get("code") == now)}
    with given.rows.open("a") as file:
        for row in sweep([name for name in names if name not in done], given.processes):
            rows[row["class"]] = row = {**row, "code": now}
            print(json.dumps(row), file=file, flush=True)
            print(row["class"], failure(row) or row.get("not_built") or "right", flush=True)
    if not given.classes:
        sweep_page.write([rows[name] for name in names], RANK)
    failed = [name for name in names if failure(rows[name])]
    sys.exit(f"{len(failed)} of {len(names)} failed: {', '.join(failed)}" if failed else 0)


def code() -> str:
    """A number that changes with our code, with the recipe of small models and with the libraries."""
    files = [
        *sorted(Path(peft_posthoc.__file__).parent.rglob("*.py")),
        *sorted(Path(small.__file__).parent.glob("small.*")),
    ]
    versions = [one.__version__ for one in (torch, transformers, diffusers, peft)]
    return hashlib.sha256(b"".join(one.read_bytes() for one in files) + str(versions).encode()).hexdigest()[:16]


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file by class, of each the last."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {row["class"]: row for row in map(json.loads, lines)}


if __name__ == "__main__":
    main()
