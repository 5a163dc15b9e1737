import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from peft_posthoc import open_checkpoint, preflight
from peft_posthoc.adapters.names import matched, target_modules
from peft_posthoc.models.decoders import PLAIN_DECODERS
from peft_posthoc.models.find import layout_of
from peft_posthoc.models.kinds import CONV1D, EMBEDDING, LINEAR
from tests.make import architectures, models


def tiny(model_type):
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "pad_token_id": 0,
    }
    return transformers.AutoConfig.for_model(model_type, **sizes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", PLAIN_DECODERS)
def test_what_is_known_of_a_plain_decoder_is_what_its_class_says(model_type, tied, tmp_path):
    config = tiny(model_type)
    config.tie_word_embeddings = tied
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    known, asked = layout_of(open_checkpoint(tmp_path)), layout_of(open_checkpoint(model))
    assert known.origin == asked.origin == type(model).__name__
    for name in open_checkpoint(tmp_path).headers:
        assert known.places(name) == asked.places(name), name
    assert known.task_type == asked.task_type
    assert known.fan_in_fan_out == asked.fan_in_fan_out
    everything = {place.module for name in open_checkpoint(tmp_path).headers for place in known.places(name)}
    assert target_modules(everything, known) == target_modules(everything, asked)


@pytest.mark.parametrize("model_type", PLAIN_DECODERS)
def test_a_configuration_that_says_nothing_of_ties_means_the_default_of_its_type(model_type):
    assert PLAIN_DECODERS[model_type] == transformers.AutoConfig.for_model(model_type).tie_word_embeddings


@pytest.mark.parametrize(
    ("make", "weight", "kinds"),
    [
        (models.gpt2, "transformer.h.0.attn.c_attn.weight", [("transformer.h.0.attn.c_attn", CONV1D, "layer")]),
        (
            models.gpt2,
            "transformer.wte.weight",
            [("transformer.wte", EMBEDDING, "embedding"), ("lm_head", LINEAR, "head")],
        ),
        (models.gpt2, "transformer.ln_f.weight", []),
        (models.gpt2, "h.0.mlp.c_fc.weight", [("transformer.h.0.mlp.c_fc", CONV1D, "layer")]),
        (
            models.bert,
            "embeddings.position_embeddings.weight",
            [("embeddings.position_embeddings", EMBEDDING, "embedding")],
        ),
        (models.bert, "encoder.layer.1.output.dense.weight", [("encoder.layer.1.output.dense", LINEAR, "layer")]),
    ],
    ids=lambda value: getattr(value, "__name__", None if isinstance(value, str) else "kinds"),
)
def test_a_class_says_what_its_weights_are(make, weight, kinds, tmp_path):
    make().save_pretrained(tmp_path)
    assert layout_of(open_checkpoint(tmp_path)).places(weight) == kinds


def test_t5_shares_one_weight_among_four_modules(tmp_path):
    models.t5().save_pretrained(tmp_path)
    places = layout_of(open_checkpoint(tmp_path)).places("shared.weight")
    assert [place.module for place in places] == ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]


def test_an_embedding_that_peft_would_adapt_wrongly_has_no_kind(tmp_path):
    # OPT adds an offset of 2 to the positions it looks up; PEFT would look up without it.
    config = transformers.OPTConfig(
        vocab_size=96, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=32
    )
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    layout = layout_of(open_checkpoint(tmp_path))
    assert layout.places("model.decoder.embed_positions.weight") == []
    assert layout.places("model.decoder.embed_tokens.weight")[0].kind is EMBEDDING


def test_without_a_class_names_and_shapes_decide():
    shapes = {"a.embed_tokens.weight": (9, 4), "a.q.weight": (4, 4), "lm_head.weight": (9, 4), "a.norm.weight": (4,)}
    layout = layout_of(open_checkpoint({name: torch.zeros(shape) for name, shape in shapes.items()}))
    assert layout.origin == "names and shapes"
    roles = {place.module: (place.kind, place.role) for name in shapes for place in layout.places(name)}
    assert roles == {
        "a.embed_tokens": (EMBEDDING, "embedding"),
        "a.q": (LINEAR, "layer"),
        "lm_head": (LINEAR, "head"),
    }


@pytest.mark.parametrize(
    ("tokens", "head"),
    [
        ("model.tok_embeddings", "output"),
        ("transformer.embedding.word_embeddings", "transformer.output_layer"),
        ("gpt_neox.embed_in", "embed_out"),
        ("model.embed_tokens", "model.projection"),
        ("model.odd", "output"),
    ],
)
def test_the_head_of_a_model_with_code_of_its_own_is_told_by_its_shape_and_not_carried(tokens, head, tmp_path):
    embedded = [] if tokens == "model.odd" else [tokens]  # Then the configuration alone says how many tokens there are.
    shapes = dict.fromkeys([*embedded, "model.layers.0.up", head], (96, 32)) | {"model.layers.0.wo": (32, 32)}
    for side in ("base", "tuned"):
        (tmp_path / side).mkdir()
        weights = {f"{module}.weight": torch.randn(shape) for module, shape in shapes.items()}
        save_file(weights, tmp_path / side / "model.safetensors")
        config = {"model_type": "mine", "vocab_size": 96, "auto_map": {"AutoModelForCausalLM": "mine.Mine"}}
        (tmp_path / side / "config.json").write_text(json.dumps(config))
    found = {row.weight: row.reason for row in preflight(tmp_path / "base", tmp_path / "tuned", 2).rows}
    assert found == {
        **{f"{module}.weight": "embedding (carried with --embeddings)" for module in embedded},
        f"{head}.weight": "head (carried with --head)",
        "model.layers.0.up.weight": "",
        "model.layers.0.wo.weight": "",
    }


