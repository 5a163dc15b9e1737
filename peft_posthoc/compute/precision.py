"""Products in float32 that are float32."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

_precision = threading.Lock()
_users = 0
_before: list[str] = []


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Products in full float32, whatever a trainer around us has set: the three digits of TF32 certify nothing.

    The setting is the whole process': of several threads the first one in sets it, the last one out puts it back.
    """
    global _users, _before
    with _precision:
        if not _users:
            _before = _precisions()
            _set_precisions(["ieee"] * len(_before) if _BY_BACKEND else ["highest"])
        _users += 1
    try:
        yield
    finally:
        with _precision:
            _users -= 1
            if not _users:
                _set_precisions(_before)


# Since torch 2.9; the older setting raises where this one was used.
_BY_BACKEND = hasattr(torch.backends, "fp32_precision")


def _backends() -> tuple[Any, ...]:
    return (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


def _precisions() -> list[str]:
    return [one.fp32_precision for one in _backends()] if _BY_BACKEND else [torch.get_float32_matmul_precision()]


def _set_precisions(precisions: Iterable[str]) -> None:
    if not _BY_BACKEND:
        torch.set_float32_matmul_precision(*precisions)
        return
    for backend, precision in zip(_backends(), precisions, strict=True):
        backend.fp32_precision = precision
