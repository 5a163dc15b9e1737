import contextlib
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_posthoc.compute.precision import full_precision
from peft_posthoc.linalg import norms
from peft_posthoc.linalg.dense import Problem
from peft_posthoc.linalg.krylov import block_krylov
from peft_posthoc.linalg.svd import cost, truncated_svd
from peft_posthoc.ranks.rules import fixed, keep_energy
from tests.make.spectra import SPECTRA, SQUARE, TALL, WIDE, cluster, low_rank, noise, power, step, with_spectrum

SHAPES = {"tall": TALL, "wide": WIDE, "square": SQUARE}
# What the stated shortfall leaves out: rounding in float32.
ROUNDING = 2e-6
seeds = st.integers(0, 2**31 - 1)


def captured(delta, found):
    """The energy of `delta` that `b @ a` takes away, in float64: only true projections can take away the optimum."""
    product = found.b.double() @ found.a.double()
    return float(delta.double().square().sum() - (delta.double() - product).square().sum())


def true_shortfall(delta, found, spectrum):
    optimum = float(spectrum[: len(found.s)].square().sum())
    return 1 - captured(delta, found) / optimum


def assert_best(delta, found, spectrum, tolerance=1e-4):
    missed = true_shortfall(delta, found, spectrum)
    assert -1e-5 <= missed <= tolerance
    assert missed <= found.shortfall + ROUNDING
    assert found.shortfall <= tolerance
    assert found.norm == pytest.approx(float(spectrum.norm()), rel=1e-6)
    kept = float(found.s.square().sum())
    assert kept == pytest.approx(captured(delta, found), rel=1e-5)
    assert found.energy == pytest.approx(kept / found.norm**2, rel=1e-6)


def assert_orthonormal(found, factor=200):
    root = found.s.sqrt()[:, None]
    limit = factor * torch.finfo(found.a.dtype).eps
    for rows in (found.a.double() / root, found.b.mT.double() / root):
        assert float((rows @ rows.mT - torch.eye(len(rows))).abs().max()) < limit


@contextlib.contextmanager
def lapack_fails(monkeypatch, times):
    """The next `times` full decompositions do not converge."""
    left = [times]
    true_svd = torch.linalg.svd

    def failing(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise torch.linalg.LinAlgError("The algorithm failed to converge.")
        return true_svd(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "svd", failing)
        yield
    assert left == [0]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [1, 32])
def test_factors_hold_the_energy_of_the_best_approximation(name, shape, rank):
    spectrum = SPECTRA[name](min(shape))
    delta = with_spectrum(*shape, spectrum, dtype=torch.float32)
    assert_best(delta, truncated_svd(delta, rank), spectrum)


@pytest.mark.parametrize("rank", [2, 16, 128, 400, 500])
@pytest.mark.parametrize("name", ["power", "noise", "graded"])
def test_every_rank_is_best(name, rank):
    spectrum = SPECTRA[name](500)
    delta = with_spectrum(*WIDE, spectrum, dtype=torch.float32)
    assert_best(delta, truncated_svd(delta, rank), spectrum)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_best_and_factors_have_its_working_precision(shape, dtype):
    delta = with_spectrum(*shape, power(min(shape)), dtype=dtype)
    found = truncated_svd(delta, 32)
    assert_best(delta, found, torch.linalg.svdvals(delta.double()))
    assert found.a.dtype == found.b.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found.a.shape, found.b.shape) == ((32, shape[1]), (shape[0], 32))
    assert found.s.dtype == torch.float64


@pytest.mark.parametrize("name", ["power", "noise", "wide cluster", "low rank plus noise"])
def test_too_few_steps_fail_the_same_assertion(name):
    """The assertions above can fail: two steps of the same iteration do, and it knows."""
    spectrum = SPECTRA[name](600)
    delta = with_spectrum(*SQUARE, spectrum, dtype=torch.float32)
    problem = Problem(delta, norms.frobenius_norm(delta), fixed(32), SQUARE)
    u, s, v, shortfall, _ = block_krylov(problem, 32, 1e-4, 0, max_steps=2)
    root = (s * problem.norm).sqrt()
    weak = truncated_svd(delta, 32)._replace(a=(v * root).mT, b=u * root, s=root.double() ** 2, shortfall=shortfall)
    with pytest.raises(AssertionError):
        assert_best(delta, weak, spectrum)
    assert 1e-4 < true_shortfall(delta, weak, spectrum) <= weak.shortfall


