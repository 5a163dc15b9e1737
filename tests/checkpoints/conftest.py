import pytest
import torch


@pytest.fixture
def weights():
    """Named tensors of several types and shapes, as a checkpoint holds them."""
    return {
        "layers.0.proj.weight": torch.randn(6, 4),
        "layers.1.proj.weight": torch.randn(6, 4, dtype=torch.bfloat16),
        "layers.1.proj.bias": torch.randn(6, dtype=torch.float16),
        "wide.weight": torch.randn(3, 50, dtype=torch.float64),
        "conv.weight": torch.randn(2, 3, 5),
        "scale": torch.tensor(2.5),
        "positions": torch.arange(7),
        "empty": torch.zeros(0, 4),
    }
