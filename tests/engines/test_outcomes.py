"""What the engines did when they were run: right adapters right, wrong ones caught, and `phlora check` told it before.

The numbers are those of `outcomes.json`; the adapters are made anew, for `check`.
"""

import pytest

from peft_posthoc.serving import engines
from tests.engines import subjects
from tests.engines.page import PAGE, page
from tests.engines.record import Right, Spoiled, bases_of, kept, rounding, said_of
from tests.engines.running import ENGINES

OUTCOMES = kept()
RUNS = [(name, base) for name, engine in ENGINES.items() for base in bases_of(engine)]
RULED = [name for name, engine in ENGINES.items() if engine.rules is not None]
# An exporter refuses, or writes what is right: what the rules say of other tools' files is not about it.
EXPORTS = ("llamacpp-export",)

# What an engine has no word for: a fault of its driver or its environment.
FAULTS = ("AttributeError", "ImportError", "ModuleNotFoundError", "NameError", "NotImplementedError", "TypeError")


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    return {base: Right(base, tmp_path_factory.mktemp("right")) for base in subjects.BASES}


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    return {base: Spoiled(base, tmp_path_factory.mktemp("spoiled")) for base in subjects.SPOILED_BASES}


def test_every_engine_was_run_with_every_adapter():
    assert list(OUTCOMES) == list(ENGINES)
    for name, own in OUTCOMES.items():
        assert own["versions"], name
        assert list(own["right"]) == bases_of(ENGINES[name])


@pytest.mark.parametrize("name", RULED)
def test_the_rules_name_the_versions_that_were_run(name):
    examined = engines.ENGINES[ENGINES[name].rules].examined
    assert all(version in examined for version in OUTCOMES[name]["versions"].values())


@pytest.mark.parametrize("name", ENGINES)
def test_refusals_are_the_engines_own(name):
    own = OUTCOMES[name]
    told = [*own.get("spoiled", {}).values(), *(d for one in own["right"].values() for d in one["adapters"].values())]
    refusals = [did["said"] for did in told if did["verdict"] == "refused"]
    assert all(len(said) > 3 and not said.startswith(FAULTS) for said in refusals), refusals


@pytest.mark.parametrize(("name", "base"), RUNS)
def test_a_right_adapter_is_right_in_the_engine(name, base):
    one = OUTCOMES[name]["right"][base]
    most = rounding(one["base"])
    assert most < 1e-2
    assert one["apart"] > 1
    for what in ("full rank", "rank 8"):
        assert one["adapters"][what]["difference"] <= most, what
    # With everything that it carries, it is the tuned model; with less, it is not.
    assert one["adapters"]["full rank"]["from_tuned"] <= most
    assert one["adapters"]["rank 8"]["from_tuned"] > 1


@pytest.mark.parametrize("name", ["peft", "vllm"])
def test_a_row_of_a_mixed_batch_is_what_its_adapter_is_alone(name):
    for base, one in OUTCOMES[name]["right"].items():
        if base in subjects.MIXTURES:
            assert one["mixed"] == "ValueError: lora.ParamWrapper does not support mixed adapter batches yet."
        else:
            assert one["mixed"] <= rounding(one["base"])


@pytest.mark.parametrize(("name", "base"), RUNS)
def test_embeddings_and_head_are_right_or_refused(name, base):
    one = OUTCOMES[name]["right"][base]
    head = one["adapters"]["full rank, embeddings and head"]
    assert head["verdict"] in ("right", "refused")
    if head["verdict"] == "right":
        assert head["from_tuned"] <= rounding(one["base"])


@pytest.mark.parametrize(("name", "base"), RUNS)
def test_a_wrong_scale_and_a_missing_layer_are_caught(name, base):
    one = OUTCOMES[name]["right"][base]
    for what in ("alpha twice", "a layer missing"):
        assert one["adapters"][what]["difference"] > 50 * rounding(one["base"]), what


@pytest.mark.parametrize("name", ["peft", "transformers", "vllm"])
def test_a_wrong_prefix_is_caught_where_the_engine_drops_it_in_silence(name):
    for one in OUTCOMES[name]["right"].values():
        assert one["adapters"]["another prefix"]["difference"] > 1


@pytest.mark.parametrize("name", RULED)
def test_check_says_today_what_is_kept_of_it(name, right, spoiled):
    of_right, of_spoiled = said_of(name, right, spoiled)
    for base, verdicts in of_right.items():
        adapters = OUTCOMES[name]["right"][base]["adapters"]
        assert verdicts == {what: adapters[what]["check"] for what in adapters}
    assert of_spoiled == {case: one["check"] for case, one in OUTCOMES[name]["spoiled"].items()}


@pytest.mark.parametrize("name", [name for name in RULED if name not in EXPORTS])
def test_the_engine_did_what_check_says(name):
    # Twice the scale, and a layer less, are what such a file says: no engine is wrong then.
    files = {"alpha twice", "a layer missing"}
    for base, one in OUTCOMES[name]["right"].items():
        for what, did in one["adapters"].items():
            # PEFT gives single experts the prefix when it brings them into its own form.
            if what not in files and (name, base, what) != ("peft", "qwen3-moe", "no prefix"):
                assert did["verdict"] == did["check"], (base, what, did)
    unlike = {case for case, did in OUTCOMES[name]["spoiled"].items() if did["verdict"] != did["check"]}
    assert unlike == {case for engine, case in subjects.UNLIKE if engine == name}


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_is_right_or_refused(name):
    wrong = {case for case, did in OUTCOMES[name]["spoiled"].items() if did["verdict"] == "silently wrong"}
    assert wrong == {"base-copies"}


def test_the_page_has_the_outcomes():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m docs.make engines"
