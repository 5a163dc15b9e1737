"""`phlora check --fix`: the rewritten adapter computes what PEFT did with the old one, and every engine reads it."""

import json
import re

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from peft_posthoc import AdapterError, check, extract, fix
from peft_posthoc.serving.rules.rule import FIX, FIX_BASE
from peft_posthoc.serving.rules.table import RULES
from tests.make import models, wrong_adapters
from tests.make.by_peft import by_peft
from tests.make.spoiled import contents, refused, run, without_progress

pytestmark = pytest.mark.filterwarnings("ignore:.*(lora_bias|tie_word_embeddings|save_embedding_layers).*:UserWarning")


@pytest.fixture
def work(good, llama_pair, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    wrong_adapters.copy_of(good, tmp_path / "work/adapter")
    wrong_adapters.copy_of(llama_pair[0], tmp_path / "work/base")
    return tmp_path / "work"


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def deltas_by_peft(base, folder):
    """What PEFT adds, whatever it warns of."""
    return models.lora_deltas(peft.PeftModel.from_pretrained(models.load(base), str(folder)))


def same_deltas(wanted, got, factor=8):
    """Zeros may have been added."""
    assert {name for name, delta in wanted.items() if delta.any()} <= set(got)
    for name, delta in got.items():
        reference = wanted.get(name, torch.zeros_like(delta))
        assert (delta - reference).norm() <= factor * torch.finfo(torch.float32).eps * reference.norm(), name


BY_PEFT = {
    "alpha twice the rank": {"lora_alpha": 16},
    "rank 5, alpha 7": {"r": 5, "lora_alpha": 7},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3, r"layers\.0\.self_attn\.v_proj": 5}, "alpha_pattern": {"v_proj": 3}},
    "patterns and rslora": {"use_rslora": True, "rank_pattern": {r".*\.1\..*": 20}, "alpha_pattern": {"q_proj": 1}},
    "q alone": {"target_modules": ["q_proj"]},
    "a regular expression": {"target_modules": r".*\.0\..*(q_proj|up_proj|o_proj)"},
    "one layer": {"layers_to_transform": [1]},
    "every linear layer": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("name", BY_PEFT)
def test_stock_peft_computes_the_same_and_every_engine_takes_it(name, llama_pair, tmp_path):
    base = llama_pair[0]
    folder = by_peft(tmp_path / "adapter", models.load(base), **BY_PEFT[name])
    fixed = fix(folder, tmp_path / "out", base=base)
    assert fixed.check.wrong == ()
    assert fixed.left_out == ()
    same_deltas(deltas_by_peft(base, folder), models.lora_deltas(models.load_adapter(base, tmp_path / "out")))
    config = config_of(tmp_path / "out")
    assert config["lora_alpha"] == config["r"]
    assert config["r"] in (8, 16, 32)
    assert {len(t) for n, t in tensors_of(tmp_path / "out").items() if "lora_A" in n} == {config["r"]}
    assert {rule.rule for outcome in fixed.check.outcomes for rule in outcome.findings} <= {"rank-for-one-gpu"}


@pytest.mark.parametrize("name", ["rslora", "patterns", "one layer", "a regular expression"])
def test_without_the_base_peft_still_computes_the_same_without_a_warning(name, llama_pair, tmp_path):
    base = llama_pair[0]
    folder = by_peft(tmp_path / "adapter", models.load(base), **BY_PEFT[name])
    fix(folder, tmp_path / "out")
    same_deltas(deltas_by_peft(base, folder), models.lora_deltas(models.load_adapter(base, tmp_path / "out")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_that_is_a_power_of_two_leaves_the_bits_as_they_are(dtype, good, tmp_path):
    parts = wrong_adapters.Parts(good)
    parts.tensors = {name: tensor.to(dtype) for name, tensor in parts.tensors.items()}
    parts.configure(lora_alpha=4 * wrong_adapters.RANK)
    fixed = fix(parts.write(tmp_path / "adapter"), tmp_path / "out")
    assert fixed.rounding == 0
    after = tensors_of(tmp_path / "out")
    for name, tensor in parts.tensors.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], tensor * (4 if "lora_B" in name else 1))


