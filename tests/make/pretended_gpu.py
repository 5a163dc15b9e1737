"""A GPU that is pretended: its tensors hold true values in the CPU's memory, and what goes there and back is counted.

As on a true one, an operation on tensors of both sides fails.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
# A value, or an error, that Python asks for.
_WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten._linalg_check_errors.default}


class _Far(Tensor):
    """A tensor that is said to be on the GPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "_Far":
        return Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",  # to PyTorch's own code, which would look for a driver
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the `with` block.")

    @property
    def device(self) -> torch.device:
        """To Python's code."""
        return GPU


class PretendedGPU(TorchDispatchMode):
    """In its `with` block `cuda:0` is there, for this thread.

    Attributes:
        there: Values in each copy to it.
        back: Values in each copy from it.
        waits: How often Python waited for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # so that PyTorch looks for no driver
        self.there: list[int] = []
        self.back: list[int] = []
        self.waits = 0
        self._pinned: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten.is_pinned.default:
            return any(args[0] is one for one in self._pinned)
        if func is torch.ops.aten._pin_memory.default:
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        far = [one for one in given if isinstance(one, _Far)]
        asked = kwargs.get("device")
        there = bool(far) if asked is None else torch.device(asked).type != "cpu"
        if func is torch.ops.aten._to_copy.default and there != bool(far):
            self._count(given[0], there, kwargs)
        elif far and any(one.ndim for one in given if not isinstance(one, _Far)):
            raise RuntimeError(f"{func} of tensors on two devices.")
        self.waits += bool(far) and func in _WAITS
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("non_blocking", None)
        own = {id(one.held): one for one in far}
        found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
        if not there:
            return found
        return tree_map(lambda one: own.get(id(one), _Far(one)) if isinstance(one, Tensor) else one, found)

    def _count(self, tensor: Tensor, there: bool, kwargs: Any) -> None:
        if not there and kwargs.get("non_blocking"):
            raise RuntimeError("What is copied from a GPU may be read before it is there.")
        pinned = any(tensor is one for one in self._pinned)
        (self.there if there else self.back).append(tensor.numel())
        self.waits += not (there and pinned and kwargs.get("non_blocking"))


def _held(one: Any) -> Any:
    return one.held if isinstance(one, _Far) else one