@pytest.mark.parametrize("name", ["power", "noise", "exponential", "low rank plus noise", "step"])
def test_the_certificate_holds_at_every_step(name):
    spectrum = SPECTRA[name](600)
    delta = with_spectrum(*SQUARE, spectrum, dtype=torch.float32)
    problem = Problem(delta, norms.frobenius_norm(delta), fixed(16), SQUARE)
    optimum = float(spectrum[:16].square().sum() / spectrum.square().sum())
    for steps in range(1, 10):
        found = block_krylov(problem, 16, 0.0, 0, max_steps=steps)
        assert 1 - float(found.s.double().square().sum()) / optimum <= found.shortfall + ROUNDING


@pytest.mark.parametrize("width", [3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 0.0])
@pytest.mark.parametrize("place", [(20, 60), (0, 40), (30, 34), (31, 130)])
def test_clusters_on_both_sides_of_the_cut_are_certified_truthfully(width, place):
    spectrum = cluster(600, width, *place)
    delta = with_spectrum(*SQUARE, spectrum, dtype=torch.float32)
    assert_best(delta, truncated_svd(delta, 32), spectrum)


@pytest.mark.parametrize(("rank", "end", "width"), [(1, 39, 8e-4), (4, 58, 6e-4), (4, 48, 1e-3), (16, 44, 2e-4)])
def test_a_cluster_wider_than_a_block_is_not_overlooked(rank, end, width):
    """Block Krylov sees as many values of a cluster as it has columns; the others leave no trace."""
    spectrum = cluster(600, width, 0, end)
    delta = with_spectrum(*SQUARE, spectrum, dtype=torch.float32)
    assert_best(delta, truncated_svd(delta, rank), spectrum)
    problem = Problem(delta, norms.frobenius_norm(delta), fixed(rank), SQUARE)
    optimum = float(spectrum[:rank].square().sum() / spectrum.square().sum())
    for clusters in (True, False):
        found = block_krylov(problem, rank, 1e-4, 0, clusters=clusters)
        # None: the basis would be too large, and all eigenvectors are taken.
        assert clusters is (
            found is None or 1 - float(found.s.double().square().sum()) / optimum <= found.shortfall + ROUNDING
        )


def test_equal_values_beyond_the_first_block_are_found_when_the_rank_is_unknown():
    spectrum = step(700, equal=60)
    delta = with_spectrum(700, 700, spectrum, dtype=torch.float32)
    share = float((spectrum.square().cumsum(0) / spectrum.square().sum())[57])
    found = truncated_svd(delta, keep_energy(share - 1e-4))
    assert len(found.s) == 58
    assert_best(delta, found, spectrum)


