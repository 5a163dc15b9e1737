"""Text that is fitted on: who writes what, and what is held out."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from peft_posthoc import Given, LeftOutWarning, PosthocError, Prompts, Sampled
from peft_posthoc.texts.chat import turn_of
from peft_posthoc.texts.distance import Distance, distances, divergence
from peft_posthoc.texts.sampling import write_on
from peft_posthoc.texts.sequences import Batch, Tokens, batches, shuffled, split
from peft_posthoc.texts.texts import check_room, held_out, shares, usual_length
from peft_posthoc.texts.writers import Writers
from tests.make import multimodal

WORDS = ["[UNK]", "<s>", "</s>", "<user>", "<bot>", *"abcdefgh"]
TEMPLATE = "<s> {% for m in messages %}<user> {{ m.content }} <bot> {% endfor %}"


def _tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]", eos_token="</s>", chat_template=template)


def _says(word: str) -> GPT2LMHeadModel:
    """A model that says one word after all others."""
    config = GPT2Config(vocab_size=len(WORDS), n_embd=8, n_layer=1, n_head=1, n_positions=32, eos_token_id=2)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.zero_() if "ln_f.bias" not in name else weight.fill_(1.0)
        model.lm_head.weight[WORDS.index(word)] = 10.0
    return model


def _writers(template: str | None = None) -> Writers:
    return Writers(_says("a"), _says("b"), _tokenizer(template), len(WORDS))


def _text(tokens: Tokens) -> str:
    return " ".join(WORDS[i] for i in tokens.ids)


def _written(texts: Any, writers: Writers | None = None, *, count: int = 16, length: int = 10) -> list[Tokens]:
    return texts.write(writers or _writers(), count=count, length=length, seed=0, progress=False)


def test_the_base_writes_general_text_and_half_of_the_prompts_and_the_tuned_model_the_others_and_answers() -> None:
    written = _written(Sampled())
    assert Counter(text.kind for text in written) == {"general": 4, "task": 12}
    asked = []
    for text in written:
        words = _text(text).split()[1:]
        assert len(words) == 9
        if text.kind == "general":
            assert set(words) == {"a"}
        else:
            assert words == sorted(words)
            asked.append(words[0])
    assert Counter(asked) == {"a": 6, "b": 6}


def test_at_a_low_temperature_a_model_writes_what_it_likes_best() -> None:
    model = _says("a")
    with torch.no_grad():
        model.lm_head.weight[WORDS.index("b")] = 9.9  # 8 times 0.1 behind `a`: 31 % of the draws, at 0.1 in 3,000 one.
    torch.manual_seed(0)
    drawn = {at: write_on(model, [[5]] * 8, [16] * 8, ends=[2], temperature=at) for at in (1.0, 0.1)}
    share = {at: sum(one.count(WORDS.index("b")) for one in rows if one) / 128 for at, rows in drawn.items()}
    assert 0.2 < share[1.0] < 0.42
    assert share[0.1] < 0.02


def test_prompts_stand_behind_the_chat_template_s_opening() -> None:
    for text in _written(Sampled(), _writers(TEMPLATE)):
        if text.kind == "task":
            said = _text(text)
            assert said.startswith(("<s> <user> a", "<s> <user> b"))
            assert said.partition(" <bot> ")[2].replace("b", "").strip() == ""
            assert "<bot> b" in said


def test_behind_a_chat_template_a_turn_is_as_long_as_is_drawn_whatever_the_models_like_best() -> None:
    """They would rather end at once, by a token of the tokenizer or of the configuration; open another turn, which no
    person types; or close this one."""
    for liked in ("</s>", "f", "<user>", "<bot>"):
        tokenizer = _tokenizer(TEMPLATE.replace("<bot>", "<bot> h h h h h"))
        tokenizer.add_tokens([AddedToken("<user>", special=True), AddedToken("<bot>", special=True)])
        assert not {"<user>", "<bot>"} & set(tokenizer.all_special_tokens)
        writers = replace(_writers(), base=_says(liked), tuned=_says(liked), tokenizer=tokenizer)
        writers.tuned.generation_config.eos_token_id = WORDS.index("f")
        with torch.no_grad():
            writers.base.lm_head.weight[WORDS.index("c")] = writers.tuned.lm_head.weight[WORDS.index("d")] = 5.0
        written = _written(Sampled(), writers, count=128, length=32)[32:]
        turns = [_text(text).removeprefix("<s> <user> ").partition(" <bot> ")[0].split() for text in written]
        assert {word for turn in turns[:48] for word in turn} == {"c"}
        assert {word for turn in turns[48:] for word in turn} == {"d"}
        # Three quarters of what the template leaves, 24 tokens: there is room to answer.
        assert {len(turn) for turn in turns} == set(range(1, 19))


def test_what_a_plain_template_goes_on_with_is_text_too_and_ends_a_turn() -> None:
    writers = replace(_writers(TEMPLATE.replace("<bot>", "e")), base=_says("e"), tuned=_says("e"))
    with torch.no_grad():
        writers.base.lm_head.weight[WORDS.index("c")] = writers.tuned.lm_head.weight[WORDS.index("c")] = 9.99
    turns = [_text(text).removeprefix("<s> <user> ").partition("e")[0] for text in _written(Sampled(), writers)[4:]]
    assert {word for turn in turns for word in turn.split()} == {"c"}
    assert "" in turns


def test_a_template_s_tokens_do_not_count() -> None:
    """What comes next counts from the template's last token before the turn on, and from its last one after it on."""
    for text in _written(Sampled(), _writers(TEMPLATE)):
        bot = text.ids.index(WORDS.index("<bot>")) if text.kind == "task" else None
        assert text.fixed == (() if bot is None else (0, 1, bot))
    for text in _written(Prompts(["c", [{"role": "user", "content": "d e"}]]), _writers(TEMPLATE)):
        if text.kind == "task":
            assert text.fixed == (0, 1, text.ids.index(WORDS.index("<bot>")))


