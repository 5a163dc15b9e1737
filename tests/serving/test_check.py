"""`phlora check`, as a command and from Python."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from peft_posthoc import AdapterError, CheckpointError, check
from peft_posthoc.cli import main as cli
from peft_posthoc.serving.engines import ENGINES
from tests.make import wrong_adapters
from tests.make.spoiled import contents, misused, refused, run


@pytest.fixture
def work(good, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    wrong_adapters.copy_of(good, tmp_path / "work/adapter")
    return tmp_path / "work"


def spoiled(work, name):
    return wrong_adapters.make(wrong_adapters.CASES[name], work / "adapter", work / name)


def test_a_good_adapter_has_exit_status_0_and_the_commands_to_serve_it(work):
    status, stdout, stderr = run("check", "adapter")
    assert (status, stderr) == (0, "")
    assert "vllm serve" in stdout
    assert "Without --base" in stdout


def test_a_bad_one_has_status_1_and_one_line_that_names_the_engines(work):
    spoiled(work, "scale-sglang")
    status, stdout, stderr = run("check", "scale-sglang")
    assert status == 1
    assert "SGLang" in stdout
    assert "[scale-sglang]" in stdout
    assert stderr == (
        "phlora: error: `scale-sglang` would be refused or silently wrong in sglang, lorax, nim, llamacpp.\n"
    )
    assert run("check", "scale-sglang", "--engine", "vllm", "--engine", "peft")[0] == 0
    assert run("check", "scale-sglang", "--engine", "vllm", "--quiet") == (0, "", "")


def test_json_has_all_that_the_table_has(work):
    spoiled(work, "norms")
    status, stdout, _ = run("check", "norms", "--engine", "vllm", "--json")
    assert status == 1
    (engine,) = json.loads(stdout)["engines"]
    assert engine["verdict"] == "refused"
    (finding,) = engine["findings"]
    assert finding["rule"] == "norms"
    assert finding["culprits"] == ["base_model.model.model.layers.0.input_layernorm.weight"]
    assert finding["source"]
    assert finding["versions"]
    assert run("check", "norms", "--json", "found.json")[0] == 1
    assert json.loads((work / "found.json").read_text())["format"] == 1


def test_the_same_adapter_from_python(work):
    result = check("adapter", engines=["vllm"])
    assert result.wrong == ()
    said = CliRunner().invoke(cli.main, ["check", "adapter", "--engine", "vllm"]).output.rstrip("\n")
    assert result.table().replace("Without base=...", "Without --base") == said
    with pytest.raises(ValueError, match=r"takes some of peft, vllm.*Got `tensorflow`"):
        check("adapter", engines=["tensorflow"])


def test_no_tensor_is_read(good, tmp_path):
    # Zeros where the values were: a reader of headers cannot tell.
    blank = wrong_adapters.copy_of(good, tmp_path / "blank")
    file = blank / "adapter_model.safetensors"
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    with file.open("r+b") as handle:
        handle.truncate(header)
        handle.truncate(len(data))
    assert load_file(file)["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].any() == torch.tensor(False)
    assert [one.findings for one in check(blank).outcomes] == [one.findings for one in check(good).outcomes]


# Bad input.


def test_adapters_that_cannot_be_read(work):
    def config(**settings):
        parts = wrong_adapters.Parts(work / "adapter")
        parts.configure(**settings)
        return parts.write(work / f"bad{len(list(work.iterdir()))}")

    (work / "empty").mkdir()
    (work / "text").write_text("no folder")
    for name in ("empty", "text", "nowhere"):
        refused(run("check", name), f"`{name}")
    refused(run("check", config(peft_type="LOHA")), "LOHA", "only LoRA")
    refused(run("check", config(r="8")), "`r`", "'8'")
    refused(run("check", config(r=0)), "at least 1")
    refused(run("check", config(rank_pattern={"(": 8})), "no regular expression")
    refused(run("check", config(alpha_pattern={"q_proj": "much"})), "alpha_pattern", "'much'")
    refused(run("check", config(modules_to_save="norm")), "modules_to_save")
    broken = config()
    (broken / "adapter_config.json").write_text("{")
    refused(run("check", broken), "not a readable configuration")
    (broken / "adapter_config.json").write_text("[]")
    refused(run("check", broken), "JSON object")
    cut = config()
    (cut / "adapter_model.safetensors").write_bytes(b"short")
    refused(run("check", cut), "not a readable safetensors file")
    (cut / "adapter_model.safetensors").unlink()
    refused(run("check", cut), "holds no adapter_model.safetensors")
    tokens = config()
    (tokens / "added_tokens.json").write_text('["a"]')
    refused(run("check", tokens), "added_tokens.json")


def test_factors_that_are_none(work):
    parts = wrong_adapters.Parts(work / "adapter")
    parts.drop("layers.0.self_attn.q_proj.lora_B")
    refused(run("check", parts.write(work / "half")), "without its counterpart")
    parts = wrong_adapters.Parts(work / "adapter")
    parts.add(f"{wrong_adapters.LAYER}.self_attn.q_proj.lora_B.weight", 32, 8)
    refused(run("check", parts.write(work / "unfit")), "do not fit")
    parts.tensors = {"lm_head.weight": torch.zeros(3, 3)}
    refused(run("check", parts.write(work / "none")), "no LoRA factors", "lm_head.weight")


def test_a_pickle_that_does_more_than_hold_tensors_is_not_executed(work):
    class Trap:
        def __reduce__(self):
            return (open, (str(work / "sprung"), "w"))

    (work / "adapter/adapter_model.safetensors").unlink()
    torch.save({"x": Trap()}, work / "adapter/adapter_model.bin")
    refused(run("check", "adapter"), "is refused")
    assert not (work / "sprung").exists()


def test_bad_options(work):
    before = contents(work)
    misused(run("check", "adapter", "--engine", "tensorflow"), "tensorflow")
    misused(run("check", "adapter", "--dtype", "float16"), "--fix")
    refused(run("check", "adapter", "--base", "org/name"), "is no folder")
    refused(run("check", "adapter", "--base", "adapter"), "The base `adapter` is an adapter.")
    refused(run("check", "adapter", "--json", "nowhere/x.json"), "no folder `nowhere`")
    (work / "notmodel").mkdir()
    refused(run("check", "adapter", "--base", "notmodel"), "No weights in `notmodel`")
    (work / "notmodel").rmdir()
    assert contents(work) == before
    with pytest.raises(AdapterError):
        check("nowhere")
    with pytest.raises(CheckpointError):
        check("adapter", base="nowhere")


def test_on_another_base_no_engine_is_right_and_none_is_started(good, bases):
    other = wrong_adapters.base_of(wrong_adapters.CASES["another-base"], bases)
    told = check(good, base=other)
    assert told.wrong == tuple(ENGINES)
    assert f"and `{other}` was given" in told.table()
    assert "To serve it" not in told.table()


def test_engines_that_load_no_such_base_count_only_where_they_are_asked_by_name(good, bases):
    quantised = wrong_adapters.base_of(wrong_adapters.CASES["format-vllm"], bases)
    told = check(good, base=quantised)
    refusing = {outcome.engine for outcome in told.outcomes if outcome.verdict == "refused"}
    assert refusing == {outcome.engine for outcome in told.outcomes if not outcome.loads_base}
    assert "vllm" in refusing
    assert told.wrong == ()
    assert "vLLM          refused (loads no such base)" in told.table()
    assert check(good, engines=["vllm", "peft"], base=quantised).wrong == ("vllm",)
