import pytest
import torch
import transformers

from peft_posthoc import extract, verify
from tests.make import models

TEXT = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
VISION = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
    **{"image_size": 32, "patch_size": 8},
}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """(base, tuned) folders of a tiny Gemma 3 with images."""
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    torch.manual_seed(0)
    return models.save_pair(transformers.Gemma3ForConditionalGeneration(config), tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def text(gemma, tmp_path_factory):
    """The same pair as the language model alone."""
    folder, found = tmp_path_factory.mktemp("text"), []
    for name, source in zip(("base", "tuned"), gemma, strict=True):
        whole = transformers.Gemma3ForConditionalGeneration.from_pretrained(source)
        alone = transformers.Gemma3ForCausalLM(whole.config.text_config)
        alone.model.load_state_dict(whole.model.language_model.state_dict())
        models.save(alone, folder / name)
        found.append(str(folder / name))
    return tuple(found)


def test_modules_are_called_as_the_class_that_the_base_is_of(gemma):
    modules = extract(*gemma, 4).factors
    assert "model.language_model.layers.0.self_attn.q_proj" in modules
    assert any(module.startswith("model.vision_tower.") for module in modules)


def test_served_as_its_language_model_it_is_the_language_model_s_adapter(gemma, text, tmp_path):
    alone = extract(*text, 4)
    adapter = extract(*gemma, 4, serve_as="Gemma3ForCausalLM")
    assert adapter.factors.keys() == alone.factors.keys()
    for module, factors in alone.factors.items():
        assert all(torch.equal(x, y) for x, y in zip(adapter.factors[module], factors, strict=True))
    out = adapter.save(tmp_path / "out")
    loaded = models.lora_deltas(models.load_adapter(text[0], out))
    assert loaded.keys() == alone.factors.keys()
    left = {row.reason for row in adapter.report.rows if "vision_tower" in row.weight and len(row.shape) == 2}
    assert left == {"no LoRA form for this tensor (no such module in Gemma3ForCausalLM)"}
    assert verify(out, *gemma, outputs=False, serve_as="Gemma3ForCausalLM").energy > 0.01


def test_a_language_model_s_pair_gives_an_adapter_for_the_model_with_images(gemma, text, tmp_path):
    adapter = extract(*text, 4, serve_as=gemma[0])
    names = {f"model.language_model.{module.removeprefix('model.')}" for module in extract(*text, 4).factors}
    assert adapter.factors.keys() == names
    models.load_adapter(gemma[0], adapter.save(tmp_path / "out"))


def test_a_language_model_s_fine_tune_is_matched_with_a_base_that_has_images(gemma, text):
    adapter = extract(gemma[0], text[1], 4)
    assert "model.language_model.layers.0.self_attn.q_proj" in adapter.factors
    assert any("with another beginning" in note or "the model itself" in note for note in adapter.report.notes)


@pytest.mark.parametrize(
    ("serve_as", "said"),
    [
        ("NoSuchModel", "`serve_as='NoSuchModel'` is neither a folder nor a class of transformers"),
        ("LlamaForCausalLM", r"needs the configuration of a llama, and the checkpoints have gemma3\."),
    ],
)
def test_what_it_cannot_be_served_as_is_told(serve_as, said, gemma):
    with pytest.raises(ValueError, match=said):
        extract(*gemma, 4, serve_as=serve_as)
