"""What the paper leaves open, with what our runs and its own tables say."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .beside import PUBLISHED
from .intervals import interval, rank_correlation
from .results import Run, differences, mean
from .task import PLAIN

_FEW = 3


def lines(found: Sequence[Sequence[Run]]) -> list[str]:
    """A section for each question of which there are rows."""
    runs = [run for one in found for run in one]
    return [
        *_prediction(runs),
        *_by_layer(runs),
        *_left_out(runs),
        *_at_32(runs),
        *_preferences(runs),
        *_refinement(runs),
    ]


def _prediction(runs: Sequence[Run]) -> list[str]:
    ranked = [run for run in runs if len(run.extracted) >= _FEW]
    if not ranked:
        return []
    text = [
        "## Does E_r predict the score?",
        "",
        "Within a fine-tune E_r and rank have one order, so that a correlation over ranks says no more of the one than",
        "of the other. Over all fine-tunes the score is the share of the fine-tune's gain that an adapter has:",
        "(adapter - base) / (fine-tune - base); of fine-tunes that gained less than a point there is none. Seeds count",
        "as fine-tunes of their own, though they are alike.",
        "",
        "| pair | seed | ranks | Spearman's, E_r and score |",
        "|---|--:|--:|--:|",
    ]
    text += [
        f"| {run.config} | {run.settings.seed} | {len(run.extracted)} | {_told(_spearman(run, run.metrics[0]))} |"
        for run in ranked
    ]
    points = [point for run in ranked for point in _gains(run)]
    energies, ranks, gains = ([point[i] for point in points] for i in range(3))
    if points:
        text += [
            "",
            f"Over all {len(points)} adapters together: of E_r and gain {_told(rank_correlation(energies, gains))}, of "
            f"rank and gain {_told(rank_correlation(ranks, gains))}.",
        ]
    for rank in sorted(set(ranks)):
        alike = [(energy, gain) for energy, of, gain in points if of == rank]
        if len(alike) > _FEW:
            rho = rank_correlation(*zip(*alike, strict=True))
            text.append(f"At rank {rank:g} alone, over {len(alike)} fine-tunes: {_told(rho)}.")
    return [*text, "", *_of_the_paper(), ""]


def _by_layer(runs: Sequence[Run]) -> list[str]:
    """Whether a layer's own energy tells what is lost when it alone is at a low rank."""
    text = []
    for run in runs:
        for metric in run.metrics if run.layers else []:
            told = run.layers or {}
            layers, scale = list(told["layers"].values()), 1 if metric in PLAIN else 100
            drops = [told["tuned"][metric] - layer["metrics"][metric] for layer in layers]
            kept, lost = ([layer[name] for layer in layers] for name in ("energy", "lost"))
            text.append(
                f"| {run.config} | {run.settings.seed} | {told['rank']} | {len(layers)} | {metric} | "
                f"{scale * max(drops):.1f} | {_told(-rank_correlation(kept, drops))} | "
                f"{_told(rank_correlation(lost, drops))} |"
            )
    if not text:
        return []
    return [
        "## Does a layer's E_r predict what it costs?",
        "",
        "The fine-tune with one weight at the rank told and all others whole, for each weight that an adapter carries.",
        "Spearman's over the layers: of the layer's own E_r and the score; and of the energy that it loses, as a share",
        "of all energy, and what the score falls by. *Worst*: the largest fall.",
        "",
        "| pair | seed | rank | layers | metric | worst | E_r and score | lost energy and fall |",
        "|---|--:|--:|--:|---|--:|--:|--:|",
        *text,
        "",
    ]


def _spearman(run: Run, metric: str) -> float:
    rows = run.extracted
    return rank_correlation([row["energy"] for row in rows], [mean(row, metric) for row in rows])


def _gains(run: Run) -> list[tuple[float, float, float]]:
    metric = run.metrics[0]
    base, full = run.row("base"), run.row("full fine-tune")
    if base is None or full is None or mean(full, metric) - mean(base, metric) < 0.01:
        return []
    start, whole = mean(base, metric), mean(full, metric) - mean(base, metric)
    return [(row["energy"], row["rank"], (mean(row, metric) - start) / whole) for row in run.extracted]


