"""Adapters and models as anybody may have written them: every command ends, and tells in one line what is wrong."""

import json
import re
import shutil
import struct

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from peft_posthoc import patterns
from peft_posthoc.adapters.config import read_config, try_patterns
from peft_posthoc.checkpoints.model_files import config_of, shards_of
from peft_posthoc.cli import main as cli
from peft_posthoc.errors import AdapterError, CheckpointError
from peft_posthoc.json_file import parse_json, read_json
from peft_posthoc.models.by_class import build
from peft_posthoc.verification.verify import verify
from tests.make import models

ENDLESS = "(.|.)*!"
HUGE = 10**400


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, a fine-tune of it, and the adapter between them, in one folder."""
    where = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = models.llama()
    model.save_pretrained(where / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(where / "tuned")
    line = ["extract", str(where / "base"), str(where / "tuned"), str(where / "good"), "--rank", "4", "--quiet"]
    assert CliRunner().invoke(cli.main, line).exit_code == 0
    return where


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """The folder that commands run in, with a copy of the adapter to spoil, `bad`; patterns get half a second."""
    shutil.copytree(made / "good", tmp_path / "bad")
    for name in ("base", "tuned", "good"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    return tmp_path


COMMANDS = {
    "verify": "verify bad --base base --tuned tuned --weights-only --quiet",
    "plus": "extract base base+bad out --rank 4 --quiet",
    "inspect": "inspect base base+bad --quiet",
    "check": "check bad",
    "check --base": "check bad --base base",
    "fix": "check bad --fix out --quiet",
    "resize": "resize bad out --rank 2 --quiet",
    "combine": "combine bad good out --quiet",
    **{f"export {to}": f"export bad out --to {to} --base base --quiet" for to in ("gguf", "mlx", "peft-moe", "merged")},
    "export": "export bad out --to merged --quiet",
}


def told(command, work):
    """Run it, and give the line that it tells its fault in; None where it finds none."""
    shutil.rmtree(work / "out", ignore_errors=True)
    result = CliRunner().invoke(cli.main, COMMANDS.get(command, command).split(), prog_name="phlora")
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code in (0, 1), result.output
    assert "Unexpected " not in result.output
    assert not any(odd in result.output for odd in ("\x1b", "\u202e", "\x9b"))
    assert len(result.output) < 20_000
    if result.exit_code == 0:
        return None
    (line,) = (one for one in result.stderr.splitlines() if one.startswith("phlora: error: "))
    assert len(line) < 2100
    return line


def config(work, **changes):
    path = work / "bad" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


VALUES = [3, -1, HUGE, "x", [1], {"x": 1}, {"down_proj": HUGE}, {"down_proj": -3}, float("nan"), 1e308, True]
KEYS = [
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "bias",
    "use_rslora",
    "init_lora_weights",
    "base_model_name_or_path",
    "revision",
]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("command", ["verify", "plus", "check", "fix", "resize", "export gguf", "export"])
def test_an_odd_value_in_an_adapters_configuration_is_no_crash(key, command, work):
    for value in VALUES:
        config(work, **{key: value})
        told(command, work)


CONFIGURATIONS = {
    "a list": "[1]",
    "null": "null",
    "nothing": "",
    "nested too deep": "[" * 100_000,
    "objects too deep": '{"a":' * 100_000,
    "a key twice": '{"r": 4, "r": 8}',
    "digits": f'{{"r": {"9" * 5000}}}',
    "infinity": '{"r": 4, "lora_alpha": 1e999}',
    "a byte order mark": "\ufeff{}",
    "alpha_pattern 3": '{"r": 4, "lora_alpha": 4, "alpha_pattern": 3}',
    "huge alpha": f'{{"r": 4, "lora_alpha": 4, "alpha_pattern": {{"up_proj": {HUGE}}}}}',
    "huge rank": f'{{"r": 4, "lora_alpha": 4, "rank_pattern": {{"up_proj": {HUGE}}}}}',
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_configuration_of_an_adapter_is_named(command, work):
    for text in CONFIGURATIONS.values():
        (work / "bad" / "adapter_config.json").write_text(text, encoding="utf-8")
        assert "`bad` is not a readable LoRA adapter: its " in (told(command, work) or "")


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("command", ["resize", "check", "fix", "export merged"])
def test_a_pattern_of_an_adapter_that_takes_too_long_is_named(key, command, work):
    config(work, **{key: {ENDLESS: 8}})
    assert f"`{key}` of `bad` holds `{ENDLESS}`, which takes longer than" in told(command, work)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_check_names_a_target_that_takes_too_long(key, work):
    config(work, **{key: ENDLESS})
    assert f"`{key}` of `bad` holds `{ENDLESS}`, which takes longer than" in told("check", work)


def test_check_names_a_layers_pattern_that_takes_too_long(work):
    config(work, layers_to_transform=[0], layers_pattern=ENDLESS)
    assert f"`layers_pattern` of `bad` holds `{ENDLESS}`, which takes longer than" in told("check", work)


@pytest.mark.parametrize(
    "odd",
    [
        {"rank_pattern": {ENDLESS: 8}},
        {"alpha_pattern": {ENDLESS: 8}},
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"modules_to_save": [ENDLESS]},
        {"layers_pattern": [ENDLESS], "layers_to_transform": 0},
    ],
)
def test_no_pattern_holds_up_peft(odd, work):
    config(work, **odd)
    names = [f"model.layers.0.mlp.{'down' * 10}"]
    with pytest.raises(AdapterError, match="takes longer than"):
        try_patterns(read_config(work / "bad"), names, "bad")


def test_verify_does_not_let_peft_wait_for_a_pattern(work):
    config(work, target_modules=ENDLESS)
    failure = verify("bad", "base", "tuned", token_ids=[[1, 2, 3]]).failure
    assert re.search(r"`target_modules` of `bad` holds .* takes longer than", failure)


@pytest.mark.parametrize("key", ["rank_pattern", "target_modules", "exclude_modules", "modules_to_save"])
@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(" * 2000 + ")" * 2000])
def test_what_is_no_pattern_is_named_with_its_key(key, pattern, work):
    config(work, **{key: {"rank_pattern": {pattern: 4}, "modules_to_save": [pattern]}.get(key, pattern)})
    for command in ("check", "resize", "verify"):
        line = told(command, work)
        assert line.startswith(f"phlora: error: `{key}` of `bad` holds `")
        assert "is no regular expression" in line or "is nested too deep" in line


FACTORS = {
    "short": lambda a, b: (a[:2], b),
    "flat": lambda a, b: (a.flatten(), b),
    "of no rank": lambda a, b: (a[:0], b[:, :0]),
    "of no rows": lambda a, b: (a, b[:0]),
    "a number": lambda a, b: (a[0, 0], b),
    "whole numbers": lambda a, b: (a.int(), b.int()),
    "complex": lambda a, b: (a.to(torch.complex64), b.to(torch.complex64)),
    "in eight bits": lambda a, b: (a.to(torch.float8_e4m3fn), b),
    "NaN": lambda a, b: (a * float("nan"), b),
    "too large": lambda a, b: (a.double() * 1e200, b.double() * 1e200),
    "of more dimensions": lambda a, b: (a[None], b),
}
NAMES = {
    "an escape": "\x1b[31mred",
    "a line break": "a\nb",
    "the other way round": "a\u202eb",
    "100 kB": "x" * 100_000,
    "digits": f"model.layers.{'9' * 5000}.self_attn.q_proj",
    "a high layer": "model.layers.99999999999.self_attn.q_proj",
    "nothing": "",
    "dots": "....",
    "a high expert": "model.layers.0.mlp.experts.99999999999.down_proj",
}


def spoil(work, change):
    """Change the file's tensors: `change` gets them, and the names of two factors."""
    path = work / "bad" / "adapter_model.safetensors"
    tensors = load_file(path)
    a = next(name for name in tensors if name.endswith("down_proj.lora_A.weight"))
    change(tensors, a, a.replace("lora_A", "lora_B"))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize("odd", FACTORS)
