"""Spectra that are known wholly."""

import torch

from peft_posthoc.linalg.spectrum import Spectrum


def whole(s, shape=None):
    """All that there is to know of a delta with these singular values."""
    s = torch.tensor(s, dtype=torch.float64)
    return Spectrum(s, float(s.square().sum()), shape or (len(s), len(s) + 1))
