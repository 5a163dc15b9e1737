"""Layer kinds: how a weight becomes a matrix, and how its factors are named and shaped in PEFT.

A new kind is one `LayerKind` and a line in `kind_of`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor, nn

from peft_posthoc.checkpoints.memory import of_bitsandbytes

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class LayerKind:
    """How PEFT adapts one type of module, or one parameter, whose weight is a matrix or can be seen as one."""

    name: str
    transposed: bool = False
    """Whether the weight is stored as in x out features; the delta that is factored is always out x in."""
    kernel: tuple[int, ...] = ()
    """Of a convolution: its weight is out x in x kernel, and as a matrix out x (in times kernel)."""
    stacked: bool = False
    """Whether it is no module but a parameter, or a slice of one, that `target_parameters` adapts."""
    a_key: str = "lora_A.weight"
    b_key: str = "lora_B.weight"
    fan_in_fan_out: bool = False
    """The setting of this name in `LoraConfig`."""

    def size(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """`m` and `n` of a weight of this shape, or None if it has no matrix."""
        if len(shape) != 2 + len(self.kernel):
            return None
        rows, columns = shape[0], prod(shape[1:])
        return (columns, rows) if self.transposed else (rows, columns)

    def matrix(self, weight: Tensor) -> Float[Tensor, "m n"]:
        """The weight as `m` out features by `n` in features: a view."""
        return weight.mT if self.transposed else weight.flatten(1)

    def weight(self, matrix: Float[Tensor, "m n"], shape: tuple[int, ...]) -> Tensor:
        """The matrix as a weight of this shape: `matrix` the other way."""
        return matrix.mT if self.transposed else matrix.reshape(shape)

    def shapes(self, module: str, rank: int, m: int, n: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the factors in the module, under the names that PEFT gives them."""
        a, b = (rank, n // prod(self.kernel), *self.kernel), (m, rank, *(1 for _ in self.kernel))
        return {f"{module}.{self.a_key}": a, f"{module}.{self.b_key}": b}

    def tensors(self, module: str, a: Float[Tensor, "r n"], b: Float[Tensor, "m r"]) -> dict[str, Tensor]:
        """The factors under the names, and in the shapes, that PEFT gives them in the module."""
        if self.kernel:  # PEFT: a convolution to `r` channels, and one of kernel size 1 from there.
            a, b = a.unflatten(1, (-1, *self.kernel)), b.reshape(*b.shape, *(1 for _ in self.kernel))
        return {f"{module}.{self.a_key}": a, f"{module}.{self.b_key}": b}

    def factors(self, a: Tensor, b: Tensor) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]:
        """The matrices `a` and `b` back from PEFT's shapes."""
        return a.flatten(1), b.flatten(1)


LINEAR = LayerKind("linear")
CONV1D = LayerKind("conv1d", transposed=True, fan_in_fan_out=True)  # transformers' Conv1D: GPT-2 and its kin
EMBEDDING = LayerKind("embedding", transposed=True, a_key="lora_embedding_A", b_key="lora_embedding_B")
EXPERT = LayerKind("expert", stacked=True)
EXPERT_IN_OUT = LayerKind("expert", transposed=True, stacked=True)  # gpt-oss, Llama 4

FILED = (LINEAR, EMBEDDING)
"""One kind for each pair of keys in a file."""


def convolution(kernel: tuple[int, ...]) -> LayerKind:
    """The kind of a convolution with this kernel: 1, 2 or 3 numbers."""
    return LayerKind("convolution", kernel=kernel)


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a live module, or None if PEFT has no LoRA form for it."""
    if isinstance(module, nn.Linear):
        return LINEAR if _is_plain(module) else None
    # Subclasses that change what is looked up (OPT's positions are offset) would be adapted wrongly by PEFT; scaled
    # word embeddings (Gemma) are handled by it.
    if type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")):
        return EMBEDDING
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return CONV1D
    # PEFT's first convolution is neither dilated nor padded otherwise than with zeros. A grouped one has all channels
    # as input: it would be larger than the weight itself.
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and type(module).__module__ == nn.Conv1d.__module__:
        plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
        return convolution(module.kernel_size) if plain else None
    return None


def _is_plain(module: nn.Linear) -> bool:
    """Tell whether a module is called, and gives what a linear layer gives: PEFT adds to that."""
    # `nn.MultiheadAttention` reads the weight of its `out_proj` and never calls it: an adapter there has no effect.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    # Routers of experts give a tuple (Llama 4, Phi-MoE), others more columns (Idefics) or groups of them (DeepSeek V4).
    # Falcon's multiplies and adds in two steps. bitsandbytes' decode first, and PEFT has layers of its own for them.
    own = type(module).__name__ == "FalconLinear" or of_bitsandbytes(module)
    return own or type(module).forward is nn.Linear.forward
