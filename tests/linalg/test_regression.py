"""Reduced-rank regression: the best factors of a rank, known by construction."""

from __future__ import annotations

import pytest
import torch

from peft_posthoc.linalg.regression import damp, regress, root_of
from peft_posthoc.linalg.svd import truncated_svd

TOKENS, N, M, RANK = 200, 12, 9, 3


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs() -> torch.Tensor:
    """Inputs some of whose directions are far larger than others."""
    return _random(TOKENS, N, seed=0) @ (_random(N, N, seed=1) * torch.logspace(0, -2, N, dtype=torch.float64))


def _error(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.norm(x @ a.mT @ b.mT - y))


def _fit(x: torch.Tensor, y: torch.Tensor, rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    found = regress(root_of(x.mT @ x), x.mT @ y, rank)
    return found.a, found.b


def test_outputs_of_a_known_low_rank_are_found_again() -> None:
    x, a, b = _inputs(), _random(RANK, N, seed=2), _random(M, RANK, seed=3)
    found_a, found_b = _fit(x, x @ a.mT @ b.mT)
    torch.testing.assert_close(found_b @ found_a, b @ a, rtol=1e-7, atol=1e-8)


def test_no_other_factors_of_the_rank_predict_better() -> None:
    x, y = _inputs(), _random(TOKENS, M, seed=4)
    a, b = _fit(x, y)
    # The least error, by the textbook: what least squares leaves, and the tail of what it says.
    said = x @ torch.linalg.lstsq(x, y).solution
    tail = torch.linalg.svdvals(said)[RANK:].square().sum()
    least = float(((said - y).square().sum() + tail).sqrt())
    assert _error(x, y, a, b) == pytest.approx(least, rel=1e-9)
    plain = truncated_svd(torch.linalg.lstsq(x, y).solution.mT.contiguous(), RANK, exact=True)
    assert _error(x, y, plain.a, plain.b) > 1.005 * least


def test_on_inputs_that_are_alike_in_all_directions_it_is_the_svd() -> None:
    x, delta = torch.linalg.qr(_random(TOKENS, N, seed=5)).Q, _random(M, N, seed=6)
    a, b = _fit(x, x @ delta.mT)
    plain = truncated_svd(delta, RANK, exact=True)
    torch.testing.assert_close(b @ a, plain.b @ plain.a, rtol=1e-9, atol=1e-9)


def test_what_the_inputs_do_not_say_is_taken_from_the_known_matrix() -> None:
    x, delta = _inputs(), _random(M, N, seed=7)
    x[:, 5:] = 0.0
    gram, cross = x.mT @ x, x.mT @ (x @ delta.mT)
    assert damp(gram, {"w": cross}, {"w": delta}, 0.03)
    found = regress(root_of(gram), cross, M)
    torch.testing.assert_close(found.b @ found.a, delta, rtol=1e-6, atol=1e-6)


def test_inputs_that_are_all_zero_say_nothing() -> None:
    gram, cross, delta = torch.zeros(N, N), torch.zeros(N, M), torch.zeros(M, N)
    assert not damp(gram, {"w": cross}, {"w": delta}, 0.03)
    assert not damp(gram + torch.nan, {"w": cross}, {"w": delta}, 0.03)
    with pytest.raises(ValueError, match="positive definite"):
        root_of(gram)


def test_each_pair_of_factors_has_halves_of_one_size() -> None:
    x = 1e-4 * _inputs()
    a, b = _fit(x, _random(TOKENS, M, seed=8))
    torch.testing.assert_close(torch.linalg.vector_norm(a, dim=1), torch.linalg.vector_norm(b, dim=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factors_have_the_type_of_what_was_summed(dtype: torch.dtype) -> None:
    x = _inputs().to(dtype)
    assert {one.dtype for one in _fit(x, x[:, :M].clone())} == {dtype}
