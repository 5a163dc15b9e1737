import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_posthoc.linalg.product import factor_product
from peft_posthoc.ranks.rules import fixed, keep_energy
from tests.make.spectra import SPECTRA, with_spectrum

EPS = torch.finfo(torch.float64).eps
SHAPES = {"tall": (120, 80), "wide": (80, 120), "square": (90, 90)}


def factors(m, n, spectrum, *, seed=0):
    """`a`, `b` whose product has exactly these singular values, mixed so that neither shows them."""
    r = len(spectrum)
    b, a = with_spectrum(m, r, spectrum, seed=seed), with_spectrum(r, n, torch.ones(r), seed=seed + 2)
    mix = torch.randn(r, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 4 * torch.eye(r)
    return mix @ a, torch.linalg.solve(mix, b, left=False)


def best(delta, rank):
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_a_cut_is_the_best_approximation_of_the_product(name, shape):
    a, b = factors(*shape, SPECTRA[name](64))
    product, delta = factor_product(a, b), b @ a
    s = torch.linalg.svdvals(delta)
    assert torch.allclose(product.s, s[: len(product.s)], rtol=0, atol=100 * EPS * s[0])
    for rank in (1, 30, 64):
        cut = product.cut(rank)
        missed = torch.linalg.norm(delta - cut.b @ cut.a)
        # Where values are equal the best approximation is not unique: its error is.
        assert torch.isclose(missed, torch.linalg.norm(s[rank:]), rtol=0, atol=300 * EPS * torch.linalg.norm(s))
        assert cut.energy == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), abs=1e-14)


@given(
    m=st.integers(1, 40), n=st.integers(1, 40), r=st.integers(1, 40), rank=st.integers(1, 40), seed=st.integers(0, 99)
)
def test_of_any_size_it_is_the_best_approximation(m, n, r, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((r, n), (m, r)))
    cut = factor_product(a, b).cut(rank)
    assert len(cut.s) == min(m, n, r, rank)
    delta, kept = b @ a, cut.b @ cut.a
    lost = torch.linalg.norm(delta - best(delta, len(cut.s)))
    assert abs(torch.linalg.norm(delta - kept) - lost) <= 1000 * EPS * torch.linalg.norm(delta)


def test_no_energy_is_lost_at_the_rank_of_the_product_or_above():
    a, b = factors(60, 80, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    for rank in (3, 4, 1000):
        cut = factor_product(a, b).cut(rank)
        assert (len(cut.s), cut.energy) == (3, 1.0)
        assert torch.allclose(cut.b @ cut.a, b @ a, rtol=0, atol=100 * EPS * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padding_and_repeated_pairs_are_told_from_small_values_in_every_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    small = torch.tensor([1, 1, 1, 1, 2.0**-12])
    a = (torch.randn(5, 60, generator=generator) * small[:, None]).to(dtype)
    b = (torch.randn(40, 5, generator=generator) * small).to(dtype)
    zeros = torch.zeros_like
    padded = factor_product(torch.cat([a, a, zeros(a)]), torch.cat([b, b, zeros(b)], dim=1))
    # The fifth is 4e-8 of the first. In float32 values that are not there would be as large.
    assert len(padded.s) == 5
    assert torch.allclose(padded.s, 2 * torch.linalg.svdvals(b.double() @ a.double())[:5], rtol=1e-6)


def test_how_a_pair_s_size_is_shared_out_between_its_two_halves_does_not_matter():
    a, b = factors(30, 40, torch.arange(6, 0, -1, dtype=torch.float64))
    skewed = torch.tensor([1e12, 1e-12, 1, 1e8, 1e-8, 1], dtype=torch.float64).log2().round().exp2()
    one, other = factor_product(a, b), factor_product(a * skewed[:, None], b / skewed)
    assert len(other.s) == 6
    assert torch.allclose(one.s, other.s, rtol=1e-13)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_product_that_cancels_is_zero_and_keeps_its_shape(shape):
    m, n = shape
    a, b = factors(m, n, torch.ones(8, dtype=torch.float64))
    nothing = torch.zeros(8, n), torch.zeros(m, 8)
    for product in (
        factor_product(torch.cat([a, a]), torch.cat([b, -b], dim=1)),
        factor_product(a, nothing[1]),
        factor_product(*nothing),
    ):
        cut = product.cut(4)
        assert (cut.a.shape, cut.b.shape) == ((1, n), (m, 1))
        assert not cut.a.any()
        assert not cut.b.any()
        assert (cut.energy, cut.norm, product.spectrum.energy) == (0.0, 0.0, 0.0)


def test_rules_are_asked_with_all_singular_values():
    a, b = factors(30, 40, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    spectrum = factor_product(a, b).spectrum
    assert spectrum.shape == (30, 40)
    assert spectrum.energy == pytest.approx(14)
    assert [rule(spectrum) for rule in (fixed(2), keep_energy(0.6), keep_energy(9.0 / 14 + 0.01))] == [2, 1, 2]


def test_the_sign_is_fixed_and_the_spectrum_is_shared_out_evenly():
    a, b = factors(30, 40, torch.tensor([4.0, 1.0], dtype=torch.float64))
    cut, other = (factor_product(x * a, x * b).cut(2) for x in (1, -1))
    assert torch.equal(cut.a, other.a)
    assert bool((cut.a.gather(1, cut.a.abs().argmax(dim=1, keepdim=True)) > 0).all())
    assert torch.allclose(cut.a.norm(dim=1) ** 2, cut.s)
    assert torch.allclose(cut.b.norm(dim=0) ** 2, cut.s)


def test_values_that_are_not_finite_are_told():
    a, b = torch.ones(2, 5), torch.ones(4, 2)
    a[0, 0] = torch.nan
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        factor_product(a, b)
