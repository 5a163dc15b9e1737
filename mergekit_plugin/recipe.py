"""A configuration of a merge: a file that anybody may have written, read within bounds, its mistakes in one line."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from mergekit.config import MergeConfiguration
from pydantic import ValidationError

from mergekit_plugin.method import NAME
from mergekit_plugin.no_code import needs_code
from peft_posthoc.errors import PosthocError, brief
from peft_posthoc.models.by_class import MOST

logger = logging.getLogger(__name__)

# The longest recipe that anybody writes by hand has a hundredth of these.
_BYTES = 200_000
_VALUES = 100_000


def read_recipe(file: Path) -> tuple[str, dict[str, Any]]:
    """The text of a configuration, and what it says.

    Raises:
        PosthocError: It is none, or larger than any is.
    """
    try:
        with file.open("rb") as opened:
            content = opened.read(_BYTES + 1)
        if len(content) > _BYTES:
            raise PosthocError(f"`{file}` is no configuration of a merge: it has more than {_BYTES} bytes.")
        source = content.decode()
    except UnicodeDecodeError as error:
        raise PosthocError(f"`{file}` is no YAML: {error}.") from error
    return source, _parse(source, file)


def _parse(source: str, file: Path) -> dict[str, Any]:
    try:
        loader = yaml.SafeLoader(source)
        nodes = []
        while loader.check_node():
            nodes.append(loader.get_node())
        # An alias stands for all that it names: a few lines can say more than there is memory for.
        if sum(map(_Counted().size, nodes)) > _VALUES:
            raise PosthocError(f"`{file}` is no configuration of a merge: it says more than {_VALUES} values.")
        documents = [loader.construct_document(node) for node in nodes]
    except yaml.YAMLError as error:
        raise PosthocError(f"`{file}` is no YAML: {error}.") from error
    except RecursionError as error:
        raise PosthocError(f"`{file}` is no configuration of a merge: it is nested too deep.") from error
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # What PyYAML makes of a value that is not of its tag or form, such as a 31st of February.
        raise PosthocError(f"`{file}` is no YAML: it holds a value that is none of its type ({error}).") from error
    if len(documents) > 1:
        raise PosthocError(
            f"`{file}` holds {len(documents)} configurations, which is for `mergekit-multi`. It takes "
            f"`merge_method: {NAME}` after `phlora mergekit enable`."
        )
    if not documents or not isinstance(documents[0], dict):
        raise PosthocError(f"`{file}` holds no configuration.")
    return documents[0]


class _Counted:
    """How many values nodes say, each alias as all that it names."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}

    def size(self, node: Any) -> int:
        """The values of a node."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in self._known:
            self._known[id(node)] = _VALUES  # a node that is part of itself says more than any
            parts = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
            self._known[id(node)] = 1 + sum(map(self.size, parts))
        return self._known[id(node)]


def validated(read: dict[str, Any], file: Path) -> MergeConfiguration:
    """A configuration as mergekit has it.

    Raises:
        PosthocError: mergekit does not take it, or it asks for more layers than can be waited for.
    """
    # mergekit overlooks them, and a misspelled one with them.
    for key in sorted(map(str, read.keys() - MergeConfiguration.model_fields.keys())):
        logger.warning("`%s` says `%s`, which means nothing to mergekit.", file, brief(key))
    with mergekit_refuses(file):
        config = MergeConfiguration.model_validate(read)
    layers = 0
    for piece in slices_of(config):
        if not piece.sources:
            raise PosthocError(f"`{file}` has a slice without `sources`.")
        for source in piece.sources:
            first, last = source.layer_range
            if last < first or (layers := layers + last - first) > MOST:
                raise PosthocError(f"`{file}` asks for layers {[first, last]} of `{source.model}`: no model has these.")
    return config


def slices_of(config: MergeConfiguration) -> list[Any]:
    """All slices that a configuration names, of all modules."""
    modules = (config.modules or {}).values()
    return [*(config.slices or ()), *(piece for module in modules for piece in module.slices or ())]


@contextlib.contextmanager
def mergekit_refuses(file: Path) -> Iterator[None]:
    """Tell in our way what mergekit finds wrong with a configuration: it has no errors of its own, but Python's.

    Raises:
        PosthocError: It finds something.
    """
    try:
        yield
    except (PosthocError, OSError, MemoryError):
        raise
    except ValidationError as error:
        parts = (f"{_place(one['loc'])}{one['msg']} (got {one['input']!r})" for one in error.errors())
        raise PosthocError(f"`{file}` is no configuration that mergekit takes. {'; '.join(parts)}.") from error
    except Exception as error:
        if needs_code(error):
            raise  # `no_code` tells it.
        what = str(error) if isinstance(error, RuntimeError | ValueError) else f"{type(error).__name__}: {error}"
        raise PosthocError(f"mergekit does not take `{file}`: {what}") from error


def _place(keys: Iterable[int | str]) -> str:
    name = ".".join(map(str, keys))
    return f"{name}: " if name else ""
