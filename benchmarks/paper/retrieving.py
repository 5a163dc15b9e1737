"""Models that find: encoders, trained to put a question beside what answers it, judged by its place among others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

from .settings import Settings
from .task import Question

SHARPNESS = 20.0  # sentence-transformers' scale for its loss on pairs
LONGEST = 96  # tokens of a text; the rest is cut off


class Retrieval:
    """The mean over a text's tokens, and the cosine of two."""

    refines = False  # It fits causal language models.
    resumes = True

    def load(self, folder: Path | str) -> Any:
        return AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)

    def processor(self, base: str) -> Any:
        return AutoTokenizer.from_pretrained(base, trust_remote_code=False)

    def length(self, question: Question, processor: Any) -> int:
        return 0  # Nothing is too long: it is cut off.

    def trainer(self, model: Any, arguments: dict[str, Any], questions: Sequence[Question], processor: Any) -> Trainer:
        return _Pairs(
            model,
            TrainingArguments(**arguments, remove_unused_columns=False),
            train_dataset=[{"question": one.prompt, "answer": one.answer} for one in questions],
            data_collator=lambda rows: {
                name: _read([row[name] for row in rows], processor) for name in ("question", "answer")
            },
        )

    @torch.inference_mode()
    def said(self, model: Any, processor: Any, questions: Sequence[Question], settings: Settings) -> Mapping[str, str]:
        """The place of the paragraph that answers, from 1 on; one that is as near is before it."""
        model.eval()
        pool = list(dict.fromkeys(one.answer for one in questions))

        def placed(texts: Sequence[str]) -> Tensor:
            order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # alike in length: little is padding
            starts = tqdm(range(0, len(texts), settings.answer_batch), desc="texts", disable=None)
            parts = [order[start : start + settings.answer_batch] for start in starts]
            found = torch.cat([mean(model, _read([texts[i] for i in part], processor)) for part in parts])
            return found[torch.tensor(order).argsort()]

        near = placed([one.prompt for one in questions]) @ placed(pool).T
        right = torch.tensor([pool.index(one.answer) for one in questions], device=near.device)
        places = (near >= near.gather(1, right[:, None])).sum(1)
        return {one.id: str(int(place)) for one, place in zip(questions, places, strict=True)}


class _Pairs(Trainer):
    """Each question's answer against those of the others in its batch."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        asked, answers = (mean(model, inputs[name]) for name in ("question", "answer"))
        near = SHARPNESS * asked @ answers.T
        loss = cross_entropy(near, torch.arange(len(near), device=near.device))
        return (loss, near) if return_outputs else loss


def mean(model: Any, inputs: Any) -> Tensor:
    """Texts as vectors of length one."""
    inputs = inputs.to(model.device)
    mask = inputs["attention_mask"][..., None]
    return normalize((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)


def _read(texts: Sequence[str], tokenizer: Any) -> Any:
    return tokenizer(list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
