"""Parts of files on the Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from peft_posthoc.checkpoints.hub import Repository, told
from peft_posthoc.errors import CheckpointError, FetchError


@contextlib.contextmanager
def _now() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise FetchError(str(error)) from error


class HubFiles:
    """The files of a repository at one commit; each part is asked for again where the connection ends."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._tags: dict[str, str] = {}

    def fetch(self, file: str, start: int, end: int) -> bytes:
        """These bytes of a file.

        Raises:
            CheckpointError: The file is no longer the one that was asked for before.
            FetchError: They cannot be fetched.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff  # type: ignore[attr-defined]

        own = self._repository
        with _now(), told(own.repo_id, own.commit, own.role):
            answer = http_backoff(
                "GET",
                hf_hub_url(own.repo_id, file, revision=own.commit),
                headers={
                    **build_hf_headers(),
                    "Accept-Encoding": "identity",
                    "Range": f"bytes={start}-{end - 1}",
                },
                timeout=HF_HUB_DOWNLOAD_TIMEOUT,
            )
            hf_raise_for_status(answer)
        tag = answer.headers.get("ETag", "")
        if self._tags.setdefault(file, tag) != tag:
            raise CheckpointError(
                f"`{file}` of `{own.repo_id}` on the hub changed while it was read. Start again when nothing writes to "
                "it."
            )
        content: bytes = answer.content
        if answer.status_code != 206 or len(content) != end - start:
            raise CheckpointError(
                f"The hub sent {len(content)} bytes of `{file}` of `{own.repo_id}` in place of {end - start}. Fetch it "
                "whole, without streaming."
            )
        return content
