"""What engines may find fault with in an adapter: each function gives the tensors, modules or settings, or nothing."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from itertools import islice

import torch

from peft_posthoc.adapters.config import in_layers_named, meant
from peft_posthoc.adapters.names import PREFIX, own_name
from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.adapters.reader import LoraFolder
from peft_posthoc.adapters.tensors import EMBEDDING_FACTOR, FACTOR, Factored
from peft_posthoc.errors import AdapterError
from peft_posthoc.formats import mlx as export_mlx
from peft_posthoc.ranks.safe import safe_rank
from peft_posthoc.serving.subject import EXPERT, Subject, leaf_of

# What PEFT 0.6's LoraConfig takes; every version since knows these.
_OLD_KEYS = frozenset(
    {
        *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r"),
        *("target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save"),
        *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    }
)
# Names of initial weights that PEFT takes out of the base when it loads the adapter, by their beginning.
_MUTATING_INITS = ("pissa", "olora", "corda", "loftq")
_DENSE = re.compile(r".+\.(mlp|shared_experts?|feed_forward)\.(gate_proj|up_proj|down_proj)")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
# `...N.parent.leaf`, `...N.parent.part.leaf` or `...N.parent.experts.N.leaf`.
_LAYERED = re.compile(r"(.*\.)?\d+\.\w+\.\w+(\.\w+|\.\d+\.\w+)?")
# Layers that are told as missing.
_MOST = 10_000
_OTHER_MODALITIES = ("vision", "visual", "audio", "speech")
# How SGLang 0.5.23 calls what it fuses (`srt/lora/utils.py`, `get_normalized_target_modules`).
_SGLANG_NAMES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}


def dense_beside_experts(subject: Subject) -> tuple[str, ...]:
    """Dense or shared MLPs in a file that holds single experts too."""
    return tuple(module for module in subject.modules if _DENSE.fullmatch(module)) if subject.experts else ()


def partial_experts(subject: Subject) -> tuple[str, ...]:
    """Single experts of which some, but not all three projections are there."""
    held: dict[str, set[str]] = defaultdict(set)
    for match in filter(None, map(EXPERT.fullmatch, subject.experts)):
        held[f"{match['experts']}.{match['index']}"].add(match["leaf"])
    full = ({"gate_proj", "up_proj", "down_proj"}, {"w1", "w2", "w3"})
    return tuple(expert for expert, leaves in held.items() if not any(leaves >= names for names in full))


def other_modalities(subject: Subject) -> tuple[str, ...]:
    """Modules of a vision or audio tower."""
    return tuple(
        module
        for module in subject.modules
        if any(word in part for part in module.split(".") for word in _OTHER_MODALITIES)
    )


def without_prefix(subject: Subject) -> tuple[str, ...]:
    """Tensors that are not called what `PeftModel` calls them."""
    return tuple(name for name in subject.headers if not name.startswith(PREFIX))


def named_after_adapter(subject: Subject) -> tuple[str, ...]:
    """Factors with the adapter's name in theirs (`lora_A.default.weight`)."""
    matches = (FACTOR.fullmatch(name) or EMBEDDING_FACTOR.fullmatch(name) for name in subject.headers)
    return tuple(match.string for match in matches if match and match["adapter"])


def alone(subject: Subject, leaf: str, *, without: str, unless: Collection[str] = ()) -> tuple[str, ...]:
    """Modules called `leaf` that have no sibling called `without`, nor one of `unless`."""
    return tuple(
        module
        for module in subject.modules
        if leaf_of(module) == leaf
        and not any(f"{module.removesuffix(leaf)}{other}" in subject.modules for other in (without, *unless))
    )


def missing_layers(subject: Subject) -> tuple[str, ...]:
    """Layers that lack a name which others have.

    The base's class tells which layers there are; without it, the numbers in the file do.
    """
    of_experts = {*subject.experts, *subject.fused_experts}
    patterns = {_pattern(module) for module in subject.modules if module not in of_experts}
    if subject.base is not None:
        there = subject.base.layout.classes
        return tuple(module for module in there if _pattern(module) in patterns and module not in subject.modules)
    if subject.config.get("layers_to_transform") is not None:
        return (f"layers_to_transform={subject.config['layers_to_transform']}",)
    numbers: dict[str, set[int]] = defaultdict(set)
    last: dict[str, int] = defaultdict(int)
    for module in subject.modules:
        if (pattern := _pattern(module)) in patterns and (number := _NUMBER.search(module)):
            numbers[pattern].add(int(number[0]))
            stack = module[: number.start()]
            last[stack] = max(last[stack], int(number[0]))
    missing = (
        pattern.replace("*", str(index), 1)
        for pattern, held in numbers.items()
        for index in range(last[pattern[: pattern.index("*")]] + 1)
        if index not in held
    )
    # A name may say any number.
    return tuple(islice(missing, _MOST))


def unknown_keys(subject: Subject) -> tuple[str, ...]:
    """Keys that PEFT 0.6 does not know."""
    return tuple(sorted(key for key in subject.config if key not in _OLD_KEYS))


