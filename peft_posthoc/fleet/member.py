"""A fine-tune of a fleet, and what became of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft_posthoc.errors import FetchError, PosthocError, one_line
from peft_posthoc.extraction.begun import Begun
from peft_posthoc.extraction.outcomes import Outcome
from peft_posthoc.sources import Source

State = Literal["made", "was there", "failed", "open"]


@dataclass
class Member:
    """A fine-tune on its way to an adapter."""

    name: str
    source: Source
    place: Path
    begun: Begun | None = None
    error: str | None = None
    """The one line that says why there is no adapter."""
    state: State = "open"
    keeps: bool = False
    """Whether what is done is of use to a later run, though this one failed."""
    outcomes: list[Outcome] = field(default_factory=list)
    """Results in memory, where none can be kept on disk."""
    report: Mapping[str, Any] | None = None
    """The adapter's report, as it lies beside it."""

    @property
    def is_open(self) -> bool:
        """Whether there is something left to do."""
        return self.state == "open"

    @property
    def work(self) -> Begun:
        """What was begun."""
        if self.begun is None:
            raise ValueError(f"`{self.name}` is not begun.")
        return self.begun

    def fail(self, error: Exception) -> None:
        """Note what went wrong; the others go on."""
        known = isinstance(error, PosthocError | ValueError | OSError)
        what = "" if known else f"Unexpected {type(error).__name__}: "
        self.error, self.state = f"{what}{one_line(error)}", "failed"
        self.keeps = isinstance(error, FetchError)
        self.outcomes.clear()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """What goes wrong in the `with` block is this fine-tune's alone."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            self.fail(error)
