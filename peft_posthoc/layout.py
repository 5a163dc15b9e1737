"""Which module each weight of a model belongs to, and of what kind it is.

What kind a weight has is asked of the model's own class where there is one (`model_class`), and read off names and
shapes otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from peft_posthoc.checkpoint import Checkpoint
from peft_posthoc.kinds import EMBEDDING, LINEAR, LayerKind

GUESSED = "names and shapes"

Role = Literal["layer", "embedding", "head", "convolution", "expert"]


class Place(NamedTuple):
    """A module of the model that a weight lives in, or, of an expert's matrix, the parameter."""

    module: str
    kind: LayerKind
    role: Role


def is_of_an_expert(module: str) -> bool:
    """Whether it is a module of one expert among several."""
    return re.search(r"(^|\.)experts\.\d+\.", module) is not None


class Stack(NamedTuple):
    """A parameter that holds the matrices of several experts, or their biases as the rows of one matrix."""

    name: str
    """What the model calls it."""
    shape: tuple[int, ...]
    """Experts x out x in features; in x out where transposed; two numbers only for biases."""
    kind: LayerKind
    parts: tuple[tuple[str, ...], ...]
    """By expert, the tensors on disk that it is made of, one above the other; empty if it is itself there."""

    @property
    def units(self) -> tuple[str, ...]:
        """What the expert's matrices are called here: `NAME[0]`, `NAME[1]`, ...; biases `NAME` alone."""
        return tuple(f"{self.name}[{e}]" for e in range(self.shape[0])) if len(self.shape) == 3 else (self.name,)


@dataclass(frozen=True)
class Layout:
    """Which module each weight of a model belongs to."""

    origin: str
    """Where this knowledge comes from: a class, or names and shapes."""
    kinds: Mapping[str, LayerKind]
    """Every module that PEFT can adapt."""
    classes: Mapping[str, str] = field(default_factory=dict)
    """The class of every module, where it is known; of the others with a weight, `""`."""
    head: str | None = None
    """The module that gives the logits of a language model."""
    ties: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """For a module whose weight is stored once and used again: the modules that use it."""
    prefix: str = ""
    """What a checkpoint of the bare model leaves out of its names (`transformer.` for GPT-2)."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """By name on disk, the model's own name of a tensor, where transformers renames it when it loads."""
    stacks: tuple[Stack, ...] = ()
    """The parameters of the experts, in the model's order."""
    mistaken: Mapping[str, LayerKind] = field(default_factory=dict)
    """Layers that PEFT takes for an expert's, by their names, and whose factors it drops in silence."""
    peft_takes_experts: bool = False
    """Whether PEFT stacks the factors of single experts; if not, it ignores them in silence."""
    tokens: str | None = None
    """The module of the token embeddings."""
    task_type: str | None = None
    fan_in_fan_out: bool = False

    def module_of(self, weight: str) -> str:
        """The module that a weight name belongs to."""
        weight = self.renamed.get(weight, weight)
        module = weight.rpartition(".")[0] or weight
        if module not in self.classes and f"{self.prefix}{module}" in self.classes:
            return f"{self.prefix}{module}"
        return module

    def name_of(self, weight: str) -> str:
        """What the model itself calls a tensor of a checkpoint."""
        return f"{self.module_of(weight)}.{self.renamed.get(weight, weight).rpartition('.')[2]}"

    def names_of(self, weight: str) -> tuple[str, ...]:
        """The same, and the names of those that share the tensor."""
        own = self.name_of(weight)
        module, _, leaf = own.rpartition(".")
        # Ties are told of modules by their weight, and of whatever else by its own name.
        shared = [f"{user}.weight" for user in self.ties.get(module, ())] if leaf == "weight" else []
        return own, *shared, *self.ties.get(own, ())

    def places(self, weight: str) -> list[Place]:
        """Where the weight lives; none if it is not the weight of a module that PEFT can adapt."""
        own = self.name_of(weight)
        if own in self.kinds and self.kinds[own].stacked:
            return [Place(own, self.kinds[own], "expert")]
        module, _, leaf = own.rpartition(".")
        if leaf != "weight":
            return []
        users = [module, *self.ties.get(module, ())]
        # Adapted in one place and not in another, a tied weight would be two.
        if any(user not in self.kinds for user in users):
            return []
        return [Place(user, self.kinds[user], self._role(user)) for user in users]

    def of_experts(self, weight: str) -> bool:
        """Whether it is a matrix, or the stacked matrices, of experts that are not taken apart."""
        return self.name_of(weight) in self._expert_names or weight in self._expert_names

    @cached_property
    def _expert_names(self) -> set[str]:
        parts = (part for stack in self.stacks for parts in stack.parts for part in parts)
        return {*(stack.name for stack in self.stacks), *parts}

    def without_ties(self, untied: Iterable[str]) -> Layout:
        """The same layout, where these modules have weights of their own."""
        own = {self.module_of(weight) for weight in untied}
        ties = {owner: tuple(user for user in users if user not in own) for owner, users in self.ties.items()}
        return replace(self, ties=ties)

    def _role(self, module: str) -> Role:
        if module == self.head:
            return "head"
        if is_of_an_expert(module):
            return "expert"
        kind = self.kinds[module]
        return "embedding" if kind is EMBEDDING else "convolution" if kind.kernel else "layer"


