"""`PosthocLoraCallback(refine=...)`: `final`, fitted on what the trainer has to read."""

import json
import shutil

import datasets
import pytest
import torch
import transformers

from hf_callbacks import PosthocLoraCallback
from hf_callbacks.data import on_data_of
from peft_posthoc import Given, Sampled, extract, refine
from peft_posthoc.refinement.refining import Refining
from tests.hosts.test_catch_up import run_catch_up
from tests.make import models
from tests.make.trainer_runs import adapters, arguments, files, here, same_factors, trainer

FEW = {"sequences": 40, "length": 8}


def rows(first, count=24):
    """Rows of tokens from one on, padded by two; their labels are other tokens, which no text may hold."""
    random = torch.Generator().manual_seed(first)
    texts = torch.randint(first, first + 20, (count, 6), generator=random)
    pad = torch.zeros(2, dtype=torch.int64)
    return [
        {
            "input_ids": torch.cat([text, pad]),
            "attention_mask": torch.cat([torch.ones_like(text), pad]),
            "labels": torch.full((8,), 90),
        }
        for text in texts
    ]


def of_rows(data):
    return [row["input_ids"][:6].tolist() for row in data]


def train(base, folder, callback, *, eval_set=True, **changes):
    training = transformers.Trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(base),
        args=arguments(folder, learning_rate=5e-3, **changes),
        train_dataset=rows(10),
        eval_dataset=rows(40) if eval_set else None,
        callbacks=[callback],
    )
    training.train()
    return training


def report(adapter):
    return json.loads((adapter / "phlora_report.json").read_text())


@pytest.mark.parametrize(("background", "eval_set"), [(True, True), (False, False)])
def test_final_is_fitted_on_the_eval_set_or_else_on_the_train_set(base, tmp_path, background, eval_set):
    run = tmp_path / "run"
    training = train(base, run, here(rank=2, refine=FEW, background=background), eval_set=eval_set)
    texts = Given(of_rows(rows(40 if eval_set else 10)))
    by_hand = refine(run / "phlora/step-6", base, run / "checkpoint-6", texts=texts, sequences=40, length=6)
    by_hand.save(tmp_path / "by-hand")
    assert same_factors(run / "phlora/final", tmp_path / "by-hand")
    # On other text it would be as far off by other numbers.
    assert report(run / "phlora/final")["refined"]["before"]["task"]["kl"] == by_hand.before["task"].kl
    # The steps' adapters are as they were extracted, and nothing else is left.
    assert "refined" not in report(run / "phlora/step-6")
    assert files(run / "_phlora") - {"lock"} == {"base.json", "made", "pinned"}
    # Page, card and log tell of it.
    told = report(run / "phlora/final")["refined"]
    numbers = " | ".join(f"{told[when]['task']['kl']:.4f}" for when in ("base", "before", "after"))
    assert numbers in (run / "phlora/README.md").read_text()
    card = (run / "phlora/final/README.md").read_text()
    assert numbers in card
    assert "nothing was trained" not in card
    logged = [row for row in training.state.log_history if "phlora/kl/task/after" in row]
    assert [row["phlora/kl/task/after"] for row in logged] == [told["after"]["task"]["kl"]]


def test_without_a_checkpoint_the_live_model_is_what_it_is_fitted_to(base, tmp_path):
    training = train(base, tmp_path / "run", here(rank=2, refine=FEW, when="end"), save_strategy="no")
    training.model.save_pretrained(tmp_path / "tuned")
    pair = base, tmp_path / "tuned"
    by_hand = refine(extract(*pair, 2), *pair, texts=Given(of_rows(rows(40))), sequences=40, length=6)
    assert all(parameter.requires_grad for parameter in training.model.parameters())
    assert training.model.training
    final = report(tmp_path / "run/phlora/final")["refined"]
    assert final["before"]["task"]["kl"] == pytest.approx(by_hand.before["task"].kl)
    assert final["after"]["task"]["kl"] == pytest.approx(by_hand.after["task"].kl)
    assert final["after"]["task"]["kl"] < final["before"]["task"]["kl"]


def test_where_the_fit_fails_final_is_as_it_was_extracted_and_the_reason_is_told(base, tmp_path, log):
    callback = PosthocLoraCallback(2, refine={"texts": Given([[1, 2, 3]])})  # one text, and none to judge by
    train(base, tmp_path, callback, save_steps=6)
    assert same_factors(tmp_path / "phlora/final", tmp_path / "phlora/step-6")
    assert "refined" not in report(tmp_path / "phlora/final")
    assert len(log.of("`final`", "not refined", "too few")) == 1


def test_a_model_that_says_no_next_tokens_keeps_its_final(tmp_path, log):
    base = models.save(models.t5(), tmp_path / "base")
    refine = {"sequences": 8}
    run = trainer(models.load(base), tmp_path / "run", PosthocLoraCallback(2, base=base, refine=refine), save_steps=6)
    run.train()
    assert "final" in adapters(tmp_path / "run/phlora")
    assert len(log.of("`final`", "not refined")) == 1


def test_what_cannot_be_handed_to_another_process_is_told_at_once():
    class Mine(Sampled):
        pass

    with pytest.raises(ValueError, match=r"`texts` of class `Mine`.*background=False"):
        PosthocLoraCallback(refine={"texts": Mine()})
    PosthocLoraCallback(refine={"texts": Mine()}, background=False)
    with pytest.raises(TypeError, match="no `minute`"):
        PosthocLoraCallback(refine={"minute": 3})
    with pytest.raises(ValueError, match="`minutes`"):
        PosthocLoraCallback(refine={"minutes": 0})