@pytest.mark.parametrize("name", ["power", "noise", "low rank plus noise"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_singular_vectors_are_orthonormal(name, shape):
    delta = with_spectrum(*shape, SPECTRA[name](min(shape)), dtype=torch.float32)
    assert_orthonormal(truncated_svd(delta, 32))
    assert_orthonormal(truncated_svd(delta, 32, exact=True))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_residual_is_that_of_each_kept_triplet(shape, exact):
    delta = with_spectrum(*shape, power(min(shape)), dtype=torch.float64)
    found = truncated_svd(delta, 16, exact=exact)
    root = found.s.sqrt()
    u, v = found.b / root, found.a.mT / root
    off = torch.maximum((delta @ v - u * found.s).norm(dim=0), (delta.mT @ u - v * found.s).norm(dim=0))
    torch.testing.assert_close(found.residual, off / found.s[0], rtol=1e-3, atol=1e-13)


@settings(deadline=None, max_examples=30)
@given(m=st.integers(1, 40), n=st.integers(1, 40), seed=seeds, data=st.data())
def test_error_is_exactly_the_discarded_tail(m, n, seed, data):
    k = min(m, n)
    rank = data.draw(st.integers(1, k))
    spectrum = power(k)
    delta = with_spectrum(m, n, spectrum, seed=seed)
    found = truncated_svd(delta, rank, exact=True)
    error = float((delta - found.b @ found.a).norm())
    assert error == pytest.approx(float(spectrum[rank:].norm()), abs=1e3 * torch.finfo(delta.dtype).eps)
    assert found.energy == pytest.approx(float(spectrum[:rank].square().sum() / spectrum.square().sum()))
    assert found.shortfall == 0


@settings(deadline=None, max_examples=20)
@given(m=st.integers(257, 420), n=st.integers(257, 420), rank=st.integers(1, 60), seed=seeds, data=st.data())
def test_any_size_rank_and_seed_is_best(m, n, rank, seed, data):
    spectrum = SPECTRA[data.draw(st.sampled_from(sorted(SPECTRA)))](min(m, n))
    delta = with_spectrum(m, n, spectrum, seed=seed, dtype=torch.float32)
    assert_best(delta, truncated_svd(delta, rank, seed=seed), spectrum)


@pytest.mark.parametrize("rank", [16, keep_energy(0.3)])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_same_seed_gives_the_same_bits(shape, rank):
    delta = with_spectrum(*shape, power(min(shape)), dtype=torch.float32)
    torch.manual_seed(1)
    once = truncated_svd(delta, rank, seed=7)
    torch.manual_seed(2)
    again = truncated_svd(delta, rank, seed=7)
    assert torch.equal(once.a, again.a)
    assert torch.equal(once.b, again.b)
    assert torch.equal(once.s, again.s)
    assert torch.equal(once.residual, again.residual)
    assert once[3:6] == again[3:6]
    other = truncated_svd(delta, rank, seed=8)
    assert not torch.equal(once.a, other.a)


def test_the_transpose_has_the_factors_exchanged():
    delta = with_spectrum(*TALL, power(500), dtype=torch.float64)
    found, turned = truncated_svd(delta, 16, tolerance=1e-12), truncated_svd(delta.mT, 16, tolerance=1e-12)
    torch.testing.assert_close(found.b @ found.a, (turned.b @ turned.a).mT, rtol=0, atol=1e-6)


def test_a_tighter_tolerance_is_kept():
    spectrum = power(500)
    delta = with_spectrum(*TALL, spectrum)
    found = truncated_svd(delta, 16, tolerance=1e-10)
    assert_best(delta, found, spectrum, tolerance=1e-10)


@pytest.mark.parametrize("scale", [1e-35, 1e-20, 1e-3, 1e12, 1e18])
def test_scale_does_not_matter(scale):
    spectrum = power(500) * scale
    delta = with_spectrum(*TALL, spectrum, dtype=torch.float32)
    missed = true_shortfall(delta, truncated_svd(delta, 16), spectrum)
    assert -1e-5 <= missed <= 1e-4


@pytest.mark.parametrize("share", [0.05, 0.4, 0.7, 0.97, 1.0])
@pytest.mark.parametrize("name", ["power", "noise", "exponential", "low rank"])
def test_an_energy_rule_keeps_the_fewest_triplets_that_reach_it(name, share):
    spectrum = SPECTRA[name](500)
    delta = with_spectrum(*TALL, spectrum, dtype=torch.float32)
    found = truncated_svd(delta, keep_energy(share))
    held = spectrum.square().cumsum(0) / spectrum.square().sum()
    # What may be missed decides between neighbours where the share lies at their border.
    fewest, most = (int((held < goal).sum()) + 1 for goal in (share - 1e-5, min(share + 2e-4, 1.0)))
    assert fewest <= len(found.s) <= min(most, 500) or share == 1
    assert found.energy >= share - 1e-5
    assert_best(delta, found, spectrum)


def test_a_rule_may_say_anything_and_gets_at_least_one_triplet_and_at_most_all():
    delta = with_spectrum(30, 20, power(20))
    assert len(truncated_svd(delta, lambda spectrum: 0).s) == 1
    assert len(truncated_svd(delta, lambda spectrum: 10**6).s) == 20
    assert len(truncated_svd(delta, fixed(7)).s) == 7
    assert len(truncated_svd(delta, fixed(70)).s) == 20


def test_a_rule_sees_the_true_total_and_singular_values_in_order():
    delta = with_spectrum(*WIDE, power(500), dtype=torch.float32)
    asked = []

    def rule(spectrum):
        asked.append(spectrum)
        return 3

    truncated_svd(delta, rule)
    assert asked
    for spectrum in asked:
        assert spectrum.shape == WIDE
        assert spectrum.energy == pytest.approx(float(power(500).square().sum()), rel=1e-6)
        assert spectrum.s.dtype == torch.float64
        assert bool((spectrum.s.diff() <= 0).all())


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 2000), (2000, 2)])
def test_vectors_and_slivers_are_exact(shape):
    delta = with_spectrum(*shape, power(min(shape)))
    found = truncated_svd(delta, min(shape))
    torch.testing.assert_close(found.b @ found.a, delta, rtol=0, atol=1e-14)
    assert found.energy == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(5, 9), TALL])
