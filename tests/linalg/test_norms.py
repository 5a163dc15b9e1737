"""Norms in chunks: as right as float64 has them, at any scale, and without a trace in memory."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_posthoc.extraction.delta import Pair, difference
from peft_posthoc.linalg.norms import frobenius, norm_of

LEFT = r"""
import re, torch
from pathlib import Path
from peft_posthoc.compute.workers import Workers
from peft_posthoc.extraction.delta import Pair, difference

def taken():
    return 1024 * int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1])

base = torch.randn(8192, 4096, dtype=torch.bfloat16)
pair, before = Pair("w", base, base + base / 64), taken()
with Workers(2, torch_threads=1) as workers:
    found = list(workers.map(lambda _: difference(pair), range(2)))
print((taken() - before) / sum(one.values.nbytes for one in found))
"""


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-9, 1.0, 1e9, 1e18, 1e30])
def test_a_norm_is_right_at_any_scale(scale):
    x = torch.randn(1 << 12, generator=torch.Generator().manual_seed(0)) * scale
    kept, wanted = x.clone(), math.sqrt(sum(float(value) ** 2 for value in x))
    assert float(norm_of(x, torch.empty_like(x, dtype=torch.float64))) == pytest.approx(wanted, rel=1e-12)
    assert frobenius(x) == pytest.approx(wanted, rel=1e-12)
    assert torch.equal(x, kept)


def test_both_norms_of_a_difference_are_those_of_float64():
    base = torch.randn(640, 1000, generator=torch.Generator().manual_seed(1)).bfloat16()
    tuned = base + (base / 100).bfloat16()
    found = difference(Pair("w", base, tuned))
    assert torch.equal(found.values, tuned.float() - base.float())
    for norm, of in ((found.norm, tuned.double() - base.double()), (found.base_norm, base.double())):
        assert norm == pytest.approx(float(torch.linalg.vector_norm(of)), rel=1e-12)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what memory is taken.")
def test_a_difference_leaves_nothing_in_memory_but_itself():
    ran = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, check=True)
    assert 0.9 < float(re.fullmatch(r"([\d.]+)\n", ran.stdout)[1]) < 1.2
