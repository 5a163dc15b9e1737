"""The two models that write text, and how text becomes tokens."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft_posthoc.compute.together import ALONE, Together
from peft_posthoc.errors import PosthocError
from peft_posthoc.texts.sampling import without_end, write_on
from peft_posthoc.texts.sequences import Tokens


@dataclass(frozen=True)
class Writers:
    """The two models that write, and how text becomes tokens."""

    base: Any
    tuned: Any
    """None, as the base, where nothing is written."""
    tokenizer: Any
    vocabulary: int
    """Tokens that both models know."""
    until: float = math.inf
    """When to stop, as `time.monotonic()` tells."""
    together: Together = ALONE
    """Processes that write together."""

    def write_on(
        self,
        model: Any,
        starts: Sequence[Sequence[int]],
        room: Sequence[int],
        *,
        ends: Sequence[int],
        never: Sequence[int] = (),
        progress: Any,
        share: float = 1.0,
        temperature: float = 1.0,
    ) -> list[list[int] | None]:
        """What a model adds to each start, within a share of the time that is left; None where that was over.

        Raises:
            PosthocError: A start has tokens that the models do not know.
        """
        self.check(starts)
        now = time.monotonic()
        until = self.until if math.isinf(self.until) else now + share * max(self.until - now, 0.0)
        return write_on(
            model,
            starts,
            room,
            ends=ends,
            never=never,
            temperature=temperature,
            until=until,
            together=self.together,
            progress=progress,
        )

    def general(self, openings: Sequence[list[int]], length: int, bar: Any, share: float = 1.0) -> list[Tokens]:
        """What the base makes of texts of no subject."""
        room = [max(1, length - len(opening)) for opening in openings]
        written = self.write_on(self.base, openings, room, ends=self.ends, progress=bar, share=share)
        return [
            Tokens((*opening, *without_end(more, self.ends)), "general")
            for opening, more in zip(openings, written, strict=True)
            if more is not None
        ]

    def encode(self, text: str, *, whole: bool = False) -> list[int]:
        """A text as token ids, with what the tokenizer puts before every text; none where the text itself has none.

        Args:
            text: That a model goes on from.
            whole: With what the tokenizer puts behind every text, too.

        Raises:
            PosthocError: There is no tokenizer.
        """
        if self.tokenizer is None:
            raise PosthocError("Neither the tuned model nor the base has a tokenizer beside it; text needs one.")
        found = list(self.tokenizer.encode(text))
        if whole:
            return found
        own = list(self.tokenizer.encode(text, add_special_tokens=False))
        last = next((i for i in range(len(own), len(found) + 1) if found[i - len(own) : i] == own), len(found))
        return found[:last] if own else []

    @property
    def ends(self) -> list[int]:
        """Tokens that end a text, of the tuned model's configuration and of the tokenizer."""
        told = [getattr(self.tokenizer, "eos_token_id", None)]
        if self.tuned is not None:
            config = self.tuned.config  # Of several models, such as one that sees and one that says, the last knows.
            places = config, config.get_text_config(), self.tuned.generation_config
            told += [getattr(own, "eos_token_id", None) for own in places]
        return sorted({i for one in told if one is not None for i in (one if isinstance(one, list) else [one])})

    @property
    def before(self) -> list[int]:
        """What the tokenizer puts before every text."""
        if self.tokenizer is None:
            return []
        start = getattr(self.tokenizer, "bos_token_id", None)
        return [i for i in self.encode("", whole=True) if i not in self.ends or i == start]

    @property
    def special(self) -> set[int]:
        """Tokens that are no text; none where that would be all."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {*(getattr(self.tokenizer, "all_special_ids", None) or self.ends)}
        special |= {i for i, token in added.items() if token.special}
        return set() if special.issuperset(range(self._words)) else special

    @property
    def _words(self) -> int:
        """Tokens that the tokenizer knows too."""
        return self.vocabulary if self.tokenizer is None else min(self.vocabulary, len(self.tokenizer))

    def check(self, texts: Sequence[Sequence[int]]) -> None:
        """See that both models know every token.

        Raises:
            PosthocError: They do not.
        """
        known = range(self.vocabulary)
        if (unknown := next((i for ids in texts for i in ids if i not in known), None)) is not None:
            raise PosthocError(f"Token id {unknown} is none that both models know, 0 to {self.vocabulary - 1}.")

    def openings(self, count: int, draw: random.Random) -> list[list[int]]:
        """What texts of no subject start with: what the tokenizer puts before every text, then any token."""
        vocabulary, special, before = self._words, self.special, self.before

        def token() -> int:
            while (found := draw.randrange(vocabulary)) in special:
                pass
            return found

        return [[*before, token()] for _ in range(count)]
