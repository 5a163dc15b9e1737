import json
import shutil

import pytest
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers import models as vocabularies

from peft_posthoc import extract
from tests.make import models

TURN = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def tokenizer(**options):
    words = {"[UNK]": 0, **{word: at + 1 for at, word in enumerate("abcdefgh")}}
    made = Tokenizer(vocabularies.WordLevel(words, unk_token="[UNK]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", eos_token="h", **options)


@pytest.fixture
def pair(tmp_path):
    """A model and a fine-tune of it, both with the same tokenizer."""
    folders = models.save_pair(models.llama(), tmp_path)
    for folder in folders:
        tokenizer().save_pretrained(folder)
    return folders


def report(pair):
    return extract(*pair, 4).report


def told(pair):
    """By key: what is told of tokenizers and generation, and whether it is material."""
    return {one.key: (one.told, one.material) for one in report(pair).differences}


def edit(folder, file, **values):
    path = f"{folder}/{file}"
    with open(path) as opened:
        content = json.load(opened)
    with open(path, "w") as opened:
        json.dump(content | values, opened)


def test_the_same_tokenizer_tells_nothing(pair):
    assert told(pair) == {}


def test_a_fine_tune_for_chat_tells_its_template_its_end_of_turn_and_its_new_tokens(pair):
    chat = tokenizer(extra_special_tokens=["<|im_start|>", "<|im_end|>"])
    chat.eos_token, chat.chat_template = "<|im_end|>", TURN
    chat.save_pretrained(pair[1])
    assert told(pair) == {
        "chat_template": ("the chat template, which only tuned has", True),
        "eos_token": ('`eos_token` "h" -> "<|im_end|>"', True),
        "tokens": ("2 tokens that only tuned has (`<|im_start|>`, `<|im_end|>`)", True),
    }
    (warning,) = [text for text in report(pair).warnings if "tokenizer" in text]
    assert "Give its tokenizer to whatever serves the adapter (`with_tokenizer=True` copies it beside it)." in warning
    assert report(pair[::-1]).differences[0].told == "the chat template, which only base has"


def test_a_template_is_the_same_in_its_own_file_and_within_the_configuration(pair):
    for folder in pair:
        edit(folder, "tokenizer_config.json", chat_template=TURN)
    assert told(pair) == {}
    chat = tokenizer()
    chat.chat_template = TURN
    chat.save_pretrained(pair[1])
    assert told(pair) == {}
    edit(pair[0], "tokenizer_config.json", chat_template=[{"name": "tool_use", "template": TURN}])
    assert told(pair) == {"chat_template": ("the chat template", True)}


def test_a_template_in_the_folder_of_further_ones_is_told(pair):
    chat = tokenizer()
    chat.chat_template = {"default": TURN}
    chat.save_pretrained(pair[0])
    chat.chat_template = {"default": TURN, "tool_use": TURN}
    chat.save_pretrained(pair[1])
    assert told(pair) == {"chat_template": ("the chat template", True)}


def test_tokenizer_files_of_other_versions_that_say_the_same_tell_nothing(pair):
    edit(
        pair[1],
        "tokenizer.json",
        truncation={"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
    )
    edit(pair[1], "tokenizer_config.json", eos_token={"content": "h", "lstrip": False}, tokenizer_class="Other")
    edit(pair[1], "tokenizer_config.json", padding_side="left", model_max_length=8)
    assert told(pair) == {}


def test_how_merges_and_pieces_are_spelled_does_not_count_and_what_they_say_does(pair):
    def write(folder, merges, cutting):
        vocab = {"a": 0, "b": 1, "ab": 2, "ba": 3}
        model = {"type": "BPE", "vocab": vocab, "merges": merges}
        content = {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": cutting}
        with open(f"{folder}/tokenizer.json", "w") as file:
            json.dump(content, file)

    cutting = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    write(pair[0], ["a b"], cutting)
    write(pair[1], [["a", "b"]], cutting | {"use_regex": True})
    assert told(pair) == {}
    write(pair[1], [["b", "a"]], cutting | {"use_regex": False})
    assert told(pair) == {
        "tokens": ("the merges of the vocabulary", True),
        "cuts": ("how text is cut (pre_tokenizer)", False),
    }


def test_where_a_reply_ends_is_material_and_how_it_is_drawn_a_note(pair):
    edit(pair[0], "generation_config.json", eos_token_id=2, temperature=0.7)
    edit(pair[1], "generation_config.json", eos_token_id=[2])
    assert told(pair) == {"temperature": ("`temperature` 0.7 -> none", False)}
    assert any("`temperature`" in note for note in report(pair).notes)
    edit(pair[1], "generation_config.json", eos_token_id=[2, 7], temperature=0.7)
    assert told(pair) == {"eos_token_id": ("`eos_token_id` [2] -> [2, 7]", True)}


def test_a_padding_token_is_a_note(pair):
    for folder, token in zip(pair, ("a", "b"), strict=True):
        edit(folder, "tokenizer_config.json", pad_token=token)
    assert told(pair) == {"pad_token": ('`pad_token` "a" -> "b"', False)}


def test_a_fine_tune_without_a_tokenizer_tells_nothing(pair):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (models.Path(pair[1]) / file).unlink()
    assert told(pair) == {}


def test_a_vocabulary_without_tokenizer_json_is_compared_as_a_file(pair):
    for folder, words in zip(pair, (b"a\nb", b"a\nc"), strict=True):
        path = models.Path(folder)
        (path / "tokenizer.json").unlink()
        (path / "vocab.txt").write_bytes(words)
    assert told(pair) == {"vocab.txt": ("the vocabulary in `vocab.txt`", True)}
    shutil.copy(f"{pair[0]}/vocab.txt", f"{pair[1]}/vocab.txt")
    assert told(pair) == {}


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 3, "added_tokens": {"a": 1}}', '{"model": {"vocab": [1]}}'])
def test_a_tokenizer_that_makes_no_sense_ends_nothing(content, pair):
    models.Path(pair[1], "tokenizer.json").write_text(content)
    found = told(pair)
    assert ("cannot be read" in str(found)) == (content == "{")


def test_a_tokenizer_is_found_beside_names_of_a_wrapper_and_beside_an_adapter(pair, tmp_path):
    extract(*pair, 4).save(tmp_path / "adapter")
    weights = models.weights_of(pair[1])
    save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(weights).items()}, weights)
    edit(pair[1], "tokenizer_config.json", eos_token="a")
    expected = {"eos_token": ('`eos_token` "h" -> "a"', True)}
    assert told(pair) == expected
    both = f"{pair[0]}+{tmp_path / 'adapter'}"
    assert told((pair[0], both)) == {}
    shutil.copy(f"{pair[1]}/tokenizer_config.json", tmp_path / "adapter")
    assert told((pair[0], both)) == expected
