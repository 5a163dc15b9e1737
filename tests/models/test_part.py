import pytest

from peft_posthoc.models.part import Part, is_rest


@pytest.mark.parametrize("part", [Part("mlp.experts.up", 3), Part("embed.weight", 32000, to_end=True)])
def test_a_part_is_read_back_from_its_name(part):
    assert Part.named(str(part)) == part
    assert is_rest(str(part)) == part.to_end


@pytest.mark.parametrize("name", ["embed.weight", "odd]", "list[x]", "[3]", "w[:]"])
def test_what_is_no_part_has_a_name_of_its_own(name):
    assert Part.named(name) is None
    assert not is_rest(name)
