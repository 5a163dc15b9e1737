"""No code that comes with a model is run, nor offered to be run, by any command or call."""

import ast
import contextlib
import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from peft_posthoc import LoraConfig, PosthocError, extract, get_peft_model, verify
from peft_posthoc.cli import main as cli
from peft_posthoc.models.remote_code import no_prompts, without_code
from tests.make import mergekit_runs, models

ROOT = Path(__file__).parents[2]
OFFER = "[y/N]"


def of_config(folder, config):
    config |= {"model_type": "evil", "architectures": ["Evil"]}
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}


def of_model(folder, config):
    config |= {"architectures": ["Evil"], "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}


def of_any_model(folder, config):
    of_model(folder, config)
    config |= {"architectures": ["AutoModelForCausalLM"]}


def of_tokenizer(folder, config):
    content = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def of_processor(folder, config):
    content = {"processor_class": "Evil", "auto_map": {"AutoProcessor": "evil.Evil", "AutoImageProcessor": "evil.Evil"}}
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps(content))


def of_a_model_within(folder, config):
    # transformers makes the part with `AutoModel.from_config`, which knows no class of the type: it would ask.
    part = {"model_type": "trocr", "auto_map": {"AutoModel": "evil.Evil"}, "_name_or_path": str(folder)}
    config |= {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": part}


def of_generation(folder, config):
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text((folder / "evil.py").read_text())


KINDS = [of_config, of_model, of_any_model, of_tokenizer, of_processor, of_a_model_within, of_generation]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture
def plain(llama_pair, tmp_path):
    extract(*llama_pair, 4).save(tmp_path / "adapter")
    return llama_pair


def trapped(plain, folder, kind):
    """The pair with code in each of its folders that leaves a mark when it is run."""
    for side, source in zip(("base", "tuned"), plain, strict=True):
        made = folder / side
        made.mkdir()
        for path in Path(source).iterdir():
            (made / path.name).write_bytes(path.read_bytes())
        (made / "evil.py").write_text(f"open({str(folder / 'MARK')!r}, 'w')\nclass Evil: pass\n")
        config = json.loads((made / "config.json").read_text())
        kind(made, config)
        (made / "config.json").write_text(json.dumps(config))
    return str(folder / "base"), str(folder / "tuned")


@pytest.fixture
def nothing_is_run(tmp_path, monkeypatch, capfd):
    """A check, for the end of a test, that no code was run, copied to be run, or offered."""
    from transformers import dynamic_module_utils

    modules = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))

    def check(*outputs):
        assert not (tmp_path / "MARK").exists()
        assert not modules.exists()
        assert OFFER not in "".join([*outputs, *capfd.readouterr()])

    return check


def run(*arguments, main=cli.main):
    """A command to which somebody says yes, whatever it asks; one that fails does so in one line."""
    result = CliRunner().invoke(main, [str(one) for one in arguments], input="y\n" * 50)
    assert result.exit_code in (0, 1), result.output
    assert "Unexpected" not in result.output
    assert "trust_remote_code" not in result.output
    assert result.stderr.count("error: ") == result.exit_code
    return result


def test_no_command_runs_or_offers_it(kind, plain, tmp_path, nothing_is_run):
    base, tuned = trapped(plain, tmp_path, kind)
    adapter, both = tmp_path / "adapter", ("--base", base, "--tuned", tuned)
    nothing_is_run(
        *(
            run(*line, "--quiet").output
            for line in (
                ["verify", adapter, *both],
                ["verify", adapter, *both, "--prompt", "Once"],
                ["extract", base, tuned, tmp_path / "out"],
                ["extract", base, tuned, tmp_path / "peft", "--form", "peft", "--dry-run"],
                ["inspect", base, tuned],
                ["extract", *plain, tmp_path / "served", "--serve-as", base],
                ["check", adapter, "--base", base],
                ["check", adapter, "--base", base, "--fix", tmp_path / "fixed"],
                *(
                    ["export", adapter, tmp_path / to, "--to", to, "--base", base]
                    for to in ("gguf", "mlx", "vllm-moe", "peft-moe", "merged")
                ),
            )
        )
    )


def test_no_call_runs_or_offers_it(kind, plain, tmp_path, nothing_is_run, monkeypatch):
    base, tuned = trapped(plain, tmp_path, kind)
    monkeypatch.setattr("builtins.input", lambda prompt="": print(prompt) or "y")
    for before in (models.load(plain[0]), base):
        with contextlib.suppress(PosthocError, ValueError):
            config = LoraConfig.from_delta(before, tuned, r=4)
            get_peft_model(models.load(plain[0]), config, init="posthoc")
        with contextlib.suppress(PosthocError, ValueError):
            verify(tmp_path / "adapter", base, tuned)
    nothing_is_run()


@pytest.mark.filterwarnings("ignore:.*torch_dtype.*", "ignore::DeprecationWarning")
def test_no_merge_runs_or_offers_it(kind, plain, tmp_path, nothing_is_run):
    from mergekit_plugin import command

    pair = trapped(plain, tmp_path, kind)
    for content, *flags in (
        [mergekit_runs.config(*pair, parameters={"rank": 4})],
        [mergekit_runs.config(*pair, method="linear", parameters={"weight": 1.0}, tokenizer_source="union")],
        [
            mergekit_runs.config(
                pair[0], f"{pair[0]}+{tmp_path / 'adapter'}", method="linear", parameters={"weight": 1.0}
            )
        ],
    ):
        file, out = mergekit_runs.written(content, tmp_path / "config"), tmp_path / "out"
        cache = ["--lora-merge-cache", tmp_path / "cache"]
        nothing_is_run(run(file, out, "--no-model", "--quiet", *cache, *flags, main=command.main).output)


