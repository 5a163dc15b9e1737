"""A checkpoint on the Hugging Face hub: only the files that are needed are fetched, at one resolved commit."""

from __future__ import annotations

import re
from pathlib import Path

from peft_posthoc.errors import CheckpointError
from peft_posthoc.folder import Folder, shards_of, weight_files

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repo_id(source: str) -> bool:
    """Whether `source` could be a hub id, by its form alone."""
    return _REPO_ID.fullmatch(source) is not None


def fetch(repo_id: str, *, revision: str | None = None, role: str = "source") -> Folder:
    """Download the configuration and weights of a hub repository into the hub's own cache, and open them.

    Args:
        repo_id: `org/name`.
        revision: Branch, tag or commit; the default branch if None.
        role: What messages call it.

    Raises:
        CheckpointError: No such repository or revision, no access, no connection, or no weights in it.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(repo_id, revision=revision)
        names = {entry.rfilename for entry in info.siblings or ()}
        wanted = weight_files(names)
        if not wanted:
            hint = " It is a LoRA adapter, not a full checkpoint." if "adapter_config.json" in names else ""
            raise CheckpointError(f"The {role} `{repo_id}` on the hub holds no weights in a known format.{hint}")

        def get(files: list[str]) -> Path:
            return Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=files))

        folder = get([*wanted, "config.json"])
        if wanted[0].endswith(".index.json"):
            get(sorted(set(shards_of(folder / wanted[0]).values())))
    except CheckpointError:
        raise
    except Exception as error:
        # The hub's client raises its own errors and those of whichever HTTP library it is built on.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"The {role} `{repo_id}` is no local folder, and could not be fetched from the hub"
            f"{f' at revision {revision}' if revision else ''}: {first}"
        ) from error
    return Folder(folder, label=repo_id, revision=info.sha)
