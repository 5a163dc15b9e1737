"""Code that comes with a model: mergekit has an option that runs it, and none is run here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mergekit.options import MergeOptions
from transformers import dynamic_module_utils

from peft_posthoc.errors import PosthocError

_INSTEAD = (
    "Where you trust it, merge with `mergekit-yaml --trust-remote-code`, and make the adapter with `phlora extract`."
)


def refuse_trust(options: MergeOptions) -> None:
    """See that mergekit is not asked to run it.

    Raises:
        PosthocError: It is.
    """
    if options.trust_remote_code:
        raise PosthocError(f"`--trust-remote-code`: no code that comes with a model is run here. {_INSTEAD}")


def needs_code(error: Exception) -> bool:
    """Tell whether it is transformers' refusal to read a model without code that comes with it."""
    return "trust_remote_code" in str(error)


@contextmanager
def no_code() -> Iterator[None]:
    """Let transformers refuse it where it would ask: where mergekit's `False` does not reach, models within models.

    For commands only: it is the whole process's.

    Raises:
        PosthocError: A model cannot be read without it.
    """
    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    except ValueError as error:
        if not needs_code(error):
            raise
        named = re.search(r"The repository (\S+) ", str(error))
        model = f"`{named[1]}`" if named else "A model of the merge"
        raise PosthocError(
            f"{model} cannot be read without code that comes with it, and none is run here. {_INSTEAD}"
        ) from error
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before
