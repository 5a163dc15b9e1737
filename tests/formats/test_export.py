"""`phlora export` as a command and a function: bad input, what is replaced, and the page that documents it."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from peft_posthoc import AdapterError, CheckpointError, export, extract
from peft_posthoc.cli import main as cli
from peft_posthoc.cli.export import TO
from peft_posthoc.formats.export import TARGETS
from tests.make import diffusion, lora, models

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")


@pytest.fixture
def work(llama_pair, tmp_path, monkeypatch):
    """A folder with a `base`, a `tuned` and the `adapter` between them, which the command runs in."""
    for folder in llama_pair:
        shutil.copytree(folder, tmp_path / "work" / Path(folder).name)
    monkeypatch.chdir(tmp_path / "work")
    extract("base", "tuned", 2).save("adapter")
    return tmp_path / "work"


def run(*arguments):
    result = CliRunner().invoke(cli.main, ["export", *map(str, arguments)], prog_name="phlora")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_command_and_the_function_have_the_same_targets():
    assert tuple(TARGETS) == TO


@pytest.mark.parametrize(("to", "out"), [("gguf", "out.gguf"), ("mlx", "out"), ("merged", "out")])
def test_it_tells_what_it_wrote_in_words_and_in_json(to, out, work):
    told = run("adapter", out, "--to", to)
    assert told.exit_code == 0, told.output
    assert told.stdout.splitlines()[-1] == f"Written to {out}"
    found = json.loads(run("adapter", out, "--to", to, "--force", "--json", "--quiet", "--dtype", "bfloat16").stdout)
    assert (found["to"], found["base"], found["out"], found["dtype"]) == (to, "base", out, "bfloat16")
    assert found["matrices"] == 14
    assert found["rank"] == (None if to == "merged" else 8)
    silent = run("adapter", out, "--to", to, "--force", "--quiet")
    assert silent.output == ""


def test_the_same_input_gives_the_same_bits(work):
    for out in ("one", "two"):
        for to in ("gguf", "mlx", "merged"):
            assert run("adapter", f"{out}/{to}", "--to", to, "--quiet").exit_code == 0
    one, two = (everything(work / out) for out in ("one", "two"))
    reports = {name for name in one if name.endswith("phlora_report.json")}  # These name where they are.
    assert len(reports) == 2
    assert {n: b for n, b in one.items() if n not in reports} == {n: b for n, b in two.items() if n not in reports}


@pytest.mark.parametrize("to", ["gguf", "mlx", "merged", "vllm-moe"])
def test_what_is_there_is_only_replaced_by_force_and_if_it_is_an_export(to, work):
    mine = work / "mine"
    if to == "gguf":
        mine.write_text("not a model")
    else:
        mine.mkdir()
        (mine / "thesis.txt").write_text("years of work")
    before = everything(work)
    for force in ([], ["--force"]):
        result = run("adapter", "mine", "--to", to, *force)
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert re.search("Choose another" if not force else "replaces nothing else|would delete it", line)
        assert everything(work) == before


@pytest.mark.parametrize("to", ["mlx", "merged"])
def test_what_was_added_to_an_export_stays_when_that_is_replaced(to, work):
    run("adapter", "out", "--to", to)
    made = everything(work / "out")
    (work / "out" / "logs").mkdir()
    (work / "out" / "logs" / "notes.txt").write_text("mine")
    (work / "out" / "README.md").write_text("mine")
    before = everything(work / "out")
    assert run("adapter", "out", "--to", to, "--force", "--dtype", "bfloat16").exit_code == 0
    after = everything(work / "out")
    assert after.keys() == before.keys()
    assert {name: after[name] for name in before if name not in made} == {
        "logs/notes.txt": b"mine",
        "README.md": b"mine",
    }
    assert after["phlora_report.json"] != before["phlora_report.json"]
    assert not list(work.glob(".*"))


def test_what_would_be_loaded_with_an_export_is_not_kept_beside_it(work):
    run("adapter", "out", "--to", "merged")
    save_file({"mine": torch.zeros(1)}, "out/more.safetensors")
    before = everything(work)
    result = run("adapter", "out", "--to", "merged", "--force")
    assert result.exit_code == 1
    assert "also holds `more.safetensors`" in result.stderr
    assert everything(work) == before


def test_a_model_in_gguf_is_not_replaced_by_an_adapter(work):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter("model.gguf", "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    before = everything(work)
    result = run("adapter", "model.gguf", "--to", "gguf", "--force")
    assert result.exit_code == 1
    assert "`model.gguf` is no earlier export; `--force` replaces nothing else." in result.stderr
    assert everything(work) == before


BAD = {
    "no target": (["adapter", "out"], 2, "Missing option '--to'"),
    "an unknown target": (["adapter", "out", "--to", "onnx"], 2, "is not one of"),
    "no adapter": (["nowhere", "out", "--to", "mlx"], 1, "not a readable LoRA adapter"),
    "a model for an adapter": (["base", "out", "--to", "mlx"], 1, "it has no adapter_config.json. Give the folder"),
    "no base": (["adapter", "out", "--to", "mlx", "--base", "nowhere"], 1, "neither a folder nor a hub id"),
    "no base's weights": (["adapter", "out", "--to", "merged", "--base", "nowhere"], 1, "does not exist"),
    "a base without a class": (["adapter", "out", "--to", "mlx", "--base", "unknown"], 1, "has no class for"),
    "a base without a configuration": (["adapter", "out", "--to", "mlx", "--base", "bare"], 1, "has no `config.json`"),
    "a folder in a file": (["adapter", "base/config.json/out", "--to", "mlx"], 1, "is not a folder"),
    "a folder for a file": (["adapter", "base", "--to", "gguf", "--force"], 1, "exists and is a folder"),
    "a file for a folder": (["adapter", "base/config.json", "--to", "mlx"], 1, "exists and is not a folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(case, work):
    arguments, status, told = BAD[case]
    (work / "bare").mkdir()
    (work / "unknown").mkdir()
    (work / "unknown" / "config.json").write_text('{"architectures": ["NobodyKnowsForCausalLM"]}')
    before = everything(work)
    result = run(*arguments)
    assert result.exit_code == status
    assert told in result.stderr
    if status == 1:
        assert len(result.stderr.splitlines()) == 1
    assert everything(work) == before
    assert not list(work.glob(".*"))


def test_bad_arguments_in_python(work):
    with pytest.raises(ValueError, match=r"`to=\.\.\.` must be one of gguf, mlx"):
        export("adapter", "out", "onnx")
    with pytest.raises(ValueError, match=r"`export\(dtype=\.\.\.\)` must be float32"):
        export("adapter", "out", "mlx", dtype=torch.int8)
    told = json.loads((work / "adapter" / "adapter_config.json").read_text())
    (work / "adapter" / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": None}))
    with pytest.raises(AdapterError, match=r"does not say what its base is\. Name it with `base=\.\.\.`"):
        export("adapter", "out", "mlx")
    (work / "adapter" / "adapter_config.json").write_text(json.dumps({**told, "use_dora": True}))
    with pytest.raises(AdapterError, match="DoRA"):
        export("adapter", "out", "merged", base="base")
    (work / "adapter" / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"could not be fetched from the hub: .* give a local folder"):
        export("adapter", "out", "mlx", base="some-org/some-model")


def test_factors_that_overflow_are_told(work):
    tensors = load_file("adapter/adapter_model.safetensors")
    save_file({name: tensor * 1e6 for name, tensor in tensors.items()}, "adapter/adapter_model.safetensors")
    for to in ("gguf", "mlx"):
        with pytest.raises(AdapterError, match=r"overflow torch\.float16\. Choose another `dtype=\.\.\.`"):
            export("adapter", "out", to, base="base", dtype=torch.float16)
    with pytest.raises(AdapterError, match=r"overflows torch\.float16 with the adapter"):
        export("adapter", "out", "merged", base="base", dtype=torch.float16)
    assert not Path("out").exists()


def test_an_embedding_that_peft_saves_beside_its_factors_is_the_base_s_own(work):
    out = lora.adapter("base", "embedded", r=2, target_modules=["embed_tokens", "q_proj"])
    names = load_file(out + "/adapter_model.safetensors").keys()
    assert any(".base_layer." in name for name in names)
    for to in ("gguf", "mlx"):
        (note,) = export(out, f"out-{to}", to, base="base").notes
        assert "`model.embed_tokens.weight` in the file is the base's own" in note
    export(out, "merged", "merged", base="base")
    assert torch.allclose(lora.logits(models.load("merged")), lora.logits(lora.served("base", out)), atol=1e-5)


@pytest.mark.parametrize("to", ["mlx", "merged"])
def test_a_base_that_is_not_the_one_which_the_adapter_names_is_noted(to, work):
    config = json.loads((work / "adapter/adapter_config.json").read_text())
    for named, notes in (
        ("org/base", []),
        ("org/other", ["The adapter names `org/other` as its base, and `base` was given."]),
    ):
        (work / "adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        assert [note for note in export("adapter", named, to, base="base").notes if "names" in note] == notes


def test_the_page_s_blocks_run_as_printed(work):
    models.save_pair(models.mixtral(), work / "moe")
    extract("moe/base", "moe/tuned", 2, experts="fused").save("moe-adapter")
    models.save_pair(diffusion.unet(), work / "unet")
    extract("unet/base", "unet/tuned", 2).save("unet-adapter")
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
    assert [language for language, _ in blocks] == ["sh", "python"]
    for line in blocks[0][1].splitlines():
        _, command, *arguments = shlex.split(line, comments=True)
        assert command == "export"
        result = run(*arguments)
        assert result.exit_code == 0, result.output
    exec(blocks[1][1], {})
    assert {target for target in TARGETS if f"--to {target}" in PAGE} == set(TARGETS)