def test_odd_factors_are_no_crash(odd, work):
    def change(tensors, a, b):
        tensors[a], tensors[b] = FACTORS[odd](tensors[a], tensors[b])

    spoil(work, change)
    for command in COMMANDS:
        told(command, work)


@pytest.mark.parametrize(
    "odd", ["short", "flat", "of no rank", "of no rows", "a number", "of more dimensions", "complex", "whole numbers"]
)
def test_factors_that_make_no_matrix_are_named(odd, work):
    def change(tensors, a, b):
        tensors[a], tensors[b] = FACTORS[odd](tensors[a], tensors[b])

    spoil(work, change)
    for command in ("verify", "plus", "check", "resize", "export merged"):
        assert "down_proj" in told(command, work)


@pytest.mark.parametrize("odd", NAMES)
def test_odd_names_are_no_crash_and_do_not_reach_the_terminal(odd, work):
    def change(tensors, a, b):
        for old, side in ((a, "A"), (b, "B")):
            tensors[f"base_model.model.{NAMES[odd]}.lora_{side}.weight"] = tensors.pop(old)

    spoil(work, change)
    for command in [*COMMANDS, "check bad --fix out"]:
        told(command, work)


@pytest.mark.parametrize("odd", ["an escape", "100 kB"])
def test_a_table_shows_odd_names_in_part_and_spelled_out(odd, work):
    spoil(work, lambda tensors, a, b: tensors.update({NAMES[odd]: torch.ones(3)}))
    assert told("check bad --fix out", work) is None


def header(text, *, length=None):
    content = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + bytes(64)


