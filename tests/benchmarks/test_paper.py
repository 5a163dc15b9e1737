"""The paper's experiment from data to page, on a toy: every row is made, once, and the page has its numbers."""

import json
import re

import peft
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from benchmarks.paper.__main__ import HERE, main
from benchmarks.paper.answering import tokens
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.headline import headline
from benchmarks.paper.intervals import interval, rank_correlation
from benchmarks.paper.nearness import _with_error
from benchmarks.paper.page import page as made
from benchmarks.paper.settings import TASKS, Settings
from peft_posthoc import extract
from tests.make import models, texts


def contexts(count):
    for i in range(count):
        yield {
            "table": {"uid": f"t{i}", "table": [["a", "b"]]},
            "paragraphs": [{"uid": f"p{i}", "order": 1, "text": "a b"}],
            "questions": [
                {"uid": f"q{i}", "question": "b a", "answer": ["a"], "answer_type": "span", "scale": ""},
            ],
        }


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    data, base = folder / "data", folder / "base"
    data.mkdir()
    (data / "tatqa_dataset_dev.json").write_text(json.dumps([*contexts(8)]))
    (data / "tatqa_dataset_test_gold.json").write_text(json.dumps([*contexts(4)]))
    tokenizer = texts.tokenizer()
    models.llama(vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    config = folder / "toy.json"
    config.write_text(
        json.dumps(
            {
                "model": str(base),
                "task": "tatqa",
                "lr": 1e-2,
                "lora_lr": 1e-2,
                "lora_rank": 4,
                "batch": 4,
                "ranks": [2, 8],
                "refined_rank": 4,
                "prompts": 2,
                "refine_sequences": 16,
                "answer_tokens": 4,
            }
        )
    )
    return folder


def run(folder, *more):
    places = ["--data", folder / "data", "--work", folder / "work", "--results", folder / "results"]
    return CliRunner().invoke(main, [*map(str, ["run", folder / "toy.json", *places]), *more])


@pytest.mark.filterwarnings("ignore")
def test_every_row_is_made_once_and_stands_on_the_page(toy):
    done = run(toy)
    assert done.exit_code == 0, done.output
    files = sorted((toy / "results/toy").glob("[0-9]*.json"))
    told = json.loads((toy / "results/toy/spectrum.json").read_text())
    energies = {
        json.loads(file.read_text()).get("rank"): json.loads(file.read_text()).get("energy") for file in files[2:5]
    }
    assert [told["energy at"][str(rank)] for rank in (2, 4, 8)] == pytest.approx([energies[rank] for rank in (2, 4, 8)])
    names = [json.loads(file.read_text())["row"] for file in files]
    assert names == [
        *("base", "full fine-tune", "PHLoRA r=2", "PHLoRA r=4", "PHLoRA r=8"),
        *("PHLoRA r=4, refined without data", "PHLoRA r=4, refined on 2 prompts"),
        *("mergekit-extract-lora r=4", "LoRA from zero r=4", "LoRA+ r=4"),
    ]
    before = {file: file.read_bytes() for file in files}
    assert run(toy).output == ""
    assert {file: file.read_bytes() for file in files} == before
    page = toy / "PAPER.md"
    told = CliRunner().invoke(main, ["page", "--results", str(toy / "results"), "--out", str(page)])
    assert told.exit_code == 0, told.output
    text = page.read_text()
    for file in files:
        row = json.loads(file.read_text())
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {row['row']} |"))
        values = list(row["metrics"]["exact match"].values())
        assert len(values) == 4
        assert f"| {100 * sum(values) / 4:.1f} (" in line
        assert ("energy" in row) is (re.search(r"r=\d+$", row["row"]) is not None and "PHLoRA" in row["row"])
    assert "| Nova Lite | 0 / 0 | 83.89 / 48.85 |" in text  # the paper's row, as its Table 3 has it
    assert page.with_name("PAPER-energy.svg").is_file()
    assert "said" not in row
    assert len(list((toy / "work/toy/said").iterdir())) == len(files)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_nothing_is_as_far_from_the_tuned_model_as_the_base(toy):
    """And one that holds all that changed is where the tuned model is."""
    base, tuned = toy / "base", toy / "work/toy/full/tuned"
    assert run(toy, "--row", "full fine-tune").exit_code == 0
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=2)).save_pretrained(
        toy / "nothing"
    )
    extract(base, tuned, 1.0, form="peft", embeddings=True, head=True, dtype=torch.float32).save(toy / "whole")
    places = ["--data", toy / "data", "--work", toy / "work", "--every", "1"]
    done = CliRunner().invoke(
        main, [*map(str, ["nearness", toy / "toy.json", toy / "nothing", toy / "whole", *places])]
    )
    assert done.exit_code == 0, done.output
    lines = ([cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if line.startswith("| "))
    rows = {name: cells for _, name, *cells, _ in lines}
    assert rows["nothing"][4] == "+0.0000 ± 0.0000"
    against, _ = rows["whole"].pop(4).split(" ± ")
    assert rows["tuned"].pop(4) == ""
    assert rows["whole"] == rows["tuned"]
    assert rows["tuned"][:2] == ["0.0000", "100.0 %"]
    made = Experiment(Settings.read(toy / "toy.json"), toy / "data", toy / "work/toy")
    by_hand, less, said = [], [], {}
    for question in made.sets.test:
        row = tokens(question, made.processor)
        place = len(row["input_ids"]) - sum(label != -100 for label in row["labels"])
        for folder in (base, tuned):
            with torch.no_grad():
                logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([row["input_ids"]])).logits
            said[folder] = torch.distributions.Categorical(logits=logits[0, place - 1 : -1])
        by_hand += torch.distributions.kl_divergence(said[tuned], said[base]).tolist()
        answer = torch.tensor(row["input_ids"][place:])
        less += (said[base].log_prob(answer) - said[tuned].log_prob(answer)).tolist()
    assert float(rows["nothing"][0]) == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-4)
    assert float(against) == pytest.approx(sum(less) / len(less), abs=1e-4)


