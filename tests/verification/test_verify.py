import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from peft_posthoc import AdapterError, extract, verify
from peft_posthoc.cli import main as cli
from peft_posthoc.ranks.rules import keep_energy
from tests.make import architectures, models


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A pair whose norms stay, so that an adapter of full rank with embeddings and head is everything."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pair")
    return models.save_pair(models.llama(), folder, only=lambda name: "norm" not in name)


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    return extract(*pair, 32, embeddings=True, head=True).save(tmp_path_factory.mktemp("whole") / "out")


@pytest.fixture(scope="module")
def part(pair, tmp_path_factory):
    return extract(*pair, 4).save(tmp_path_factory.mktemp("part") / "out")


def test_a_whole_adapter_is_the_tuned_model_in_weights_and_logits(pair, whole):
    result = verify(whole, *pair)
    assert result.cosine == pytest.approx(1, abs=1e-6)
    assert result.energy == pytest.approx(1, abs=1e-6)
    for row in result.rows:
        assert row.relative_error < 1e-6
        assert row.cosine == pytest.approx(1, abs=1e-6)
    assert result.adapter.kl < 1e-8 < 1e-5 < result.base.kl
    assert result.adapter.top1 == 1
    assert "random tokens" in result.outputs_note


def test_a_weight_that_transformers_drew_is_told(pair, part, tmp_path):
    name = "model.norm.weight"
    for lacks in (0, 1):
        models = [*pair]
        models[lacks] = shutil.copytree(pair[lacks], tmp_path / f"of-{lacks}")
        weights = load_file(models[lacks] / "model.safetensors")
        del weights[name]
        save_file(weights, models[lacks] / "model.safetensors", {"format": "pt"})
        assert f"`{models[lacks]}` lacks {name}, which transformers drew" in verify(part, *models).outputs_note
    assert "drew" not in verify(part, *pair).outputs_note


def test_a_part_of_it_is_measured_against_the_whole_delta(pair, part):
    result = verify(part, *pair, outputs=False)
    deltas = models.true_deltas(*pair)
    kept = models.lora_deltas(models.load_adapter(pair[0], part))
    energy = sum(delta.norm() ** 2 for delta in deltas.values())
    lost = sum((delta - kept.get(name.removesuffix(".weight"), 0)).norm() ** 2 for name, delta in deltas.items())
    assert result.energy == pytest.approx(float(1 - lost / energy), rel=1e-5)
    # For the best approximation the cosine is the root of the energy share.
    assert result.cosine == pytest.approx(float(1 - lost / energy) ** 0.5, rel=1e-4)
    rows = {row.weight: row for row in result.rows}
    name = "model.layers.0.mlp.up_proj"
    assert rows[f"{name}.weight"].delta_relative_error == pytest.approx(
        float((deltas[f"{name}.weight"] - kept[name]).norm() / deltas[f"{name}.weight"].norm()), rel=1e-4
    )
    assert rows["lm_head.weight"].delta_cosine == 0
    assert rows["model.norm.weight"].delta_cosine is None
    assert result.adapter is None
    assert result.outputs_note == "not asked for"


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """A pair of which everything moved, and all of it in the `peft` form, layers at ranks of their own."""
    folder = tmp_path_factory.mktemp("exact")
    base, tuned = architectures.pair_of("qwen2", folder)
    return base, tuned, extract(base, tuned, keep_energy(1.0), form="peft").save(folder / "out")


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer")
def test_the_peft_form_is_the_tuned_model_in_every_tensor(exact):
    base, tuned, out = exact
    result = verify(out, base, tuned)
    assert result.energy == pytest.approx(1, abs=1e-6)
    assert all(row.relative_error < 1e-6 and row.delta_cosine == pytest.approx(1, abs=1e-6) for row in result.rows)
    assert any(row.weight.endswith("norm.weight") for row in result.rows)
    assert any(row.weight.endswith("q_proj.bias") for row in result.rows)
    assert result.adapter.kl < 1e-8 < 1e-5 < result.base.kl


