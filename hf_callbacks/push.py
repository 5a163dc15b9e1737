"""Finished adapters on their way to the hub, while training goes on."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi

from hf_callbacks.pin import hold
from hf_callbacks.run import FINAL
from peft_posthoc.adapters.card import CARD, card_of
from peft_posthoc.errors import one_line


class Sent(NamedTuple):
    """An upload that came to its end."""

    name: str
    """Of the adapter's folder: `step-100` or `final`."""
    failure: str | None
    """Why it is not on the hub."""


class Push:
    """Uploads to one repository, one after the other: `final` to its root, the others to folders of their names.

    Args:
        repo_id: `org/name`.
        work: Where adapters are held until they are on the hub: those of steps may be let go before. What an
            interrupted run left there is uploaded first.
        private: Whether the repository is private, if it is made now.
        token: The user's; by default that of `hf auth login`.
    """

    def __init__(self, repo_id: str, work: Path, *, private: bool, token: str | None) -> None:
        self.repo_id = repo_id
        self._work = work
        self._private = private
        self._made = False
        # Its uploads run in a thread, in the order in which they were asked for.
        self._api = HfApi(token=token)
        self._waiting: deque[tuple[str, Future[None]]] = deque()
        self._count = max((int(path.name) for path in work.glob("[0-9]*")), default=0)
        for held in sorted(work.glob("*/step-*[0-9]")):  # others were not whole when that run ended
            self._submit(held)
        for outdated in work.glob(f"*/{FINAL}"):
            shutil.rmtree(outdated.parent, ignore_errors=True)

    def __len__(self) -> int:
        """How many have not come to their end."""
        return len(self._waiting)

    def add(self, adapter: Path, *, step: int) -> None:
        """Upload an adapter after those that were asked for before."""
        # A folder for each: a resumed run may make a step's adapter again while the first is still on its way.
        self._count += 1
        held = self._work / f"{self._count:06}" / adapter.name
        hold(adapter, sorted(path.name for path in adapter.iterdir()), held)
        page = held / CARD
        page.unlink(missing_ok=True)  # it is a link: writing would change the adapter's own
        subfolder = None if held.name == FINAL else held.name
        page.write_text(card_of(adapter, step=step, repo_id=self.repo_id, subfolder=subfolder), encoding="utf-8")
        self._submit(held)

    def poll(self) -> list[Sent]:
        """Uploads that came to their end since it was last asked."""
        ended = []
        while self._waiting and self._waiting[0][1].done():
            ended.append(self._next())
        return ended

    def wait(self) -> Iterator[Sent]:
        """Every upload that is left, as it comes to its end."""
        while self._waiting:
            yield self._next()

    def _next(self) -> Sent:
        name, upload = self._waiting.popleft()
        error = upload.exception()
        return Sent(name, None if error is None else one_line(error).removesuffix("."))

    def _submit(self, held: Path) -> None:
        self._waiting.append((held.name, self._api.run_as_future(self._upload, held)))

    def _upload(self, held: Path) -> None:
        if not self._made:
            self._api.create_repo(self.repo_id, private=self._private, exist_ok=True)
            self._made = True
        self._api.upload_folder(
            repo_id=self.repo_id,
            folder_path=held,
            path_in_repo="" if held.name == FINAL else held.name,
            commit_message=f"Adapter {held.name}",
        )
        shutil.rmtree(held.parent, ignore_errors=True)
