"""The files beside a model's weights that say how text is cut into tokens, framed and generated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from peft_posthoc.checkpoints.checkpoint import Checkpoint, place_of
from peft_posthoc.checkpoints.hub import fetch_beside, is_repo_id

TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
    *("*.tiktoken", "chat_template*", "additional_chat_templates/*.jinja"),
)
_OF_TEXT = (*TOKENIZER, "generation_config.json")


def files_of_text(checkpoint: Checkpoint) -> dict[str, Path]:
    """By name: tokenizer, chat template and generation config of a model; nothing if it has no folder.

    Raises:
        CheckpointError: They are on the hub, and could not be fetched.
    """
    folder = place_of(checkpoint)
    if folder is None:
        return {}
    if checkpoint.revision is not None and is_repo_id(checkpoint.label):
        fetch_beside(checkpoint.label, _OF_TEXT, revision=checkpoint.revision)
    files = text_files_in(folder)
    if "tokenizer.json" in files:
        files.pop("added_tokens.json", None)  # All are in there, and engines refuse an adapter with this file.
    return files


def text_files_in(folder: Path) -> dict[str, Path]:
    """By name: the same of a folder, all that there are."""
    return dict(matching(folder, _OF_TEXT))


def matching(folder: Path, patterns: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Names, relative to a folder, and paths of its files that match one of the patterns."""
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                yield path.relative_to(folder).as_posix(), path