def _of_the_paper() -> list[str]:
    """Its text says that there is a clear correlation; here are its own numbers."""
    found, at_32 = [], []
    for told in PUBLISHED.values():
        for row in told["rows"]:
            full, *cells = (re.findall(r"[\d.]+", row[i]) for i in (2, 4, 5, 6))
            for metric, whole in enumerate(map(float, full)):
                energies, scores = zip(*((float(cell[-1]), float(cell[metric])) for cell in cells), strict=True)
                found.append(rank_correlation(energies, scores))
                at_32.append((energies[0], scores[0] / whole))
    ordered = [one for one in found if one == one]
    return [
        f'The paper sees "a clear correlation". Of its {len(found)} series of three ranks (a model, a set, a metric) '
        f"{sum(one > 0.99 for one in ordered)} grow with E_r throughout, {sum(one < -0.99 for one in ordered)} fall "
        f"throughout, {len(found) - len(ordered)} stay the same; the mean of Spearman's is "
        f"{sum(ordered) / len(ordered):.2f}. Of E_32 and the share of the fine-tune's score at 32, over all series: "
        f"{_told(rank_correlation(*zip(*at_32, strict=True)))}.",
    ]


def _left_out(runs: Sequence[Run]) -> list[str]:
    """Of adapters with nearly all energy of what they carry, what is lost is what they do not carry."""
    text = []
    for run in runs:
        full, whole = run.row("full fine-tune"), max(run.extracted, key=lambda row: row["rank"], default=None)
        if full is not None and whole is not None and whole["energy"] > 0.995:
            metric = run.metrics[0]
            lost, scale = mean(whole, metric) - mean(full, metric), 1 if metric in PLAIN else 100
            text.append(
                f"| {run.config} | {run.settings.seed} | {whole['rank']} | {100 * whole['energy']:.1f} | "
                f"{100 * whole['of all']:.1f} | {metric} | {scale * lost:+.1f} |"
            )
    if not text:
        return []
    return [
        "## What is lost with what an adapter does not carry?",
        "",
        "Adapters that keep all but 0.5 % of the energy of the layers that they carry. What they are short of the",
        "fine-tune is lost with the rest: embeddings, the head, norms, convolutions, which E_r does not count.",
        "",
        "| pair | seed | rank | E_r | of all that changed | metric | to the fine-tune |",
        "|---|--:|--:|--:|--:|---|--:|",
        *text,
        "",
    ]


def _at_32(runs: Sequence[Run]) -> list[str]:
    known = [
        (run, run.spectrum["energy at"]["32"]) for run in runs if run.spectrum and "32" in run.spectrum["energy at"]
    ]
    if not known:
        return []
    shares = ", ".join(f"{run.config} (seed {run.settings.seed}) {100 * share:.1f} %" for run, share in known)
    within = sum(0.345 <= share < 0.445 for _, share in known)
    return [
        "## Do the paper's energies, 35 to 44 % at rank 32, hold?",
        "",
        f"Of our {len(known)} fine-tunes {within} lie in that range: {shares}. Our models are small, so that 32 is",
        "more of their full rank, and see few steps: the numbers are those of these pairs.",
        "",
    ]


def _preferences(runs: Sequence[Run]) -> list[str]:
    taught = [run for run in runs if run.spectrum and run.settings.model == "smollm2"]
    if not any("preferences" in run.settings.task for run in taught):
        return []
    text = [
        "## What does a preference delta look like?",
        "",
        "Full fine-tunes of one base, by what they were trained on. They differ in learning rate and steps too.",
        "",
        "| pair | learning rate | steps | delta | E_1 | E_8 | E_32 | stable rank |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for run in taught:
        at, settings = (run.spectrum or {})["energy at"], run.settings
        steps = -(-run.rows[0]["trained on"] // settings.batch) * settings.epochs
        text.append(
            f"| {run.config} | {settings.lr:g} | {steps:g} | {100 * (run.spectrum or {})['relative_delta']:.2f} % | "
            + " | ".join(f"{100 * at[rank]:.1f}" for rank in ("1", "8", "32"))
            + f" | {1 / at['1']:.1f} |"
        )
    return [*text, ""]


def _refinement(runs: Sequence[Run]) -> list[str]:
    text = []
    for run in runs:
        for row in run.rows:
            name, _, how = row["row"].partition(", refined ")
            start = run.row(name)
            if how and start is not None:
                for metric in run.metrics:
                    values = differences(row, start, metric)
                    low, high = interval(values)
                    scale = 1 if metric in PLAIN else 100
                    text.append(
                        f"| {run.config} | {name} | {how} | {metric} | {scale * sum(values) / len(values):+.2f} | "
                        f"{scale * low:+.2f} to {scale * high:+.2f} |"
                    )
    if not text:
        return []
    return [
        "## What does refinement change?",
        "",
        "The refined adapter less the one that it was made of, question by question, with 95 % of bootstrap samples.",
        "",
        "| pair | adapter | refined | metric | difference | interval |",
        "|---|---|---|---|--:|--:|",
        *text,
        "",
    ]


def _told(rho: float) -> str:
    return f"{rho:.2f}" if rho == rho else "no order"
