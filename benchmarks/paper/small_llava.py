"""A small vision-language model, trained from a configuration on what shapes Easy-VQA's images have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from . import easyvqa
from .seeing import Images
from .task import SEED, Question, sample

SIDE, PATCH, WIDTH, LAYERS, HEADS = 64, 16, 128, 3, 4
QUESTIONS, BATCH, EPOCHS, LR = 3200, 32, 2, 1e-3
_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 3 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "initializer_range": WIDTH**-0.5,  # With the usual 0.02 so narrow a model learns nothing of its images for long.
}


def make(folder: Path, data: Path) -> None:
    """Train it, and write it with its processor."""
    processor = _processor(easyvqa.read(data, "train"))
    torch.manual_seed(SEED)
    model = _model(processor.tokenizer)
    arguments = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": EPOCHS,
        "learning_rate": LR,
        "save_strategy": "no",
        "logging_steps": 50,
        "seed": SEED,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    Images().trainer(model, arguments, sample(easyvqa.shapes(data), QUESTIONS), processor).train()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _processor(questions: Iterable[Question]) -> LlavaProcessor:
    split = Whitespace()
    texts = {text for one in questions for text in (one.prompt, one.answer)}
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    core = Tokenizer(
        WordLevel({word: i for i, word in enumerate(["<pad>", "<eos>", "<image>", *sorted(words)])}, "<pad>")
    )
    core.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=["<image>"]
    )
    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's own, which the model drops
    )


def _model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, projection_dim=WIDTH, **_SIZES),
            text_config=LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **_SIZES, **ends),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_select_strategy="default",
            vision_feature_layer=-1,
            **ends,
        )
    )
