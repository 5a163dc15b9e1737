"""An inspection for a terminal: the answer, a row for each kind of module or each layer, a row for each rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peft_posthoc.inspection.found import Found
from peft_posthoc.text import percent, shorten, sized

_WIDTH = 42


def table(inspection: Found, *, layers: bool = False) -> str:
    """The inspection for a terminal.

    Args:
        inspection: What was found.
        layers: A row for every weight, not for each kind of module.
    """
    rows = _layers(inspection) if layers else _kinds(inspection)
    total = [float(inspection.curves.total[rank - 1]) for rank in inspection.ranks()]
    head = [inspection.kept(), *inspection.report.beside()]
    return "\n".join([*head, "", *rows, f"{'total':<{_WIDTH}} {_shares(total)}", "", *_rules(inspection)])


def _kinds(inspection: Found) -> Iterable[str]:
    ranks, telling, auto = inspection.ranks(), inspection.telling(), inspection.measured()
    more = f" {'auto':>12}" if auto else ""
    yield f"{_heading('modules', ranks)} {f'for {telling.share:.0%}':>12}{more}"
    for kind, weights in inspection.kinds.items():
        energy = {name: (inspection.rows[name].delta_norm or 0.0) ** 2 for name in weights}
        kept = [sum(inspection.curves.at(name, rank) * energy[name] for name in weights) for rank in ranks]
        end = f" {telling.lowest_to_highest(weights):>12}" + (f" {auto.lowest_to_highest(weights):>12}" if auto else "")
        count = f" ({len(weights)})"
        shown = f"{shorten(kind, _WIDTH - len(count))}{count}"
        yield f"{shown:<{_WIDTH}} {_shares([one / inspection.energy_of(kind) for one in kept])}{end}"


def _layers(inspection: Found) -> Iterable[str]:
    ranks, telling, auto = inspection.ranks(), inspection.telling(), inspection.measured()
    more = f" {'auto':>5} {'noise':>6}" if auto else ""
    yield f"{_heading('weight', ranks)} {f'for {telling.share:.0%}':>8}{more}"
    for name, row in inspection.rows.items():
        end = f" {telling.rank(name):>8}" + (f" {auto.rank(name):>5} {percent(row.noise):>6}" if auto else "")
        kept = [inspection.curves.at(name, rank) for rank in ranks]
        yield f"{shorten(name, _WIDTH):<{_WIDTH}} {_shares(kept)}{end}"


def _heading(first: str, ranks: Sequence[int]) -> str:
    return f"{f'{first}: E_r at rank':<{_WIDTH}} " + " ".join(f"{rank:>6}" for rank in ranks)


def _shares(shares: Iterable[float]) -> str:
    return " ".join(f"{percent(share):>6}" for share in shares)


def _rules(inspection: Found) -> Iterable[str]:
    found = inspection.candidates
    wide = max(len(one.flags) for one in found)
    yield f"{'rule':<{wide}} {'ranks':>12} {'E_r':>7} {'error':>7} {'portable':>10} {'(padding)':>11} {'peft':>10}"
    for one in found:
        if not one.ranks:
            yield f"{one.flags:<{wide}} {one.reason}"
            continue
        kept = [one.at_least(percent(one.energy)), one.at_most(percent(one.error))]
        sizes = [one.at_least(sized(one.portable)), f"({sized(one.padding)})", one.at_least(sized(one.peft))]
        numbers = " ".join([*(f"{text:>7}" for text in kept), f"{sizes[0]:>10} {sizes[1]:>11} {sizes[2]:>10}"])
        larger = "  larger than the fine-tune" if inspection.is_larger(inspection.bytes(one)) else ""
        yield f"{one.flags:<{wide}} {one.lowest_to_highest():>12} {numbers}{larger}"
