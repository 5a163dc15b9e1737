"""How alike adapters are, against what the whole deltas say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_posthoc import AdapterError, extract, extract_many
from peft_posthoc.adapters.open import open_adapter
from peft_posthoc.fleet.compare import Comparison
from tests.make import models


def tensors(**deltas: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"layers.{name[1:]}.proj.weight": value for name, value in deltas.items()}


@pytest.fixture
def base() -> dict[str, torch.Tensor]:
    return tensors(l0=torch.randn(12, 10), l1=torch.randn(10, 12))


def moved(base: dict[str, torch.Tensor], *deltas: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: weight + delta for (name, weight), delta in zip(base.items(), deltas, strict=True)}


def outer(m: int, n: int, at: int, size: float) -> torch.Tensor:
    """A delta of rank one: `size` at one place."""
    found = torch.zeros(m, n)
    found[at, at] = size
    return found


def test_cosines_are_those_of_the_deltas(base, tmp_path: Path) -> None:
    # a and b share the first layer's direction, c goes against a, d has nothing in common with any.
    fleet = {
        "a": moved(base, outer(12, 10, 0, 3), outer(10, 12, 0, 4)),
        "b": moved(base, outer(12, 10, 0, 3), outer(10, 12, 1, 4)),
        "c": moved(base, outer(12, 10, 0, -6), outer(10, 12, 0, -8)),
        "d": moved(base, outer(12, 10, 5, 1), outer(10, 12, 5, 1)),
    }
    compared = extract_many(base, fleet, 1, out=tmp_path / "all").comparison
    assert compared is not None
    wanted = torch.tensor([[1, 9 / 25, -1, 0], [9 / 25, 1, -9 / 25, 0], [-1, -9 / 25, 1, 0], [0, 0, 0, 1.0]])
    assert torch.allclose(compared.cosines, wanted.double(), atol=1e-5)
    assert torch.allclose(compared.norms, torch.tensor([5, 5, 10, 2**0.5]).double(), atol=1e-5)
    assert compared.nearest("a") == ("b", pytest.approx(9 / 25, abs=1e-5))
    # Inputs in the first layer: columns 0 (a, b, c at 9/25 of their energy 1) and 5; in the second 0, 1 and 5.
    assert compared.shared is not None
    of_rank_1 = (3 * 9 / 25 + 2 * 16 / 25) / 4
    assert compared.shared[1] == pytest.approx(of_rank_1, abs=1e-5)
    assert compared.shared[2] == pytest.approx(of_rank_1 + (1 / 2 + 16 / 25) / 4, abs=1e-5)
    assert compared.shared[3] == pytest.approx(1, abs=1e-5)


def test_a_module_that_only_some_have_counts_for_those(llama_pair, tmp_path: Path) -> None:
    for name, options in {"one": {}, "other": {"head": True, "embeddings": True}}.items():
        extract(*llama_pair, 4, **options).save(tmp_path / name)
    compared = Comparison.of({name: tmp_path / name for name in ("one", "other")})
    one, other = (
        {name: each.factors(name)[0].product() for name in each.modules}
        for each in (open_adapter(tmp_path / name) for name in ("one", "other"))
    )
    inner = sum(float((delta * other[name]).sum()) for name, delta in one.items())
    norms = [sum(float(delta.square().sum()) for delta in each.values()) ** 0.5 for each in (one, other)]
    assert float(compared.cosines[0, 1]) == pytest.approx(inner / norms[0] / norms[1], rel=1e-9)


def test_the_common_basis_is_that_of_the_joint_svd(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.llama()
    base = models.save(model, tmp_path / "base")
    tuned = [models.save(models.tuned_from(model), tmp_path / f"tuned-{at}") for at in range(3)]
    made = extract_many(base, tuned, 3, out=tmp_path / "all")
    assert made.comparison is not None
    assert made.comparison.shared is not None
    adapters = [open_adapter(one.folder) for one in made.members]
    held, total = 0.0, 0.0
    for name in adapters[0].modules:
        stacked = torch.cat(
            [each.factors(name)[0].product() / norm for each, norm in zip(adapters, made.comparison.norms, strict=True)]
        )
        energies = torch.linalg.svdvals(stacked) ** 2
        held, total = held + float(energies[:3].sum()), total + float(energies.sum())
    assert made.comparison.shared[3] == pytest.approx(held / total, rel=1e-6)
    assert [rank for rank, _ in made.comparison.shares()] == [3, 6]


def test_the_page_shows_every_fine_tune_and_every_failure(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.llama()
    base = models.save(model, tmp_path / "base")
    tuned = {f"of-{at}": models.save(models.tuned_from(model), tmp_path / f"tuned-{at}") for at in range(2)}
    fleet = extract_many(base, {**tuned, "<lost>": tmp_path / "absent"}, 3, out=tmp_path / "all")
    fleet.html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 3
    assert "<code>of-0</code>" in page
    assert "<code>&lt;lost&gt;</code>" in page
    assert "does not exist" in page
    assert "https:" not in page  # Nothing is fetched.


def test_adapters_that_cannot_be_compared_are_made_all_the_same(base, tmp_path: Path, monkeypatch) -> None:
    def refuse(place: Path) -> None:
        raise AdapterError(f"`{place.name}` is more than its factors.")

    monkeypatch.setattr("peft_posthoc.fleet.compare.open_adapter", refuse)
    fleet = {name: moved(base, outer(12, 10, 0, 3), outer(10, 12, 0, 4)) for name in ("a", "b")}
    made = extract_many(base, fleet, 1, out=tmp_path / "all")
    assert not made.failed
    assert "not compared: `a` is more than its factors." in made.table()
    made.html(tmp_path / "page.html")
    assert "is more than its factors" in (tmp_path / "page.html").read_text()
