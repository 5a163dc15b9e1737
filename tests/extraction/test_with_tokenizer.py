"""The fine-tune's tokenizer, chat template and generation config beside its adapter, where they are asked for."""

import json

import pytest
import transformers
from click.testing import CliRunner

from peft_posthoc import AdapterError, extract
from peft_posthoc.cli import main as cli
from tests.make import mergekit_runs, models
from tests.make.texts import tokenizer
from tests.make.trainer_runs import here, trainer

TEMPLATE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
COPIED = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "phlora_report.json"}


@pytest.fixture
def pair(tmp_path):
    """A base, and a fine-tune of it with a chat template of its own."""
    base, tuned = models.save_pair(models.llama(), tmp_path)
    for folder, template in ((base, None), (tuned, TEMPLATE)):
        one = tokenizer()
        one.chat_template = template
        one.save_pretrained(folder)
    return base, tuned


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_they_are_copied_where_they_are_asked_for(pair, tmp_path):
    assert names(extract(*pair, 4).save(tmp_path / "without")) == ADAPTER
    place = extract(*pair, 4, with_tokenizer=True).save(tmp_path / "with")
    assert names(place) == ADAPTER | COPIED
    assert transformers.AutoTokenizer.from_pretrained(place).chat_template == TEMPLATE
    weights = [(tmp_path / one / "adapter_model.safetensors").read_bytes() for one in ("with", "without")]
    assert weights[0] == weights[1]


def test_the_command_line_and_several_ranks_have_them_too(pair, tmp_path):
    out = tmp_path / "out"
    line = ["extract", *pair, str(out), "--rank", "2,4", "--with-tokenizer", "--quiet"]
    assert CliRunner().invoke(cli.main, line).exit_code == 0
    assert names(out / "r2") == names(out / "r4") == ADAPTER | COPIED


def test_they_go_with_their_adapter_and_what_else_lies_there_stays(pair, tmp_path):
    place = extract(*pair, 4, with_tokenizer=True).save(tmp_path / "out")
    (place / "notes.txt").write_text("mine")
    extract(*pair, 4).save(place, force=True)
    assert names(place) == ADAPTER | {"notes.txt"}
    (place / "tokenizer.json").write_text("{}")
    with pytest.raises(AdapterError, match="is not the file that belongs there"):
        extract(*pair, 4, with_tokenizer=True).save(place, force=True)
    assert (place / "tokenizer.json").read_text() == "{}"


def test_a_report_cannot_name_files_of_somebody_else_as_ours(pair, tmp_path):
    place = extract(*pair, 4).save(tmp_path / "out")
    for name in ("notes.txt", "tokenizer.json"):
        (place / name).write_text("mine")
    report = json.loads((place / "phlora_report.json").read_text())
    report["beside"] = ["notes.txt", "../base/config.json"]
    (place / "phlora_report.json").write_text(json.dumps(report))
    extract(*pair, 4).save(place, force=True)
    assert names(place) == ADAPTER | {"notes.txt", "tokenizer.json"}
    assert (tmp_path / "base/config.json").is_file()


def test_added_tokens_are_copied_alone_only_where_the_tokenizer_does_not_hold_them(pair, tmp_path):
    tuned = tmp_path / "tuned"
    (tuned / "added_tokens.json").write_text("{}")
    assert "added_tokens.json" not in names(extract(*pair, 4, with_tokenizer=True).save(tmp_path / "fast"))
    (tuned / "tokenizer.json").rename(tuned / "vocab.json")
    assert "added_tokens.json" in names(extract(*pair, 4, with_tokenizer=True).save(tmp_path / "slow"))


def test_a_model_without_any_is_told(llama_pair, tmp_path):
    base, tuned = (models.load(one) for one in llama_pair)
    adapter = extract(base.state_dict(), tuned.state_dict(), 4, with_tokenizer=True)
    assert any("There is no tokenizer beside `state dict`" in note for note in adapter.report.notes)
    assert names(adapter.save(tmp_path / "out")) == ADAPTER


def test_the_callback_has_them_when_the_checkpoint_is_gone(pair, tmp_path):
    training = trainer(pair[0], tmp_path / "run", here(with_tokenizer=True, rank=4), save_total_limit=1)
    training.processing_class = tokenizer()
    training.train()
    for step in ("step-2", "step-6", "final"):
        assert names(tmp_path / "run/phlora" / step) >= COPIED - {"chat_template.jinja"}


@pytest.mark.parametrize("method", ["phlora", "task_arithmetic"])
def test_an_adapter_of_a_merge_has_those_of_the_merge(method, pair, tmp_path):
    rank = {"parameters": {"rank": 4}} if method == "phlora" else {"each": {"weight": 1.0}}
    config = mergekit_runs.config(*pair, method=method, **rank, tokenizer_source=pair[1])
    assert mergekit_runs.phlora(config, tmp_path / "out", "--with-tokenizer").exit_code == 0
    assert {"tokenizer.json", "chat_template.jinja"} <= names(tmp_path / "out/phlora")
    mergekit_runs.refused(
        mergekit_runs.phlora(config, tmp_path / "none", "--with-tokenizer", "--no-model"), "`--with-tokenizer` makes"
    )
