"""transformers: `model.load_adapter`, without PEFT's own model around it."""

from typing import Any

import driving
import torch
import transformers


class Transformers:
    def __init__(self, job: dict[str, Any]) -> None:
        self.base = job["base"]
        self.versions = {"transformers": transformers.__version__}

    @torch.no_grad()
    def next_token(self, adapter: str | None, prompts: list[list[int]]) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
        if adapter is not None:
            model.load_adapter(adapter)
        return driving.log_softmax(torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]))


driving.drive(Transformers)
