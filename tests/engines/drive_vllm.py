"""vLLM on CPU, in this process: an adapter a request, and one batch over several."""

import os

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

from typing import Any

import driving
import numpy as np
import vllm
from vllm.lora.request import LoRARequest

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class Vllm:
    def __init__(self, job: dict[str, Any]) -> None:
        self.versions = {"vllm": vllm.__version__}
        # One more than adapters in a batch: with no place free, the base's rows get the last one's adapter on CPU
        # (vllm/lora/ops/torch_ops indexes it with -1).
        places = 1 + max(1, len({name for name, _ in job["mixed"] if name is not None}))
        self.llm = vllm.LLM(
            job["base"],
            dtype=job["dtype"],
            enforce_eager=True,
            skip_tokenizer_init=True,
            enable_lora=True,
            max_lora_rank=next((rank for rank in RANKS if rank >= job["rank"]), RANKS[-1]),
            max_loras=places,
            max_model_len=64,
            max_logprobs=-1,
        )
        self.requests: dict[str, LoRARequest] = {}
        self.count = 0

    def _request(self, adapter: str | None) -> LoRARequest | None:
        if adapter is None:
            return None
        if adapter not in self.requests:
            self.count += 1
            number = self.count
            request = LoRARequest(str(number), number, adapter)
            # Here first: an error within `generate` leaves the engine hanging.
            self.llm.llm_engine.add_lora(request)
            self.requests[adapter] = request
        return self.requests[adapter]

    def next_token(self, adapter: str | None, prompts: list[list[int]]) -> Any:
        return self.mixed([(adapter, prompt) for prompt in prompts])

    def beside(self, adapter: str, prompts: list[list[int]]) -> Any:
        return self.mixed([(None, prompt) for prompt in prompts])

    def mixed(self, rows: list[tuple[str | None, list[int]]]) -> Any:
        wanted = {adapter for adapter, _ in rows}
        for adapter in [adapter for adapter in self.requests if adapter not in wanted]:
            self.llm.llm_engine.remove_lora(self.requests.pop(adapter).lora_int_id)
        one = vllm.SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)
        found = self.llm.generate(
            [{"prompt_token_ids": prompt} for _, prompt in rows],
            one,
            lora_request=[self._request(adapter) for adapter, _ in rows],
            use_tqdm=False,
        )
        first = [request.outputs[0].logprobs[0] for request in found]
        return np.array([[row[token].logprob for token in range(len(row))] for row in first])


driving.drive(Vllm)
