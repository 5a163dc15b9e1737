import pytest

from tests.make import models
from tests.make.adapters import LEAVES, adapt


@pytest.fixture
def llama(tmp_path):
    """A base's folder."""
    return models.save(models.llama(), tmp_path / "base")


@pytest.fixture
def patterned(llama, tmp_path):
    """An adapter of which every layer has another rank and scale."""
    patterns = {"rank_pattern": {"q_proj": 4, r"layers\.1\.self_attn\.v_proj": 12}, "alpha_pattern": {"k_proj": 3}}
    return adapt(
        models.load(llama), tmp_path / "a", r=8, lora_alpha=20, use_rslora=True, target_modules=LEAVES, **patterns
    )