def layout_of(*checkpoints: Checkpoint, of_tuned: bool = False) -> Layout:
    """Find out what kind each weight of a model is, from the first of its checkpoints that knows.

    A live module is asked itself. A configuration that transformers knows is built into its class on the meta device,
    but for the common decoders, of which all is known (the class takes seconds to import). Anything else goes by names
    and shapes. The task is the last one's: a reward model made from a language model is none.

    Args:
        *checkpoints: Of one model, the tuned one last.
        of_tuned: Ask the last one first.
    """
    layout = _first_known(checkpoints[::-1] if of_tuned else checkpoints)
    last = checkpoints[-1]
    name = type(last.module).__name__ if last.module is not None else architecture(last.config or {})
    other = bool(name) and name != layout.origin and task_type(name, encoder_decoder=True) is None
    return replace(layout, task_type=None) if other else layout


def _first_known(checkpoints: tuple[Checkpoint, ...]) -> Layout:
    from peft_posthoc.model_class import build, layout_of_module

    names = dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.headers)
    for checkpoint in checkpoints:
        if checkpoint.module is not None:
            return layout_of_module(checkpoint.module, type(checkpoint.module).__name__, names)
    for checkpoint in checkpoints:
        config = checkpoint.config or {}
        plain = config.get("model_type") in PLAIN_DECODERS and architecture(config).endswith("ForCausalLM")
        if plain and "model.embed_tokens.weight" in checkpoint.headers:
            return _of_plain_decoder(checkpoint, config)
        built = build(config)
        if built is not None:
            return layout_of_module(built, type(built).__name__, names)
    return _of_names(checkpoints[0])


# Decoders whose every matrix is a Linear, but for `model.embed_tokens`; and whether they tie `lm_head` to it when their
# configuration does not say so. A test holds each against its class in transformers.
PLAIN_DECODERS: Mapping[str, bool] = {
    "cohere": True,
    "gemma": True,
    "gemma2": True,
    "gemma3_text": True,
    "glm": False,
    "glm4": False,
    "granite": False,
    "llama": False,
    "mistral": False,
    "olmo": False,
    "olmo2": False,
    "phi": False,
    "phi3": False,
    "qwen2": False,
    "qwen3": False,
    "smollm3": True,
    "stablelm": False,
    "starcoder2": True,
}


def architecture(config: Mapping[str, Any]) -> str:
    """The class that a configuration names, or nothing."""
    names = config.get("architectures") or [""]
    return str(names[0])


