"""Prompts and texts in files: a line each, JSON, JSON lines, parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft_posthoc.errors import PosthocError
from peft_posthoc.files import regular
from peft_posthoc.json_file import read_json
from peft_posthoc.text import asked

FIELDS = ("prompt", "messages", "conversations", "question", "instruction", "input", "text")
"""Fields that hold a prompt, the likeliest first."""
_LARGEST = 1 << 30
"""Bytes of a file of prompts that are read at most."""


def read_prompts(path: str | Path, field: str | None = None) -> list[Any]:
    """The prompts in a file: texts, or lists of messages.

    Args:
        path: `.txt` has one a line; `.jsonl`, `.json` and `.parquet` have texts, or objects with a field that holds it.
        field: That field; by default the first of `FIELDS` that is there.

    Raises:
        PosthocError: The file cannot be read, or holds no prompts.
    """
    file = Path(path)
    try:
        if regular(file).stat().st_size > _LARGEST:
            raise PosthocError(f"`{path}` has more than {_LARGEST >> 30} GiB. Give a part of it.")
        found = list(_records(file))
    except (OSError, ValueError) as error:
        raise PosthocError(f"`{path}` cannot be read: {error}") from error
    prompts = [_prompt(record, field, f"`{path}`, record {i + 1}") for i, record in enumerate(found)]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise PosthocError(f"`{path}` holds no prompts.")
    return prompts


def read_texts(path: str | Path, field: str | None = None) -> list[str]:
    """The texts in a file, as `read_prompts` takes it.

    Raises:
        PosthocError: The file cannot be read, or holds no texts.
    """
    found = read_prompts(path, field)
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise PosthocError(f"`{path}`, text {i + 1} is a list of messages: give it as `{asked('prompts', None)}`.")
    return found


def _records(file: Path) -> Iterable[Any]:
    match file.suffix:
        case ".jsonl" | ".ndjson":
            with file.open(encoding="utf-8") as lines:
                yield from (json.loads(line) for line in lines if line.strip())
        case ".json":
            content = read_json(file)
            if isinstance(content, Mapping):  # {"data": [...]}, as some tools write.
                content = next((value for value in content.values() if isinstance(value, list)), [content])
            yield from content
        case ".parquet":
            try:
                from pyarrow import parquet  # type: ignore[import-untyped]
            except ImportError as error:
                raise PosthocError("Parquet files need pyarrow: `pip install pyarrow`.") from error
            yield from parquet.read_table(file).to_pylist()
        case ".txt":
            yield from file.read_text(encoding="utf-8").splitlines()
        case _:
            raise PosthocError(f"`{file}` must end in .txt, .jsonl, .json or .parquet.")


def _prompt(record: Any, field: str | None, where: str) -> Any:
    if isinstance(record, Mapping):
        chosen = field or next((name for name in FIELDS if record.get(name)), None)
        if chosen is None or chosen not in record:
            raise PosthocError(f"{where} has the fields {', '.join(map(str, record))}: name the one with the prompt.")
        record = record[chosen]
    if isinstance(record, list):
        return _messages(record, where)
    if not isinstance(record, str):
        raise PosthocError(f"{where} is no text but {type(record).__name__}.")
    return record.strip()


def _messages(turns: list[Any], where: str) -> list[dict[str, str]]:
    """A conversation up to its last user turn, in the words of chat templates; ShareGPT's are known too."""
    roles = {"human": "user", "gpt": "assistant"}
    try:
        said = [
            {
                "role": roles.get(turn.get("role", turn.get("from")), turn.get("role", turn.get("from"))),
                "content": turn["content"] if "content" in turn else turn["value"],
            }
            for turn in turns
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise PosthocError(f"{where} is no list of messages with role and content.") from error
    while said and said[-1]["role"] != "user":
        said.pop()
    return said