@pytest.mark.parametrize(("rank", "kept"), [(3, 3), (keep_energy(0.9), 1)])
def test_a_zero_delta_gives_zero_factors(shape, rank, kept):
    found = truncated_svd(torch.zeros(shape), rank)
    assert (found.a.shape, found.b.shape) == ((kept, shape[1]), (shape[0], kept))
    assert not found.a.any()
    assert not found.b.any()
    assert (found.energy, found.norm, found.shortfall, found.residual.sum()) == (0, 0, 0, 0)
    assert found.s.tolist() == [0] * kept


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("true_rank", [1, 5, 20])
def test_an_exactly_low_rank_delta_is_restored(shape, true_rank):
    spectrum = low_rank(min(shape), true_rank)
    delta = with_spectrum(*shape, spectrum, dtype=torch.float32)
    for rank in (true_rank, 40):
        found = truncated_svd(delta, rank)
        assert float((delta - found.b @ found.a).norm()) < found.norm * torch.finfo(torch.float32).eps ** 0.5
        assert found.energy == pytest.approx(1.0, abs=1e-6)


def test_a_small_rank_is_cut_from_a_larger_one():
    spectrum = power(600)
    delta = with_spectrum(*SQUARE, spectrum, dtype=torch.float32)
    found = truncated_svd(delta, 40)
    for rank in (1, 17, 40):
        cut = found.cut(rank)
        assert torch.equal(cut.a, found.a[:rank])
        assert torch.equal(cut.b, found.b[:, :rank])
        assert true_shortfall(delta, cut, spectrum) <= cut.shortfall + ROUNDING
        assert cut.energy == pytest.approx(float(cut.s.square().sum()) / found.norm**2)


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_survives_lapack_not_converging(monkeypatch, failures, dtype):
    spectrum = power(30)
    delta = with_spectrum(40, 30, spectrum, dtype=dtype)
    with lapack_fails(monkeypatch, times=failures):
        found = truncated_svd(delta, 5)
    assert_best(delta, found, spectrum)
    assert found.a.dtype == dtype


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_largest_entry_of_every_right_singular_vector_of_the_delta_is_positive(shape):
    found = truncated_svd(with_spectrum(*shape, power(min(shape)), dtype=torch.float32), 8)
    flipped = truncated_svd(-with_spectrum(*shape, power(min(shape)), dtype=torch.float32), 8)
    for rows in (found.a, flipped.a):
        assert bool((rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)) > 0).all())


@pytest.fixture(params=["an older setting", "a setting for one backend"])
def loose_precision(request):
    """Products in bfloat16, as a training script may have set them; and a function that says if they still are."""
    mkldnn = torch.backends.mkldnn.matmul
    before = mkldnn.fp32_precision
    a = torch.randn(256, 256)
    exact = a.double() @ a.double()
    assert float((a @ a - exact).abs().max()) < 1e-3
    if request.param == "an older setting":
        torch.set_float32_matmul_precision("medium")
    else:
        mkldnn.fp32_precision = "bf16"
    yield lambda: float((a @ a - exact).abs().max()) > 1e-2
    if request.param == "an older setting":
        torch.set_float32_matmul_precision("highest")
    mkldnn.fp32_precision = before


