"""MKFE's loader on a file in its own format, and overlaps counted by hand."""

import csv

import pytest

from benchmarks.paper.mkfe import MKFE, facts
from benchmarks.paper.task import Question

RIGHT = "{'conditions': 'Proteinuria', 'interventions': 'Drug: Losartan|Other: Placebo'}"


def write(folder, rows):
    with (folder / "finetuning_train.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["Question", "Answer"])
        table.writeheader()
        table.writerows(rows)


def test_a_file_as_it_is_published(tmp_path):
    asked = 'Your goal is to extract. Input: {\n conditions: string }\n\nInput: A study, with\n"quotes".'
    write(tmp_path, [{"Question": asked, "Answer": RIGHT}] * 11 + [{"Question": "Input: no facts", "Answer": "none"}])
    train, test = MKFE().load(tmp_path)
    assert (len(train), len(test)) == (10, 1)  # five to one, as in the paper; what cannot be scored is in neither
    assert {one.prompt for one in [*train, *test]} == {'A study, with\n"quotes".'}
    assert not {one.id for one in train} & {one.id for one in test}
    assert MKFE().score(train[0], train[0].answer) == {"key overlap": 1, "value overlap": 1}


def test_the_papers_sizes_are_the_most(tmp_path):
    write(tmp_path, [{"Question": f"Input: {i}", "Answer": RIGHT} for i in range(1300)])
    assert [len(part) for part in MKFE().load(tmp_path)] == [1000, 200]


@pytest.mark.parametrize(
    ("said", "keys", "values"),
    [
        (RIGHT, 1, 1),
        ('{"conditions": " proteinuria ", "interventions": "Drug: Losartan"}', 1, 0.5),  # JSON; one value of two
        ("{'Conditions': 'Proteinuria'}", 0.5, 1),  # all matched keys are right
        ("{'conditions': 'x', 'more': 'y'}", 0.5, 0),
        ("{'more': 'y'}", 0, 0),
        (f"Here it is: {RIGHT}.", 1, 1),
        ("conditions: Proteinuria", 0, 0),
        ("{'conditions': 'Proteinuria'", 0, 0),  # cut off
        ("{'conditions', 'interventions'}", 0, 0),  # a set
        ("__import__('os')", 0, 0),
        ("", 0, 0),
    ],
)
def test_overlaps(said, keys, values):
    question = Question("", "", RIGHT, facts(RIGHT))
    assert MKFE().score(question, said) == {"key overlap": keys, "value overlap": values}