def mutating_init(subject: Subject) -> tuple[str, ...]:
    """Initial weights that are taken out of the base."""
    init = subject.config.get("init_lora_weights")
    return (f"init_lora_weights={init!r}",) if str(init).lower().startswith(_MUTATING_INITS) else ()


def variants(subject: Subject) -> tuple[str, ...]:
    """Settings with which PEFT computes something else than base + b @ a, and that vLLM knows of."""
    return subject.setting("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")


def bias_setting(subject: Subject) -> tuple[str, ...]:
    """`bias`, unless it is "none"."""
    bias = subject.config.get("bias", "none")
    return () if bias == "none" else (f"bias={bias!r}",)


def target_pattern(subject: Subject) -> tuple[str, ...]:
    """`target_modules`, where it is a regular expression."""
    target = subject.config.get("target_modules")
    return (target,) if isinstance(target, str) and target not in ("all", "all-linear") else ()


def untargeted(subject: Subject) -> tuple[str, ...]:
    """Modules whose name is in no target, as SGLang compares them."""
    target = subject.config.get("target_modules")
    if not isinstance(target, list):
        return ()

    def name(module: str) -> str:
        return _SGLANG_NAMES.get(leaf_of(module), leaf_of(module))

    names = {name(str(one)) for one in target}
    return tuple(module for module, _ in _ranked(subject) if name(module) not in names)


def untargeted_in_peft(subject: Subject) -> tuple[str, ...]:
    """Modules that PEFT does not take `target_modules` to mean."""
    target = subject.config.get("target_modules")
    if target is None:
        return () if subject.fused_experts else ("target_modules=None",)
    ranked = [module for module, _ in _ranked(subject)]
    # To PEFT, "all-linear" is all but the head.
    spared = {*subject.heads, *subject.embeddings} if target == "all-linear" else set()
    taken = set(ranked) if target == "all-linear" else meant(subject.config, "target_modules", ranked, subject.label)
    taken &= in_layers_named(subject.config, ranked, subject.label)
    taken -= {*spared, *meant(subject.config, "exclude_modules", ranked, subject.label)}
    return tuple(module for module in ranked if module not in taken)


def misscaled(subject: Subject, scale: Callable[[Factored], float]) -> tuple[str, ...]:
    """Modules that an engine with this formula multiplies with something else than PEFT, and how much."""
    found = ((module, subject.scale(module), scale(own)) for module, own in _ranked(subject))
    return tuple(
        f"{module} (by {got:.3g} instead of {wanted:.3g})"
        for module, wanted, got in found
        if not math.isclose(wanted, got, rel_tol=1e-6)
    )


def other_ranks(subject: Subject) -> tuple[str, ...]:
    """Modules whose rank is not the configuration's `r`."""
    found = ((module, own.rank) for module, own in _ranked(subject) if own.rank != subject.r)
    return tuple(f"{module} ({rank} instead of {subject.r})" for module, rank in found)


def misranked(subject: Subject) -> tuple[str, ...]:
    """Modules whose rank is not what PEFT expects of the configuration."""
    found = ((module, own.rank, subject.configured_rank(module)) for module, own in _ranked(subject))
    return tuple(f"{module} ({rank} instead of {wanted})" for module, rank, wanted in found if rank != wanted)


def _ranked(subject: Subject) -> list[tuple[str, Factored]]:
    """All modules but those of all experts at once, whose factors are stacked."""
    fused = {*subject.fused_experts}
    return [(module, own) for module, own in subject.modules.items() if module not in fused]


def mixed_leaves(subject: Subject) -> tuple[str, ...]:
    """Names whose layers have different ranks even after LoRAX and TGI pad them."""
    ranks: dict[str, set[int]] = defaultdict(set)
    for module, own in _ranked(subject):
        ranks[leaf_of(module)].add(safe_rank(own.rank))
    return tuple(leaf for leaf, own in ranks.items() if len(own) > 1)


def padded_ranks(subject: Subject) -> tuple[str, ...]:
    """Ranks that LoRAX and TGI pad to another one than `r`, by which they scale every name but the first."""
    several = len({leaf_of(module) for module, _ in _ranked(subject)}) > 1
    ranks = {own.rank for _, own in _ranked(subject) if safe_rank(own.rank) != subject.r}
    return tuple(f"rank {rank}, r {subject.r}" for rank in sorted(ranks)) if several else ()


def exotic_names(subject: Subject) -> tuple[str, ...]:
    """Modules whose names are not of the form that TensorRT-LLM takes apart: `...N.parent.leaf`."""
    skipped = {*subject.embeddings, *subject.heads}
    return tuple(module for module in subject.modules if module not in skipped and not _LAYERED.fullmatch(module))


def overwriting(subject: Subject) -> tuple[str, ...]:
    """Norms, biases and whole weights that PEFT, not told of them by the configuration, writes over the base's."""
    biases = subject.biases if not bias_setting(subject) else ()
    names = (name for name in (*subject.norms, *biases, *subject.whole) if not subject.is_kept_whole(name))
    if subject.base is None:
        return tuple(names)
    return tuple(name for name in names if name.removeprefix(PREFIX) in subject.base.checkpoint.headers)


