"""Layer kinds: how a weight becomes a matrix, how its factors are named and shaped in PEFT, and which weight is which.

A new kind is one `LayerKind` and a line in `kind_of`. What kind a weight has is asked of the model's own class where
there is one, and read off names and shapes otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_posthoc.checkpoint import Checkpoint

GUESSED = "names and shapes"

Role = Literal["layer", "embedding", "head"]


@dataclass(frozen=True)
class LayerKind:
    """How PEFT adapts one type of module whose weight is a matrix on disk."""

    name: str
    transposed: bool
    """Whether the weight is stored as in x out features; the delta that is factored is always out x in."""
    a_key: str = "lora_A.weight"
    b_key: str = "lora_B.weight"
    fan_in_fan_out: bool = False
    """What `LoraConfig` must say of it."""

    def size(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """`m` and `n` of a weight of this shape, or None if it has no matrix."""
        if len(shape) != 2:
            return None
        return (shape[1], shape[0]) if self.transposed else (shape[0], shape[1])

    def matrix(self, weight: Tensor) -> Float[Tensor, "m n"]:
        """The weight as `m` out features by `n` in features: a view."""
        return weight.mT if self.transposed else weight

    def tensors(self, module: str, a: Float[Tensor, "r n"], b: Float[Tensor, "m r"]) -> dict[str, Tensor]:
        """The factors under the names, and in the shapes, that PEFT gives them in the module."""
        return {f"{module}.{self.a_key}": a, f"{module}.{self.b_key}": b}

    def factors(self, a: Tensor, b: Tensor) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"]]:
        """The matrices `a` and `b` back from PEFT's shapes."""
        return a, b