def test_other_scales_round_once_more_and_it_says_by_how_much(good, tmp_path):
    parts = wrong_adapters.Parts(good)
    parts.tensors = {name: tensor.bfloat16() for name, tensor in parts.tensors.items()}
    parts.configure(lora_alpha=11)
    folder = parts.write(tmp_path / "adapter")
    eps = torch.finfo(torch.bfloat16).eps
    fixed = fix(folder, tmp_path / "out")
    exact = {n: t.double() * (11 / wrong_adapters.RANK if "lora_B" in n else 1) for n, t in parts.tensors.items()}
    errors = [(t.double() - exact[n]).norm() / exact[n].norm() for n, t in tensors_of(tmp_path / "out").items()]
    assert fixed.rounding == pytest.approx(float(max(errors)))
    assert eps / 100 < fixed.rounding <= eps / 2
    assert "rounded" in fixed.table()
    wide = fix(folder, tmp_path / "wide", dtype=torch.float32)
    assert wide.rounding <= torch.finfo(torch.float32).eps / 2


def fixable():
    return [rule for rule in RULES if rule.way_out.startswith((FIX, FIX_BASE, "`--fix OUT` leaves"))]


@pytest.mark.parametrize("rule", fixable(), ids=lambda rule: rule.name)
def test_a_rule_that_tells_to_fix_no_longer_sees_what_was_fixed(rule, good, llama_pair, tmp_path):
    folder = wrong_adapters.make(wrong_adapters.CASES[rule.name], good, tmp_path / "adapter")
    fixed = fix(folder, tmp_path / "out", base=llama_pair[0])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "phlora_report.json"),
    }
    assert rule.name not in {finding.rule for outcome in fixed.check.outcomes for finding in outcome.findings}
    models.load_adapter(llama_pair[0], tmp_path / "out")


def test_many_rules_tell_to_fix():
    assert len(fixable()) > 30


@pytest.mark.parametrize("name", ["no-prefix", "adapter-in-names", "pickled"])
def test_what_is_called_or_stored_otherwise_is_the_same_adapter(name, good, llama_pair, tmp_path):
    folder = wrong_adapters.make(wrong_adapters.CASES[name], good, tmp_path / "adapter")
    fixed = fix(folder, tmp_path / "out", base=llama_pair[0])
    before, after = tensors_of(good), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert len(fixed.rewritten) == 1
    assert config_of(tmp_path / "out") == config_of(good)


def test_fixing_twice_changes_nothing(llama_pair, tmp_path):
    folder = by_peft(tmp_path / "adapter", models.load(llama_pair[0]), **BY_PEFT["patterns"])
    fix(folder, tmp_path / "once", base=llama_pair[0])
    again = fix(tmp_path / "once", tmp_path / "twice", base=llama_pair[0])
    assert again.rewritten == ()
    assert again.rounding == 0
    for name in ("adapter_config.json",):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    once, twice = tensors_of(tmp_path / "once"), tensors_of(tmp_path / "twice")
    assert all(torch.equal(once[name], twice[name]) for name in once)


# What has no place.


def test_what_is_left_out_is_told_with_its_size(good, llama_pair, tmp_path):
    base = load_file(f"{llama_pair[0]}/model.safetensors")
    norm = base["model.norm.weight"]
    parts = wrong_adapters.Parts(good)
    parts.tensors |= {
        "base_model.model.model.norm.weight": norm + 0.25,
        "base_model.model.model.layers.0.input_layernorm.weight": base["model.layers.0.input_layernorm.weight"],
        "base_model.model.lm_head.weight": 2 * base["lm_head.weight"],
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": torch.zeros(32),
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.bias": torch.full((32,), 3.0),
    }
    folder = parts.write(tmp_path / "adapter")
    fixed = fix(folder, tmp_path / "out", base=llama_pair[0])
    rows = {row.tensor.removeprefix("base_model.model."): row for row in fixed.left_out}
    assert set(rows) == {"model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.lora_B.bias"}
    assert rows["model.norm.weight"].change == pytest.approx(0.25 * 32**0.5 / float(norm.norm()))
    assert rows["model.norm.weight"].bytes == 128
    assert rows["lm_head.weight"].change == pytest.approx(1)
    assert rows["model.layers.1.self_attn.q_proj.lora_B.bias"].norm == pytest.approx(3 * 32**0.5)
    report = json.loads((tmp_path / "out/phlora_report.json").read_text())
    assert [row["tensor"] for row in report["left_out"]] == [row.tensor for row in fixed.left_out]
    assert "a norm, 128 B" in fixed.table()
    # Without the base nobody knows what of it is new.
    alone = fix(folder, tmp_path / "alone")
    assert len(alone.left_out) == 4
    assert {row.change for row in alone.left_out} == {None}