def test_an_attention_s_own_output_layer_is_never_called_and_has_no_kind():
    attention = torch.nn.MultiheadAttention(32, 4)
    assert layout_of(open_checkpoint(attention)).places("out_proj.weight") == []


def test_names_of_unknown_orientation_are_not_guessed():
    weights = {f"h.0.attn.{name}.weight": torch.zeros(32, 32) for name in ("c_attn", "c_proj", "q")}
    layout = layout_of(open_checkpoint(weights))
    assert [name for name in weights if layout.places(name)] == ["h.0.attn.q.weight"]


def test_whichever_side_knows_its_class_is_asked(tmp_path):
    model = models.gpt2()
    model.save_pretrained(tmp_path)
    blind = open_checkpoint(dict(model.named_parameters()))
    assert layout_of(blind, open_checkpoint(tmp_path)).origin == "GPT2LMHeadModel"


def test_names_that_a_plain_decoder_does_not_have_are_asked_of_its_class(tmp_path):
    compiled = {f"_orig_mod.{name}": weight for name, weight in models.llama().state_dict().items()}
    folder = tmp_path / "compiled"
    models.llama().save_pretrained(folder)
    from safetensors.torch import save_file

    save_file(compiled, folder / "model.safetensors", metadata={"format": "pt"})
    layout = layout_of(open_checkpoint(folder))
    assert layout.places("_orig_mod.model.embed_tokens.weight") == []
    assert layout.places("_orig_mod.lm_head.weight") == []


def test_a_full_name_also_means_what_ends_in_it():
    names = ("proj", "aux.proj", "aux.other")
    layout = layout_of(open_checkpoint({f"{name}.weight": torch.zeros(8, 8) for name in names}))
    assert target_modules(["proj"], layout) == ["proj"]
    assert matched(["proj"], layout) == {"proj", "aux.proj"}
    assert matched(["aux.proj"], layout) == {"aux.proj"}


def test_names_on_disk_that_transformers_changes_when_it_loads_are_the_model_s_own(tmp_path):
    architectures.ARCHITECTURES["vit"].make().save_pretrained(tmp_path)
    stored = open_checkpoint(tmp_path)
    layout = layout_of(stored)
    own = models.load(tmp_path).state_dict()
    assert {layout.name_of(name) for name in stored.headers} == set(own)
    name = next(name for name in stored.headers if name not in own and name.endswith("key.weight"))
    assert [place.module for place in layout.places(name)] == [layout.name_of(name).removesuffix(".weight")]


def test_what_is_another_tensor_after_loading_has_no_other_name(tmp_path):
    models.mixtral().save_pretrained(tmp_path)
    layout = layout_of(open_checkpoint(tmp_path))
    assert layout.name_of("model.layers.0.block_sparse_moe.gate.weight") == "model.layers.0.mlp.gate.weight"
    assert not any("experts" in name for name in layout.renamed)


def test_layers_that_mamba_does_not_call_have_no_kind():
    layout = layout_of(open_checkpoint(architectures.ARCHITECTURES["mamba"].make()))
    assert layout.places("backbone.layers.0.mixer.in_proj.weight")
    assert layout.places("backbone.layers.0.mixer.out_proj.weight") == []
    assert layout.places("backbone.layers.0.mixer.dt_proj.weight") == []


@pytest.mark.parametrize(("name", "task"), [("bart", "SEQ_2_SEQ_LM"), ("t5", "SEQ_2_SEQ_LM"), ("whisper", None)])
def test_peft_s_class_for_two_texts_is_not_for_a_model_that_listens(name, task):
    assert layout_of(open_checkpoint(architectures.ARCHITECTURES[name].make())).task_type == task


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("llama4", "language_model.model.layers.1.feed_forward.router.weight"),  # Gives a tuple.
        ("phimoe", "model.layers.0.mlp.router.weight"),
        ("whisper", "model.encoder.embed_positions.weight"),  # Asked for its size.
        ("wavlm", "wavlm.encoder.layers.0.attention.q_proj.weight"),  # Its weight is read, and it is not called.
        ("deberta-v2", "deberta.encoder.rel_embeddings.weight"),
        ("mobilebert", "mobilebert.embeddings.word_embeddings.weight"),  # Tied to a head that is not called.
    ],
)
def test_what_peft_would_adapt_wrongly_has_no_place(name, weight):
    model = open_checkpoint(architectures.ARCHITECTURES[name].make())
    assert weight in model.headers
    assert layout_of(model).places(weight) == []


def test_a_linear_layer_of_another_class_that_computes_the_same_has_one():
    layout = layout_of(open_checkpoint(architectures.ARCHITECTURES["falcon"].make()))
    (place,) = layout.places("transformer.h.0.self_attention.query_key_value.weight")
    assert place.kind is LINEAR