PART = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
HEADERS = {
    "a huge length": header({"a": PART}, length=2**62),
    "100 MB": header({"a": PART}, length=99_999_999),
    "overlapping": header({"a": PART, "b": PART}),
    "a negative shape": header({"a": {**PART, "shape": [-4, -4]}}),
    "a huge shape": header({"a": {**PART, "shape": [2**62, 2**62]}}),
    "offsets backwards": header({"a": {**PART, "data_offsets": [64, 0]}}),
    "an unknown type": header({"a": {**PART, "dtype": "X9"}}),
    "a list": header(b"[1]"),
    "nested too deep": header(b"[" * 100_000),
    "no text": header(b'{"\xff": 1}'),
    "nothing": b"",
}


@pytest.mark.parametrize("odd", HEADERS)
def test_an_odd_header_of_a_file_is_named_with_the_file(odd, work):
    (work / "bad" / "adapter_model.safetensors").write_bytes(HEADERS[odd])
    for command in ("verify", "check", "resize", "export merged"):
        assert "bad" in told(command, work)
    shutil.copytree(work / "base", work / "model")
    (work / "model" / "model.safetensors").write_bytes(HEADERS[odd])
    assert "model/model.safetensors`" in told("extract model tuned out", work)


# Models.


def model(work, **changes):
    if not (work / "model").exists():
        shutil.copytree(work / "base", work / "model")
    original = json.loads((work / "base" / "config.json").read_text())
    (work / "model" / "config.json").write_text(json.dumps({**original, **changes}))


@pytest.mark.parametrize(
    "key",
    ["vocab_size", "text_config", "quantization_config", "hidden_size", "num_hidden_layers", "dtype", "hidden_act"],
)
def test_an_odd_value_in_a_models_configuration_is_no_crash(key, work):
    for value in (-1, 10**30, "x", [1], {"x": 1}, 1.5):
        model(work, **{key: value})
        for command in (
            "extract model tuned out --rank 4 --quiet",
            "extract base tuned out --serve-as model --rank 4 --quiet",
            "verify good --base base --tuned model --token-ids 1 --quiet",
            "check good --base model",
            "export good out --to mlx --base model --quiet",
        ):
            told(command, work)


def test_layers_that_nobody_can_wait_for_are_not_built(work):
    model(work, num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match="`num_hidden_layers` is 1000000000; more than"):
        build(config_of(work / "model"))
    model(work, vocab_size_per_layer_input=10**9)
    assert build(config_of(work / "model")) is not None


@pytest.mark.parametrize(
    "text",
    ["3", "null", '{"weight_map": 3}', '{"weight_map": [1]}', "[" * 100_000, '{"weight_map": {"a": "x", "a": "y"}}'],
)
def test_an_odd_index_is_named(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json` is not a valid index of shards: "):
        shards_of(tmp_path / "model.safetensors.index.json")


def test_a_model_of_empty_tensors_holds_nothing(work):
    weights = load_file(work / "base" / "model.safetensors")
    save_file({name: tensor[:0] for name, tensor in weights.items()}, work / "empty.safetensors")
    for command in (
        "inspect empty.safetensors empty.safetensors --quiet",
        "extract empty.safetensors empty.safetensors out --dry-run",
        "extract empty.safetensors empty.safetensors out",
    ):
        assert "holds no values" in told(command, work)


def test_an_empty_tensor_beside_others_is_unchanged(work):
    for side in ("base", "tuned"):
        weights = load_file(work / side / "model.safetensors")
        save_file({**weights, "more.weight": torch.zeros(0, 4)}, work / f"{side}.safetensors")
    assert told("extract base.safetensors tuned.safetensors out --rank 4 --quiet", work) is None
    rows = json.loads((work / "out" / "phlora_report.json").read_text())["rows"]
    assert [row["status"] for row in rows if row["weight"] == "more.weight"] == ["unchanged"]


# JSON.


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[" * 100_000, "nested too deep"), ('{"a": 1, "a": 2}', "the key `a` twice"), ("\ufeff{}", "byte order mark")],
)
def test_json_that_is_none_is_a_value_error_with_the_reason(text, reason, tmp_path):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        read_json(tmp_path / "a.json", unique=True)
    with pytest.raises(ValueError, match=reason):
        parse_json(text, unique=True)


def test_json_is_read_from_regular_files_of_a_sane_size(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1, "a": {"b": 2}}')
    assert read_json(tmp_path / "a.json") == {"a": {"b": 2}}
    assert read_json(tmp_path / "a.json", hook=len) == 1
    with pytest.raises(ValueError, match="No such file"):
        read_json(tmp_path / "b.json")
    with pytest.raises(ValueError, match="Is a directory"):
        read_json(tmp_path)
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(ValueError, match="at most 100000000 are read"):
        read_json(tmp_path / "large.json")
