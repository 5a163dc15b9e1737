"""MedMCQA's loader on rows in its own format, and which option an answer names."""

import json

import pytest

from benchmarks.paper.medmcqa import MedMCQA, chosen_of

ROW = {"id": "a", "question": "Which vitamin?", "opa": "A", "opb": "B12", "opc": "C", "opd": "Vitamin D.", "cop": 4}
OPTIONS = ["Heart", "Left lung", "Liver", "Left lung"]


def test_a_file_as_it_is_published(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"id": "b", "cop": 1}) + "\n")
    (tmp_path / "dev.json").write_text("\n")
    train, test = MedMCQA().load(tmp_path)
    assert test == []
    assert train[0].prompt == "Which vitamin?\nA. A\nB. B12\nC. C\nD. Vitamin D."
    assert [one.answer for one in train] == ["D. Vitamin D.", "A. A"]
    for one in train:
        assert MedMCQA().score(one, one.answer) == {"accuracy": 1, "answered": 1}
        assert MedMCQA().score(one, "B. B12") == {"accuracy": 0, "answered": 1}
        assert MedMCQA().score(one, "") == {"accuracy": 0, "answered": 0}


@pytest.mark.parametrize(
    ("said", "chosen"),
    [
        ("C", 2),
        ("(C) liver", 2),
        ("C. Liver, because of its blood", 2),
        ("liver.", 2),
        ("A. Liver", None),  # two at once
        ("Left lung", None),  # two options say so
        ("D. Left lung", 3),
        ("A heart", 0),
        ("Cirrhosis", None),  # no letter: a word
        ("It is the liver", None),
        ("", None),
    ],
)
def test_which_option_an_answer_names(said, chosen):
    assert chosen_of(said, OPTIONS) == chosen
