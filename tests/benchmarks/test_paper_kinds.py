"""The paper's experiment on a model that prefers, one that finds and one that sees, each on a toy."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from benchmarks.paper.__main__ import main
from benchmarks.paper.easyvqa import EasyVQA, shapes
from benchmarks.paper.preferring import Preferences
from benchmarks.paper.retrieving import Retrieval
from benchmarks.paper.task import Question
from benchmarks.paper.tatqa_texts import TatQAPreferences, TatQARetrieval
from tests.make import models, texts

SIZES = {"epochs": 1, "batch": 4, "micro_batch": 4, "lr": 1e-2, "lora_lr": 1e-2, "ranks": [2, 8], "refined_rank": 2}
NEITHER = {"mergekit": False, "lora_rank": None, "prompts": 0, "refine_sequences": 16}


def asked(uid, answer, paragraph, **changes):
    told = {"uid": uid, "question": f"w{uid} w2", "answer": [answer], "answer_type": "span", "answer_from": "text"}
    return told | {"scale": "", "rel_paragraphs": [paragraph]} | changes


def write_tatqa(folder, count=8):
    contexts = [
        {
            "table": {"table": [["a"]]},
            "paragraphs": [{"order": 2, "text": f"w{i} w{i + 20}"}, {"order": 1, "text": f"w{i + 40}"}],
            "questions": [
                asked(f"{i}1", "w3 w4", "2"),
                asked(f"{i}2", "w5", "1"),
                asked(f"{i}3", "w6", "1", answer_from="table"),
                asked(f"{i}4", "w7", "1", rel_paragraphs=["1", "2"]),
            ],
        }
        for i in range(count)
    ]
    contexts[0]["questions"] = contexts[0]["questions"][:1]  # No other answer beside it: no pair.
    for name in ("dev", "test_gold"):
        (folder / f"tatqa_dataset_{name}.json").write_text(json.dumps(contexts))


def run(folder, settings, *more):
    config = folder / "toy.json"
    config.write_text(json.dumps(SIZES | NEITHER | settings))
    places = ["--data", folder, "--work", folder / "work", "--results", folder / "results"]
    done = CliRunner().invoke(main, [*map(str, ["run", config, *places]), *more])
    assert done.exit_code == 0, done.output
    return sorted((folder / "results").rglob("*.json"))


def metric(file, name):
    values = json.loads(file.read_text())["metrics"][name].values()
    return sum(values) / len(values)


def save(model, folder):
    tokenizer = texts.tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.filterwarnings("ignore")
def test_a_preference_run(tmp_path):
    write_tatqa(tmp_path)
    train, test = TatQAPreferences().load(tmp_path)
    assert len(train) == len(test) == 14  # of eight contexts seven have two answers in a paragraph each
    assert (train[0].prompt, train[0].answer, train[0].gold) == ("w1 w21\nw11 w2", "w3 w4", {"wrong": "w5"})
    torch.manual_seed(0)
    save(models.llama(), tmp_path / "base")
    base, full, low, high, refined, spectrum = run(
        tmp_path, {"model": str(tmp_path / "base"), "task": "tatqa-preferences", "zero_ranks": []}
    )
    assert metric(full, "margin") > metric(base, "margin")  # the same pairs are in both sets here
    assert 0 < json.loads(low.read_text())["energy"] < json.loads(high.read_text())["energy"] <= 1
    assert "refined without data" in json.loads(refined.read_text())["row"]
    assert json.loads(spectrum.read_text())["relative_delta"] > 0


def test_a_margin_is_of_the_answers_alone():
    torch.manual_seed(0)
    model, tokenizer = models.llama(), texts.tokenizer()
    same = Question("a", "w1 w2", "w3", {"wrong": "w3"})
    other = Question("b", "w1 w2", "w3", {"wrong": "w4 w5"})
    said = Preferences().said(model, tokenizer, [same, other], None)
    assert float(said["a"]) == 0
    ids = tokenizer("w1 w2\n w3 <eos>").input_ids, tokenizer("w1 w2\n w4 w5 <eos>").input_ids
    with torch.inference_mode():
        log = [model(torch.tensor([one])).logits[0].double().log_softmax(-1) for one in ids]
    right, wrong = (sum(float(p[i - 1, one[i]]) for i in range(2, len(one))) for p, one in zip(log, ids, strict=True))
    assert float(said["b"]) == pytest.approx(right - wrong, abs=1e-4)
    assert TatQAPreferences().score(other, "0.0")["likelier"] == 0.5
    assert TatQAPreferences().score(other, "-1.5") == {"likelier": 0, "margin": -1.5}


@pytest.mark.filterwarnings("ignore")
def test_an_encoder_and_each_of_its_seeds(tmp_path):
    write_tatqa(tmp_path)
    train, _ = TatQARetrieval().load(tmp_path)
    assert [(one.prompt, one.answer) for one in train[:2]] == [("w01 w2", "w0 w20"), ("w11 w2", "w1 w21")]
    torch.manual_seed(0)
    save(models.bert(), tmp_path / "base")
    settings = {"model": str(tmp_path / "base"), "task": "tatqa-retrieval", "seeds": [1, 2], "layer_rank": 2}
    files = run(tmp_path, settings)
    names = [file.relative_to(tmp_path / "results/toy").as_posix() for file in files]
    assert names == [
        f"seed-{seed}/{name}.json"
        for seed in (1, 2)
        for name in (
            *("00-base", "01-full-fine-tune", "02-PHLoRA-r=2", "03-PHLoRA-r=8", "04-LoRA-from-zero-r=2"),
            *("layers", "spectrum"),
        )
    ]
    assert metric(files[0], "first") == metric(files[7], "first")  # the base has no seed
    assert json.loads(files[8].read_text())["settings"]["seed"] == 2
    told, whole = json.loads(files[5].read_text()), json.loads(files[2].read_text())["energy"]
    assert len(told["layers"]) == 12  # six matrices in each of two layers
    assert 1 - sum(one["lost"] for one in told["layers"].values()) == pytest.approx(whole, abs=1e-5)
    assert told["tuned"] == {name: metric(files[1], name) for name in ("first", "reciprocal rank")}
    # Layers alone: what they are of is made anew.
    files[5].unlink()
    shutil.rmtree(tmp_path / "work/toy/seed-1")
    assert run(tmp_path, settings) == files
    assert json.loads(files[5].read_text()) == told


def test_the_place_of_what_is_found():
    torch.manual_seed(0)
    model, tokenizer = models.bert(), texts.tokenizer()
    settings = type("Settings", (), {"answer_batch": 2})
    alike = [Question(str(i), one, one, None) for i, one in enumerate(["w1 w2 w3", "w4", "w5 w6"])]
    assert set(Retrieval().said(model, tokenizer, alike, settings).values()) == {"1"}  # each is nearest to itself
    turned = [one._replace(answer=alike[(i + 1) % 3].answer) for i, one in enumerate(alike)]
    said = Retrieval().said(model, tokenizer, turned, settings)
    assert "1" not in said.values()
    assert TatQARetrieval().score(turned[0], "4") == {"first": 0, "reciprocal rank": 0.25}


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_sees(tmp_path):
    for part, count in (("train", 4), ("test", 2)):
        (tmp_path / part / "images").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (64, 64), ["red", "blue"][i % 2]).save(tmp_path / part / "images" / f"{i}.png")
        told = [["what color is the shape?", ["red", "blue"][i % 2], i] for i in range(count)]
        told += [["what shape is there?", ["circle", "triangle"][i % 2], i] for i in range(count)]
        told += [["is there a red shape?", ["yes", "no"][i % 2], i] for i in range(count)]
        (tmp_path / part / "questions.json").write_text(json.dumps(told * (20 if part == "train" else 1)))
    train, test = EasyVQA().load(tmp_path)
    assert [one.answer for one in (*train[:4], *test)] == ["red", "blue"] * 3
    assert {one.answer for one in shapes(tmp_path)} == {"circle", "triangle"}
    base, full, *_ = run(
        tmp_path,
        {"model": "small-llava", "task": "easy-vqa", "zero_ranks": [], "lr": 1e-3, "answer_tokens": 2},
    )
    assert metric(base, "accuracy") == 0  # It has learnt shapes.
    assert metric(full, "accuracy") == 1