def test_the_delta_is_left_as_it_was_with_its_surroundings(loose_precision):
    if not loose_precision():
        pytest.skip("This processor multiplies in float32 whatever is set.")
    delta = with_spectrum(*TALL, power(500), dtype=torch.float32)
    before = delta.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = truncated_svd(delta.requires_grad_(), 16)
    assert loose_precision()
    assert torch.equal(delta, before)
    assert not found.a.requires_grad
    assert_best(delta.detach(), found, power(500))


def test_threads_that_factor_at_once_leave_the_precision_as_it_was(loose_precision):
    loose = loose_precision()
    deltas = [with_spectrum(*TALL, power(500), seed=seed, dtype=torch.float32) for seed in range(6)]
    with full_precision(), ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda delta: truncated_svd(delta, 16), deltas))
        assert not loose_precision()
    assert loose_precision() == loose


def test_the_last_of_several_threads_puts_the_precision_back(loose_precision):
    loose, (one, two) = loose_precision(), (full_precision(), full_precision())
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert not loose_precision()
    two.__exit__(None, None, None)
    assert loose_precision() == loose


@pytest.mark.parametrize("rank", [0, -1, 9, True])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(
        ValueError, match=r"`truncated_svd\(rank=\.\.\.\)` must lie between 1 and 8, the smaller side of a "
    ):
        truncated_svd(torch.ones(12, 8), rank)
    with pytest.raises(ValueError, match=r"delta of shape \(12, 8\)\. Got 99\."):
        truncated_svd(torch.ones(12, 8), 99)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_delta_that_is_not_finite_is_refused(bad, dtype):
    delta = torch.ones(12, 8, dtype=dtype)
    delta[3, 4] = bad
    with pytest.raises(ValueError, match=r"`truncated_svd\(delta=\.\.\.\)` must be finite"):
        truncated_svd(delta, 2)


@pytest.mark.parametrize("rank", [0, 6, True])
def test_a_cut_beyond_the_rank_held_is_refused(rank):
    found = truncated_svd(with_spectrum(12, 8, power(8)), 5)
    with pytest.raises(
        ValueError, match=r"`LowRank.cut\(rank=\.\.\.\)` must lie between 1 and 5, the rank held\. Got "
    ):
        found.cut(rank)


@pytest.mark.parametrize("rows", [1, 5, 4096, 5000])
def test_a_pass_in_panels_is_the_two_products(rows):
    """130 columns: panels of 4032 rows."""
    tall = torch.randn(rows, 130, dtype=torch.float64)
    x = torch.randn(130, 16, dtype=torch.float64)
    image, back = Problem(tall, 2.0, fixed(1), (rows, 130)).there_and_back(x)
    torch.testing.assert_close(image, tall @ x / 2)
    torch.testing.assert_close(back, tall.mT @ (tall @ x) / 4)


def test_the_iteration_stops_on_what_it_sees_and_not_on_a_count(monkeypatch):
    products = []
    both = Problem.there_and_back
    monkeypatch.setattr(Problem, "there_and_back", lambda self, x: products.append(x.shape) or both(self, x))
    steps = []
    for spectrum in (low_rank(700), power(700), noise(700)):
        products.clear()
        truncated_svd(with_spectrum(700, 700, spectrum, dtype=torch.float32), 16)
        steps.append(len(products))
    assert steps[0] < steps[1] < steps[2]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_cost_grows_with_the_rank_and_not_with_the_way_the_delta_lies(shape):
    m, n = shape
    costs = [cost(m, n, rank) for rank in (1, 16, 32, 64)]
    assert costs == sorted(costs)
    assert costs == [cost(n, m, rank) for rank in (1, 16, 32, 64)]
    assert cost(m, n, 16) < cost(m, n, 200) < cost(m, n, 16, exact=True)