def test_it_survives_the_way_to_another_process():
    asked = Refining(Given([[1, 2], "text"]), None, sequences=7, minutes=2.5, seed=3)
    assert Refining.from_json(json.loads(json.dumps(asked.to_json()))) == asked


class Drawing(torch.utils.data.Dataset):
    """Draws when it is read."""

    def __len__(self):
        return 8

    def __getitem__(self, place):
        row = torch.randint(0, 90, (4,))
        return {"input_ids": row, "labels": row}


@pytest.mark.parametrize(
    ("batch", "texts"),
    [
        ({"input_ids": [[0, 0, 5, 6]], "attention_mask": [[0, 0, 1, 1]]}, [[5, 6]]),
        ({"input_ids": [[5, 6, 7, 8, 9]], "position_ids": [[0, 1, 0, 1, 2]]}, [[5, 6], [7, 8, 9]]),
        ({"input_ids": [[5, 6], [7, 8]], "labels": [[-100, 1], [2, 3]]}, [[5, 6], [7, 8]]),
    ],
)
def test_texts_are_what_the_collator_gives_without_padding(base, tmp_path, batch, texts):
    training = trainer(base, tmp_path)
    training.data_collator = lambda rows: {name: torch.tensor(value) for name, value in batch.items()}
    training.eval_dataset = [{"input_ids": [1]}]
    assert on_data_of(training, Refining()).texts == Given(texts)


def test_data_that_is_read_leaves_the_random_numbers_as_they_are(base, tmp_path):
    training = trainer(base, tmp_path)
    training.eval_dataset = {"one": Drawing(), "other": Drawing()}
    before = torch.get_rng_state()
    found = on_data_of(training, Refining(sequences=6))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(found.texts.texts) == 4  # The other two are general.
    assert found.length == 4  # no text has more


def test_a_data_set_that_is_a_stream_is_read_as_the_trainer_reads_it(base, tmp_path):
    training = trainer(base, tmp_path)
    texts = [[i, i + 1, i + 2] for i in range(30)]
    of_ids = datasets.IterableDataset.from_generator(lambda: ({"input_ids": ids, "note": "x"} for ids in texts))
    for stream in (of_ids, of_ids.map(lambda row: {"labels": row["input_ids"]})):
        training.eval_dataset = stream
        assert on_data_of(training, Refining(sequences=16)).texts == Given(texts[:14])


@pytest.mark.parametrize(
    ("length", "kept", "told"),
    [
        (None, [[1, 2, 3, 4], [5, 6, 7, 8]], None),
        (3, [[1, 2, 3]], "2 rows 1 are cut to 3 tokens, and 1 are left out"),
        (2, [[1, 2]], "2 rows 1 are cut to 2 tokens, and 1 are left out"),
    ],
)
def test_no_row_loses_its_answer_in_silence(base, tmp_path, log, length, kept, told):
    """The answer of one begins with its second token, that of the other with its last."""
    training = trainer(base, tmp_path)
    training.data_collator = lambda rows: {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    training.eval_dataset = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, 8]},
    ]
    assert on_data_of(training, Refining(length=length)).texts == Given(kept)
    assert len(log.of("rows", "left out")) == (told is not None)
    if told is not None:
        assert log.of(told)
    training.eval_dataset = training.eval_dataset[1:]
    assert on_data_of(training, Refining(length=3)).texts is None
    assert log.of("No answer", "within 3 tokens", "models write")


def test_data_without_token_ids_is_told_and_the_models_write(base, tmp_path, log):
    training = trainer(base, tmp_path)
    training.data_collator = list
    assert on_data_of(training, Refining()).texts is None
    assert len(log.of("no `input_ids`", "models write")) == 1


def test_a_run_that_is_over_is_caught_up_with_and_refined(base, tmp_path):
    train(base, tmp_path, here(rank=2))
    assert "--minutes belongs" in run_catch_up(tmp_path, "--minutes", "1").output
    done = run_catch_up(tmp_path, "--refine", "--sequences", "40", "--length", "8")
    assert done.exit_code == 0, done.output
    by_hand = refine(tmp_path / "phlora/step-6", base, tmp_path / "checkpoint-6", sequences=40, length=8)
    by_hand.save(tmp_path / "by-hand")
    assert same_factors(tmp_path / "phlora/final", tmp_path / "by-hand")
    assert "refined" in report(tmp_path / "phlora/final")


def test_what_is_refined_already_stays_and_is_told(base, tmp_path):
    train(base, tmp_path, here(rank=2, refine=FEW))
    before = (tmp_path / "phlora/final/adapter_model.safetensors").read_bytes()
    done = run_catch_up(tmp_path, "--refine", "--sequences", "40", "--length", "8", "--lr", "0.3")
    assert done.exit_code == 0, done.output
    assert "`final` is refined already" in done.stderr
    assert (tmp_path / "phlora/final/adapter_model.safetensors").read_bytes() == before


def test_without_its_checkpoint_final_is_as_it_was_extracted(base, tmp_path):
    train(base, tmp_path, here(rank=2))
    for gone in (tmp_path / "phlora/final", tmp_path / "checkpoint-6"):
        shutil.rmtree(gone)
    done = run_catch_up(tmp_path, "--refine", "--sequences", "40", "--length", "8")
    assert done.exit_code == 1
    assert "`final` is not refined: the checkpoint of step 6 is gone" in done.stderr
    assert same_factors(tmp_path / "phlora/final", tmp_path / "phlora/step-6")