def test_a_prompt_of_another_kind_changes_nothing_for_the_others() -> None:
    odd = [{"role": "user", "content": "c"}, {"role": "user", "content": "d"}]
    for text in _written(Prompts(["c", "d", "e", odd]), _writers("{{ messages | length }} " + TEMPLATE)):
        if text.kind == "task" and text.ids.count(WORDS.index("<user>")) == 1:
            assert text.fixed == (0, 1, 2, text.ids.index(WORDS.index("<bot>")))


def test_a_template_with_nothing_before_the_turn_has_openings_of_any_token() -> None:
    written = _written(Sampled(), _writers("{{ messages[0].content }} <bot>"))
    assert len({text.ids[0] for text in written if text.kind == "task"}) > 3


def test_of_one_prompt_only_the_answer_counts() -> None:
    written = [text for text in _written(Prompts(["c d"])) if text.kind == "task"]
    assert {text.fixed for text in written} == {(0, 1)}


def test_what_all_given_texts_start_with_does_not_count_but_their_ends_do() -> None:
    def fixed(*texts: str) -> list[tuple[int, ...]]:
        return [text.fixed for text in _written(Given(texts)) if text.kind == "task"]

    assert fixed("a b c </s>", "a b d e </s>") == [(0, 1), (0, 1)]
    assert fixed("a b", "a b c") == [(0, 1), (0, 1)]
    assert fixed("a b", "c b") == [(), ()]
    assert fixed("a b c", "a b d", "a e", "f") == [(0,), (0,), (0,), ()]
    assert fixed("a b c d", "a b d", "a b e", "f") == [(0, 1), (0, 1), (0, 1), ()]
    assert fixed("a b") == fixed("a b", "a b")[:1] == [()]


def test_prompts_stand_behind_a_prefix() -> None:
    said = [_text(text) for text in _written(Sampled("c d")) if text.kind == "task"]
    assert all(one.startswith(("c d a", "c d b")) for one in said)


def test_given_prompts_are_answered_by_the_tuned_model() -> None:
    written = _written(Prompts(["c d", "e"]))
    assert Counter(text.kind for text in written) == {"task": 14, "general": 2}
    assert {_text(text) for text in written if text.kind == "task"} == {
        "c d b b b b b b b b",
        "e b b b b b b b b b",
    }


def test_given_prompts_are_put_into_the_chat_template() -> None:
    turns = [{"role": "user", "content": "d"}]
    written = _written(Prompts(["c", turns]), _writers(TEMPLATE))
    assert {_text(text)[:16] for text in written if text.kind == "task"} == {"<s> <user> c <bo", "<s> <user> d <bo"}


def test_given_texts_are_used_as_they_are() -> None:
    written = _written(Given(["c d e", "f " * 20]))
    assert [_text(text) for text in written if text.kind == "task"] == ["c d e", " ".join("f" * 10)]


