"""Words for people."""

import pytest

from peft_posthoc.text import counted


@pytest.mark.parametrize(("count", "said"), [(0, "0 tensors"), (1, "1 tensor"), (2, "2 tensors")])
def test_a_number_stands_with_its_noun(count, said):
    assert counted(count, "tensor") == said


def test_a_verb_goes_with_the_number_too():
    assert [counted(count, "layer is", "layers are") for count in (1, 2)] == ["1 layer is", "2 layers are"]
