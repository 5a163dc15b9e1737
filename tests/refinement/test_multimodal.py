"""Models that see, refined on text: what says the text is fitted, and what no text comes to stays and is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peft_posthoc import blocks, compensated, distil, extract, refine
from peft_posthoc.refinement.method import UNREAD
from peft_posthoc.refinement.preflight import refine_preflight
from tests.make import models, multimodal

MAKES: dict[str, Any] = {"gemma3": multimodal.gemma3, "llava": multimodal.llava, "qwen2.5-vl": multimodal.qwen2_5_vl}
METHODS: list[Any] = [distil(lr=0.05), blocks(), compensated()]


@pytest.fixture(scope="module", params=MAKES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    torch.manual_seed(0)
    found: tuple[str, str] = models.save_pair(MAKES[request.param](), tmp_path_factory.mktemp("pair"), scale=0.05)
    return found


@pytest.mark.parametrize("method", METHODS, ids=lambda one: type(one).__name__)
def test_only_what_says_the_text_is_fitted(pair: tuple[str, str], tmp_path: Path, method: Any) -> None:
    extract(*pair, 8, dtype=torch.float32).save(tmp_path / "svd")
    refined = refine(tmp_path / "svd", *pair, method=method, sequences=192, length=12)
    before = load_file(tmp_path / "svd" / "adapter_model.safetensors")
    still = {name for name, x in before.items() if torch.equal(x, refined.tensors[name])}
    seeing = {name for name in before if "language_model" not in name}
    assert not refined.kept
    assert seeing
    assert still == seeing
    assert {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in seeing} == {*refined.unmoved}
    assert {*refined.unmoved.values()} == {UNREAD}
    told = refine_preflight(tmp_path / "svd", *pair, method=method, sequences=192, length=12)
    if not isinstance(method, compensated):  # It fits as many layers as are read, which headers do not tell.
        assert told.steps == refined.steps
