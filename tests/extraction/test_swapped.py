"""A base that looks like the fine-tune, and a fine-tune that looks like the base, are asked about."""

import json

import pytest

from peft_posthoc import extract, preflight
from tests.make import models

CARD = "---\nbase_model: {}\n---\n# A model\n"


@pytest.fixture
def pair(tmp_path):
    return models.save_pair(models.llama(), tmp_path)


def asked(base, tuned):
    found = [note for note in extract(base, tuned, 2).report.notes if note.startswith("Are base and tuned swapped?")]
    assert [note for note in preflight(base, tuned, 2).notes if note.startswith("Are base")] == found
    return found


def test_a_pair_as_it_should_be_is_not(pair, tmp_path):
    (tmp_path / "tuned/trainer_state.json").write_text("{}")
    (tmp_path / "tuned/README.md").write_text(CARD.format(pair[0]))
    (tmp_path / "base/README.md").write_text(CARD.format("org/yet-another"))
    assert asked(*pair) == []


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "training_args.bin"])
def test_a_base_of_a_training_run(name, pair, tmp_path):
    (tmp_path / "base" / name).write_text("{}")
    assert f"holds `{name}` of a training run" in asked(*pair)[0]
    (tmp_path / "tuned/optimizer.pt").write_text("")  # two stages of training
    assert asked(*pair) == []


@pytest.mark.parametrize("listed", ["{}", "\n- org/one\n- {}"])
def test_a_base_whose_card_names_the_tuned(listed, pair, tmp_path):
    (tmp_path / "base/README.md").write_text(CARD.format(listed.format(pair[1])))
    assert asked(*pair) == [f"Are base and tuned swapped? `{pair[0]}` names `{pair[1]}` as its own base."]


def test_a_base_whose_configuration_names_the_tuned(pair, tmp_path):
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"_name_or_path": pair[1]}))
    assert "as its own base" in asked(*pair)[0]


@pytest.mark.parametrize("card", ["---\nbase_model: [\n---\n", "---\n- 1\n---\n", "no card"])
def test_a_card_that_cannot_be_read_is_nothing(card, pair, tmp_path):
    (tmp_path / "base/README.md").write_text(card)
    assert asked(*pair) == []