def task_type(class_name: str, *, encoder_decoder: bool) -> str | None:
    """PEFT's task type, for the tasks whose PEFT class adds nothing to the model."""
    if class_name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if class_name.endswith("ForConditionalGeneration") and encoder_decoder else None


def _of_plain_decoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Layout:
    matrices = {name.removesuffix(".weight") for name, header in checkpoint.headers.items() if len(header.shape) == 2}
    kinds = {module: EMBEDDING if module == "model.embed_tokens" else LINEAR for module in matrices}
    tied = bool(config.get("tie_word_embeddings", PLAIN_DECODERS[str(config["model_type"])]))
    kinds["lm_head"] = LINEAR
    return Layout(
        origin=architecture(config),
        kinds=kinds,
        classes=dict.fromkeys([*(name.rpartition(".")[0] for name in checkpoint.headers), "lm_head"], ""),
        head="lm_head",
        tokens="model.embed_tokens",
        ties={"model.embed_tokens": ("lm_head",)} if tied else {},
        task_type="CAUSAL_LM",
    )


_EMBEDDING_LEAVES = (
    *("embed_tokens", "word_embeddings", "wte", "wpe", "position_embeddings", "token_type_embeddings", "shared"),
    *("embed_positions", "relative_attention_bias"),
)
_TOKEN_LEAVES = ("embed_tokens", "word_embeddings", "wte", "shared")
# Routers beside experts, which are no plain layers.
_ROUTER_LEAVES = ("gate", "router")
_HEAD_LEAVES = ("lm_head", "embed_out")
# GPT-2's names, whose weights are stored in x out in some models and out x in in others: a guess could be wrong.
_UNKNOWABLE_LEAVES = ("c_attn", "c_proj", "c_fc")


def _of_names(checkpoint: Checkpoint) -> Layout:
    kinds: dict[str, LayerKind] = {}
    unknowable = (*_UNKNOWABLE_LEAVES, *(_ROUTER_LEAVES if any(map(is_of_an_expert, checkpoint.headers)) else ()))
    for name, header in checkpoint.headers.items():
        module, _, leaf = name.rpartition(".")
        name = module.rpartition(".")[2]
        if leaf == "weight" and len(header.shape) == 2 and name not in unknowable:
            kinds[module] = EMBEDDING if name in _EMBEDDING_LEAVES else LINEAR
    heads = [module for module in kinds if module.rpartition(".")[2] in _HEAD_LEAVES]
    return Layout(
        origin=GUESSED,
        kinds=kinds,
        classes=dict.fromkeys((module for name in checkpoint.headers for module in _around(name)), ""),
        head=heads[0] if heads else None,
        tokens=next((module for module in kinds if module.rpartition(".")[2] in _TOKEN_LEAVES), None),
    )


def _around(weight: str) -> list[str]:
    """The module of a weight, and those that it lies in: PEFT takes a name to mean these too."""
    parts = weight.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))] or [""]


def target_modules(chosen: Iterable[str], layout: Layout) -> list[str]:
    """The shortest honest `target_modules`: leaf names where a leaf occurs nowhere else, full names otherwise."""
    modules = set(chosen)
    elsewhere = {module.rpartition(".")[2] for module in {*layout.classes, *layout.kinds} - modules}
    leaves = {module: module.rpartition(".")[2] for module in modules}
    if layout.origin == GUESSED:
        # A list of modules has some without weights, of which names tell nothing: `to_out.0` may lie beside a dropout.
        elsewhere |= {leaf for leaf in leaves.values() if leaf.isdigit()}
    return sorted({module if leaf in elsewhere else leaf for module, leaf in leaves.items()})


def matched(targets: Iterable[str], layout: Layout) -> set[str]:
    """The modules that PEFT takes `target_modules` to mean: a full name also means what ends in it."""
    names = set(targets)
    return {module for module in {*layout.classes, *layout.kinds} if not names.isdisjoint(ends(module))}


def ends(module: str) -> list[str]:
    """The name of a module and what follows each of its dots: by any of these PEFT finds it."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]