def test_verify_says_why_outputs_are_not_compared(plain, tmp_path):
    base, tuned = trapped(plain, tmp_path, of_model)
    result = run("verify", tmp_path / "adapter", "--base", base, "--tuned", tuned)
    assert result.exit_code == 0
    assert "Weights: the adapter has cosine" in result.stdout
    assert "Outputs not compared: transformers has no class Evil; the code that comes with it is not run.\n" in (
        result.stdout
    )


def test_verify_says_why_there_is_no_tokenizer(plain, tmp_path):
    base, tuned = trapped(plain, tmp_path, of_tokenizer)
    line = ["verify", tmp_path / "adapter", "--base", base, "--tuned", tuned]
    why = f"the tokenizer of `{tuned}` is code that comes with it, which is not run"
    assert f"on 8 sequences of 32 random tokens: {why})" in run(*line).stdout
    failed = run(*line, "--prompt", "Once", "--quiet")
    assert f"There is no tokenizer for the prompts: {why}. Give `--token-ids`." in failed.stderr


def test_a_class_that_is_only_to_be_had_by_its_code_is_told_in_a_line(plain, tmp_path):
    base, _ = trapped(plain, tmp_path, of_model)
    told = "transformers has no class Evil; the code that comes with it is not run."
    served = run("extract", *plain, tmp_path / "out", "--serve-as", base, "--quiet")
    assert served.stderr == f"phlora: error: `--serve-as {base}`: {told}\n"
    exported = run("export", tmp_path / "adapter", tmp_path / "mlx", "--to", "mlx", "--base", base, "--quiet")
    assert exported.stderr.endswith("which transformers has no class for; the code that comes with it is not run.\n")


def test_a_merge_that_needs_it_says_what_to_do(plain, tmp_path):
    from mergekit_plugin import command

    file = mergekit_runs.written(mergekit_runs.config(*trapped(plain, tmp_path, of_config)), tmp_path / "config")
    failed = run(file, tmp_path / "out", "--quiet", main=command.main)
    assert failed.exit_code == 1
    assert failed.stderr.count("\n") == 1
    assert "cannot be read without code that comes with it, and none is run here. Where you trust it" in failed.stderr
    asked = run(file, tmp_path / "out", "--trust-remote-code", "--quiet", main=command.main)
    assert asked.stderr.startswith("mergekit-phlora: error: `--trust-remote-code`: no code")
    assert not (tmp_path / "MARK").exists()


def test_a_model_whose_code_transformers_has_is_compared_as_ever(plain, tmp_path):
    def known(folder, config):
        config |= {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}

    pair = trapped(plain, tmp_path, known)
    assert verify(tmp_path / "adapter", *pair) == verify(tmp_path / "adapter", *plain)
    assert not (tmp_path / "MARK").exists()


def test_a_configuration_is_read_without_what_names_code():
    config = {"a": 1, "auto_map": {}, "parts": [{"attn_implementation": "org/kernel", "b": [2]}], "c": {"auto_map": 3}}
    assert without_code(config) == {"a": 1, "parts": [{"b": [2]}], "c": {}}


def test_a_library_that_asks_gets_no_answer_from_standard_input(monkeypatch):
    asks = click.Command("asks", callback=lambda: click.echo(input("Run it? [y/N] ")))
    monkeypatch.setitem(cli.main.commands, "asks", asks)
    result = CliRunner().invoke(cli.main, ["asks"], input="y\n" * 50)
    assert result.exit_code == 1
    assert "EOF" in result.stderr
    assert "y" not in result.stdout.removeprefix("Run it? [y/N] ")
    with no_prompts(), pytest.raises(EOFError):
        input()


# The source itself.

OURS = ("peft_posthoc", "mergekit_plugin", "hf_callbacks", "examples", "benchmarks")


def careless(source):
    """The calls in a source that may run code of a folder that they open."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        of_peft = name.rpartition(".")[0].rpartition(".")[2].startswith(("Peft", "LoraConfig"))
        opens = name.endswith(".from_pretrained") or (name.endswith(".from_config") and "Auto" in name)
        if given.get("trust_remote_code", "False") != "False":
            found.append(f"{name} trusts")
        elif opens and not of_peft and "trust_remote_code" not in given:
            found.append(f"{name} asks")
        elif name == "torch.load" and given.get("weights_only") != "True":
            found.append(f"{name} unpickles")
        elif name in ("pickle.load", "pickle.loads", "get_class_from_dynamic_module"):
            found.append(f"{name} runs")
    return found


def test_no_call_in_the_source_leaves_it_to_a_default():
    files = [path for folder in OURS for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    assert {str(path): bad for path in files if (bad := careless(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "call",
    [
        "AutoTokenizer.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=None)",
        "transformers.AutoModel.from_config(config)",
        "getattr(transformers, name).from_pretrained(folder, local_files_only=True)",
        "model.config(trust_remote_code=options.trust_remote_code)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.loads(content)",
    ],
)
def test_such_a_call_would_be_found(call):
    assert careless(call)
    assert careless("AutoTokenizer.from_pretrained(folder, trust_remote_code=False)") == []
