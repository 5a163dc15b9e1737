"""One layer at a time: the fine-tune with a single weight of it at a low rank, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from tqdm import tqdm

if TYPE_CHECKING:
    from .experiment import Experiment


def by_layer(made: Experiment, rank: int) -> dict[str, Any]:
    """Of each weight that an adapter carries: its E_r, its part in all energy that is lost, and the scores without it.

    Returns:
        `rank`, `tuned` (the means of the fine-tune's scores) and `layers`: by name `energy`, `lost` (of the energy of
        all carried weights, what this one loses) and `metrics` (the means).
    """
    folder, _ = made.extracted(rank)  # which may train the fine-tune first
    with torch.no_grad():
        return _by_layer(made, folder, rank)


def _by_layer(made: Experiment, folder: Path, rank: int) -> dict[str, Any]:
    base = dict(made.kind.load(made.base).named_parameters())
    adapted = dict(PeftModel.from_pretrained(made.kind.load(made.base), folder).merge_and_unload().named_parameters())
    tuned = made.kind.load(made.tuned)
    carried = {name: weight for name, weight in tuned.named_parameters() if not torch.equal(base[name], adapted[name])}
    of_all = sum(float((weight - base[name]).square().sum()) for name, weight in carried.items())
    layers = {}
    for name, weight in tqdm(carried.items(), desc="layers", disable=None):
        missed, whole = float((weight - adapted[name]).square().sum()), weight.clone()
        weight.copy_(adapted[name])
        layers[name] = {
            "energy": 1 - missed / float((whole - base[name]).square().sum()),
            "lost": missed / of_all,
            "metrics": _means(made, tuned),
        }
        weight.copy_(whole)
    return {"rank": rank, "tuned": _means(made, tuned), "layers": layers}


def _means(made: Experiment, model: Any) -> dict[str, float]:
    questions = made.sets.test
    torch.manual_seed(made.settings.seed)
    said = made.kind.said(model, made.processor, questions, made.settings)
    scores = [made.task.score(one, said[one.id]) for one in questions]
    return {metric: sum(one[metric] for one in scores) / len(scores) for metric in made.task.metrics}
