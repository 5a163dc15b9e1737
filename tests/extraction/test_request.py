"""What is asked for: the same words, types and defaults on every surface, and in JSON."""

import inspect
import json
from collections.abc import Iterable, Mapping
from typing import get_args

import click
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import peft_posthoc
from hf_callbacks import PosthocLoraCallback
from mergekit_plugin.command import main as mergekit_phlora
from peft_posthoc.cli.main import main as phlora
from peft_posthoc.cli.options import option
from peft_posthoc.extraction.request import OPTIONS, Options, Request
from peft_posthoc.ranks.rules import fixed, keep_energy

OF_PYTHON = {"choose", "leave_out"}
FULL = {
    "base_revision": "main",
    "tuned_revision": "v1",
    "tuned_name": "mine",
    "include": ["layers", "head"],
    "exclude": ["norm"],
    "embeddings": True,
    "head": True,
    "conv": True,
    "experts": "fused",
    "rename": ["a=>b", r"(c)\.d=>\1"],
    "serve_as": "LlamaForCausalLM",
    "for_base": "org/base-4bit",
    "vocab": "extend",
    "rank_pattern": {"q_proj": 4},
    "conv_rank": 2,
    "with_tokenizer": True,
    "stream": True,
    "form": "peft",
    "exact": True,
    "device": "cpu",
    "dtype": "float16",
    "unrelated": True,
    "min_energy": 0.5,
}


def test_every_option_comes_back_from_json():
    assert set(FULL) == set(OPTIONS) - OF_PYTHON
    request = Request.of(4, **FULL)
    told = json.loads(json.dumps(request.to_json()))
    assert told == {"rank": {"rank": 4}, **{name: FULL[name] for name in FULL if FULL[name] != OPTIONS[name].default}}
    assert Request.from_json(told) == Request.of(fixed(4), **FULL)


VALUES = {
    str | None: st.none() | st.text(min_size=1),
    bool: st.booleans(),
    float | None: st.none() | st.floats(0.01, 1),
    str | Iterable[str]: st.text(min_size=1) | st.lists(st.text(min_size=1), max_size=3),
    Mapping[str, int] | None: st.none() | st.dictionaries(st.text(min_size=1), st.integers(1, 9), max_size=2),
}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_request_is_the_same_after_json(data):
    asked = {}
    for name, one in OPTIONS.items():
        kind = Options.__annotations__[name].__origin__
        if name in OF_PYTHON or not data.draw(st.booleans()):
            continue
        asked[name] = data.draw(st.sampled_from(one.choices) if one.choices else VALUES.get(kind, st.just("cpu")))
    try:
        request = Request.of(data.draw(st.integers(1, 99).map(fixed) | st.just(keep_energy(0.5))), **asked)
    except ValueError:
        return  # two of them contradict each other
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request


@pytest.mark.parametrize("own", [{"choose": tuple}, {"leave_out": {"a": "b"}}, {"for_base": torch.nn.Linear(2, 2)}])
def test_what_only_python_can_say_is_not_told_in_json(own):
    with pytest.raises(ValueError, match=f"`{next(iter(own))}` cannot be handed to another process"):
        Request.of(4, **own).to_json()


def test_a_request_takes_the_place_of_options_and_can_be_changed(llama_pair, tmp_path):
    request = Request.of(4, head=True, exclude="q_proj")
    assert Request.of(request, head=False) == Request.of(4, exclude="q_proj")
    adapters = [
        peft_posthoc.extract(*llama_pair, request),
        peft_posthoc.extract(*llama_pair, 4, head=True, exclude="q_proj"),
    ]
    files = [each.save(tmp_path / f"{i}") / "adapter_model.safetensors" for i, each in enumerate(adapters)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("function", [peft_posthoc.extract, peft_posthoc.preflight, peft_posthoc.inspect])
def test_signature_and_help_show_every_option_with_its_default(function):
    parameters = inspect.signature(function).parameters
    for name, one in OPTIONS.items():
        assert parameters[name].default == one.default
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert " ".join(f"{name}: {one.help}".split())[:60] in " ".join(function.__doc__.split())
    assert not any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def test_the_callback_shows_them_too():
    assert set(OPTIONS) <= set(inspect.signature(PosthocLoraCallback).parameters)
    assert [name for name in OPTIONS if f"\n    {name}: " not in PosthocLoraCallback.__doc__] == []
    with pytest.raises(ValueError, match="`tuned_name` is known of every checkpoint"):
        PosthocLoraCallback(4, tuned_name="mine")


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (phlora.get_command(None, "extract"), set()),
        (
            phlora.get_command(None, "inspect"),
            {"tuned_name", "rank_pattern", "conv_rank", "dtype", "for_base", "min_energy", "with_tokenizer"},
        ),
        (
            mergekit_phlora,
            {"base_revision", "tuned_revision", "tuned_name", "rename", "conv_rank", "stream", "unrelated"},
        ),
    ],
    ids=["extract", "inspect", "mergekit-phlora"],
)
def test_commands_have_the_same_options(command, missing):
    flags = {param.name: param for param in command.params if isinstance(param, click.Option)}
    assert set(OPTIONS) - OF_PYTHON - set(flags) == missing
    for name in set(OPTIONS) & set(flags) - missing - {"vocab"} - ({"device"} if command is mergekit_phlora else set()):
        assert flags[name].help.startswith(OPTIONS[name].help[:20])
        choices = getattr(flags[name].type, "choices", ())
        assert tuple(choices) == OPTIONS[name].choices


def test_an_option_of_a_command_has_the_default_of_python():
    @click.command()
    @option("include")
    @option("head")
    @option("form")
    @option("experts")
    def command(**given):
        assert Request.of(4, **given) == Request.of(4)

    command.main([], standalone_mode=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"experts": "all"}, "`experts` must be one of none, per-expert, fused. Got 'all'"),
        ({"form": "no"}, "`form` must be one of"),
        ({"vocab": "extend"}, "only `form='peft'` can"),
        ({"form": "peft", "experts": "per-expert"}, "takes `experts='fused'`"),
    ],
)
def test_a_value_that_makes_no_sense_is_told_before_any_work(options, said):
    with pytest.raises(ValueError, match=said):
        PosthocLoraCallback(4, **options)
    with pytest.raises(ValueError, match=said):
        peft_posthoc.extract("nowhere", "nowhere", 4, **options)


def test_every_option_that_changes_factors_is_in_the_report_and_so_in_the_key_of_what_is_kept(llama_pair):
    """A layer that was finished under other options is not taken for one of these."""
    told = peft_posthoc.extract(*llama_pair, 2).provenance["options"]
    otherwise = {"base_revision", "tuned_revision", "tuned_name", "with_tokenizer", "choose", "leave_out", "dtype"}
    otherwise |= {"min_energy", "for_base", "stream", "unrelated"}
    assert set(told) == set(OPTIONS) - otherwise | {"rule"}


def test_an_option_that_there_is_not_is_a_type_error():
    with pytest.raises(TypeError, match="no option `heads`"):
        peft_posthoc.extract("nowhere", "nowhere", 4, heads=True)


def test_a_request_does_not_change():
    request = Request.of(4, head=True)
    with pytest.raises(TypeError):
        request.options["head"] = False
    with pytest.raises(AttributeError):
        request.rank = 5


def test_a_type_is_named_or_given():
    assert Request.of(4, dtype=torch.bfloat16) == Request.of(4, dtype="bfloat16")
    assert get_args(Options.__annotations__["dtype"])
