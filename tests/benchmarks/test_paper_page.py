"""What the page says of rows whose answers are known."""

import json
from dataclasses import asdict

import pytest

from benchmarks.paper import beside, open_questions
from benchmarks.paper.page import page
from benchmarks.paper.results import read
from benchmarks.paper.settings import Settings


def write(folder, scores, *, task="tatqa", metric="exact match", seed=42, energies=None, **changes):
    """Rows by name, each with its scores; of `r=` those of a truncated SVD, with the energy told."""
    settings = asdict(Settings(model="smollm2", task=task, seed=seed, **changes))
    folder.mkdir(parents=True)
    for place, (name, values) in enumerate(scores.items()):
        row = {"row": name, "settings": settings, "metrics": {metric: {str(i): one for i, one in enumerate(values)}}}
        row |= {
            "bytes": 1e6,
            "seconds": 1,
            "questions": len(values),
            "trained on": 8,
            "date": "today",
            "machine": "one",
        }
        if name in (energies or {}):
            row |= {"rank": int(name.partition("=")[2]), "energy": energies[name], "of all": energies[name] / 2}
        (folder / f"{place:02}-{name}.json").write_text(json.dumps(row))


def spectrum(folder, at):
    told = {"energy at": at, "energy_of_all": 0.4, "relative_delta": 0.002}
    (folder / "spectrum.json").write_text(json.dumps(told))


ENERGIES = {"PHLoRA r=8": 0.25, "PHLoRA r=32": 0.5, "PHLoRA r=64": 0.75}


def test_a_row_stands_beside_the_papers_in_the_same_columns(tmp_path):
    scores = {"base": [0, 0], "full fine-tune": [1, 1], "PHLoRA r=32": [1, 0]}
    write(tmp_path / "a", scores, energies=ENERGIES)
    text = page(tmp_path)
    assert "| **smollm2** (exact match) | 0.0 | 100.0 |  | 50.0 (50) |  |  |" in text
    assert "| Nova Pro | 50.0 / 17.0 | 99.50 / 24.75 | 99.50 / 25.50 | 100.0 / 24.0 (36) |" in text
    assert "No run of ours: none was made." not in text


def test_of_several_seeds_the_mean_the_least_and_the_most(tmp_path):
    for seed, right in ((1, [1, 1, 0, 0]), (2, [1, 1, 1, 0])):
        write(tmp_path / "a" / f"seed-{seed}", {"base": [0] * 4, "full fine-tune": right}, seed=seed)
    text = page(tmp_path)
    assert "| full fine-tune |  | 62.5 (50.0 to 75.0) |  | 1.0 MB | 1 |" in text
    assert "| base |  | 0.0 (0.0 to 0.0) | -62.5 (-75.0 to -50.0) | 1.0 MB | 1 |" in text


def test_gains_are_compared_over_fine_tunes_and_scores_within_one(tmp_path):
    ends = {"base": [0] * 4, "full fine-tune": [1] * 4}
    falling = {name: [1] * most + [0] * (4 - most) for name, most in zip(ENERGIES, (3, 2, 1), strict=True)}
    write(tmp_path / "a", ends | falling, energies=ENERGIES)
    rising = {name: [1] * most + [0] * (4 - most) for name, most in zip(ENERGIES, (1, 2, 3), strict=True)}
    write(tmp_path / "b", ends | rising, energies=ENERGIES)
    write(tmp_path / "c", {name: [1] * 4 for name in ends} | rising, energies=ENERGIES)  # It gained nothing.
    text = "\n".join(open_questions.lines(list(read(tmp_path))))
    assert "| a | 42 | 3 | -1.00 |" in text
    assert "| b | 42 | 3 | 1.00 |" in text
    assert "Over all 6 adapters together: of E_r and gain 0.00, of rank and gain 0.00." in text


def test_what_is_lost_at_full_energy_is_lost_with_what_is_not_carried(tmp_path):
    scores = {"full fine-tune": [1, 1], "PHLoRA r=32": [0, 0], "PHLoRA r=64": [1, 0]}
    write(tmp_path / "a", scores, energies={"PHLoRA r=32": 0.99, "PHLoRA r=64": 1.0})
    text = "\n".join(open_questions.lines(list(read(tmp_path))))
    assert "| a | 42 | 64 | 100.0 | 50.0 | exact match | -50.0 |" in text
    assert "| a | 42 | 32 |" not in text


def test_of_each_layer_the_energy_stands_against_what_it_costs(tmp_path):
    write(tmp_path / "a", {"base": [0], "full fine-tune": [1]})
    told = {  # E_r and the score have opposite orders, what is lost and the fall the same.
        name: {"energy": energy, "lost": lost, "metrics": {"exact match": score}}
        for name, energy, lost, score in (("q", 0.9, 0.3, 0.2), ("k", 0.5, 0.2, 0.4), ("v", 0.1, 0.1, 0.7))
    }
    layers = {"rank": 2, "tuned": {"exact match": 0.8}, "layers": told}
    (tmp_path / "a" / "layers.json").write_text(json.dumps(layers))
    text = "\n".join(open_questions.lines(list(read(tmp_path))))
    assert "| a | 42 | 2 | 3 | exact match | 60.0 | -1.00 | 1.00 |" in text


def test_what_refinement_changes_is_counted_by_question(tmp_path):
    write(
        tmp_path / "a",
        {"PHLoRA r=8": [0, 0, 1, 1], "PHLoRA r=8, refined without data": [1, 1, 1, 1]},
        energies=ENERGIES,
    )
    text = "\n".join(open_questions.lines(list(read(tmp_path))))
    assert "| a | PHLoRA r=8 | without data | exact match | +50.00 | +0.00 to +100.00 |" in text


@pytest.mark.parametrize(("share", "within"), [(0.35, 1), (0.444, 1), (0.446, 0), (0.72, 0)])
def test_the_papers_energies_are_met_or_not(tmp_path, share, within):
    write(tmp_path / "a", {"base": [0]})
    spectrum(tmp_path / "a", {"1": 0.25, "8": 0.3, "32": share, "64": 0.8})
    found = list(read(tmp_path))
    assert f"Of our 1 fine-tunes {within} lie in that range: a (seed 42) {100 * share:.1f} %." in "\n".join(
        open_questions.lines(found)
    )
    assert (
        f"| a | 42 | 25.0 |  |  | 30.0 |  | {100 * share:.1f} | 80.0 |  |  |  | 4.0 | 0.20 % | 50.0 % |"
        in "\n".join(beside.lines(found))
    )
