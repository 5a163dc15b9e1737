"""Several LoRA adapters of one model as one: the weighted sum of what they add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peft_posthoc.adapters.cast import widest
from peft_posthoc.adapters.factors import Factors
from peft_posthoc.adapters.module import Module
from peft_posthoc.adapters.names import PREFIX
from peft_posthoc.adapters.reader import AdapterFile
from peft_posthoc.errors import MismatchError
from peft_posthoc.models.layout import is_of_an_expert


class LoraSum:
    """Several adapters as one: their modules, checked to fit, and what they add up to.

    Args:
        folders: The adapters.
        weights: Of their deltas.

    Raises:
        MismatchError: They are not adapters of one model, or PEFT has no adapter that is their sum.
    """

    def __init__(self, folders: Sequence[AdapterFile], weights: Sequence[float]) -> None:
        self._parts = list(zip(folders, weights, strict=True))
        self.modules: dict[str, Module] = {}
        for folder in folders:
            if folder.added:
                raise MismatchError(
                    f"`{folder.label}` adds to `{next(iter(folder.added))}` by no factors, which no adapter of PEFT "
                    "does. Extract from BASE and BASE+ADAPTER."
                )
            for name, module in folder.modules.items():
                known = self.modules.setdefault(name, module)
                same = _form(known)
                if same != _form(module):
                    raise MismatchError(
                        f"`{name}` is {_shape(known)} in `{folders[0].label}` and {_shape(module)} in `{folder.label}`:"
                        " they are not adapters of one model."
                    )
        if len(told := {tuple(sorted(own)) for one in folders if (own := one.config.get("target_parameters"))}) > 1:
            raise MismatchError(
                f"The adapters adapt different parameters ({' and '.join(map(str, sorted(told)))}); which tensors are "
                "whose in their files only the model can tell."
            )
        biased = [module for folder in folders for module in folder.modules.values() if module.bias]
        others = [module for module in self.modules.values() if module.kind in ("embedding", "experts")]
        if biased and others:
            raise MismatchError(
                f"One adapter holds a bias of `{biased[0].name}`, one adapts `{others[0].name}`: PEFT takes no adapter "
                "with both."
            )

    def factors(self, name: str) -> list[Factors]:
        """The factors of each delta, side by side."""
        each = [
            [Factors(one.a, one.b * weight) for one in folder.factors(name)]
            for folder, weight in self._parts
            if name in folder.modules
        ]
        return [
            Factors(torch.cat([one.a for one in same]), torch.cat([one.b for one in same], dim=1))
            for same in zip(*each, strict=True)
        ]

    def bias(self, name: str) -> Tensor | None:
        """The sum of what is added to the module's bias."""
        found = [(f.bias(name), weight) for f, weight in self._parts if name in f.modules]
        biases = [bias * weight for bias, weight in found if bias is not None]
        return torch.stack(biases).sum(dim=0) if biases else None

    def rank(self, name: str) -> int:
        """How many pairs are side by side."""
        return sum(folder.modules[name].rank for folder, _ in self._parts if name in folder.modules)

    def bytes(self, name: str) -> int:
        """Size of the module in the files."""
        held = [folder for folder, _ in self._parts if name in folder.modules]
        return sum(f.headers[one].bytes for f in held for one in f.modules[name].tensor_names())

    def dtype(self) -> torch.dtype:
        """The widest of the adapters'."""
        return widest(folder.dtype() for folder, _ in self._parts)

    def has_experts(self) -> bool:
        """True if some module is of one expert, or stacks them."""
        return any(module.kind == "experts" or is_of_an_expert(name) for name, module in self.modules.items())

    def beside(self, dtype: torch.dtype, whole: Mapping[str, Tensor]) -> int:
        """Bytes in a file of this that do not grow with the rank: biases, whole tensors, and what a header needs."""
        modules = self.modules.values()
        biases = [module.size[0] for module in modules] if any(module.bias for module in modules) else []
        names = [*(name for module in modules for name in module.tensor_names()), *whole]
        # An entry of the header: type, shape, and two places of up to 13 digits.
        header = sum(len(name) + 120 for name in names) + sum(len(module.name) + 160 for module in modules)
        return header + dtype.itemsize * sum(biases) + sum(tensor.nbytes for tensor in whole.values())

    def extras(self) -> str | None:
        """Something in the adapters beside factors, in words; None if there is nothing."""
        for folder, _ in self._parts:
            for module in folder.modules.values():
                if module.bias:
                    return f"`{folder.label}` holds a bias of `{module.name}`"
            if folder.whole:
                return f"`{folder.label}` holds `{folder.whole[0].removeprefix(PREFIX)}` whole"
        return None

    def whole(self) -> dict[str, Tensor]:
        """The tensors that take the place of the base's.

        Raises:
            MismatchError: The adapters do not agree on one, or their weights leave it between theirs and the base's.
        """
        found: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for folder, _ in self._parts for name in folder.whole):
            holders = [(folder, weight) for folder, weight in self._parts if name in folder.whole]
            first, inner = holders[0][0], name.removeprefix(PREFIX)
            found[name] = first.tensor(name)
            for other, _ in holders[1:]:
                if not torch.equal(found[name], other.tensor(name)):
                    raise MismatchError(
                        f"`{first.label}` and `{other.label}` both hold `{inner}` whole, with other values. Without "
                        "the base they cannot be added: merge each into the base, and extract from the sum."
                    )
            # The base's own weight, which PEFT saves beside adapted embeddings, is nobody's change.
            share = sum(weight for _, weight in holders)
            if not inner.endswith(".base_layer.weight") and abs(share - 1) > 1e-6:
                raise MismatchError(
                    f"`{first.label}` holds `{inner}` whole, and its weight is {share:g}: what is between it and the "
                    "base's is not known without the base. Give those that hold it weights that add up to 1."
                )
        return found


def _form(module: Module) -> tuple[object, ...]:
    return module.kind, module.experts, module.filed.a_shape[1:], module.filed.m


def _shape(module: Module) -> str:
    m, n = module.size
    stack = f"{module.experts} x " if module.experts > 1 else ""
    return f"{module.kind} {stack}{m} x {n}"
