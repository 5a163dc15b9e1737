"""How sure a mean over questions is, and whether two orders agree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .task import SEED

DRAWS = 10_000


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Between which values the mean lies in 95 of 100 bootstrap samples of the questions (percentiles)."""
    drawn = np.random.default_rng(SEED).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.percentile(np.asarray(values, dtype=float)[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: Pearson's of the ranks, equal values sharing theirs; NaN where one has no order."""
    ranks = [_ranks(np.asarray(one, dtype=float)) for one in (x, y)]
    if any(one.std() == 0 for one in ranks):
        return float("nan")
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.array([(values < one).sum() + ((values == one).sum() - 1) / 2 for one in values])
