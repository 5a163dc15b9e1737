"""The components of a pipeline that adapters are for, and what is added to the modules of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from peft_posthoc.adapters.cast import cast
from peft_posthoc.adapters.factors import Factors
from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.checkpoints.checkpoint import place_of
from peft_posthoc.errors import AdapterError
from peft_posthoc.models.config import architecture
from peft_posthoc.models.original_modules import is_original
from peft_posthoc.text import asked

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Components that pipelines load adapters into."""
_BY_CLASS = {"UNet": "unet", "Transformer": "transformer", "CLIPText": "text_encoder", "T5Encoder": "text_encoder_3"}


class Component(NamedTuple):
    """An adapter and the component that it is for."""

    name: str
    """By its folder in a pipeline of diffusers."""
    cls: str
    """The model's class."""
    deltas: AdapterOnModel

    @property
    def text(self) -> bool:
        """True for a text encoder."""
        return self.name.startswith("text_encoder")


def components(all_deltas: Sequence[AdapterOnModel], *, named: bool = True) -> list[Component]:
    """The components that adapters are for.

    Args:
        all_deltas: The adapters.
        named: Whether the format names the components: if not, it has one beside the text encoders.

    Raises:
        AdapterError: A base is no component of a pipeline, two adapters are for one, or the format has no place for
            two.
    """
    found: dict[str, Component] = {}
    for deltas in all_deltas:
        one = Component(_name(deltas), _class(deltas), deltas)
        if (other := found.setdefault(one.name, one)) is not one:
            raise AdapterError(
                f"`{other.deltas.folder.label}` and `{deltas.folder.label}` are for the same component, `{one.name}`. "
                "Combine them first."
            )
    others = [one.name for one in found.values() if not one.text]
    if len(others) > 1 and not named:
        raise AdapterError(
            f"`{others[0]}` and `{others[1]}` have the same names in this format. Write a file for each of them."
        )
    return list(found.values())


def filed(name: str, factors: Factors, kernel: Sequence[int], rank: int | None, dtype: torch.dtype) -> Factors:
    """Factors as a file holds them: cast, padded, and with the axes of a convolution.

    Raises:
        AdapterError: The type does not hold them.
    """
    a, b = cast(factors.a, factors.b, dtype, name, rank=rank)
    return (
        Factors(a.reshape(len(a), -1, *kernel), b.reshape(*b.shape, *(1 for _ in kernel))) if kernel else Factors(a, b)
    )


def factors_of(deltas: AdapterOnModel, module: str) -> Factors:
    """The factors of a module without the zeros that bring them to the rank of the file; of one row at least."""
    a, b = deltas.factors(module)
    used = a.any(1) & b.any(0)
    if not used.any():
        used[:1] = True
    return Factors(a[used], b[:, used])


def one_below_another(deltas: AdapterOnModel, parts: Sequence[str]) -> Factors:
    """The factors of one matrix that has these modules' rows one below the other: of the sum of their ranks.

    Where all have the same `a`, as parts of a LoRA that was fused, of theirs.
    """
    each = [factors_of(deltas, part) for part in parts]
    held = [one for one in each if len(one.a)]
    if held and all(one.a.shape == held[0].a.shape and torch.equal(one.a, held[0].a) for one in held):
        rank = len(held[0].a)
        return Factors(
            held[0].a, torch.cat([one.b if len(one.a) else one.b.new_zeros(len(one.b), rank) for one in each])
        )
    return Factors(torch.cat([one.a for one in each]), torch.block_diag(*(one.b for one in each)))


def summands(deltas: AdapterOnModel) -> dict[str, Tensor]:
    """What is added to the model's tensors beside factors, or would have to be for those in the file whole, in float64.

    Raises:
        AdapterError: A tensor in the file is of another shape than the base's.
    """
    found = {own: delta.double() for name, delta in deltas.beside.items() for own in deltas.layout.names_of(name)}
    found |= {name: deltas.folder.tensor(key).double() for name, key in deltas.added.items()}
    for module in deltas.biases:
        name = f"{module}.bias"
        found[name] = found.get(name, 0) + deltas.bias(module)
    stored = {own: name for name in deltas.base.headers for own in deltas.layout.names_of(name)}
    for name, key in deltas.whole.items():
        after = deltas.folder.tensor(key).double()
        before = deltas.base.read(stored[name]).double() if name in stored else torch.zeros_like(after)
        if before.shape != after.shape:
            raise AdapterError(
                f"`{deltas.folder.label}` holds `{name}` as {list(after.shape)}; in the base `{deltas.base.label}` it "
                f"is {list(before.shape)}."
            )
        found[name] = found.get(name, 0) + (after - before)
    return {name: delta for name, delta in found.items() if delta.any()}


def _class(deltas: AdapterOnModel) -> str:
    config: Mapping[str, object] = deltas.base.config or {}
    return str(config.get("_class_name") or architecture(config) or "")


def _name(deltas: AdapterOnModel) -> str:
    """The name of the model within its pipeline, by its folder or by its class.

    Raises:
        AdapterError: Neither tells.
    """
    place, named = place_of(deltas.base), _class(deltas)
    label = deltas.base.label.rstrip("/").rpartition("/")[2]
    for name in (place.name if place is not None else label, label):
        if name in COMPONENTS:
            return name
    found = next((component for part, component in _BY_CLASS.items() if part in named), None)
    of_diffusers = "_class_name" in (deltas.base.config or {})
    if found is None and is_original(deltas.base.headers):
        raise AdapterError(
            f"`{deltas.base.label}` has its authors' names, and the format those of diffusers. Extract with "
            f"`{asked('serve_as', 'FOLDER')}`, the folder of such a model, or use `{asked('to', 'comfyui')}`."
        )
    if found is None or not (of_diffusers or found.startswith("text_encoder")):
        raise AdapterError(
            f"The base `{deltas.base.label}` ({named or 'of no known class'}) is no component of a diffusers pipeline: "
            f"its folder is called none of {', '.join(COMPONENTS)}. Any other model's adapter goes "
            f"without `{asked('to', None)}`."
        )
    return found


def old_name(component: Component, module: str) -> str:
    """A module's name in files: CLIP's have a part that its modules in transformers 5 no longer have."""
    inner = module.startswith(("encoder.layers.", "embeddings.", "final_layer_norm"))
    return f"text_model.{module}" if component.cls.startswith("CLIPText") and inner else module
