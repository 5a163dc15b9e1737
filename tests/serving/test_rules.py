"""Every rule about engines has an adapter that breaks it. What engines did with these is in `tests/engines`."""

import peft
import pytest

from peft_posthoc import check, extract
from peft_posthoc.cli.check import NAMES
from peft_posthoc.serving.engines import ENGINES
from peft_posthoc.serving.image_engines import IMAGE_ENGINES
from peft_posthoc.serving.rules.table import RULES
from peft_posthoc.serving.subject import Subject
from tests.make import models, wrong_adapters
from tests.make.by_peft import by_peft


def found(folder, base=None, engines=("all",)):
    """The names of the rules that an adapter breaks, by engine."""
    return {
        outcome.engine: {finding.rule for finding in outcome.findings}
        for outcome in check(folder, engines=engines, base=base).outcomes
    }


def test_every_rule_has_one_name_a_source_and_an_adapter_that_breaks_it():
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names)
    assert set(names) == set(wrong_adapters.CASES)
    for rule in RULES:
        assert rule.source, rule.name
        assert rule.message, rule.name
        assert rule.way_out, rule.name
        assert rule.severity in ("refused", "silently wrong", "warning")
        assert rule.engines, rule.name
        assert set(rule.engines) <= set(ENGINES), rule.name


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_rule_sees_the_adapter_that_breaks_it(rule, good, bases, tmp_path):
    case = wrong_adapters.CASES[rule.name]
    seen = found(wrong_adapters.make(case, good, tmp_path / "adapter"), wrong_adapters.base_of(case, bases))
    wanted = {engine for engine in ENGINES if rule.applies_to(engine)}
    assert {engine for engine, names in seen.items() if rule.name in names} == wanted


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_no_rule_sees_a_portable_adapter(rule, good, llama_pair):
    assert not rule.finds(Subject.read(good))
    assert not rule.finds(Subject.read(good, llama_pair[0]))


@pytest.mark.parametrize("name", wrong_adapters.FINE)
def test_a_rule_does_not_see_what_is_close_to_it_and_right(name, good, bases, tmp_path):
    rules, case = wrong_adapters.FINE[name]
    seen = found(wrong_adapters.make(case, good, tmp_path / "adapter"), wrong_adapters.base_of(case, bases))
    assert not set(rules) & set().union(*seen.values())


def test_the_page_has_the_rules_of_today():
    page = wrong_adapters.Path(__file__).parents[2] / "docs/serving.md"
    assert page.read_text(encoding="utf-8") == wrong_adapters.page(), "python -m docs.make serving"


def test_the_command_knows_every_engine():
    assert (*ENGINES, *IMAGE_ENGINES, "all") == NAMES


def test_a_zero_alpha_is_one_in_llama_cpp_and_nothing_in_peft(good, tmp_path):
    parts = wrong_adapters.Parts(good)
    parts.configure(lora_alpha=0)
    folder = parts.write(tmp_path / "adapter")
    assert "scale-llamacpp" in found(folder)["llamacpp"]
    assert Subject.read(folder).scale("model.layers.0.self_attn.q_proj") == 0


def test_scales_that_are_all_one_are_not_in_lorax_where_it_pads_to_another_rank(good, tmp_path):
    # Its first name is scaled by lora_alpha / r; from then on it takes the padded rank of that name for r.
    parts = wrong_adapters.Parts(good)
    for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
        parts.cut(8, only=leaf)
    own = {"self_attn.*": 8}
    parts.configure(rank_pattern=own, alpha_pattern=own)
    seen = found(parts.write(tmp_path / "adapter"))
    assert "scale-lorax" not in seen["lorax"]
    assert "padded-rank" in seen["lorax"] & seen["tgi"]


