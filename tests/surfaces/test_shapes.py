"""Annotations of shapes are checked, in every module that has one (`tests/conftest.py`)."""

import importlib
import inspect
from pathlib import Path

import jaxtyping
import pytest
import torch

import peft_posthoc
from peft_posthoc.adapters.cast import cast
from peft_posthoc.models.kinds import LINEAR

ROOT = Path(peft_posthoc.__file__).parents[1]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "peft_posthoc").rglob("*.py"))
    if "Float[" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_with_shapes_is_loaded_by_who_checks_them(name):
    assert len(MODULES) > 10
    module = importlib.import_module(name)
    assert "jaxtyping" in type(inspect.getmodule(module).__loader__).__module__


def test_what_has_another_shape_is_refused():
    a, b = torch.zeros(2, 5), torch.zeros(4, 3)
    with pytest.raises(jaxtyping.TypeCheckError):
        cast(a, b, torch.float32, "name")
    with pytest.raises(jaxtyping.TypeCheckError):
        LINEAR.tensors("module", a, b)
