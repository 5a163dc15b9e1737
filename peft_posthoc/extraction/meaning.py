"""What a delta means where base or tuned is quantised, or where another form of the base is served."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft_posthoc.extraction.row import Row
from peft_posthoc.text import as_flag, percent

# Of the energy that rounding to a grid is expected to leave beside the kept triplets, the share from which it is there.
# Where tuned started from the rounded weights next to none is.
_THERE = 0.5
# Of a delta's energy, the share of a grid's rounding from which it is most of it.
_MOST = 0.5


def norms(rows: Iterable[Row]) -> dict[str, Any]:
    """Of all rows that know them: `grid` of base and tuned, `served_error` and `served_delta`, as roots of sums."""
    rows = list(rows)
    grids = [row.grid for row in rows if row.grid is not None]
    served = [row for row in rows if row.served_error is not None]
    found: dict[str, Any] = {}
    if grids:
        found["grid"] = (_root(base for base, _ in grids), _root(tuned for _, tuned in grids))
    if served:
        found["served_error"] = _root(row.served_error or 0.0 for row in served)
        found["served_delta"] = _root(row.served_delta or 0.0 for row in served)
    return found


def meaning(rows: Sequence[Row], provenance: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """What is to be said of a delta: notes and warnings, none where nothing is quantised."""
    told = norms(rows)
    notes = [_for_base(rows, _named(provenance, "for_base"), told)] if "served_error" in told else []
    if "grid" not in told:
        return notes, []
    known = [row for row in rows if row.grid is not None]
    delta, error = _root(row.delta_norm or 0.0 for row in known), math.hypot(*told["grid"])
    sides = [side for side, norm in zip(("base", "tuned"), told["grid"], strict=True) if norm]
    named = [_named(provenance, side) for side in sides]
    are = " and ".join(named) + (" are" if len(sides) > 1 else " is")
    numbers = f"norm {delta:.3g}, of which rounding to the grid is expected to make {error:.3g}"
    if not _is_there(known):
        why = (
            "most weights have the same codes in both, and smaller changes are not in it"
            if len(sides) > 1
            else "the fine-tune started from the rounded weights, as merges of QLoRA do, and the delta is its task"
        )
        notes.append(
            f"{are} quantised, and the delta (norm {delta:.3g}) lacks what rounding to the grid is expected to make of "
            f"it ({error:.3g}): {why}."
        )
        return notes, []
    if "base" in sides:
        what = "is the total one, the task's and the error of quantising together"
    else:
        what = "has the error of quantising beside the task"
    notes.append(f"{are} quantised: the delta {what} ({numbers}).")
    if error**2 <= _MOST * delta**2:
        return notes, []
    return notes, [
        f"{percent(min(error / delta, 1.0) ** 2)} of the deltas' energy is what quantising is expected to leave there, "
        f"flat over all ranks: it takes their place from the task. {_ways_out(provenance, sides)}"
    ]


def _ways_out(provenance: Mapping[str, Any], sides: Sequence[str]) -> str:
    ways = []
    if "tuned" in sides:
        ways.append(f"Give the fine-tune as it was before, or let `{as_flag('rank', 'auto')}` tell what stands out.")
    if "base" in sides:
        flag = as_flag("for_base", provenance["base"])
        ways.append(
            f"Give the base as it was before, with `{flag}`; or fit the adapter to what is served with `phlora refine`."
        )
    return " ".join(ways)


def _named(provenance: Mapping[str, Any], side: str) -> str:
    forms = provenance.get("quantised", {}).get(side)
    return f"`{provenance[side]}`" + (f" ({', '.join(forms)})" if forms else "")


def _for_base(rows: Sequence[Row], served: str, told: Mapping[str, float]) -> str:
    task = _root(row.delta_norm or 0.0 for row in rows if row.served_error is not None)
    error, total = told["served_error"], told["served_delta"]
    ratio = f", {error / task:.3g} times that" if task else ""
    return (
        f"To be served on {served}: the task's delta has norm {task:.3g}, the base's quantisation error {error:.3g}"
        f"{ratio}; from what is served to tuned it is {total:.3g}. The adapter holds the task's and leaves the error "
        "where it is; `phlora refine` can mend some of it."
    )


def _is_there(rows: Iterable[Row]) -> bool:
    """Whether the deltas, and what the kept triplets leave of them, are as large as rounding to grids makes both."""
    found, expected = [0.0, 0.0], [0.0, 0.0]
    for row in rows:
        m, n = row.shape[0], math.prod(row.shape[1:])
        energy, rounding = (row.delta_norm or 0.0) ** 2, sum(error**2 for error in row.grid or ())
        found[0] += energy
        found[1] += (1 - (row.energy or 0.0)) * energy
        expected[0] += rounding
        expected[1] += rounding * (m - row.rank) * (n - row.rank) / (m * n)
    return all(there >= _THERE * least for there, least in zip(found, expected, strict=True))


def _root(norms: Iterable[float]) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))
