"""Steps of an optimiser over factors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from peft_posthoc.compute.together import Together
from peft_posthoc.refinement.steps import Steps


class Two(Together):
    """As if another process read what this one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 2

    def sum(self, tensors: Sequence[Tensor]) -> None:
        for own in tensors:
            own.mul_(2)

    def agreed(self) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.mark.parametrize("together", [Together(), Two()])
def test_factors_that_no_loss_depends_on_are_known(together: Together) -> None:
    factors = {name: Parameter(torch.ones(2)) for name in ("x.lora_A.weight", "y.lora_A.weight")}
    steps = Steps(factors, 0.1, together)
    assert steps.unread() == []
    steps.step(factors["x.lora_A.weight"].sum(), 0.1)
    assert steps.unread() == ["y.lora_A.weight"]
    steps.step(factors["y.lora_A.weight"].sum(), 0.2)
    assert steps.unread() == []