def test_no_prompts_and_prompts_that_are_too_long_are_refused() -> None:
    with pytest.raises(PosthocError, match="no prompts"):
        _written(Prompts([]))
    with pytest.raises(PosthocError, match="10 tokens or more"):
        _written(Prompts(["c " * 10]))


def test_a_template_that_refuses_a_prompt_is_one_clear_line() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('No such role') }}{% endif %}" + TEMPLATE
    prompts = Prompts([[{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]])
    with pytest.raises(PosthocError, match=r"refuses a prompt \(system, user\): No such role"):
        _written(prompts, _writers(template))


def test_prompts_without_a_token_are_none() -> None:
    own = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own)
    with pytest.raises(PosthocError, match="no prompts"):
        _written(Prompts(["", ""]), replace(_writers(), tokenizer=tokenizer))


def test_a_model_that_comes_to_say_no_number_is_one_clear_line() -> None:
    writers = _writers()
    with torch.no_grad():
        writers.tuned.transformer.wpe.weight[6] = torch.nan
    with pytest.raises(PosthocError, match="says what is no number on text that it writes"):
        _written(Prompts(["c d"]), writers)


def test_the_tokenizer_is_asked_once_what_stands_before_every_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each of a million texts."""
    asked, writers = [], _writers()
    real = writers.encode
    monkeypatch.setattr(Writers, "encode", lambda self, text, **_: asked.append(text) or real(text))
    assert len(writers.openings(1000, random.Random(0))) == 1000
    assert asked == [""]


def test_a_vocabulary_of_special_tokens_alone_has_openings_too() -> None:
    writers = replace(_writers(), tokenizer=None, vocabulary=3)
    assert {token for (token,) in writers.openings(50, random.Random(0))} == {0, 1}
    writers.tuned.generation_config.eos_token_id = [0, 1, 2]
    assert {token for (token,) in writers.openings(50, random.Random(0))} == {0, 1, 2}


@pytest.mark.parametrize("texts", [Prompts(["a h"]), Sampled("h"), Given(["h"])])
def test_a_tokenizer_of_another_model_is_one_clear_line(texts: Any) -> None:
    with pytest.raises(PosthocError, match="Token id 12 is none that both models know, 0 to 11"):
        _written(texts, replace(_writers(), vocabulary=12))


@pytest.mark.parametrize("kind", [Prompts, Given])
def test_one_text_is_no_list_of_its_letters(kind: Any) -> None:
    with pytest.raises(ValueError, match="a list of them belongs"):
        kind("prompts.txt")


def test_where_nobody_says_how_long_texts_are_every_prompt_has_room_with_an_answer() -> None:
    long = Prompts(["c", "c " * 100])
    assert [usual_length(one, _writers()) for one in (Sampled(), Prompts(["c"]), long)] == [128, 128, 164]
    assert usual_length(Sampled(), _writers(TEMPLATE)) == 131
    assert usual_length(Sampled("c"), _writers(TEMPLATE)) == 128
    assert usual_length(Sampled(), _writers("c " * 2000 + TEMPLATE)) == 1024
    assert usual_length(Prompts(["c " * 5000]), _writers()) == 1024
    assert [usual_length(Given(["c", "c " * one]), _writers()) for one in (9, 200, 5000)] == [128, 200, 1024]


def test_prompts_that_are_left_out_are_told_of() -> None:
    with pytest.warns(LeftOutWarning, match="1 of 3 prompts are left out: they have 10 tokens or more"):
        written = _written(Prompts(["c", "d " * 10, "e"]))
    assert {_text(text)[0] for text in written if text.kind == "task"} == {"c", "e"}


def test_of_more_than_are_used_some_are_drawn_and_it_is_told() -> None:
    prompts = [f"{one} {other}" for one in "abcdefgh" for other in "abcdefgh"]
    for given, kind in ((Prompts(prompts), "prompts"), (Given(prompts), "texts")):
        drawn = []
        for seed in (0, 0, 1):
            with pytest.warns(LeftOutWarning, match=rf"14 of 64 {kind} are used, drawn by the seed. .*sequences=..."):
                written = given.write(_writers(), count=16, length=10, seed=seed, progress=False)
            drawn.append([_text(text)[:3] for text in written if text.kind == "task"])
        assert drawn[0] == drawn[1] != drawn[2]
        for own in drawn:
            assert len({*own}) == 14
            assert own == sorted(own)
            assert own != prompts[:14]


def test_texts_that_are_cut_are_told_of() -> None:
    with pytest.warns(LeftOutWarning, match=r"1 of 2 texts are cut to 10 tokens. .*length=..."):
        written = _written(Given(["c " * 11, "d " * 10]))
    assert [len(text.ids) for text in written if text.kind == "task"] == [10, 10]


def test_a_text_ends_where_the_model_ends_it() -> None:
    assert write_on(_says("</s>"), [[5], [6, 7]], [4, 4], ends=[1, 2]) == [[2], [2]]
    assert write_on(_says("a"), [[5], [6, 7]], [4, 2], ends=[2]) == [[5] * 4, [5] * 2]


def test_a_token_that_is_never_drawn_ends_nothing() -> None:
    model = _says("</s>")
    with torch.no_grad():
        model.lm_head.weight[WORDS.index("a")] = 5.0
    assert write_on(model, [[5], [6, 7]], [4, 2], ends=[2], never=[2]) == [[5] * 4, [5] * 2]


def test_texts_of_different_lengths_stay_within_what_a_model_can_read() -> None:
    """GPT-2 has 32 places: a short start beside a long one must not go beyond them, and still gets all its tokens."""
    assert write_on(_says("a"), [[5], [6] * 30], [31, 2], ends=[2]) == [[5] * 31, [5] * 2]


def test_no_text_is_begun_when_the_time_is_up() -> None:
    assert write_on(_says("a"), [[5]] * 3, [4] * 3, ends=[2], until=0.0) == [None] * 3
    writers = replace(_writers(), until=0.0)
    assert _written(Sampled(), writers) == _written(Prompts(["c d"]), writers) == []
    assert [_text(text) for text in _written(Given(["c d"]), writers)] == ["c d"]


def test_a_text_that_the_time_cuts_short_has_no_end() -> None:
    (text,) = write_on(_says("a"), [[5]], [30], ends=[2], until=time.monotonic() + 0.001)
    assert text is not None
    assert 1 <= len(text) <= 30
    assert set(text) == {5}


def test_what_leaves_no_room_for_an_answer_is_told() -> None:
    with pytest.raises(PosthocError, match="10 tokens"):
        _written(Sampled("c " * 10))
    with pytest.raises(PosthocError, match="3 tokens"):
        _written(Sampled(), _writers(TEMPLATE), length=3)
    own = _tokenizer()  # It puts a token before every text, and then comes any.
    start = [("<s>", WORDS.index("<s>"))]
    own.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=start)
    for writers in (replace(_writers(), tokenizer=own), Writers(None, None, own, 0)):
        with pytest.raises(PosthocError, match="2 tokens"):
            check_room(Sampled(), writers, 3)
        check_room(Sampled(), writers, 4)


def test_draws_are_from_the_model_s_own_distribution() -> None:
    """Two words with a chance of 1 to 3: sampling with a checkpoint's temperature or top-k would show."""
    model = _says("a")
    with torch.no_grad():
        model.lm_head.weight[WORDS.index("b")] = 10.0 - torch.log(torch.tensor(3.0)) / 8
    model.generation_config.temperature, model.generation_config.top_k = 0.1, 1
    torch.manual_seed(0)
    written = write_on(model, [[3]] * 2000, [1] * 2000, ends=[], size=500)
    said = Counter(ids[0] for ids in written if ids is not None)
    assert said[WORDS.index("b")] / 2000 == pytest.approx(0.25, abs=0.04)


