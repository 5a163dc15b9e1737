"""The fine-tunes of a fleet: what a user gives of them, and the name of each one's folder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path

from peft_posthoc.errors import CheckpointError
from peft_posthoc.files import regular
from peft_posthoc.sources import Source, sides

# A collection's address on the hub, or `collections/OWNER/TITLE-ID` of it.
_COLLECTION = re.compile(r"(?:https://huggingface\.co/)?collections/([^/\s]+/[^/\s]+)")


def listed(tuned: Iterable[str], base: str) -> list[str]:
    """What is given, with text files (`@FILE`, or `FILE.txt`) and collections on the hub replaced by what they list.

    Args:
        tuned: What is given.
        base: Which a collection may hold too.

    Raises:
        CheckpointError: A list is not there, is empty, or cannot be read.
    """
    found: list[str] = []
    for one in tuned:
        if one.startswith("@") or (one.endswith(".txt") and Path(one).is_file()):
            found += _lines(Path(one.removeprefix("@")))
        elif not Path(one).exists() and (collection := _COLLECTION.fullmatch(one.rstrip("/"))):
            found += [model for model in _models(collection[1]) if model != base.rstrip("/")]
        else:
            found.append(one)
    return found


def _lines(path: Path) -> list[str]:
    try:
        text = regular(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The list `{path}` cannot be read: {error}.") from error
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise CheckpointError(f"The list `{path}` is empty. Write a fine-tune on each line: a folder or a hub id.")
    return lines


def _models(slug: str) -> list[str]:
    from huggingface_hub import get_collection

    try:
        items = get_collection(slug).items
    except Exception as error:  # The client raises its own errors and those of its HTTP library.
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"The collection `collections/{slug}` could not be fetched from the hub: {first}"
        ) from error
    if models := [item.item_id for item in items if item.item_type == "model"]:
        return models
    raise CheckpointError(f"The collection `collections/{slug}` on the hub holds no models.")


def named(tuned: Mapping[str, Source] | Sequence[Source]) -> dict[str, Source]:
    """The fine-tunes by the names of their folders: the end of each path or id, as much of it as tells them apart.

    Raises:
        ValueError: There are none, one is given twice, or one has no name of its own.
    """
    if isinstance(tuned, Mapping):
        for name in tuned:
            if not name or Path(name).name != name or name.startswith("."):
                raise ValueError(f"`{name}` cannot be the name of an adapter's folder.")
        found = dict(tuned)
    else:
        if strangers := [type(one).__name__ for one in tuned if not isinstance(one, str | PathLike)]:
            raise ValueError(f"A {strangers[0]} has no name: give the fine-tunes as a mapping of names to them.")
        sources = [str(one) for one in tuned]
        if twice := sorted({one for one in sources if sources.count(one) > 1}):
            raise ValueError(f"`{twice[0]}` is given twice.")
        found = dict(zip(_apart([_parts(one) for one in sources]), tuned, strict=True))
    if not found:
        raise ValueError("There are no fine-tunes.")
    return found


def _parts(source: str) -> tuple[str, ...]:
    """The parts of a path, or of a hub id; of BASE+ADAPTER the adapter's."""
    both = sides(source) if not Path(source).exists() else None
    path = Path(both[1] if both else source)
    path = path.resolve() if path.exists() else path
    path = path.with_suffix("") if path.is_file() or path.suffix == ".gguf" else path
    return tuple(part.lstrip(".") or "_" for part in path.parts if part != path.anchor)


def _apart(paths: Sequence[tuple[str, ...]]) -> list[str]:
    taken = ["--".join(path[-1:]) for path in paths]
    for width in range(2, max(map(len, paths), default=0) + 1):
        taken = [
            "--".join(path[-width:]) if taken.count(name) > 1 else name
            for path, name in zip(paths, list(taken), strict=True)
        ]
    if twice := [name for name in taken if taken.count(name) > 1]:
        raise ValueError(f"Two of the fine-tunes are called `{twice[0]}`: they are one, or need names of their own.")
    return taken
