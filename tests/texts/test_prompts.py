"""Files of prompts: what is in them, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_posthoc import PosthocError
from peft_posthoc.texts.prompts import read_prompts, read_texts

TURNS = [{"role": "user", "content": "Why?"}]
PARTS = [{"type": "text", "text": "Why?"}]


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("a.txt", "one\n\n two \n", ["one", "two"]),
        ("a.txt", "one\u2028more\n", ["one\u2028more"]),
        ("a.txt", "\ufeffone\n", ["one"]),
        ("a.jsonl", '{"prompt": "one", "text": "long"}\n"two"\n', ["one", "two"]),
        ("a.jsonl", '\ufeff{"prompt": "one"}\n{"prompt": ""}\n{"prompt": null}\n', ["one"]),
        ("a.JSONL", '"one"', ["one"]),
        ("a.json", '"one"', ["one"]),
        ("a.jsonl", '{"instruction": "Say it.", "input": "one", "output": "1"}', ["Say it.\none"]),
        ("a.jsonl", '{"instruction": "Say it.", "input": ""}\n{"instruction": "Or not."}', ["Say it.", "Or not."]),
        ("a.json", json.dumps(["one", {"question": "two"}]), ["one", "two"]),
        ("a.json", json.dumps({"version": 1, "data": [{"text": "one"}]}), ["one"]),
        ("a.json", json.dumps({"prompt": "one", "tags": []}), ["one"]),
        ("a.json", json.dumps({"messages": TURNS}), [TURNS]),
        ("a.json", json.dumps({"prompt": ["one", "two"]}), ["one", "two"]),
        ("a.json", json.dumps({"answers": ["no", "no"], "prompt": ["one", "two"]}), ["one", "two"]),
        ("a.json", json.dumps({"version": 1, "lines": ["one", "two"]}), ["one", "two"]),
        ("a.json", '\ufeff"one"', ["one"]),
        (
            "a.json",
            json.dumps({"messages": [{"role": "user", "content": PARTS}]}),
            [[{"role": "user", "content": PARTS}]],
        ),
        ("a.json", json.dumps({"messages": [TURNS, TURNS]}), [TURNS, TURNS]),
        ("a.json", json.dumps({"conversations": [{"messages": TURNS}]}), [TURNS]),
        ("a.json", json.dumps({"text": "about", "data": [{"prompt": "one"}]}), ["one"]),
        (
            "a.jsonl",
            json.dumps({"messages": [*TURNS, {"role": "assistant", "content": None}, *TURNS]}) + '\n"1"',
            ["1"],
        ),
        ("a.jsonl", json.dumps({"messages": TURNS}), [TURNS]),
        ("a.jsonl", '{"messages": [{"role": "user", "content": null}]}\n"one"', ["one"]),
        ("a.jsonl", json.dumps({"messages": [*TURNS, {"role": "assistant", "content": "So."}]}), [TURNS]),
        ("a.jsonl", json.dumps({"conversations": [{"from": "human", "value": "Why?"}]}), [TURNS]),
    ],
)
def test_prompts_are_found(tmp_path: Path, name: str, content: str, wanted: list[Any]) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompts(tmp_path / name) == wanted


def test_parquet_is_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": [1, 2], "prompt": ["one", "two"]}), tmp_path / "a.parquet")
    assert read_prompts(tmp_path / "a.parquet") == ["one", "two"]


def test_a_field_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "no", "ask": "yes"}', encoding="utf-8")
    assert read_prompts(tmp_path / "a.jsonl", "ask") == ["yes"]
    contents = [
        {"ask": "yes", "tags": ["no"]},
        {"ask": ["yes"]},
        {"prompt": ["no"], "ask": ["yes"]},
        {"prompt": "no", "data": [{"ask": "yes"}]},
    ]
    for content in contents:
        (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8")
        assert read_prompts(tmp_path / "a.json", "ask") == ["yes"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", '{"prompt": ["no"], "id": ["no"]}'), ("a.txt", "no"), ("a.json", '["no"]'), ("a.jsonl", '{"id": 3}')],
)
def test_a_field_that_is_not_there_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(PosthocError, match=r"has (no|the) fields.*field"):
        read_prompts(tmp_path / name, "ask")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", "", "holds no prompts"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.jsonl", '"one"\n\n{"a"\n', "line 3, column 5"),
        ("a.jsonl", '{"prompt": null}', "holds no prompts"),
        ("a.json", "3", "no text but int"),
        ("a.jsonl", "[1]\n", "no list of messages"),
        ("a.jsonl", '{"messages": [{"content": "one"}]}', "record 1 is no list of messages"),
        ("a.jsonl", "3\n", "no text but int"),
        ("a.jsonl", '{"id": 3}\n', "has the fields id"),
        ("a.json", '{"id": ["a", "b"], "answer": ["c"]}', "has the fields id, answer"),
        ("a.json", '["one",\n"two"', "line 2, column 6"),
        ("a.jsonl", "[" * 100_000, "nested too deep"),
        ("a.jsonl", '"one"\n"\\ud800"', r"record 2 holds half of a character, '\\ud800'"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": {"a": 1}}]}', "no text but dict"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [{"text": 5}]}]}', "no text but int"),
        ("a.csv", "one", "must end in"),
    ],
)
def test_what_is_no_file_of_prompts_is_refused(tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(PosthocError, match=told):
        read_prompts(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PosthocError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_texts_are_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TURNS}), encoding="utf-8")
    with pytest.raises(PosthocError, match="list of messages"):
        read_texts(tmp_path / "a.jsonl")


def test_a_folder_is_read_by_datasets_as_a_data_set_on_the_hub_is(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n', encoding="utf-8")
    (tmp_path / "test.jsonl").write_text('{"prompt": "three"}\n', encoding="utf-8")
    assert read_prompts(tmp_path) == ["one", "two"]


def test_a_data_set_that_is_not_there_is_one_line() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(PosthocError, match="`no-org/no-name` is no file, and `datasets` cannot read it"):
        read_prompts("no-org/no-name")
