import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from click.testing import CliRunner

from peft_posthoc import extract, preflight, verify
from peft_posthoc.checkpoints.checkpoint import Header
from peft_posthoc.cli.main import main
from peft_posthoc.inspection.inspection import inspect
from peft_posthoc.pairing.configurations import configuration_differences
from tests.make import models

LONGER = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}


def found(base, tuned, *, heads=1):
    """By key: what is told of two configurations, and whether it is material."""
    headers = {f"head{i}": Header((32000, 8), torch.float32) for i in range(heads)}
    sides = (SimpleNamespace(config=config, headers=headers) for config in (base, tuned))
    return {one.key: (one.told, one.material) for one in configuration_differences(*sides)}


def llama(**values):
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **values}


def edited(folder, **values):
    """Change the configuration that lies in a model's folder."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def pair(tmp_path):
    base, tuned = models.save_pair(models.llama(), tmp_path)
    edited(tmp_path / "tuned", **LONGER)
    return base, tuned


@pytest.mark.parametrize(
    ("key", "base", "tuned", "told"),
    [
        ("rms_norm_eps", 1e-6, 1e-5, "`rms_norm_eps` 1e-06 -> 1e-05"),
        ("hidden_act", "silu", "gelu", '`hidden_act` "silu" -> "gelu"'),
        ("num_attention_heads", 32, 16, "`num_attention_heads` 32 -> 16"),
        ("a_key_of_next_year", None, 0.5, "`a_key_of_next_year` none -> 0.5"),
    ],
)
def test_what_changes_outputs_is_told_by_key_and_both_values(key, base, tuned, told):
    sides = (llama(**{key: value}) for value in (base, tuned))
    assert found(*sides)[key] == (told, True)


def test_rotary_positions_are_compared_in_whichever_spelling_they_have():
    older = llama(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    newer = llama(rope_parameters={"rope_type": "linear", "factor": 2, "rope_theta": 500000})
    assert found(older, newer) == {}
    assert found(older, llama(rope_theta=5e5)) == {
        "rope_parameters": (
            '`rope_parameters.factor` 2.0 -> none, `rope_parameters.rope_type` "linear" -> "default"',
            True,
        )
    }
    unknown = [{**config, "model_type": "of_nobody"} for config in (older, newer)]
    assert found(*unknown) == {}
    assert found(unknown[0], {**unknown[1], "rope_parameters": {"rope_theta": 1e6, "type": "linear", "factor": 2}}) == {
        "rope_parameters": ("`rope_parameters.rope_theta` 500000.0 -> 1000000.0", True)
    }


def test_models_within_a_model_are_compared_and_a_part_with_the_whole():
    whole = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "final_logit_softcapping": None}}
    capped = {**whole, "text_config": {"model_type": "gemma3_text", "final_logit_softcapping": 30.0}}
    told = "`text_config.final_logit_softcapping` none -> 30.0"
    assert found(whole, capped) == {"text_config.final_logit_softcapping": (told, True)}
    assert found(whole, whole["text_config"]) == {}
    assert found(whole["text_config"], capped) == {
        "final_logit_softcapping": ("`final_logit_softcapping` none -> 30.0", True)
    }


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3", "phi3", "gpt_neox", "qwen2_vl", "mamba2", "t5"])
def test_the_same_model_in_another_file_differs_in_nothing(name):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[name]()
    short, long = json.loads(config.to_json_string()), json.loads(config.to_json_string(use_diff=False))
    long |= {"torch_dtype": "float16", "transformers_version": "4.40.0", "use_cache": False, "_name_or_path": "/x"}
    long |= {"attention_dropout": 0.3, "pad_token_id": 0, "gradient_checkpointing": True, "unsloth_version": "2025.1"}
    assert found({**short, "model_type": name}, {**long, "model_type": name}) == {}


def test_names_of_one_activation_and_spellings_of_one_number_are_the_same():
    base, tuned = (llama(hidden_act=act, rms_norm_eps=eps) for act, eps in (("silu", 1e-6), ("swish", 9.99999997e-7)))
    assert found(base, tuned) == {}


def test_generation_s_keys_in_an_older_configuration_are_no_difference():
    base = {"model_type": "bart", "num_beams": 4, "no_repeat_ngram_size": 3, "max_length": 142}
    assert found(base, {"model_type": "bart"}) == {}


def test_a_length_and_names_of_labels_are_told_mildly_but_a_length_that_scales_positions_is_material():
    assert found(llama(max_position_embeddings=2048), llama(max_position_embeddings=4096, id2label={"0": "good"})) == {
        "max_position_embeddings": ("`max_position_embeddings` 2048 -> 4096", False),
        "id2label": ('`id2label` none -> {"0": "good"}', False),
    }
    scaled = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    one, other = (llama(max_position_embeddings=length, **scaled) for length in (2048, 4096))
    assert found(one, other)["max_position_embeddings"][1]


def test_what_is_said_of_ties_counts_where_a_file_holds_a_head():
    tied, untied = (llama(vocab_size=32000, tie_word_embeddings=tied) for tied in (True, False))
    assert found(tied, untied, heads=1) == {}
    assert found(tied, untied, heads=2) == {"tie_word_embeddings": ("`tie_word_embeddings` true -> false", True)}


def test_a_component_of_diffusers_is_compared_with_its_class_s_defaults():
    base = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "norm_eps": 1e-5}
    assert found(base, {**base, "dual_cross_attention": False, "time_embedding_dim": None, "norm_num_groups": 32}) == {}
    assert found(base, {**base, "flip_sin_to_cos": False}) == {
        "flip_sin_to_cos": ("`flip_sin_to_cos` true -> false", True)
    }


def test_one_without_a_configuration_has_none_to_compare_and_one_that_its_class_refuses_is_compared_as_written():
    assert found(None, llama()) == {}
    assert found(llama(num_hidden_layers="two"), llama(num_hidden_layers="two", rms_norm_eps=1.0)) == {
        "rms_norm_eps": ("`rms_norm_eps` none -> 1.0", True)
    }


def test_every_surface_tells_it_with_what_to_do(pair, tmp_path):
    advice = """--hf-overrides '{"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}}'"""
    told = "`rope_parameters.rope_theta` 10000.0 -> 1000000.0"
    adapter = extract(*pair, 4)
    out = adapter.save(tmp_path / "out")
    assert [one.key for one in adapter.report.differences] == ["rope_parameters"]
    assert any(told in warning and advice in warning for warning in adapter.report.warnings)
    kept = json.loads((out / "phlora_report.json").read_text())["differences"]
    assert [(one["base"]["rope_theta"], one["tuned"]["rope_theta"]) for one in kept] == [(1e4, 1e6)]
    for result in (preflight(*pair, 4), inspect(*pair, 4), verify(out, *pair, outputs=False)):
        (line,) = [line for line in result.table().splitlines() if told in line]
        assert line.startswith("Warning: ")
        assert advice in line
        assert result.to_dict()["differences"]
    printed = CliRunner().invoke(main, ["extract", *pair, str(tmp_path / "told"), "--rank", "4"]).stdout
    assert advice in printed


def test_live_models_are_compared_too():
    base = models.llama()
    tuned = models.tuned_from(base)
    assert extract(base, tuned, 4).report.differences == ()
    tuned.config.rms_norm_eps = 0.1
    assert [one.key for one in extract(base, tuned, 4).report.differences] == ["rms_norm_eps"]
    assert extract(base, tuned.state_dict(), 4).report.differences == ()


def test_a_model_saved_again_in_another_type_tells_nothing(tmp_path):
    base, tuned = models.save_pair(models.llama(), tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.bfloat16)
    again.config.use_cache = False
    again.save_pretrained(tmp_path / "again")
    report = extract(base, str(tmp_path / "again"), 4).report
    assert (report.differences, [note for note in report.notes if "other" in note]) == ((), [])
