"""An adapter to the hub: its files, and a model card that says how to load it from there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from peft_posthoc.adapters.card import CARD, MARK, card_of, is_our_card
from peft_posthoc.adapters.config import WEIGHTS, read_config
from peft_posthoc.adapters.writer import adapter_files
from peft_posthoc.checkpoints.hub import is_repo_id
from peft_posthoc.errors import AdapterError, OutputError, one_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def push(
    adapter: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    force: bool = False,
    token: str | None = None,
) -> str:
    """Upload an adapter to a repository on the hub, which is made if it is not there.

    Nothing but the adapter goes there: what else lies in its folder does not. A model card that is not ours stays, in
    the folder and on the hub.

    Args:
        adapter: An adapter folder, whoever made it.
        repo_id: `org/name`.
        private: Whether the repository is private, if it is made now.
        force: Replace a model card that somebody wrote.
        token: The user's; by default that of `hf auth login`.

    Returns:
        The address of the repository.

    Raises:
        AdapterError: There is no adapter.
        OutputError: The hub does not take it.
        ValueError: `repo_id` is no hub id.
    """
    folder = Path(adapter)
    if not is_repo_id(repo_id):
        raise ValueError(f"`{repo_id}` is no hub id such as `org/name`.")
    read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(f"`{folder}` holds no `{WEIGHTS}`.")
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    page = folder / CARD
    theirs = page.is_file() and not is_our_card(page) and not force
    content = page.read_bytes() if theirs else card_of(folder, repo_id=repo_id).encode()
    with _told(repo_id):
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        names = sorted(adapter_files(folder) - {CARD})
        files = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
        if force or not _has_card_of_others(api, repo_id):
            files.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=content))
        api.create_commit(repo_id, files, commit_message="LoRA adapter")
    return str(address)


class CanPush:
    """What is saved as an adapter folder, and pushed as one."""

    def push_to_hub(self, repo_id: str, *, private: bool = False, force: bool = False, token: str | None = None) -> str:
        """Upload it to a repository on the hub, as `phlora push` does with a folder.

        Args:
            repo_id: `org/name`; made if it is not there.
            private: Whether the repository is private, if it is made now.
            force: Replace a model card that somebody wrote.
            token: The user's; by default that of `hf auth login`.

        Returns:
            The address of the repository.

        Raises:
            OutputError: The hub does not take it.
            ValueError: `repo_id` is no hub id.
        """
        with TemporaryDirectory(prefix="phlora-") as work:
            place = Path(work) / "adapter"
            self.save(place)  # type: ignore[attr-defined]  # of whatever this is mixed into
            return push(place, repo_id, private=private, force=force, token=token)


def _has_card_of_others(api: HfApi, repo_id: str) -> bool:
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    try:
        path = api.hf_hub_download(repo_id, CARD)
    except (EntryNotFoundError, RevisionNotFoundError):  # It is new, or empty.
        return False
    return MARK not in Path(path).read_text(encoding="utf-8", errors="replace")


@contextmanager
def _told(repo_id: str) -> Iterator[None]:
    """Say what is wrong in one line."""
    try:
        yield
    except Exception as error:  # The hub's client raises its own errors and those of the library below it.
        from huggingface_hub.constants import HF_HUB_OFFLINE

        why = one_line(error).removesuffix(".")
        advice = "" if HF_HUB_OFFLINE else " Check its name and your rights there; `hf auth login` logs you in."
        raise OutputError(f"`{repo_id}` on the hub did not take the adapter: {why}.{advice}") from error
