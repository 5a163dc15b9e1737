"""A checkpoint on the Hugging Face hub: only the files that are needed are fetched, at one resolved commit."""

from __future__ import annotations

import re
from glob import escape
from pathlib import Path
from typing import NamedTuple

from peft_posthoc.errors import CheckpointError
from peft_posthoc.folder import is_index, no_weights, shards_of, weight_files

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


# An adapter's files, as PEFT names them.
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


class Fetched(NamedTuple):
    """What was fetched of a repository."""

    folder: Path
    commit: str | None


def is_repo_id(source: str) -> bool:
    """Whether `source` could be a hub id, by its form alone."""
    return _REPO_ID.fullmatch(source) is not None


def fetch(repo_id: str, *, revision: str | None = None, role: str = "source", adapter: bool | None = None) -> Fetched:
    """Download the configuration and weights of a hub repository into the hub's own cache.

    Args:
        repo_id: `org/name`.
        revision: Branch, tag or commit; the default branch if None.
        role: What messages call it.
        adapter: Whether it is the LoRA adapter that is wanted; if None, where the repository has no whole weights.

    Raises:
        CheckpointError: No such repository or revision, no access, no connection, or no weights in it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(repo_id, revision=revision)
        names = {entry.rfilename for entry in info.siblings or ()}
        wanted = [] if adapter else weight_files(names)
        if not wanted and (adapter or (adapter is None and _ADAPTER[0] in names)):
            wanted = [file for file in _ADAPTER if file in names]
        if not wanted:
            raise CheckpointError(no_weights(f"`{repo_id}` on the hub", names))

        def get(files: list[str]) -> Path:
            return Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=[escape(file) for file in files]))

        folder = get([*wanted, "config.json"])
        if is_index(wanted[0]):
            shards = sorted(set(shards_of(folder / wanted[0]).values()))
            missing = [shard for shard in shards if shard not in names]
            if missing:
                raise CheckpointError(
                    f"The index of `{repo_id}` names shards that are not there: {', '.join(missing)}."
                )
            get(shards)
    except CheckpointError:
        raise
    except Exception as error:
        # The hub's client raises its own errors and those of whichever HTTP library it is built on.
        where = f"{repo_id}{f'@{revision}' if revision else ''}"
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, RevisionNotFoundError):
            why = f"`{repo_id}` on the hub has no revision `{revision or 'main'}`. Give a branch, tag or commit of it."
        elif isinstance(error, GatedRepoError):
            why = f"`{repo_id}` on the hub is gated. Ask for access on its page, and log in with `hf auth login`."
        elif isinstance(error, RepositoryNotFoundError):
            why = (
                f"`{repo_id}` is neither a local folder nor a repository on the hub that you can see. Check the name; "
                "for a private one, log in with `hf auth login`."
            )
        else:
            why = (
                f"`{where}` is no local folder, and could not be fetched from the hub: {first.rstrip('.')}. Without a "
                "connection, give a local folder."
            )
        raise CheckpointError(f"The {role} {why}") from error
    return Fetched(folder, info.sha)
