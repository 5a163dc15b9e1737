"""What rounding puts on a delta, and the rank that stands out of it: planted, and found."""

import pytest
import torch

from peft_posthoc import Spectrum, above_noise, extract
from peft_posthoc.linalg.noise import Noise, edge, rounding, white
from peft_posthoc.ranks.rules import signal_rank

SHAPES = {"tall": (420, 300), "wide": (300, 420), "square": (360, 360)}
NAME = "layers.0.proj.weight"


def noise_of(rows, columns, seed):
    """Gaussian noise whose variances are rows times columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(rows), len(columns), generator=generator, dtype=torch.float64)
    return x * (rows[:, None] * columns).sqrt()


def planted(shape, rank, size, seed, *, dtype, start, uneven=False):
    """A base and a fine-tune of it, both saved in `dtype`: what was trained is of this rank, `size` spacings large."""
    m, n = shape
    generator = torch.Generator().manual_seed(seed)
    base = 0.02 * torch.randn(m, n, generator=generator)
    if uneven:
        base *= 3 * torch.rand(m, 1, generator=generator)
    change = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator) / rank**0.5
    saved = base.to(dtype)
    tuned = (saved.float() if start == "saved" else base) + size * 0.02 * torch.finfo(dtype).eps * change
    return {NAME: saved}, {NAME: tuned.to(dtype)}


def layer_of(adapter):
    (layer,) = adapter.layers.values()
    return layer


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_the_edge_of_noise_of_unequal_variances(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (
        torch.rand(k, generator=generator, dtype=torch.float64) ** power + 0.01
        for k, power in zip(shape, (4, 2), strict=True)
    )
    x = noise_of(rows, columns, seed)
    top = float(torch.linalg.matrix_norm(x, 2) / x.norm())
    assert top < edge(rows, columns) < 1.08 * top
    # Taking all variances to be the same is no bound at all.
    assert white(*shape) < 0.8 * top


@pytest.mark.parametrize("shape", [*SHAPES.values(), (30, 2000)])
def test_equal_variances_give_the_known_edge(shape):
    m, n = shape
    assert edge(torch.ones(m), torch.full((n,), 7.0)) == pytest.approx(white(m, n), rel=1e-6)
    tops = [torch.linalg.matrix_norm(torch.randn(m, n) / (m * n) ** 0.5, 2) for _ in range(3)]
    assert max(tops) < 1.01 * white(m, n) < 1.1 * max(tops)


def test_rows_without_noise_do_not_count():
    rows = torch.cat([torch.ones(100), torch.zeros(900)])
    assert edge(rows, torch.ones(50)) == pytest.approx(white(100, 50), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_energy_of_rounding_is_that_of_the_spacing(dtype):
    base, tuned = torch.randn(2, 200, 300)
    delta = tuned.to(dtype).float() - base.to(dtype).float()
    true = float((delta - (tuned - base)).square().sum())
    assert rounding(base.to(dtype), tuned.to(dtype), delta).energy == pytest.approx(true, rel=0.02)
    # A base that is more precise than the fine-tune brings no noise of its own.
    delta = tuned.to(dtype).float() - base
    true = float((delta - (tuned - base)).square().sum())
    assert rounding(base, tuned.to(dtype), delta).energy == pytest.approx(true, rel=0.02)


def test_noise_never_exceeds_what_a_row_holds():
    base = torch.randn(64, 64).bfloat16()
    tuned = base.clone()
    tuned[:8] += 1
    found = rounding(base, tuned, tuned.float() - base.float())
    rows = rounding(base[:8], tuned[:8], tuned[:8].float() - base[:8].float())
    assert found.energy == pytest.approx(rows.energy)
    assert rounding(base, base, torch.zeros(64, 64)) is None


def test_float32_does_not_tell_its_noise():
    base, tuned = torch.randn(2, 9, 9)
    assert rounding(base.bfloat16(), tuned, tuned - base) is None


@pytest.mark.parametrize("start", ["saved", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_auto_finds_the_planted_rank_under_rounding(shape, dtype, start, seed):
    size = (4.0, 1.0, 0.5)[seed]
    pair = planted(shape, 10, size, seed, dtype=dtype, start=start, uneven=seed == 1)
    layer = layer_of(extract(*pair, "auto"))
    assert len(layer.factors.s) == layer.signal == 10
    assert len(layer_of(extract(*pair, "auto", exact=True)).factors.s) == 10
    # An energy share finds nothing of the kind: what it keeps is noise for the most part.
    assert len(layer_of(extract(*pair, 0.999)).factors.s) > 20


@pytest.mark.parametrize("shape", [*SHAPES.values(), (120, 500)])
@pytest.mark.parametrize("level", [1e-3, 1e-2, 1e-1])
def test_auto_finds_the_planted_rank_under_noise_that_is_not_known(shape, level):
    m, n = shape
    tuned = torch.randn(m, 10) @ torch.randn(10, n) / 10**0.5 + level * torch.randn(m, n)
    layer = layer_of(extract({NAME: torch.zeros(m, n)}, {NAME: tuned}, "auto"))
    assert len(layer.factors.s) == layer.signal == 10
    assert layer.noise is None


def test_auto_finds_an_exactly_low_rank():
    tuned = torch.randn(360, 7) @ torch.randn(7, 300)
    assert len(layer_of(extract({NAME: torch.zeros(360, 300)}, {NAME: tuned}, "auto")).factors.s) == 7


def test_of_nothing_but_rounding_one_triplet_is_kept_and_the_report_says_so():
    base = 0.02 * torch.randn(300, 300)
    nudged = base + 1e-6 * torch.randn(300, 300)
    adapter = extract({NAME: base.bfloat16()}, {NAME: nudged.bfloat16()}, "auto")
    (row,) = adapter.report.rows
    assert (row.rank, row.signal_rank) == (1, 0)
    assert row.noise == pytest.approx(1, abs=1e-6)
    assert "signal   noise" in adapter.report.table(layers=True)
    assert "100.0%" in adapter.report.table(layers=True)


def test_the_noise_share_is_that_of_the_delta():
    before, change = torch.randn(300, 200), 0.01 * torch.randn(300, 4) @ torch.randn(4, 200)
    base, tuned = {NAME: before.bfloat16()}, {NAME: (before + change).bfloat16()}
    (row,) = extract(base, tuned, "auto").report.rows
    delta = tuned[NAME].float() - base[NAME].float()
    true = float(((delta - change).norm() / delta.norm()) ** 2)
    assert 0.005 < true < 0.1
    assert row.noise == pytest.approx(true, rel=0.03)
    # It is measured where it is asked for.
    (row,) = extract(base, tuned, 4).report.rows
    assert (row.noise, row.signal_rank) == (None, None)


def test_the_signal_is_counted_on_constructed_spectra():
    def spectrum(s, shape, noise=None, rest=0.0):
        s = torch.tensor(s, dtype=torch.float64)
        return Spectrum(s, float(s.square().sum()) + rest, shape, noise)

    # Noise of energy 1 in 100 x 100 has no value above 0.21.
    known = Noise(1.0, white(100, 100))
    assert signal_rank(spectrum([5.0, 0.3, 0.2, 0.1], (100, 100), known, rest=3.0)) == 2
    assert signal_rank(spectrum([0.2, 0.1], (100, 100), known, rest=1.0)) == 0
    # All that are known stand out: go on.
    assert signal_rank(spectrum([5.0, 0.3], (100, 100), known, rest=3.0)) == 3
    assert signal_rank(spectrum([2.0, 1.0], (2, 100), Noise(1e-9, white(2, 100)))) == 2
    # What is left bounds the noise: with no more than that, 0.15 stands out.
    assert signal_rank(spectrum([5.0, 0.15, 0.01], (100, 100), known, rest=0.01)) == 2
    assert above_noise()(spectrum([0.2, 0.1], (100, 100), known, rest=1.0)) == 1


def test_equal_singular_values_stand_out_together():
    s = torch.full((12,), 1.0, dtype=torch.float64)
    assert signal_rank(Spectrum(s[:5], 12.0 + 0.1, (200, 300))) == 6
    assert signal_rank(Spectrum(torch.cat([s, s.new_tensor([0.03])]), 12.0 + 0.1, (200, 300))) == 12


def test_noise_survives_an_interruption(tmp_path):
    from peft_posthoc.extraction.spool import Spool

    spool = Spool(tmp_path / "out", "any")
    spool.patience = 0.0
    layers = [
        layer_of(extract(*planted((30, 20), 2, 4.0, 0, dtype=dtype, start="exact"), "auto"))
        for dtype in (torch.bfloat16, torch.float32)
    ]
    for layer in layers:
        spool.put(layer)
        (back,) = spool.outcomes([NAME])
        assert back[3:] == layer[3:]
    assert isinstance(layers[0].noise, Noise)
    assert layers[1].noise is None
