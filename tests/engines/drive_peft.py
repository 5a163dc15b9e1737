"""PEFT: `PeftModel.from_pretrained`, and one batch over several adapters (`adapter_names`)."""

from typing import Any

import driving
import peft
import torch
import transformers


class Peft:
    def __init__(self, job: dict[str, Any]) -> None:
        self.base = job["base"]
        self.versions = {"peft": peft.__version__, "transformers": transformers.__version__}

    def _load(self) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()

    @torch.no_grad()
    def next_token(self, adapter: str | None, prompts: list[list[int]]) -> Any:
        self.model = self._load()
        if adapter is not None:
            self.model = peft.PeftModel.from_pretrained(self.model, adapter)
        return self._after(prompts)

    @torch.no_grad()
    def beside(self, adapter: str, prompts: list[list[int]]) -> Any:
        with self.model.disable_adapter():
            return self._after(prompts)

    def _after(self, prompts: list[list[int]]) -> Any:
        rows = [self.model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
        return driving.log_softmax(torch.stack(rows))

    @torch.no_grad()
    def mixed(self, rows: list[tuple[str | None, list[int]]]) -> Any:
        model, names = self._load(), {}
        for adapter in dict.fromkeys(adapter for adapter, _ in rows if adapter is not None):
            names[adapter] = f"a{len(names)}"
            if len(names) == 1:
                model = peft.PeftModel.from_pretrained(model, adapter, adapter_name="a0")
            else:
                model.load_adapter(adapter, adapter_name=names[adapter])
        # On the left, so that the last position of every row is its prompt's last.
        longest = max(len(prompt) for _, prompt in rows)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for _, prompt in rows])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for _, prompt in rows])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        chosen = [names.get(adapter, "__base__") for adapter, _ in rows]
        found = model(ids, attention_mask=mask, position_ids=positions, adapter_names=chosen)
        return driving.log_softmax(found.logits[:, -1])


driving.drive(Peft)
