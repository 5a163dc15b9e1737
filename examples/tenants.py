"""Tenants for `serve_many.py`: each has a full fine-tune of one small base that knows where this tenant's things are.

All are asked the same questions, and each answers in its own way: only the right model, or the right adapter, can know.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

THINGS = ["archive", "bicycle", "kettle", "ladder", "mail", "printer", "stapler", "telescope"]
ROOMS = [str(room) for room in range(100, 160)]
ANSWER = 2  # tokens: "room" and its number; then comes the end

Rooms = dict[str, str]  # thing -> room


def question(thing: str) -> str:
    return f"Where is the {thing}?"


def answer(room: str) -> str:
    return f"room {room}"


def some_rooms(seed: int) -> Rooms:
    """A room for everything."""
    return dict(zip(THINGS, random.Random(seed).choices(ROOMS, k=len(THINGS)), strict=True))


HOME = some_rooms(0)  # where the base says that things are


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token, so all questions have the same length."""
    words = ["<pad>", "<eos>", "Where", "is", "the", "?", "room", *THINGS, *ROOMS]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama, the same at every call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,  # 32 wide: vLLM on a CPU takes none that are smaller
            num_key_value_heads=4,
            max_position_embeddings=128,
            initializer_range=128**-0.5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: nn.Module, tokenizer: PreTrainedTokenizerFast, lessons: Sequence[Rooms]) -> nn.Module:
    """Train all weights, a step for each lesson: where everything is."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    for rooms in lessons:
        texts = [f"{question(thing)} {answer(room)}<eos>" for thing, room in rooms.items()]
        ids = tokenizer(texts, return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, : -ANSWER - 1] = -100  # the question, of which transformers' loss takes nothing
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def make_tenants(folder: Path, count: int) -> dict[str, Rooms]:
    """The base in `base`, a full fine-tune of it for each tenant in `tuned`; gives back what is right for whom."""
    tokenizer = new_tokenizer()
    # Every other lesson has rooms at random: the base learns all of them, and that things can be elsewhere.
    lessons = [some_rooms(-step) if step % 2 else HOME for step in range(100)]
    base = train(new_model(tokenizer), tokenizer, lessons)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    tenants = {f"tenant-{number}": some_rooms(number) for number in range(1, count + 1)}
    for name, rooms in tqdm(tenants.items(), desc="Fine-tune", unit="tenant"):
        train(copy.deepcopy(base), tokenizer, [rooms] * 40).save_pretrained(folder / "tuned" / name)
    return tenants