LINEAR = LayerKind("linear", transposed=False)
CONV1D = LayerKind("conv1d", transposed=True, fan_in_fan_out=True)  # transformers' Conv1D: GPT-2 and its kin
EMBEDDING = LayerKind("embedding", transposed=True, a_key="lora_embedding_A", b_key="lora_embedding_B")
KINDS = (LINEAR, CONV1D, EMBEDDING)


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a live module, or None if PEFT has no LoRA form for it."""
    # `nn.MultiheadAttention` reads the weight of its `out_proj` and never calls it: an adapter there has no effect.
    if isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return LINEAR
    # Subclasses that change what is looked up (OPT's positions are offset) would be adapted wrongly by PEFT; scaled
    # word embeddings (Gemma) are handled by it.
    if type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")):
        return EMBEDDING
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return CONV1D
    return None


class Place(NamedTuple):
    """A module of the model that a weight lives in."""

    module: str
    kind: LayerKind
    role: Role


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
        if self.name_of(weight).rpartition(".")[2] != "weight":
            return []
        module = self.module_of(weight)
        users = [module, *self.ties.get(module, ())]
        return [Place(user, self.kinds[user], self._role(user)) for user in users if user in self.kinds]

    def without_ties(self, untied: Iterable[str]) -> Layout:
        """The same layout, where these modules have weights of their own."""
        own = {self.module_of(weight) for weight in untied}
        ties = {owner: tuple(user for user in users if user not in own) for owner, users in self.ties.items()}
        return replace(self, ties=ties)

    def _role(self, module: str) -> Role:
        if module == self.head:
            return "head"
        return "embedding" if self.kinds[module] is EMBEDDING else "layer"


def layout_of(*checkpoints: Checkpoint) -> Layout:
    """Find out what kind each weight of a model is, from the first of its checkpoints that knows.

    A live module is asked itself. A configuration that transformers knows is built into its class on the meta device,
    but for the common decoders, of which all is known (the class takes seconds to import). Anything else goes by names
    and shapes. The task is the last one's: a reward model made from a language model is none.
    """
    layout = _first_known(checkpoints)
    last = checkpoints[-1]
    name = type(last.module).__name__ if last.module is not None else _architecture(last.config or {})
    other = bool(name) and name != layout.origin and _task_type(name, encoder_decoder=True) is None
    return replace(layout, task_type=None) if other else layout


def _first_known(checkpoints: tuple[Checkpoint, ...]) -> Layout:
    names = dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.headers)
    for checkpoint in checkpoints:
        if checkpoint.module is not None:
            return _of_module(checkpoint.module, type(checkpoint.module).__name__, names)
    for checkpoint in checkpoints:
        config = checkpoint.config or {}
        plain = config.get("model_type") in PLAIN_DECODERS and _architecture(config).endswith("ForCausalLM")
        if plain and "model.embed_tokens.weight" in checkpoint.headers:
            return _of_plain_decoder(checkpoint, config)
        built = _meta_model(config)
        if built is not None:
            return _of_module(built, type(built).__name__, names)
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


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or [""]
    return str(names[0])


def _of_plain_decoder(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Layout:
    matrices = {name.removesuffix(".weight") for name, header in checkpoint.headers.items() if len(header.shape) == 2}
    kinds = {module: EMBEDDING if module == "model.embed_tokens" else LINEAR for module in matrices}
    tied = bool(config.get("tie_word_embeddings", PLAIN_DECODERS[str(config["model_type"])]))
    kinds["lm_head"] = LINEAR
    return Layout(
        origin=_architecture(config),
        kinds=kinds,
        classes=dict.fromkeys([*(name.rpartition(".")[0] for name in checkpoint.headers), "lm_head"], ""),
        head="lm_head",
        ties={"model.embed_tokens": ("lm_head",)} if tied else {},
        task_type="CAUSAL_LM",
    )


def _meta_model(config: Mapping[str, Any]) -> nn.Module | None:
    architecture = _architecture(config)
    if not architecture:
        return None
    import transformers

    cls = getattr(transformers, architecture, None)
    if cls is None or getattr(cls, "config_class", None) is None:
        return None
    with torch.device("meta"):
        model: nn.Module = cls(cls.config_class.from_dict(dict(config)))
    return model


def _of_module(model: nn.Module, origin: str, stored: Iterable[str]) -> Layout:
    names = {module: name for name, module in model.named_modules()}
    kinds = {name: kind for module, name in names.items() if (kind := kind_of(module)) is not None}
    if any("Experts" in type(module).__name__ for module in names):
        # PEFT takes a dense or shared MLP beside stacked experts for one of theirs and drops its factors in silence.
        kinds = {name: kind for name, kind in kinds.items() if name.rpartition(".")[2] not in _EXPERT_LEAVES}
    uncalled = _UNCALLED.get(getattr(getattr(model, "config", None), "model_type", ""), ())
    kinds = {name: kind for name, kind in kinds.items() if name.rpartition(".")[2] not in uncalled}
    head = names.get(_call(model, "get_output_embeddings"))
    linear_like = [kinds[name] for name in kinds if name != head and kinds[name] is not EMBEDDING]
    return Layout(
        origin=origin,
        kinds=kinds,
        classes={name: type(module).__name__ for module, name in names.items()},
        head=head,
        ties=_ties(model),
        prefix=f"{prefix}." if (prefix := getattr(model, "base_model_prefix", "")) and hasattr(model, prefix) else "",
        renamed=_renamed(model, stored),
        task_type=_task_type(type(model).__name__, encoder_decoder=_reads_and_writes_text(model)),
        fan_in_fan_out=bool(linear_like) and all(kind.fan_in_fan_out for kind in linear_like),
    )


def _renamed(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Of the names on disk that the class does not have, those that transformers 5 turns into one that it has."""
    own = model.state_dict()
    unknown = [name for name in stored if name not in own]
    if not unknown:
        return {}
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return {}  # transformers 4 has its classes under the names on disk.
    if not isinstance(model, PreTrainedModel):
        return {}
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found = {}
    for name in unknown:
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        # What a converter takes is another tensor afterwards: stacked, split or turned.
        if converter is None and renamed in own:
            found[name] = renamed
    return found


