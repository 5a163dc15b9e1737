"""TAT-QA's loader on a file in its own format, and its scores by hand."""

import json

import pytest

from benchmarks.paper.numbers import number, split_scale
from benchmarks.paper.task import Question, sample
from benchmarks.paper.tatqa import TatQA

CONTEXT = {
    "table": {"uid": "t", "table": [["", "2019", "2018"], ["Revenue", "$1,234.5", "(12)"]]},
    "paragraphs": [
        {"uid": "p2", "order": 2, "text": "Second."},
        {"uid": "p1", "order": 1, "text": "First."},
    ],
    "questions": [
        {"uid": "a", "question": "Change?", "answer": 17.7, "answer_type": "arithmetic", "scale": "percent"},
        {"uid": "b", "question": "Years?", "answer": ["2019", "2018"], "answer_type": "multi-span", "scale": ""},
        {"uid": "c", "question": "How many?", "answer": 2.0, "answer_type": "count", "scale": ""},
    ],
}


def asked(answer, kind, scale=""):
    return Question("", "", "", {"answer": answer, "answer_type": kind, "scale": scale})


def test_a_file_as_it_is_published(tmp_path):
    (tmp_path / "tatqa_dataset_dev.json").write_text(json.dumps([CONTEXT]))
    (tmp_path / "tatqa_dataset_test_gold.json").write_text(json.dumps([CONTEXT | {"questions": []}]))
    train, test = TatQA().load(tmp_path)
    assert test == []
    assert [one.id for one in train] == ["a", "b", "c"]
    assert train[0].prompt == "\t2019\t2018\nRevenue\t$1,234.5\t(12)\nFirst.\nSecond.\nChange?"
    assert [one.answer for one in train] == ["17.7 percent", "2019; 2018", "2"]
    for one in train:
        assert TatQA().score(one, one.answer) == {"exact match": 1.0, "F1": 1.0, "literal": 1.0}


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no `tatqa_dataset_dev.json` in .*TAT-QA"):
        TatQA().load(tmp_path)


@pytest.mark.parametrize(
    ("answer", "kind", "scale", "said", "exact", "f1"),
    [
        # A number is its value with its scale, to two decimals.
        ([17.7], "arithmetic", "percent", "17.7%", 1, 1),
        ([17.7], "arithmetic", "percent", "17.7 percent", 1, 1),
        ([17.7], "arithmetic", "percent", "0.177", 1, 1),  # a bare fraction is the percentage
        ([17.7], "arithmetic", "percent", "17.7", 0, 0),
        ([17.7], "arithmetic", "percent", "17.704 percent", 1, 1),
        ([17.7], "arithmetic", "percent", "17.71 percent", 0, 0),
        ([273], "arithmetic", "million", "$273 million", 1, 1),
        ([273], "arithmetic", "million", "273,000,000", 1, 1),
        ([273], "arithmetic", "million", "273 thousand", 0, 0),
        ([273], "arithmetic", "million", "273", 0, 0),
        ([-12], "arithmetic", "", "(12)", 1, 1),
        ([-12], "arithmetic", "", "12", 0, 0),
        ([0], "count", "", "", 0, 0),
        # Words: without case, articles and punctuation; F1 is of bags of words.
        (["the modified retrospective method"], "span", "", "Modified retrospective method.", 1, 1),
        (["the modified retrospective method"], "span", "", "the method", 0, 0.5),  # 1 of 1, and 1 of 3
        (["$0.5 million"], "span", "", "0.5 million", 1, 1),
        (["6,577"], "span", "million", "6577 million", 1, 1),
        (["6,577"], "span", "million", "6577", 0, 0),
        # All of several, in any order.
        (["2019", "2018"], "multi-span", "", "2018; 2019", 1, 1),
        (["2019", "2018"], "multi-span", "", "2019", 0, 0.67),
        (["$9.2 million", "$8.4 million"], "multi-span", "", "$9.2 million; $8.4 million", 1, 1),
        (["a; b"], "span", "", "a; b", 1, 1),
        (["2019"], "span", "", "", 0, 0),
    ],
)
def test_scores(answer, kind, scale, said, exact, f1):
    found = TatQA().score(asked(answer, kind, scale), said)
    assert (found["exact match"], found["F1"]) == (exact, pytest.approx(f1, abs=0.005))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$1,234.5", 1234.5),
        ("(12)", -12),
        ("$(3)", -3),
        ("12.5%", 0.125),
        ("3 million", 3e6),
        ("-0.2", -0.2),
        (".5", 0.5),
        ("", None),
        ("2019 and", None),
        ("1-2", None),
        ("million", None),
    ],
)
def test_numbers(text, value):
    assert number(text) == (None if value is None else pytest.approx(value))


def test_the_scale_is_the_last_word():
    assert split_scale("17.7 percent") == ("17.7", "percent")
    assert split_scale("3 Millions.") == ("3", "million")
    assert split_scale("a million reasons") == ("a million reasons", "")


def test_a_sample_is_the_same_each_time_and_in_order():
    assert sample(range(100), 5) == sample(range(100), 5) == sorted(sample(range(100), 5))
    assert sample(range(3), None) == [0, 1, 2]