def not_for_mlx(subject: Subject) -> tuple[str, ...]:
    """The refusal of `phlora export --to mlx`, if it refuses the adapter."""
    try:
        folder = LoraFolder(subject.label)
        if subject.base is not None:
            export_mlx.check(AdapterOnModel(folder, subject.base.checkpoint, subject.base.layout))
    except AdapterError as error:
        return (str(error),)
    return ()


def other_copies(subject: Subject) -> tuple[str, ...]:
    """Copies of the base's weights that are not the base's."""
    if subject.base is None:
        return ()
    headers, read = subject.base.checkpoint.headers, subject.base.checkpoint.read

    def differs(copy: str) -> bool:
        name = own_name(copy)
        if name not in headers:  # A tied head is stored as the embeddings.
            return False
        return not torch.equal(subject.weights.read(copy).float(), read(name).float())

    return tuple(copy for copy in subject.base_copies if differs(copy))


def kept_norms(subject: Subject) -> tuple[str, ...]:
    """Norms that llama.cpp's converter knows by their names."""
    return tuple(name for name in subject.norms if "_layernorm" in name or ".norm" in name)


def other_norms(subject: Subject) -> tuple[str, ...]:
    """Norms that it does not know, such as `q_norm` and `ln_1`."""
    known = {*kept_norms(subject)}
    return tuple(name for name in subject.norms if name not in known)


def strangers(subject: Subject) -> tuple[str, ...]:
    """Modules that the base's class does not have."""
    if subject.base is None:
        return ()
    classes, handled = subject.base.layout.classes, {*subject.experts}
    return tuple(
        module
        for module in subject.modules
        if module not in handled and module.removesuffix(".base_layer") not in classes
    )


def unmapped(subject: Subject) -> tuple[str, ...]:
    """Modules that the base's class does not have, with or without a wrapper's `language_model.` in their names."""
    classes = subject.base.layout.classes if subject.base is not None else {}
    return tuple(module for module in strangers(subject) if module.replace("language_model.", "") not in classes)


def in_layers(names: Iterable[str]) -> tuple[str, ...]:
    """Those of numbered layers."""
    return tuple(name for name in names if ".layers." in name)


def other_adapters(subject: Subject) -> tuple[str, ...]:
    """Other safetensors files in the folder with tensors that an engine would take for the adapter's."""
    return tuple(
        file for file, names in subject.others.items() if any(".lora_" in one or ".layers." in one for one in names)
    )


def fused_names(subject: Subject) -> tuple[str, ...]:
    """Fused projections of a class that has them one by one."""
    parts = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}
    classes = subject.base.layout.classes if subject.base is not None else {}
    return tuple(
        module
        for module in strangers(subject)
        if (leaf := leaf_of(module)) in parts and f"{module.removesuffix(leaf)}{parts[leaf]}" in classes
    )


def unfitting(subject: Subject, *, larger: bool, smaller: bool) -> tuple[str, ...]:
    """Modules whose factors are larger or smaller than the base's weight."""
    if subject.base is None:
        return ()
    found = []
    for module, own in subject.modules.items():
        slot = subject.base.slots.get(module)
        if slot is None or (own.m, own.n) == (slot.m, slot.n):
            continue
        if larger if own.m > slot.m or own.n > slot.n else smaller:
            found.append(f"{module} ({own.m} x {own.n}, in the base {slot.m} x {slot.n})")
    return tuple(found)


def tied(subject: Subject) -> tuple[str, ...]:
    """Embeddings and heads with factors, of a base that ties them."""
    return (*subject.embeddings, *subject.heads) if subject.base is not None and subject.base.tied else ()


def maybe_tied(subject: Subject) -> tuple[str, ...]:
    """The same, where no base tells."""
    return (*subject.embeddings, *subject.heads) if subject.base is None else ()


def of_model(subject: Subject, names: Iterable[str], *types: str) -> tuple[str, ...]:
    """The names, if the base is of one of these model types."""
    return tuple(names) if subject.base is not None and subject.base.model_type in types else ()


def not_of_model(subject: Subject, names: Iterable[str], *types: str) -> tuple[str, ...]:
    """The names, unless the base is known to be of one of these model types."""
    return () if subject.base is not None and subject.base.model_type in types else tuple(names)


def incompletely_whole(subject: Subject) -> tuple[str, ...]:
    """Modules of the base that PEFT takes to be in the file whole, and which are not."""
    if subject.base is None:
        return ()
    ends = subject.kept_whole()
    held = {name.removeprefix(PREFIX).rpartition(".")[0] for name in subject.headers}
    return tuple(
        module
        for module in subject.base.layout.classes
        if ends and module.endswith(ends) and not any(f"{own}.".startswith(f"{module}.") for own in held)
    )


def new_tokens(subject: Subject) -> tuple[str, ...]:
    """Tokens of `added_tokens.json` that the base's vocabulary does not have, or all, where it is not known."""
    size = subject.base.vocabulary if subject.base is not None else None
    return tuple(token for token, number in subject.added_tokens.items() if size is None or number >= size)


def _pattern(module: str) -> str:
    return _NUMBER.sub("*", module)