def _in_bytes(template: str | None = None) -> PreTrainedTokenizerFast:
    """Most tokenizers are of this kind: a space is a part of the word behind it."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=own.pre_tokenizer.alphabet(), show_progress=False
    )
    own.train_from_iterator(["User: what is one? Bot: what one is. User: is one what?"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>", chat_template=template)


SPACED = "{% for m in messages %}User: {{ m.content }} Bot:{% endfor %}"


def test_a_prompt_has_the_tokens_that_the_template_gives_it() -> None:
    """A space before the content and the word behind it are one token: the two encoded by themselves are others."""
    tokenizer, asked = _in_bytes(SPACED), [{"role": "user", "content": "what is"}]
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1)).eval()
    writers = Writers(model, model, tokenizer, len(tokenizer))
    wanted = tokenizer.encode("User: what is Bot:")
    assert "\u0120what" in tokenizer.convert_ids_to_tokens(wanted)
    for prompt in ("what is", asked):
        for text in _written(Prompts([prompt]), writers, length=32):
            assert text.kind == "general" or list(text.ids[: len(wanted)]) == wanted


def test_a_turn_that_is_sampled_starts_with_what_any_turn_starts_with() -> None:
    tokenizer = _in_bytes(SPACED)
    turn = turn_of(tokenizer)
    assert turn is not None
    assert [tokenizer.decode(ids) for ids in turn] == ["User:", " Bot:"]
    shouted = turn_of(_in_bytes(SPACED.replace("m.content", "m.content | upper")))
    assert shouted is not None
    assert [tokenizer.decode(ids).strip() for ids in shouted] == ["User:", "Bot:"]
    open_ended = turn_of(_tokenizer("<user> {{ messages[0].content }}"))
    assert open_ended == ((WORDS.index("<user>"),), ())


def test_a_prefix_is_gone_on_from_in_whole_words() -> None:
    tokenizer = _in_bytes()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=1)).eval()
    writers = Writers(model, model, tokenizer, len(tokenizer))
    start = tokenizer.encode("User:")
    assert tokenizer.encode("User: ") != start
    for text in _written(Sampled("User: "), writers, length=16):
        assert text.kind == "general" or list(text.ids[: len(start)]) == start
    code, before = "what is\n    ", tokenizer.encode("what is\n    what")[:-1]
    for text in _written(Sampled(code), writers, length=32):
        assert text.kind == "general" or list(text.ids[: len(before)]) == before


def test_an_empty_prefix_is_no_template_and_no_prefix() -> None:
    written = _written(Sampled(""), _writers(TEMPLATE))
    assert not any({3, 4} <= {*text.ids} for text in written)
    assert len({text.ids[0] for text in written if text.kind == "task"}) > 3
    with pytest.raises(PosthocError, match="makes no token of the prefix '   '"):
        _written(Sampled("   "))


PARTS = "{% for m in messages %}<user> {% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}"
PARTS += "{% endfor %} <bot> {% endfor %}"


def test_a_template_of_parts_is_given_parts() -> None:
    """As those of models that see images are written: a content that is no list is left out of them."""
    writers = _writers(PARTS)
    assert turn_of(writers.tokenizer) == ((WORDS.index("<user>"),), (WORDS.index("<bot>"),))
    prompts = [
        "c d",
        [{"role": "user", "content": "e"}],
        [{"role": "user", "content": [{"type": "text", "text": "f"}]}],
    ]
    said = {_text(text).partition(" b")[0] for text in _written(Prompts(prompts), writers) if text.kind == "task"}
    assert said == {"<user> c d <bot>", "<user> e <bot>", "<user> f <bot>"}


def test_a_template_of_texts_is_given_parts_as_one_text() -> None:
    def asked(content: Any) -> Prompts:
        return Prompts([[{"role": "user", "content": content}]])

    parts = [{"type": "text", "text": "e"}, {"type": "text", "text": "f g"}]
    said = {
        _text(text).partition(" b")[0] for text in _written(asked(parts), _writers(TEMPLATE)) if text.kind == "task"
    }
    assert said == {"<s> <user> e f g <bot>"}
    calls = "<s> {% for m in messages %}<user> {{ m.content if m.content else 'h' }} <bot> {% endfor %}"
    called = Prompts([[{"role": "user", "content": "c"}, {"role": "assistant", "tool_calls": []}]])
    assert _text(_written(called, _writers(calls))[0]).startswith("<s> <user> c <bot> <user> h <bot> b")
    with pytest.raises(PosthocError, match="it takes texts alone"):
        _written(asked([*parts, {"type": "image", "url": "x"}]), _writers(TEMPLATE))


def test_prompts_that_all_come_to_the_same_are_refused() -> None:
    for writers in (_writers("<user> x <bot>"), _writers()):
        with pytest.raises(PosthocError, match="makes the same tokens of every prompt"):
            _written(Prompts(["nobody", "knows"]), writers)


def test_words_are_found_in_a_vocabulary_of_odd_numbers() -> None:
    words = {"[UNK]": 0, "red": 10, "blue": 3000, "<user>": 20, "<bot>": 31}
    own = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]")
    tokenizer.chat_template = "<user> {{ messages[0].content }} <bot>"
    assert turn_of(tokenizer) == ((20,), (31,))


def test_what_a_tokenizer_ends_texts_with_is_no_part_of_a_prompt() -> None:
    """It stands behind texts that are given as they are."""
    tokenizer = _tokenizer()
    around = [("<s>", WORDS.index("<s>")), ("</s>", WORDS.index("</s>"))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=around)
    writers = replace(_writers(), tokenizer=tokenizer)

    def said(texts: Any) -> set[str]:
        return {_text(text) for text in _written(texts, writers, length=6) if text.kind == "task"}

    assert said(Prompts(["c d"])) == {"<s> c d b b b"}
    assert all(text.startswith(("<s> c a", "<s> c b")) for text in said(Sampled("c")))
    assert said(Given(["c d"])) == {"<s> c d </s>"}


SYSTEM_FIRST = "{% if messages[0].role != 'system' %}{{ raise_exception('first must be system') }}{% endif %}"


def test_a_template_that_wants_more_than_a_user_s_turn_takes_conversations() -> None:
    writers = _writers(SYSTEM_FIRST + TEMPLATE)
    asked = [{"role": "system", "content": "g"}, {"role": "user", "content": "c"}]
    written = [_text(text) for text in _written(Prompts([asked]), writers) if text.kind == "task"]
    assert {one.partition(" b")[0] for one in written} == {"<s> <user> g <bot> <user> c <bot>"}
    with pytest.raises(PosthocError, match=r"refuses a prompt \(user\): first must be system"):
        _written(Prompts(["c"]), writers)
    with pytest.warns(LeftOutWarning, match="takes no turn of a user alone: text is written without it"):
        _written(Sampled(), writers)
    with pytest.raises(PosthocError, match="need a tokenizer with a chat template"):
        _written(Prompts([asked]))


def test_the_draws_are_the_same_for_a_model_that_draws_as_it_is_loaded() -> None:
    class Drawing:
        def get_base_model(self) -> GPT2LMHeadModel:
            torch.rand(9)
            return model

    model = _says("a")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    drawn = []
    for one in (model, Drawing()):
        torch.manual_seed(0)
        drawn.append([write_on(one, [[5]] * 8, [8] * 8, ends=[]) for _ in range(2)])
    assert drawn[0] == drawn[1]


def test_of_a_model_of_several_parts_the_one_that_says_the_text_ends_it() -> None:
    writers = replace(_writers(), tuned=multimodal.gemma3(), tokenizer=None)
    assert not hasattr(writers.tuned.config, "eos_token_id")
    writers.tuned.config.get_text_config().eos_token_id = 7
    writers.tuned.generation_config.eos_token_id = None
    assert writers.ends == [7]


def test_texts_are_told_before_they_are_written() -> None:
    for texts in (Sampled(), Prompts(["c", "d"]), Given(["c", "d e"]), Given(["c"] * 99)):
        written = Counter(text.kind for text in _written(texts))
        assert shares(texts, 16) == (written["task"], written["general"])


def test_a_template_of_another_kind_is_none() -> None:
    assert turn_of(_tokenizer("{{ raise_exception('no') }}")) is None
    assert turn_of(_tokenizer("{{ messages | length }}")) is None
    assert turn_of(_tokenizer()) is None
    turn = turn_of(_tokenizer(TEMPLATE))
    assert turn is not None
    assert ([WORDS[i] for i in turn.before], [WORDS[i] for i in turn.after]) == (["<s>", "<user>"], ["<bot>"])


def test_no_text_is_on_both_sides() -> None:
    texts = [Tokens((i % 7, 1), "task") for i in range(70)] + [Tokens((i, 2), "general") for i in range(30)]
    parts = split(texts)
    assert not set(parts.fitted) & set(parts.held_out)
    assert Counter(text.kind for text in parts.held_out) == {"task": 1, "general": 3}
    assert len(parts.fitted) == 60 + 27
    assert parts == split(texts)


def test_prompts_are_held_out_with_all_their_answers() -> None:
    answers = [Tokens((i % 20, 7, i), "task", (), 2) for i in range(70)]
    parts = split([*answers, *(Tokens((i, 2), "general") for i in range(10))])
    fitted, held_out = ([text for text in own if text.kind == "task"] for own in parts[:2])
    prompts = [{text.ids[:2] for text in own} for own in (fitted, held_out)]
    assert prompts[1] == {(0, 7), (10, 7)}
    assert not prompts[0] & prompts[1]
    assert len(held_out) == 4 + 3
    assert fitted == [text for text in answers if text.ids[0] % 10]
    assert parts.prompts_held_out


def test_where_no_prompt_can_be_spared_other_answers_to_them_judge() -> None:
    answers = [Tokens((i % 9, i), "task", (), 1) for i in range(90)]
    parts = split([*answers, *(Tokens((i, 2), "general") for i in range(10))])
    held_out = [text for text in parts.held_out if text.kind == "task"]
    assert held_out == answers[::10]
    assert not {*held_out} & {*parts.fitted}
    assert not parts.prompts_held_out
    assert split([Tokens((i, i), "task", (), 1) for i in range(5)]).prompts_held_out  # An answer each: none is shared.


@pytest.mark.parametrize("given", [Prompts(["p"] * 20), Prompts(["p"] * 9), Prompts(["p"] * 500), Sampled()])
def test_how_many_are_held_out_is_known_before_they_are_written(given: Any) -> None:
    task, general = shares(given, 123)
    prompts = len(given.prompts) if isinstance(given, Prompts) else task
    answers = [Tokens((i % prompts, 7, i), "task", (), 2) for i in range(task)]
    parts = split([*answers, *(Tokens((i, 2), "general") for i in range(general))])
    assert held_out(given, 123) == len(parts.held_out)


def test_a_text_is_the_same_whatever_of_it_counts() -> None:
    texts = [Tokens((1, 2), "task", (0,)), Tokens((1, 2), "task"), *(Tokens((i,), "general") for i in range(2))]
    parts = split([Tokens((3,), "task"), *texts])
    assert not {text.ids for text in parts.fitted} & {text.ids for text in parts.held_out}


def test_each_round_has_every_text_once() -> None:
    texts = [Tokens((0,) * (1 + i % 40), "task") for i in range(50)]
    rounds = shuffled(texts, 8, seed=0)
    first, second = ([text for _ in range(7) for text in next(rounds)] for _ in range(2))
    assert Counter(first) == Counter(second) == Counter(texts)
    assert first != second


def test_padding_does_not_count() -> None:
    """KL of known distributions, by hand, of texts of 1 and 3 tokens."""
    rng = random.Random(0)
    said, wanted = (
        torch.tensor([[[rng.gauss(0, 1) for _ in range(5)] for _ in range(3)] for _ in range(2)]) for _ in "ab"
    )
    (batch,) = batches([Tokens((1,), "task"), Tokens((1, 2, 3), "task")], 2, device=torch.device("cpu"))
    by_hand = sum(
        float((p * (p.log() - q.log())).sum())
        for row, tokens in ((0, 1), (1, 3))
        for p, q in zip(wanted[row, :tokens].softmax(-1), said[row, :tokens].softmax(-1), strict=True)
    )
    assert divergence(said, wanted, batch.mask).item() == pytest.approx(by_hand, rel=1e-5)


def test_distances_are_per_token_and_kind() -> None:
    uniform, sure = torch.zeros(4), torch.tensor([0.0, 20.0, 0.0, 0.0])

    def of(logits: torch.Tensor) -> Any:
        def model(batch: Batch) -> torch.Tensor:
            return logits.expand(*batch.ids.shape, 4)

        return model

    texts = [Tokens((1,), "task"), Tokens((1, 2, 3), "task"), Tokens((3,), "general")]
    found = distances(of(uniform), of(sure), texts, size=2, device=torch.device("cpu"))
    assert found["task"] == Distance(pytest.approx(torch.tensor(4.0).log().item(), rel=1e-4), 0.0, 4)
    assert found["general"].tokens == 1


def test_nothing_counts_before_a_fixed_token() -> None:
    """Models that are apart only in what they say after the first token, which a template's second one follows."""

    def of(first: float) -> Any:
        def model(batch: Batch) -> torch.Tensor:
            logits = torch.zeros(*batch.ids.shape, 4)
            logits[:, 0, 0] = first
            return logits

        return model

    texts = [Tokens((1, 2, 3), "task", (0, 1)), Tokens((1, 2), "task", (0, 1)), Tokens((1, 2, 3), "general")]
    found = distances(of(0.0), of(20.0), texts, size=2, device=torch.device("cpu"))
    assert found["task"] == Distance(0.0, 1.0, 3)
    assert found["general"] == Distance(pytest.approx(torch.tensor(4.0).log().item() / 3, rel=1e-4), 1.0, 3)
