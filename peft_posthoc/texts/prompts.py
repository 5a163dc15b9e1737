"""Prompts and texts in files: a line each, JSON, JSON lines, parquet; and in data sets on the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from peft_posthoc.errors import MissingExtraError, PosthocError, one_line
from peft_posthoc.files import regular
from peft_posthoc.json_file import parse_json
from peft_posthoc.text import asked

FIELDS = ("prompt", "messages", "conversations", "question", "instruction", "input", "text")
"""Fields that hold a prompt, the likeliest first."""
_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
_LARGEST = 1 << 30
"""Bytes of a file of prompts that are read at most."""
_MOST = 10_000
"""Records of a data set that are read at most."""


def read_prompts(path: str | Path, field: str | None = None) -> list[Any]:
    """The prompts in a file: texts, or lists of messages. Empty ones are left out.

    Args:
        path: `.txt` has one a line; `.jsonl`, `.json` and `.parquet` have texts, or objects with a field that holds it.
            What is no file may be a data set on the hub, `org/name`: the first records of its `train` are read.
        field: That field; by default the first of `FIELDS` that is there.

    Raises:
        PosthocError: The file cannot be read, or holds no prompts.
    """
    file = Path(path)
    try:
        if _is_data_set(file):
            found = _of_data_set(str(path))
        elif regular(file).stat().st_size > _LARGEST:
            raise PosthocError(f"`{path}` has more than {_LARGEST >> 30} GiB. Give a part of it.")
        else:
            found = list(_records(file, field))
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


def _is_data_set(file: Path) -> bool:
    if file.is_dir():
        return True
    return (
        not file.exists() and file.suffix.lower() not in _SUFFIXES and len(file.parts) == 2 and not file.is_absolute()
    )


def _of_data_set(name: str) -> list[Any]:
    """The first records of a data set on the hub, or of a folder of its files."""
    try:
        import datasets

        if int(datasets.__version__.split(".")[0]) < 4:
            raise ImportError("It runs code that comes with data sets.")
    except ImportError as error:
        raise MissingExtraError(
            f"`{name}` is no file. Data sets on the hub need datasets 4 or newer: "
            "`pip install 'peft-posthoc[datasets]'`."
        ) from error
    try:
        parts = datasets.load_dataset(name, streaming=True)
        return list(islice(parts["train"] if "train" in parts else next(iter(parts.values())), _MOST))
    except Exception as error:  # Of many kinds: of the hub's client, and of the reader of each type of file.
        raise PosthocError(f"`{name}` is no file, and `datasets` cannot read it: {one_line(error)}") from error


def _records(file: Path, field: str | None) -> Iterable[Any]:
    match file.suffix.lower():
        case ".jsonl" | ".ndjson":
            with file.open(encoding="utf-8-sig") as lines:
                for i, line in enumerate(lines):
                    if line.strip():
                        yield _json(line.rstrip(), i)
        case ".json":
            content = _json(file.read_text(encoding="utf-8-sig"))
            yield from content if isinstance(content, list) else _rows(content, field)
        case ".parquet":
            try:
                from pyarrow import parquet  # type: ignore[import-untyped]
            except ImportError as error:
                raise PosthocError("Parquet files need pyarrow: `pip install pyarrow`.") from error
            yield from parquet.read_table(file).to_pylist()
        case ".txt":
            with file.open(encoding="utf-8-sig") as lines:
                yield from lines
        case _:
            raise PosthocError(f"`{file}` must end in .txt, .jsonl, .json or .parquet.")


def _rows(content: Any, field: str | None) -> Iterable[Any]:
    """The records in an object: `{"data": [...]}`, as some tools write, a column by its name, or one record."""
    if not isinstance(content, Mapping):
        return [content]
    names = [field] if field else FIELDS
    lists = [value for value in content.values() if isinstance(value, list)]
    for rows in lists:
        if any(isinstance(row, Mapping) and {*names} & row.keys() for row in rows):
            return rows
    for name in names:
        if isinstance(value := content.get(name), list) and not _is_conversation(value):
            return ({name: one} for one in value)
        if value:
            return [content]
    return lists[0] if len(lists) == 1 else [content]


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and any(
        isinstance(turn, Mapping) and {"role", "from"} & turn.keys() for turn in value
    )


def _json(text: str, before: int = 0) -> Any:
    """What a text says, with so many lines before it."""
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {before + error.lineno}, column {error.colno}: {error.msg}.") from error


def _prompt(record: Any, field: str | None, where: str) -> Any:
    if isinstance(record, Mapping):
        known = [name for name in ([field] if field else FIELDS) if name in record]
        if not known:
            own = ", ".join(map(str, record))
            raise PosthocError(f"{where} has the fields {own}: name the one with the prompt, `{asked('field', None)}`.")
        said = next((name for name in known if record[name]), None)
        record = _with_input(record) if said == "instruction" and not field else record[said] if said else None
    elif field and record and not (isinstance(record, str) and record.isspace()):
        raise PosthocError(f"{where} has no fields: leave out `{asked('field', None)}`.")
    if record is None:
        return None
    if isinstance(record, list):
        return _messages(record, where)
    return _text(record, where).strip()


def _with_input(record: Mapping[str, Any]) -> Any:
    """An instruction, and what it is about, where that is a field of its own (Alpaca's form)."""
    said, about = record["instruction"], record.get("input")
    return f"{said}\n{about}" if isinstance(said, str) and isinstance(about, str) and about else said


def _text(found: Any, where: str) -> str:
    if not isinstance(found, str):
        raise PosthocError(f"{where} is no text but {type(found).__name__}.")
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise PosthocError(f"{where} holds half of a character, {found[error.start]!a}.") from error
    return found


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
    if any(turn["role"] is None for turn in said):
        raise PosthocError(f"{where} is no list of messages with role and content.")
    while said and said[-1]["role"] != "user":
        said.pop()
    if any(turn["content"] is None for turn in said):
        return []
    for turn in said:
        _check_content(turn["content"], where)
    return said


def _check_content(content: Any, where: str) -> None:
    for part in content if isinstance(content, list) else [{"text": content}]:
        _text(part.get("text", "") if isinstance(part, Mapping) else part, where)
