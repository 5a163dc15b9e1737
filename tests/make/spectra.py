"""Matrices whose singular values are known by construction."""

from functools import lru_cache

import torch

TALL, WIDE, SQUARE = (700, 500), (500, 700), (600, 600)


@lru_cache(maxsize=16)
def orthonormal(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def with_spectrum(m, n, spectrum, *, seed=0, dtype=torch.float64):
    """An (m, n) matrix with exactly these singular values: the test knows the answer."""
    r = len(spectrum)
    return ((orthonormal(m, r, seed) * spectrum) @ orthonormal(n, r, seed + 1).mT).to(dtype)


def power(k, exponent=0.475):
    """What fine-tuning looks like: E_32 near 40 % of the energy at k = 2048."""
    return (torch.arange(k, dtype=torch.float64) + 2) ** -exponent


def exponential(k):
    return 0.97 ** torch.arange(k, dtype=torch.float64)


def flat(k):
    return torch.ones(k, dtype=torch.float64)


def noise(k):
    """Singular values of a Gaussian k x 2k matrix, by quantiles (Marchenko and Pastur, 1967)."""
    ratio = 0.5
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    x = torch.linspace(low, high, 20001, dtype=torch.float64)
    density = ((x - low) * (high - x)).clamp(min=0).sqrt() / x
    mass = torch.cumsum(density, dim=0) / density.sum()
    quantiles = (torch.arange(k, dtype=torch.float64) + 0.5) / k
    return x[torch.searchsorted(mass, quantiles).clamp(max=20000)].sqrt().flip(0)


def low_rank(k, rank=20):
    return torch.where(torch.arange(k) < rank, power(k, 1.0), 0.0)


def low_rank_plus_noise(k, rank=20):
    return torch.sort(torch.where(torch.arange(k) < rank, 3 * exponential(k), 0.3 * noise(k)), descending=True).values


def cluster(k, width, first=20, end=60):
    """Values `first` to `end` lie within `width` of each other, relative to their size."""
    s = power(k)
    s[first:end] = s[first:end].mean() * (1 + width * torch.linspace(0.5, -0.5, end - first, dtype=torch.float64))
    return torch.sort(s, descending=True).values


def step(k, equal=100):
    """`equal` equal values, then a drop by half into a tail: too many for a thin block to see."""
    return torch.where(torch.arange(k) < equal, 1.0, 0.5 * power(k))


def graded(k):
    """Twelve orders of magnitude."""
    return 10 ** torch.linspace(0, -12, k, dtype=torch.float64)


SPECTRA = {
    "power": power,
    "steep power": lambda k: power(k, 1.5),
    "exponential": exponential,
    "flat": flat,
    "noise": noise,
    "low rank": low_rank,
    "rank deficient": lambda k: torch.where(torch.arange(k) < k // 2, power(k), 0.0),
    "low rank plus noise": low_rank_plus_noise,
    "equal values": lambda k: cluster(k, 0.0),
    "tight cluster": lambda k: cluster(k, 1e-6),
    "cluster": lambda k: cluster(k, 1e-3),
    "wide cluster": lambda k: cluster(k, 1e-2),
    "step": step,
    "graded": graded,
}
