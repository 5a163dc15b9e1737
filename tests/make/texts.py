"""Texts of 94 words, and a tokenizer of these."""

import tokenizers
import transformers


def tokenizer():
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(94))])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def texts(start):
    return " ".join(f"w{(start + 7 * i) % 94}" for i in range(12))


PROMPTS = [texts(i) for i in range(32)]
