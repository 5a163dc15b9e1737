"""Adapters and bases that engines are asked about."""

import pytest

from peft_posthoc import extract
from tests.make import wrong_adapters


@pytest.fixture(scope="module")
def good(llama_pair, tmp_path_factory):
    """An adapter of every linear layer at rank 16, in the portable form."""
    return extract(*llama_pair, wrong_adapters.RANK).save(tmp_path_factory.mktemp("good") / "adapter")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return tmp_path_factory.mktemp("bases")