@pytest.mark.parametrize(
    ("tensor", "weight"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("model.layers.0.self_attn.q_proj.lora_B.bias", "model.layers.0.self_attn.q_proj.bias"),
        ("model.layers.0.mlp.up_proj.lora_B.weight", "model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_a_wrong_tensor_of_the_peft_form_is_found_out(exact, tensor, weight, tmp_path):
    base, tuned, out = exact
    shutil.copytree(out, tmp_path / "out")
    tensors = load_file(out / "adapter_model.safetensors")
    tensors[f"base_model.model.{tensor}"] *= 1.5
    save_file(tensors, tmp_path / "out/adapter_model.safetensors", metadata={"format": "pt"})
    result = verify(tmp_path / "out", base, tuned, outputs=False)
    assert [row.weight for row in result.rows if row.relative_error > 1e-6] == [weight]


def test_a_wrong_pattern_of_the_peft_form_is_found_out(exact, tmp_path):
    base, tuned, out = exact
    shutil.copytree(out, tmp_path / "out")
    config = json.loads((out / "adapter_config.json").read_text())
    key = next(key for key in config["alpha_pattern"] if "k_proj" in key)
    config["alpha_pattern"][key] *= 2
    (tmp_path / "out/adapter_config.json").write_text(json.dumps(config))
    result = verify(tmp_path / "out", base, tuned, outputs=False)
    module = key.replace("\\", "")
    wrong = {row.weight: row.delta_relative_error for row in result.rows if row.relative_error > 1e-6}
    assert wrong == {f"{module}.{leaf}": pytest.approx(1, rel=1e-5) for leaf in ("weight", "bias")}


def test_a_whole_tensor_that_the_base_does_not_have_is_refused(exact, tmp_path):
    base, tuned, out = exact
    shutil.copytree(out, tmp_path / "out")
    tensors = load_file(out / "adapter_model.safetensors")
    tensors["base_model.model.model.norm.weight"] = torch.ones(7)
    save_file(tensors, tmp_path / "out/adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"holds `model\.norm\.weight` whole, as \[7\]; in the base it is \[32\]"):
        verify(tmp_path / "out", base, tuned, outputs=False)


def test_tied_and_renamed_weights_of_the_peft_form_are_found(tmp_path):
    for name in ("gpt2", "vit"):
        base, tuned = architectures.pair_of(name, tmp_path / name)
        out = extract(base, tuned, 4096, form="peft").save(tmp_path / name / "out")
        result = verify(out, base, tuned, outputs=False)
        assert all(row.relative_error < 1e-6 for row in result.rows), name


def test_the_kl_divergence_is_that_of_the_tuned_from_the_model(pair, part):
    ids = [[1, 2, 3, 4, 5]]
    result = verify(part, *pair, token_ids=ids)
    tokens = torch.tensor(ids)
    with torch.no_grad():
        tuned, base = (torch.log_softmax(models.load(folder)(tokens).logits.double(), -1) for folder in pair[::-1])
        adapted = torch.log_softmax(models.load_adapter(pair[0], part)(tokens).logits.double(), -1)
    for outputs, said in ((result.base, base), (result.adapter, adapted)):
        expected = torch.nn.functional.kl_div(said, tuned, log_target=True, reduction="sum") / 5
        assert outputs.kl == pytest.approx(float(expected), rel=1e-3)
        assert outputs.top1 == pytest.approx(float((said.argmax(-1) == tuned.argmax(-1)).double().mean()))


def test_a_wrong_adapter_is_found_out(pair, whole, tmp_path):
    """The proof can fail: twice the scale, and another pair's adapter."""
    config = json.loads((whole / "adapter_config.json").read_text())
    doubled = tmp_path / "doubled"
    doubled.mkdir()
    (doubled / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["r"]}))
    (doubled / "adapter_model.safetensors").write_bytes((whole / "adapter_model.safetensors").read_bytes())
    result = verify(doubled, *pair)
    assert result.energy == pytest.approx(0, abs=1e-5)
    assert result.adapter.kl > 0.1 * result.base.kl
    other = extract(pair[0], models.tuned_from(models.load(pair[0])), 32).save(tmp_path / "other")
    assert abs(verify(other, *pair, outputs=False).cosine) < 0.1


@pytest.mark.parametrize(("make", "has_logits"), [(models.gpt2, True), (models.bert, False), (models.t5, True)])
def test_other_classes_are_compared_by_what_they_give(make, has_logits, tmp_path):
    model = make()
    layers = {f"{name}.weight" for name, m in model.named_modules() if hasattr(m, "bias") and m.weight.ndim == 2}
    base, tuned = models.save_pair(model, tmp_path, only=layers.__contains__)
    out = extract(base, tuned, 96).save(tmp_path / "out")
    result = verify(out, base, tuned)
    assert result.cosine > 1 - 1e-6
    assert result.adapter.relative_error < 0.01 * result.base.relative_error
    assert (result.adapter.kl is not None) is has_logits


def test_an_adapter_that_does_not_fit_is_refused(pair, whole, tmp_path):
    wide = models.save_pair(models.llama(hidden_size=64), tmp_path)
    with pytest.raises(AdapterError, match=r"in the base `.*` it is"):
        verify(whole, *wide)
    deep = extract(*models.save_pair(models.llama(num_hidden_layers=3), tmp_path / "deep"), 4).save(tmp_path / "out")
    with pytest.raises(AdapterError, match=r"adapts `model\.layers\.2\."):
        verify(deep, *pair)
    with pytest.raises(AdapterError, match="not a readable LoRA adapter"):
        verify(tmp_path, *pair)


def run(*arguments):
    return CliRunner().invoke(cli.main, ["verify", *map(str, arguments)])


def test_the_command_fails_below_the_asked_cosine_and_above_the_asked_divergence(pair, part, whole):
    models_of = ("--base", pair[0], "--tuned", pair[1], "--quiet")
    assert run(whole, *models_of, "--min-cosine", "0.999", "--max-kl", "1e-6").exit_code == 0
    low = run(part, *models_of, "--weights-only", "--min-cosine", "0.99")
    assert low.exit_code == 1
    assert "below --min-cosine 0.99" in low.stderr
    far = run(part, *models_of, "--max-kl", "1e-9")
    assert far.exit_code == 1
    assert "above --max-kl" in far.stderr
    blind = run(whole, *models_of, "--weights-only", "--max-kl", "1")
    assert blind.exit_code == 1
    assert "cannot be checked" in blind.stderr


def test_the_command_gives_json(pair, part):
    result = run(part, "--base", pair[0], "--tuned", pair[1], "--quiet", "--token-ids", "1 2,3", "--json")
    found = json.loads(result.stdout)
    assert found["outputs_note"] == "on 1 given sequences of token ids"
    assert len(found["rows"]) == 21
