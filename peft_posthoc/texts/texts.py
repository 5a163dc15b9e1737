"""Where the text comes from that an adapter is fitted on: prompts, texts as they are, or nothing but the two models."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from peft_posthoc.errors import LeftOutWarning, PosthocError, one_line
from peft_posthoc.progress import progress_bar
from peft_posthoc.text import asked
from peft_posthoc.texts.chat import Turn, has_template, takes_parts, turn_of, written
from peft_posthoc.texts.fixed import fixed_places
from peft_posthoc.texts.sampling import without_end
from peft_posthoc.texts.sequences import Tokens, held_out_of, spares
from peft_posthoc.texts.writers import Writers

_LENGTH, _ANSWER = 128, 64
"""Tokens of a text, and of an answer behind a long prompt."""
MOST = 1024
"""Tokens of a text at most where nobody says."""
_LOW = 0.7
"""The temperature at which the tuned model writes prompts: at 1 what it was tuned on is rare behind a random token."""


class Texts(Protocol):
    """What gives texts to fit on."""

    def write(self, writers: Writers, *, count: int, length: int, seed: int, progress: bool) -> list[Tokens]:
        """Some `count` texts of at most `length` tokens, the same for the same seed."""


@dataclass(frozen=True)
class Sampled:
    """No data: text that the models write themselves.

    A quarter is general: the base goes on from a random token. The rest looks like the task's: a turn of the user
    (behind the chat template's opening, or `prefix`, or a random token), then the answer of the tuned model. Half of
    these turns the base writes, half the tuned model at a low temperature: what it says then is what it was tuned on.
    How long a turn is, is drawn. Behind a chat template it does not end sooner: by themselves models ask short
    questions there, and many a task has a page before its question.

    Args:
        prefix: What a prompt starts with, where there is no chat template; if it is empty, any token does.
    """

    prefix: str | None = None

    def write(self, writers: Writers, *, count: int, length: int, seed: int, progress: bool) -> list[Tokens]:
        """Some `count` texts of at most `length` tokens, the same for the same seed."""
        draw, turn = random.Random(seed), _turn(self, writers.tokenizer)
        if self.prefix is None and turn is None and has_template(writers.tokenizer):
            warnings.warn(
                "The chat template takes no turn of a user alone: text is written without it. Give conversations as it "
                f"wants them (`{asked('prompts', None)}`).",
                LeftOutWarning,
                stacklevel=2,
            )
        _, general = shares(self, count)
        openings = writers.openings(count, draw)
        of_no_subject, openings = openings[:general], openings[general:]
        opening, after = self._around(writers, length)
        if opening:
            openings = [opening] * len(openings)
        # How long a prompt is, nobody knows: anything up to three quarters of the text.
        room = [draw.randint(1, max(1, 3 * (length - len(opening) - len(after)) // 4)) for opening in openings]
        ends, never = writers.ends, list[int]()
        if turn is not None:
            special = writers.special
            # What a template of plain text goes on with, such as a line's end, may be text, and ends a turn.
            ends = [i for i in after[:1] if i not in special]
            never = sorted({*special, *(i for i in writers.ends if i not in ends)} if special else ())
        half = len(openings) // 2
        with _seeded(seed), progress_bar(total=2 * count - general, desc="Writing text", progress=progress) as bar:
            # Each of the parts, and the answers, takes about as long as it has texts.
            texts = writers.general(of_no_subject, length, bar, share=1 / 7)
            written = writers.write_on(
                writers.base, openings[:half], room[:half], ends=ends, never=never, progress=bar, share=1 / 4
            )
            written += writers.write_on(
                writers.tuned,
                openings[half:],
                room[half:],
                ends=ends,
                never=never,
                progress=bar,
                share=1 / 3,
                temperature=_LOW,
            )
            starts = [
                [*opening, *without_end(more, ends), *after]
                for opening, more in zip(openings, written, strict=True)
                if more is not None
            ]
            return texts + _answered(writers, starts, length, bar)

    def _around(self, writers: Writers, length: int) -> tuple[list[int], list[int]]:
        """What stands before a prompt, if that is no random token, and after it.

        Raises:
            PosthocError: It leaves no room for a prompt and its answer.
        """
        turn = _turn(self, writers.tokenizer)
        before, after = ([], []) if turn is None else (list(turn.before), list(turn.after))
        if self.prefix:  # Most tokenizers have a space before a word as a part of it: the models write it.
            before = writers.encode(self.prefix.removesuffix(" "))
            if not before:
                raise PosthocError(f"The tokenizer makes no token of the prefix {self.prefix!r:.40}.")
        opening = len(before) or len(writers.before) + 1  # Any token stands there else.
        if (taken := opening + len(after)) + 1 >= length:
            raise PosthocError(
                f"What stands around a prompt has {taken} tokens, which leaves no room in texts of {length} tokens for "
                f"a prompt and its answer. Allow longer texts (`{asked('length', None)}`)."
            )
        return before, after


@dataclass(frozen=True)
class Prompts:
    """Unlabelled prompts, answered by the tuned model; an eighth of all text is general, written by the base.

    Args:
        prompts: Each a text, which the chat template is put around if there is one; or a list of messages.
    """

    prompts: Sequence[str | Sequence[dict[str, str]]]

    def __post_init__(self) -> None:
        _check_list(self.prompts)

    def write(self, writers: Writers, *, count: int, length: int, seed: int, progress: bool) -> list[Tokens]:
        """Some `count` texts of at most `length` tokens, the same for the same seed."""
        if not self.prompts:
            raise PosthocError("There are no prompts.")
        draw, (task, general) = random.Random(seed), shares(self, count)
        own, too_long = self._starts(writers, length)
        if too_long:
            left = f"{too_long} of {len(own) + too_long} prompts are left out: they have {length} tokens or more."
            warnings.warn(f"{left} Allow longer texts (`{asked('length', None)}`).", LeftOutWarning, stacklevel=2)
        own = _drawn(own, task, draw, "prompts")
        # Each prompt is answered as often as it takes; another answer is another text.
        starts = [own[i % len(own)] for i in range(task)]
        openings = writers.openings(general, draw)
        with _seeded(seed), progress_bar(total=count, desc="Writing text", progress=progress) as bar:
            answered = _answered(writers, starts, length, bar, share=7 / 8)
            return answered + writers.general(openings, length, bar)

    def _starts(self, writers: Writers, length: int) -> tuple[list[list[int]], int]:
        """The prompts that leave room for an answer, and how many leave none.

        Raises:
            PosthocError: No prompt leaves any, or none has tokens.
        """
        own = [ids for ids in _encoded(writers, self.prompts) if ids]
        if not own:
            raise PosthocError("The tokenizer knows nothing of any prompt: there are no prompts.")
        short = [ids for ids in own if len(ids) < length]
        if not short:
            raise PosthocError(
                f"Every prompt has {length} tokens or more. Allow longer texts (`{asked('length', None)}`)."
            )
        return short, len(own) - len(short)


@dataclass(frozen=True)
class Given:
    """Texts as they are; an eighth of all text is general, written by the base.

    Args:
        texts: Each a text, or its token ids.
    """

    texts: Sequence[str | Sequence[int]]

    def __post_init__(self) -> None:
        _check_list(self.texts)

    def write(self, writers: Writers, *, count: int, length: int, seed: int, progress: bool) -> list[Tokens]:
        """Some `count` texts of at most `length` tokens, the same for the same seed."""
        own = self._tokens(writers)
        if not own:
            raise PosthocError("There are no texts.")
        writers.check(own)
        draw, (task, general) = random.Random(seed), shares(self, count)
        if cut := sum(len(ids) > length for ids in own):
            left = f"{cut} of {len(own)} texts are cut to {length} tokens."
            warnings.warn(f"{left} Allow longer texts (`{asked('length', None)}`).", LeftOutWarning, stacklevel=2)
        own = [ids[:length] for ids in _drawn(own, task, draw, "texts")]
        openings = writers.openings(general, draw)
        with _seeded(seed), progress_bar(total=general, desc="Writing text", progress=progress) as bar:
            written = writers.general(openings, length, bar)
        return [
            *(Tokens(tuple(ids), "task", fixed) for ids, fixed in zip(own, fixed_places(own), strict=True)),
            *written,
        ]

    def _tokens(self, writers: Writers) -> list[list[int]]:
        read = (writers.encode(text, whole=True) if isinstance(text, str) else list(text) for text in self.texts)
        return [ids for ids in read if ids]


def _drawn(own: list[list[int]], count: int, draw: random.Random, what: str) -> list[list[int]]:
    """So many of what is given, in its order; all if it is no more."""
    if len(own) <= count:
        return own
    used = f"{count} of {len(own)} {what} are used, drawn by the seed."
    warnings.warn(f"{used} Use more (`{asked('sequences', None)}`).", LeftOutWarning, stacklevel=3)
    return [own[i] for i in sorted(draw.sample(range(len(own)), count))]


def _check_list(texts: Sequence[Any]) -> None:
    if isinstance(texts, str):
        raise ValueError(f"One text where a list of them belongs: `[{texts!r:.40}]` is one.")


def shares(texts: Texts, count: int) -> tuple[int, int]:
    """Of some `count` texts, those like the task's, and the general ones."""
    general = max(2, count // 4) if isinstance(texts, Sampled) else count - of_data(count)
    task = count - general
    return min(task, len(texts.texts)) if isinstance(texts, Given) else task, general


def of_data(count: int) -> int:
    """Of some `count` texts, those that are of the user's data."""
    return count - max(2, count // 8)


def held_out(texts: Texts, count: int) -> int:
    """Of some `count` texts of a kind like the task's, and general ones, those that `split` holds out."""
    task, general = shares(texts, count)
    prompts = min(len(texts.prompts), task) if isinstance(texts, Prompts) else 0
    if spares(prompts):
        judges = held_out_of(prompts)
        return held_out_of(general) + sum(len(range(i * prompts // judges, task, prompts)) for i in range(judges))
    return held_out_of(general) + held_out_of(task)


def usual_length(texts: Texts, writers: Writers) -> int:
    """Tokens of a text at most where nobody says: room for every text, or every prompt and an answer, within reason.

    What a chat template puts around a turn that is sampled takes no room from it.
    """
    if isinstance(texts, Sampled) and (turn := _turn(texts, writers.tokenizer)) is not None:
        return min(_LENGTH + len(turn.before) + len(turn.after), MOST)
    longest = 0
    if isinstance(texts, Prompts):
        longest = _ANSWER + max(map(len, _encoded(writers, texts.prompts)), default=0)
    elif isinstance(texts, Given):
        longest = max(map(len, texts._tokens(writers)), default=0)
    return max(_LENGTH, min(longest, MOST))


def check_room(texts: Texts, writers: Writers, length: int) -> None:
    """See before any text is written that one of so many tokens has room for an answer.

    Raises:
        PosthocError: It has none, or the tokenizer makes nothing of prompts or prefix.
    """
    if isinstance(texts, Sampled):
        texts._around(writers, length)
    elif isinstance(texts, Prompts):
        texts._starts(writers, length)


def _turn(sampled: Sampled, tokenizer: Any) -> Turn | None:
    """What stands around a sampled turn; None if that is not a template."""
    return None if sampled.prefix is not None else turn_of(tokenizer)


def _answered(writers: Writers, starts: Sequence[list[int]], length: int, bar: Any, share: float = 1.0) -> list[Tokens]:
    """Each start with what the tuned model goes on with, its end included."""
    starts = [start[: length - 1] for start in starts]
    room = [length - len(start) for start in starts]
    written = writers.write_on(writers.tuned, starts, room, ends=writers.ends, progress=bar, share=share)
    return [
        Tokens((*start, *more), "task", fixed, len(start))
        for start, more, fixed in zip(starts, written, fixed_places(starts, starts=True), strict=True)
        if more is not None
    ]


def _encoded(writers: Writers, prompts: Sequence[str | Sequence[dict[str, str]]]) -> list[list[int]]:
    """Each prompt as token ids, up to where its answer starts.

    Raises:
        PosthocError: There is no chat template for conversations, or it refuses one, or what is said is not in them.
    """
    if has_template(writers.tokenizer):
        parts = takes_parts(writers.tokenizer)
        found = [_by_template(writers.tokenizer, prompt, parts=parts) for prompt in prompts]
    elif all(isinstance(prompt, str) for prompt in prompts):
        found = [writers.encode(str(prompt)) for prompt in prompts]
    else:
        raise PosthocError("Prompts that are lists of messages need a tokenizer with a chat template.")
    if found and found[0] and len({*map(tuple, found)}) == 1 < len({*map(repr, prompts)}):
        raise PosthocError("The chat template, or the tokenizer, makes the same tokens of every prompt.")
    return found


def _by_template(tokenizer: Any, prompt: str | Sequence[dict[str, str]], *, parts: bool) -> list[int]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return written(tokenizer, messages, parts=parts)
    except Exception as error:  # Templates are programs; some refuse roles, or an order of them.
        roles = ", ".join(str(message["role"]) for message in messages)
        raise PosthocError(f"The chat template refuses a prompt ({roles}): {one_line(error)}") from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """PyTorch's random numbers from a seed of their own, and as they were after it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
