"""How transformers 5 loads the tensors of files: under other names, fused matrices split, split ones put together."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_posthoc.models.layout import Conversion

Parts = tuple[tuple[str, ...], ...]
"""Of a stack of experts: for every expert, the tensors on disk that it is made of."""


class Loading(NamedTuple):
    """The tensors of a model, as they come from those of files."""

    renamed: dict[str, str]
    """By name on disk, the model's own."""
    stacked: dict[str, Parts]
    """By the model's name of a stack of experts, what it is made of."""
    conversions: tuple[Conversion, ...]


def loading(model: nn.Module, files: Iterable[Collection[str]], stacks: Collection[str]) -> Loading:
    """Ask transformers how it loads files.

    Args:
        model: With or without values.
        files: Of each, the names of its tensors.
        stacks: The model's names of its stacks of experts.
    """
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = Loading({}, {}, ())
    for names in dict.fromkeys(map(tuple, files)):
        unknown = [name for name in names if name not in own]
        rules = _rules(model) if unknown else []
        if rules:
            renamed, stacked, conversions = _loading(model, own, unknown, rules, stacks)
            known = {one.sources for one in found.conversions}
            more = [one for one in conversions if one.sources not in known]
            found = Loading({**renamed, **found.renamed}, {**stacked, **found.stacked}, (*found.conversions, *more))
    return found


def _loading(
    model: nn.Module,
    own: Mapping[str, tuple[int, ...]],
    unknown: Iterable[str],
    rules: Collection[Any],
    stacks: Collection[str],
) -> Loading:
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = getattr(model, "base_model_prefix", "")
    meta = dict.fromkeys(own, True)
    renamed: dict[str, str] = {}
    sources: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(unknown, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if target in own and pattern is None:
            renamed[name] = target
        elif target in own:
            sources[target][pattern].append(name)
    stacked, conversions = {}, []
    for target, found in sources.items():
        rule = by_pattern[next(iter(found))]
        columns = [found[pattern] for pattern in rule.source_patterns if pattern in found]
        if target in stacks and _stacks_experts(rule):
            if all(len(column) == own[target][0] for column in columns):
                stacked[target] = tuple(zip(*columns, strict=True))
            continue
        taken = [(pattern, name) for pattern, names in found.items() for name in names]
        make = partial(_convert, model, own, rule, target, taken)
        conversions.append(Conversion(tuple(name for _, name in taken), make))
    return Loading(renamed, stacked, tuple(conversions))


def _convert(
    model: Any,
    own: Mapping[str, tuple[int, ...]],
    rule: Any,
    target: str,
    taken: Iterable[tuple[str, str]],
    *tensors: Tensor,
) -> dict[str, Tensor]:
    """The model's tensors that a rule makes, by name; none if they are not those of the model."""
    rule = deepcopy(rule)  # It collects what it is given.
    for (pattern, name), tensor in zip(taken, tensors, strict=True):
        rule.add_tensor(target, name, pattern, tensor)
    made = rule.convert(target, model=model, config=model.config)
    made = {name: one[0] if isinstance(one, list) else one for name, one in made.items()}
    return made if all(own.get(name) == tuple(tensor.shape) for name, tensor in made.items()) else {}


def _rules(model: nn.Module) -> list[Any]:
    """The rules by which transformers 5 loads a checkpoint into the model."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []  # transformers 4 has its classes under the names on disk.
    return list(get_model_conversion_mapping(model)) if isinstance(model, PreTrainedModel) else []


def _stacks_experts(rule: Any) -> bool:
    """Tell whether a rule does nothing but stack experts, and the parts of each along the out features."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
    return steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def written(model: nn.Module, name: str, parameter: Tensor) -> Parts:
    """The tensors by expert that transformers saves a stack as; none if it saves it as it is."""
    if not any(_stacks_experts(rule) for rule in _rules(model) if hasattr(rule, "operations")):
        return ()
    from transformers.core_model_loading import revert_weight_conversion

    names = list(revert_weight_conversion(model, {name: torch.empty_like(parameter, device="meta")}))
    if len(names) % len(parameter) or names == [name]:
        return ()
    by_expert: dict[str, list[str]] = defaultdict(list)
    for one in names:
        by_expert["".join(re.findall(r"experts\.(\d+)\.", one))].append(one)
    return tuple(tuple(by_expert[str(e)]) for e in range(len(parameter)))