NOT_ADAPTED = {
    "a head under all-linear": (
        lambda parts: (wrong_adapters.adapted_head(parts), parts.configure(target_modules="all-linear")),
        {"lm_head"},
    ),
    "a layer that is left out": (
        lambda parts: parts.configure(layers_to_transform=[0]),
        {f"model.layers.1.{name}" for name in wrong_adapters.IN_LAYER},
    ),
    "layers of another name": (
        lambda parts: parts.configure(layers_to_transform=1, layers_pattern="layers"),
        {f"model.layers.0.{name}" for name in wrong_adapters.IN_LAYER},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOT_ADAPTED)
def test_what_peft_does_not_adapt(name, good, llama_pair, tmp_path):
    spoil, dropped = NOT_ADAPTED[name]
    folder = wrong_adapters.make(wrong_adapters.Case(spoil), good, tmp_path / "adapter")
    subject = Subject.read(folder, llama_pair[0])
    model = peft.PeftModel.from_pretrained(models.load(llama_pair[0]), folder)
    assert set(subject.modules) - set(models.lora_deltas(model)) == dropped
    (rule,) = (rule for rule in RULES if rule.name == "untargeted-in-peft")
    assert set(rule.finds(subject)) == dropped


@pytest.mark.filterwarnings("ignore")
def test_copies_of_the_base_that_peft_saves_are_the_base_s(llama_pair, tmp_path):
    folder = by_peft(tmp_path / "adapter", models.load(llama_pair[0]), target_modules=["q_proj", "v_proj", "lm_head"])
    subject = Subject.read(folder, llama_pair[0])
    assert subject.base_copies
    seen = found(folder, llama_pair[0])
    assert "base-copies" in seen["peft"]
    assert "other-base-copies" not in set().union(*seen.values())
    assert "other-base-copies" in found(folder, llama_pair[1])["peft"]


# Adapters of others.


HARMLESS = {"unknown-keys", "rank-for-one-gpu"}
BY_PEFT = {
    "plain": ({}, {}),
    "regex": (
        {"target_modules": r".*\.(q_proj|v_proj)"},
        {"sglang": {"target-pattern"}},
    ),
    "rslora": (
        {"use_rslora": True},
        {"sglang": {"scale-sglang"}, "lorax": {"rslora-lorax"}, "llamacpp": {"scale-llamacpp"}},
    ),
    "one layer": ({"layers_to_transform": [0]}, {"lorax": {"missing-layers"}, "tgi": {"missing-layers"}}),
    "q alone": ({"target_modules": ["q_proj"]}, {"sglang": {"q-without-v"}}),
    "rank 4": ({"r": 4, "lora_alpha": 4}, {"lorax": {"padded-rank"}, "tgi": {"padded-rank"}}),
    "lora_bias": (
        {"lora_bias": True},
        {
            **{engine: {"lora-bias"} for engine in ("vllm", "sglang", "trtllm", "llamacpp")},
            **{engine: {"lora-bias-ignored"} for engine in ("lorax", "tgi")},
            "mlx": {"mlx-export"},
        },
    ),
    "dora": (
        {"use_dora": True},
        {
            **{engine: {"dora"} for engine in ("vllm", "sglang")},
            **{engine: {"dora-ignored"} for engine in ("lorax", "tgi")},
            **{"llamacpp": {"dora-gguf"}, "trtllm": {"dora-trtllm"}, "mlx": {"mlx-export"}},
        },
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BY_PEFT)
def test_an_adapter_that_peft_saved(name, llama_pair, tmp_path):
    settings, wanted = BY_PEFT[name]
    folder = by_peft(tmp_path / "adapter", models.load(llama_pair[0]), **settings)
    seen = found(folder, llama_pair[0])
    assert seen.pop("nim") == seen["vllm"] | seen["sglang"]
    assert {engine: names - HARMLESS for engine, names in seen.items() if names - HARMLESS} == wanted


@pytest.mark.filterwarnings("ignore")
def test_factors_of_all_experts_at_once(tmp_path):
    model = models.qwen3_moe()
    models.save(model, tmp_path / "base")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    folder = by_peft(tmp_path / "adapter", model, target_modules=[], target_parameters=targets)
    seen = found(folder, tmp_path / "base")
    assert [seen[engine] for engine in ("sglang", "llamacpp", "trtllm")] == 3 * [{"fused-experts"}]
    assert seen["peft"] == {"fused-experts-peft", "unknown-keys"}
    assert "wrong-path" not in set().union(*seen.values())


@pytest.mark.parametrize("make", [models.mixtral, models.qwen3_moe], ids=lambda make: make.__name__)
def test_single_experts_of_extract(make, tmp_path):
    base, tuned = models.save_pair(make(), tmp_path)
    folder = extract(base, tuned, wrong_adapters.RANK, experts="per-expert").save(tmp_path / "adapter")
    seen = found(folder, base)
    unread = dict.fromkeys(("lorax", "tgi"), frozenset({"single-experts-unread"}))
    named = {} if make is models.mixtral else {"trtllm": {"expert-names-trtllm"}}
    assert {engine: names for engine, names in seen.items() if names} == unread | named


def test_the_peft_form_is_for_peft_alone(llama_pair, tmp_path):
    folder = extract(*llama_pair, 0.5, form="peft").save(tmp_path / "adapter")
    outcomes = check(folder, base=llama_pair[0]).outcomes
    assert [outcome.engine for outcome in outcomes if outcome.verdict == "right"] == ["peft"]


@pytest.mark.parametrize("pair", ["llama_pair", "tied_pair"])
def test_embeddings_and_head_of_extract(pair, request, tmp_path):
    base, tuned = request.getfixturevalue(pair)
    folder = extract(base, tuned, wrong_adapters.RANK, embeddings=True, head=True).save(tmp_path / "adapter")
    verdicts = {outcome.engine: outcome.verdict for outcome in check(folder, base=base).outcomes}
    right = {engine for engine, verdict in verdicts.items() if verdict == "right"}
    untied = {"llamacpp"} if pair == "llama_pair" else set()
    assert right == {"peft", "vllm", "sglang", "nim", "mlx"} | untied


@pytest.mark.filterwarnings("ignore")
def test_a_vocabulary_that_must_be_resized_first_is_told_with_the_call(tmp_path):
    model = models.llama()
    base = models.save(model, tmp_path / "base")
    model.resize_token_embeddings(104)
    tuned = models.save(models.tuned_from(model), tmp_path / "tuned")
    folder = extract(base, tuned, 8, form="peft", vocab="extend").save(tmp_path / "adapter")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(models.load(base), folder)
    (outcome,) = check(folder, base=base, engines=["peft"]).outcomes
    assert "resized-vocabulary" in {finding.rule for finding in outcome.findings}
    assert outcome.verdict == "right"
    first, then = outcome.serve
    namespace = {"base": models.load(base), "PeftModel": peft.PeftModel}
    exec(first, namespace)
    exec(then, namespace)


def test_the_flags_that_an_engine_is_started_with(good, llama_pair):
    serve = {outcome.engine: " ".join(outcome.serve) for outcome in check(good, base=llama_pair[0]).outcomes}
    assert f"vllm serve {llama_pair[0]} --enable-lora --max-lora-rank 16 --max-loras 1" in serve["vllm"]
    leaves = "--lora-target-modules down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"
    assert leaves in serve["sglang"]
    assert "--max-lora-rank 16" in serve["sglang"]
    assert "max_lora_rank=16" in serve["trtllm"]


def test_vllm_reserves_one_of_its_own_ranks(good, tmp_path):
    parts = wrong_adapters.Parts(good)
    parts.cut(260)
    parts.configure(r=260, lora_alpha=260)
    (outcome,) = check(parts.write(tmp_path / "adapter"), engines=["vllm"]).outcomes
    assert "--max-lora-rank 320" in outcome.serve[0]