def _call(model: nn.Module, method: str) -> Any:
    found = getattr(model, method, None)
    return found() if callable(found) else None


def _ties(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each module whose weight others share, the others."""
    sharers: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            sharers.setdefault(owner, []).append(name)
    # On the meta device nothing is tied yet: the class tells what will be.
    declared = getattr(model, "_tied_weights_keys", None)
    if isinstance(declared, Mapping) and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        for user, owner in declared.items():
            if user not in sharers.get(owner, ()):
                sharers.setdefault(owner, []).append(user)

    def module(name: str) -> str:
        return name.removesuffix(".weight")

    return {module(owner): tuple(module(user) for user in users) for owner, users in sharers.items()}


def _reads_and_writes_text(model: nn.Module) -> bool:
    """Whether PEFT's class for encoder-decoders fits: it hands over token ids, which one that listens does not take."""
    text = getattr(model, "main_input_name", "input_ids") == "input_ids"
    return text and bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _task_type(class_name: str, *, encoder_decoder: bool) -> str | None:
    """PEFT's task type, for the tasks whose PEFT class adds nothing to the model."""
    if class_name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if class_name.endswith("ForConditionalGeneration") and encoder_decoder else None


# Layers whose weight the model reads and which it does not call: an adapter there has no effect, or is refused by PEFT.
_UNCALLED: Mapping[str, tuple[str, ...]] = {
    "falcon_h1": ("out_proj",),
    "falcon_mamba": ("out_proj", "dt_proj"),
    "jamba": ("dt_proj",),
    "mamba": ("out_proj", "dt_proj"),
    "mamba2": ("out_proj",),
    "nemotron_h": ("out_proj",),
}
_EXPERT_LEAVES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
_EMBEDDING_LEAVES = (
    *("embed_tokens", "word_embeddings", "wte", "wpe", "position_embeddings", "token_type_embeddings", "shared"),
    *("embed_positions", "relative_attention_bias"),
)
_HEAD_LEAVES = ("lm_head", "embed_out")
# GPT-2's names, whose weights are stored in x out in some models and out x in in others: a guess could be wrong.
_UNKNOWABLE_LEAVES = ("c_attn", "c_proj", "c_fc")


def _of_names(checkpoint: Checkpoint) -> Layout:
    kinds: dict[str, LayerKind] = {}
    for name, header in checkpoint.headers.items():
        module, _, leaf = name.rpartition(".")
        name = module.rpartition(".")[2]
        if leaf == "weight" and len(header.shape) == 2 and name not in _UNKNOWABLE_LEAVES:
            kinds[module] = EMBEDDING if name in _EMBEDDING_LEAVES else LINEAR
    heads = [module for module in kinds if module.rpartition(".")[2] in _HEAD_LEAVES]
    return Layout(
        origin=GUESSED,
        kinds=kinds,
        classes=dict.fromkeys((name.rpartition(".")[0] for name in checkpoint.headers), ""),
        head=heads[0] if heads else None,
    )


def target_modules(chosen: Iterable[str], layout: Layout) -> list[str]:
    """The shortest honest `target_modules`: leaf names where a leaf occurs nowhere else, full names otherwise."""
    modules = set(chosen)
    elsewhere = {module.rpartition(".")[2] for module in {*layout.classes, *layout.kinds} - modules}
    leaves = {module: module.rpartition(".")[2] for module in modules}
    return sorted({module if leaf in elsewhere else leaf for module, leaf in leaves.items()})


def matched(targets: Iterable[str], layout: Layout) -> set[str]:
    """The modules that PEFT takes `target_modules` to mean: a full name also means what ends in it."""
    names = set(targets)

    def means(module: str) -> bool:
        parts = module.split(".")
        return any(".".join(parts[start:]) in names for start in range(len(parts)))

    return {module for module in {*layout.classes, *layout.kinds} if means(module)}
