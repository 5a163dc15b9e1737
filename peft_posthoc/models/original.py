"""A component of diffusers in a single file under its original names, seen under the class's own.

diffusers' converter of the class is run once on the shapes alone, and every step it takes on a tensor is recorded; a
tensor of the class is then made by the steps that lead to it, when it is read. No table of names is kept here, and no
model is ever whole in memory.

`learned(headers, config)` gives, by the class's name, the `Piece` that each tensor is made of: its sources by their
names in the file, and what makes it of them. `as_component` shows a checkpoint so.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.view import Piece, View, same
from peft_posthoc.models.by_class import build
from peft_posthoc.models.config import architecture

# Where a file has more than the component, or is ComfyUI's, the component's names begin with one of these.
PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def as_component(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint under the names of a class of diffusers, if it has more of its tensors by its original names.

    Whatever the component is not made of, such as the VAE in the same file, keeps its name.

    Args:
        checkpoint: Of the component, or with the component in it.
        config: The component's, with its sizes.
    """
    if _converter(config) is None:
        return checkpoint
    model = build(config)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} if model is not None else {}
    here = sum(name in own for name in checkpoint.headers)
    if here == len(own):
        return checkpoint
    made = {name: piece for name, piece in learned(checkpoint.headers, config).items() if name in own}
    fitting = sum(own[name] == piece.header.shape for name, piece in made.items())
    if fitting <= here or 2 * fitting < len(made):  # It may have two text encoders, of different widths.
        return checkpoint
    used = {source for piece in made.values() for source in piece.sources}
    beside = {name: same(checkpoint, name) for name in checkpoint.headers if name not in used and name not in made}
    return _Component(checkpoint, made | beside, config)


def learned(headers: Mapping[str, Header], config: Mapping[str, Any]) -> dict[str, Piece]:
    """By the class's name, what each of its tensors is made of; nothing where diffusers' converter does not fit.

    Args:
        headers: Of the file under original names.
        config: Of the component: `_class_name`, and what the converter asks of it.
    """
    convert = _converter(config)
    if convert is None:
        return {}
    of_text = "_class_name" not in config
    prefix = next((one for one in PREFIXES if not of_text and any(name.startswith(one) for name in headers)), "")
    names = [name for name in headers if name.startswith(prefix)]
    empty = {name: torch.empty(headers[name].shape, dtype=headers[name].dtype, device="meta") for name in names}
    put = PREFIXES[0] if config.get("_class_name") == "UNet2DConditionModel" else ""  # Its converter takes no other.
    given = {f"{put}{name.removeprefix(prefix)}": tensor for name, tensor in empty.items()}
    heads, size = (config.get(key) for key in ("num_attention_heads", "attention_head_dim"))
    steps = _Steps(heads * size if isinstance(heads, int) and isinstance(size, int) else None)
    try:
        with steps:
            made = convert(given, **({"config": config} if "config" in inspect.signature(convert).parameters else {}))
    except Exception:
        # Each converter fails in its own way on names and shapes that it does not expect: the file is another model's.
        return {}
    sources = {id(tensor): name for name, tensor in empty.items()}
    found = {}
    for name, tensor in made.items():
        needed = steps.leaves(tensor)
        if isinstance(tensor, Tensor) and needed and all(id(one) in sources for one in needed):
            header = Header(tuple(tensor.shape), tensor.dtype)
            make = partial(steps.again, tensor, needed)
            found[name] = Piece(tuple(sources[id(one)] for one in needed), header, make)
    return found


class _Component(View):
    """A file's component under the names of its class."""

    def __init__(self, checkpoint: Checkpoint, pieces: Mapping[str, Piece], config: Mapping[str, Any]) -> None:
        super().__init__(checkpoint, pieces)
        self.config = config


class _Step(NamedTuple):
    operation: Any
    args: tuple[Any, ...]
    options: Mapping[str, Any]
    result: int
    """Which of the tensors that it gives."""


class _Steps(TorchDispatchMode):
    """What is done to tensors, to be done again to others."""

    def __init__(self, width: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._width = width
        self._by_result: dict[int, _Step] = {}
        self._kept: list[Tensor] = []  # A number of one that is gone would be given again.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.split_with_sizes.default:
            args = (args[0], self._fitting(args[1], args[0]), *args[2:])
        given = func(*args, **(kwargs or {}))
        for number, tensor in enumerate(tree_leaves(given)):
            self._by_result[id(tensor)] = _Step(func, args, kwargs or {}, number)
            self._kept.append(tensor)
        return given

    def leaves(self, tensor: Any) -> list[Tensor]:
        """The tensors that one is made of, in the order in which they are taken."""
        step = self._by_result.get(id(tensor))
        if step is None:
            return [tensor]
        parts = [one for one in tree_leaves((step.args, step.options)) if isinstance(one, Tensor)]
        return list({id(leaf): leaf for part in parts for leaf in self.leaves(part)}.values())

    def again(self, tensor: Tensor, leaves: list[Tensor], *values: Tensor) -> Tensor:
        """The tensor, made of these values in place of what it was made of."""
        known = {id(leaf): value for leaf, value in zip(leaves, values, strict=True)}

        def value_of(one: Tensor) -> Tensor:
            if id(one) in known:
                return known[id(one)]
            step = self._by_result[id(one)]
            args, options = tree_map_only(Tensor, value_of, (step.args, dict(step.options)))
            made: Tensor = tree_leaves(step.operation(*args, **options))[step.result]
            return made

        return value_of(tensor)

    def _fitting(self, sizes: list[int], tensor: Tensor) -> list[int]:
        """The rows of q, k, v and the rest in a model of this width: some converters have that of one model (Flux)."""
        if self._width is None or len(sizes) != 4 or {*sizes[:3]} == {self._width}:
            return sizes
        return [self._width] * 3 + [tensor.shape[0] - 3 * self._width]


def _text_encoder(checkpoint: dict[str, Tensor], width: Any) -> dict[str, Tensor]:
    """The text encoder of this width in a file: by transformers' names behind a beginning, or by OpenCLIP's."""
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

    found: list[dict[str, Tensor]] = [convert_ldm_clip_checkpoint(checkpoint)]
    like = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
    for name in checkpoint:
        prefix, first, rest = name.partition("transformer.resblocks.0.ln_1.weight")
        if first and not rest:
            found.append(convert_open_clip_checkpoint(like, checkpoint, prefix))
    embedding = "text_model.embeddings.token_embedding.weight"
    made = next(one for one in found if embedding in one and one[embedding].shape[1] == width)
    # In transformers 5 some have no `text_model` around what is in them.
    return made | {name.removeprefix("text_model."): tensor for name, tensor in made.items()}


def _converter(config: Mapping[str, Any]) -> Any:
    """How diffusers makes a component of a file under original names; None if it does not."""
    name = config.get("_class_name")
    if find_spec("diffusers") is not None and (architecture(config) or "").startswith("CLIPText"):
        return partial(_text_encoder, width=config.get("hidden_size"))
    if not isinstance(name, str) or find_spec("diffusers") is None:
        return None
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    return SINGLE_FILE_LOADABLE_CLASSES.get(name, {}).get("checkpoint_mapping_fn")
