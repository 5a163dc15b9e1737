"""What `serving.py` measures in transformers and PEFT, in a process of its own; prints one line of JSON.

python serving_peft.py one FOLDER TENANTS REQUESTS,... TOKENS ROUNDS
python serving_peft.py start-adapters|start-models FOLDER TENANTS STARTED
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import host
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

PROMPT = 32


def load_full(folder: Path, *, copy: bool = False) -> PreTrainedModel:
    """A full checkpoint: mapped, as transformers leaves it, or copied into the process' own memory."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    for parameter in model.parameters() if copy else ():
        parameter.data = parameter.data.clone()
    return model


def load_adapter(model: PeftModel, folder: Path, name: str, *, lean: bool = True) -> None:
    """One adapter more; `lean` without PEFT's initial random weights."""
    model.load_adapter(folder, name, autocast_adapter_dtype=False, low_cpu_mem_usage=lean)


def route(folder: Path, tenants: int = 1) -> PeftModel:
    """The base with the first adapters, in the checkpoint's dtype."""
    base = load_full(folder / "base")
    model = PeftModel.from_pretrained(
        base, folder / "adapters/0", adapter_name="0", autocast_adapter_dtype=False, low_cpu_mem_usage=True
    )
    for i in range(1, tenants):
        load_adapter(model, folder / "adapters" / str(i), str(i))
    return model.eval()


def prompts(model: PreTrainedModel, count: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (count, PROMPT), generator=random)


def answer(model: PreTrainedModel | PeftModel, asked: torch.Tensor, tokens: int, **how: Any) -> list[list[int]]:
    """Exactly so many tokens for every prompt, each the likeliest."""
    found = model.generate(
        input_ids=asked,
        attention_mask=torch.ones_like(asked),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        **how,
    )
    new: list[list[int]] = found[:, asked.shape[1] :].tolist()
    return new


def seconds(what: Callable[[], object]) -> float:
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def loads(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds to make a tenant ready beside a base that serves: its full checkpoint, and its adapter."""
    model = route(folder)
    one = prompts(model, 1)
    full, adapter = folder / "tuned/0", folder / "adapters/1"
    found: dict[str, Any] = {
        kind: {cache: defaultdict(list) for cache in ("warm", "cold")} for kind in ("full", "adapter")
    }

    def of_full(times: dict[str, list[float]], prepare: Callable[[Path], object]) -> None:
        prepare(full)
        times["read"].append(seconds(lambda: host.read(full)))
        prepare(full)
        times["mapped"].append(seconds(lambda: load_full(full)))
        prepare(full)
        start = time.perf_counter()
        tenant = load_full(full, copy=True)
        times["copied"].append(time.perf_counter() - start)
        answer(tenant, one, 1)
        times["first"].append(time.perf_counter() - start)

    def of_adapter(times: dict[str, list[float]], prepare: Callable[[Path], object]) -> None:
        prepare(adapter)
        times["read"].append(seconds(lambda: host.read(adapter)))
        prepare(adapter)
        times["default"].append(seconds(lambda: load_adapter(model, adapter, "tenant", lean=False)))
        model.delete_adapter("tenant")
        prepare(adapter)
        start = time.perf_counter()
        load_adapter(model, adapter, "tenant")
        times["lean"].append(time.perf_counter() - start)
        model.set_adapter("tenant")
        answer(model, one, 1)
        times["first"].append(time.perf_counter() - start)
        model.set_adapter("0")
        model.delete_adapter("tenant")

    for turn in range(rounds + 1):
        for cache, prepare in (("warm", host.read), ("cold", host.drop)):  # the first round warms up
            of_full(found["full"][cache] if turn else defaultdict(list), prepare)
            gc.collect()
            of_adapter(found["adapter"][cache] if turn else defaultdict(list), prepare)
    return found


def answers(folder: Path, tenants: int, requests: list[int], tokens: int, rounds: int) -> dict[str, Any]:
    """Requests of all tenants in one batch, or tenant after tenant; and the latency of one."""
    names = [str(i) for i in range(tenants)]
    base, routed = load_full(folder / "base"), route(folder, tenants)
    merged = [load_full(folder / "tuned" / name) for name in names]
    asked = prompts(base, tenants * max(requests)).view(tenants, max(requests), PROMPT)
    tenant, one = names[-1], asked[-1, :1]
    routed.set_adapter(tenant)

    def in_one_batch(each: int, model: PeftModel) -> list[list[int]]:
        rows = [name for name in names for _ in range(each)]
        return answer(model, asked[:, :each].reshape(-1, PROMPT), tokens, adapter_names=rows)

    def in_turn(each: int, models: Callable[[int], PreTrainedModel]) -> list[list[int]]:
        return [new for i in range(tenants) for new in answer(models(i), asked[i, :each], tokens)]

    throughput: dict[str, Any] = {str(each): defaultdict(list) for each in requests}
    latency: dict[str, Any] = {kind: defaultdict(list) for kind in ("base", "merged", "routed")}
    said = {
        "mixed": in_one_batch(max(requests), routed),
        "merged": in_turn(max(requests), merged.__getitem__),
        "base": answer(base, asked.reshape(-1, PROMPT), tokens),
    }
    for _ in range(rounds):
        for each in requests:
            runs: dict[str, Callable[[], object]] = {
                "mixed": lambda each=each: in_one_batch(each, routed),
                "merged": lambda each=each: in_turn(each, merged.__getitem__),
                "mixed_loading": lambda each=each: in_one_batch(each, route(folder, tenants)),
                "merged_loading": lambda each=each: in_turn(each, lambda i: load_full(folder / "tuned" / names[i])),
            }
            for kind, run in runs.items():
                throughput[str(each)][kind].append(seconds(run))
        for kind, model in (("base", base), ("merged", merged[-1]), ("routed", routed)):
            for _ in range(3):
                first = seconds(lambda model=model: answer(model, one, 1))
                whole = seconds(lambda model=model: answer(model, one, 1 + tokens))
                latency[kind]["first"].append(first)
                latency[kind]["next"].append((whole - first) / tokens)
    return {"throughput": throughput, "latency": latency, "said": said}


def together(kind: str, folder: Path, tenants: int, started: float) -> dict[str, Any]:
    """All tenants in one process, until each has answered: memory, and seconds from the process' start."""
    imported, libraries = time.monotonic() - started, host.memory()
    names = [str(i) for i in range(tenants)]
    if kind == "start-adapters":
        model = route(folder, tenants)
        one = prompts(model, 1)
        for name in names:
            model.set_adapter(name)
            answer(model, one, 1)
    else:
        models = [load_full(folder / "tuned" / name) for name in names]
        for each in models:
            answer(each, prompts(each, 1), 1)
    return {
        "imported": [imported],
        "ready": [time.monotonic() - started],
        "libraries": [libraries["Rss"]],
        "anonymous": [host.memory()["Anonymous"]],
        "resident": [host.memory()["Rss"]],
    }


def main(task: str, folder: str, tenants: str, *rest: str) -> None:
    disable_progress_bar()
    with torch.inference_mode():
        if task == "one":
            requests, tokens, rounds = [int(each) for each in rest[0].split(",")], int(rest[1]), int(rest[2])
            found = loads(Path(folder), rounds)
            found |= answers(Path(folder), int(tenants), requests, tokens, rounds)
            found["threads"] = torch.get_num_threads()
        else:
            found = together(task, Path(folder), int(tenants), float(rest[0]))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