def test_the_embeddings_that_peft_saves_beside_their_factors_are_dropped(llama_pair, tmp_path):
    base = llama_pair[0]
    folder = by_peft(tmp_path / "adapter", models.load(base), target_modules=["embed_tokens", "lm_head", "q_proj"])
    assert "base_model.model.lm_head.base_layer.weight" in tensors_of(folder)
    fixed = fix(folder, tmp_path / "out", base=base, engines=["peft", "vllm", "sglang"])
    assert fixed.check.wrong == ()
    assert fixed.left_out == ()
    same_deltas(deltas_by_peft(base, folder), models.lora_deltas(models.load_adapter(base, tmp_path / "out")))


def test_the_peft_form_becomes_a_portable_one(llama_pair, tmp_path):
    folder = extract(*llama_pair, 0.5, form="peft", exclude=["embed", "lm_head"]).save(tmp_path / "adapter")
    fixed = fix(folder, tmp_path / "out", base=llama_pair[0])
    assert fixed.check.wrong == ()
    assert {row.why for row in fixed.left_out} == {"a norm"}
    same_deltas(
        deltas_by_peft(llama_pair[0], folder),
        models.lora_deltas(models.load_adapter(llama_pair[0], tmp_path / "out")),
    )


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_mergekit_extract_lora(llama_pair, tmp_path):
    from mergekit.scripts.extract_lora import main

    options = ["--model", llama_pair[1], "--base-model", llama_pair[0], "--out-path", str(tmp_path / "adapter")]
    result = CliRunner().invoke(main, [*options, "--max-rank", "12", "--quiet"], catch_exceptions=False)
    assert result.exit_code == 0
    wrong = check(tmp_path / "adapter", base=llama_pair[0]).wrong
    # It keeps norms, embeddings and head whole.
    assert wrong == ("vllm", "sglang", "lorax", "tgi", "trtllm", "nim", "llamacpp", "mlx")
    fixed = fix(tmp_path / "adapter", tmp_path / "out", base=llama_pair[0])
    assert fixed.check.wrong == ()
    left_out = {row.tensor.removeprefix("base_model.model."): row.change for row in fixed.left_out}
    true = models.true_deltas(*llama_pair)
    before = dict(models.load(llama_pair[0]).named_parameters())
    assert len(left_out) == 7
    for name, change in left_out.items():
        assert change == pytest.approx(float(true[name].norm() / before[name].norm()), rel=1e-5)
    tensors = tensors_of(tmp_path / "adapter")
    deltas = models.lora_deltas(models.load_adapter(llama_pair[0], tmp_path / "out"))
    for module, delta in deltas.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        assert torch.allclose(delta, b @ a, atol=1e-6)


# What is refused.


def convolution(parts):
    parts.tensors["base_model.model.conv.lora_A.weight"] = torch.zeros(wrong_adapters.RANK, 4, 3, 3)
    parts.tensors["base_model.model.conv.lora_B.weight"] = torch.zeros(8, wrong_adapters.RANK, 1, 1)


def not_finite(parts):
    next(iter(parts.tensors.values()))[0, 0] = float("nan")