def test_a_difference_of_losses_is_as_uncertain_as_the_questions_are_few():
    """Two of two tokens and one of one: 1 and 2 below and above the mean of 2."""
    assert _with_error(torch.tensor([1.0, 2.0, 3.0]), [2, 1]) == f"+2.0000 ± {2**0.5 / 3:.4f}"


def test_every_set_of_the_paper_has_a_loader_and_every_configuration_a_set():
    configs = {Settings.read(file).task for file in HERE.glob("*-*.json")}
    assert configs <= TASKS.keys() >= json.loads((HERE / "published.json").read_text()).keys()


def test_the_page_is_what_the_command_makes_of_the_results():
    assert (HERE.parent / "PAPER.md").read_text(encoding="utf-8") == made(HERE / "results")


def test_the_readme_has_the_numbers_of_the_real_model():
    assert headline(HERE / "results") in (HERE.parents[1] / "README.md").read_text(encoding="utf-8")


def test_a_row_that_is_none_and_data_that_are_not_there_are_a_line(toy, tmp_path):
    assert "there are ['base'" in run(toy, "--row", "nothing").output
    told = run(toy, "--data", str(tmp_path), "--results", str(tmp_path))
    assert "Error: There is no `tatqa_dataset_dev.json`" in told.output


def test_a_set_without_a_network_or_a_model_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for task, line in (
        ("mkfe", "Error: `owkin/medical_knowledge_from_extracts` was not f"),
        ("msvd", "Error: No model"),
    ):
        config = tmp_path / f"{task}.json"
        config.write_text(json.dumps({"model": "nothing", "task": task}))
        told = CliRunner().invoke(main, ["run", str(config), "--work", str(tmp_path)])
        assert told.exit_code == 1
        assert told.output.startswith(line)


def test_an_interval_is_of_the_mean():
    assert interval([1.0] * 20) == (1.0, 1.0)
    low, high = interval([0.0, 1.0] * 50)
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.01)  # the binomial's
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.01)


@pytest.mark.parametrize(
    ("x", "y", "rho"),
    [
        ([1, 2, 3], [10, 20, 30], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),  # 1 - 6 * 2 / (4 * 15)
        ([1, 2, 2, 3], [1, 2, 2, 3], 1),
    ],
)
def test_rank_correlation(x, y, rho):
    assert rank_correlation(x, y) == pytest.approx(rho)