REFUSED = {
    "dora": (wrong_adapters.DORA, "use_dora"),
    "magnitudes": (wrong_adapters.MAGNITUDE, "use_dora"),
    "pissa": (wrong_adapters.PISSA, "takes a part away from the base"),
    "replication": (wrong_adapters.REPLICATION, "layer_replication"),
    "fused experts": (wrong_adapters.CASES["fused-experts"].spoil, "all experts at once"),
    "convolution": (convolution, "convolutions"),
    "wrong path": (wrong_adapters.CASES["wrong-path"].spoil, "the base does not have"),
    "other shapes": (wrong_adapters.CASES["other-shapes"].spoil, "the base's shapes"),
    "ranks": (wrong_adapters.CASES["rank-not-as-configured"].spoil, "than its configuration says"),
    "nan": (not_finite, "NaN or infinity"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rewritten_without_loss_is_refused_and_nothing_is_written(name, work):
    spoil, fragment = REFUSED[name]
    parts = wrong_adapters.Parts(work / "adapter")
    spoil(parts)
    parts.write(work / "bad")
    before = contents(work)
    refused(run("check", "bad", "--base", "base", "--fix", "out"), "`bad`", fragment)
    assert contents(work) == before


def test_factors_that_overflow_the_dtype(work):
    parts = wrong_adapters.Parts(work / "adapter")
    parts.configure(lora_alpha=10**9)
    parts.write(work / "large")
    before = contents(work)
    refused(run("check", "large", "--fix", "out", "--dtype", "float16"), "overflow", "float16")
    assert contents(work) == before


# The command.


def test_the_command_writes_and_has_the_status_of_what_it_wrote(work):
    wrong_adapters.make(wrong_adapters.CASES["scale-sglang"], work / "adapter", work / "bad")
    status, stdout, stderr = run("check", "bad", "--base", "base", "--fix", "out")
    assert (status, without_progress(stderr)) == (0, [])
    assert "scale 4 folded into lora_B" in stdout
    assert stdout.endswith("Adapter written to out\n")
    assert run("check", "out", "--base", "base")[0] == 0
    assert run("check", "bad", "--base", "base", "--fix", "quiet", "--quiet") == (0, "", "")
    assert {path.name for path in work.iterdir()} == {"adapter", "base", "bad", "out", "quiet"}


def test_what_is_still_wrong_after_it(work):
    parts = wrong_adapters.Parts(work / "adapter")
    wrong_adapters.adapted_embedding(parts)
    parts.write(work / "embedded")
    status, stdout, stderr = run("check", "embedded", "--engine", "tgi", "--fix", "out", "--json")
    assert status == 1
    assert "`out` would still be refused or silently wrong in tgi." in stderr
    told = json.loads(stdout)
    assert told["check"]["engines"][0]["verdict"] == "silently wrong"
    assert (work / "out").is_dir()


def test_an_existing_folder_is_replaced_only_with_force(work):
    before = contents(work)
    refused(run("check", "adapter", "--fix", "adapter"), "exists and is not empty", "--force")
    refused(run("check", "adapter", "--fix", "base", "--force"), "not an adapter folder")
    refused(run("check", "nowhere", "--fix", "out"), "`nowhere` does not exist")
    assert contents(work) == before
    wrong_adapters.make(wrong_adapters.CASES["padded-rank"], work / "adapter", work / "out")
    assert run("check", "adapter", "--fix", "out", "--force")[0] == 0
    assert config_of(work / "out")["r"] == wrong_adapters.RANK


def test_an_adapter_can_be_fixed_in_its_own_place(work):
    wrong_adapters.make(wrong_adapters.CASES["padded-rank"], work / "adapter", work / "own")
    assert run("check", "own", "--fix", "own", "--force")[0] == 0
    assert config_of(work / "own")["r"] == 16


def test_the_folder_says_where_it_comes_from(work):
    fix("adapter", "out", base="base")
    with (work / "out/adapter_model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert json.loads(header["__metadata__"]["phlora"])["fixed"] == "adapter"


def test_tensors_in_types_that_no_engine_computes_with_are_widened(work):
    parts = wrong_adapters.Parts(work / "adapter")
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in parts.tensors.items()}
    save_file(tensors, work / "adapter/adapter_model.safetensors", metadata={"format": "pt"})
    fixed = fix("adapter", "out")
    assert fixed.rounding == 0
    assert {tensor.dtype for tensor in tensors_of(work / "out").values()} == {torch.float32}
    assert any(re.search("float32", line) for line in fixed.rewritten)


def test_bad_calls_from_python(work):
    with pytest.raises(ValueError, match="takes some of"):
        fix("adapter", "out", engines=["nothing"])
    with pytest.raises(AdapterError, match="does not exist"):
        fix("nowhere", "out")
    assert not (work / "out").exists()
