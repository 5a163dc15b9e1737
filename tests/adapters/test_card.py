"""The model card that every adapter has, whichever way it was made."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from peft_posthoc import combine, extract, fix, resize
from peft_posthoc.adapters.card import card, hub_id_of

CONFIG = {"base_model_name_or_path": "org/base", "r": 8, "task_type": "CAUSAL_LM"}
OF_THE_HUB = {"base": "org/base", "base_revision": "c0ffee", "tuned": "org/tuned", "tuned_revision": "dec0de"}


@pytest.fixture(scope="module")
def adapter(llama_pair, tmp_path_factory):
    return extract(*llama_pair, 4).save(tmp_path_factory.mktemp("card") / "adapter")


def told(provenance, **more):
    totals = {"rank": 4, "energy": 0.5, "relative_error": 0.7, "bytes": 1000}
    return {"totals": totals, "provenance": provenance, **more}


def test_the_head_names_the_base_of_the_hub_as_the_hub_reads_it():
    head = ModelCard(card(CONFIG, told(OF_THE_HUB))).data
    assert (head.base_model, head.base_model_relation) == ("org/base", "adapter")
    assert (head["library_name"], head.pipeline_tag) == ("peft", "text-generation")
    assert {"lora", "phlora"} <= set(head.tags)


@pytest.mark.parametrize("base", ["/home/me/base", "runs/base", "./base", "base", "org/base+org/adapter"])
def test_no_place_on_this_machine_is_a_base_in_the_head_and_the_page_says_so(base):
    page = card(CONFIG | {"base_model_name_or_path": base}, told(OF_THE_HUB | {"base": base, "base_revision": None}))
    assert ModelCard(page).data.base_model is None
    assert f"The base is `{base}`, which is not known to be on the hub" in page


def test_a_model_in_the_hubs_cache_has_its_id():
    assert hub_id_of("hub/models--org--a-model/snapshots/c0ffee") == "org/a-model"


def test_the_adapter_is_for_the_base_that_it_is_served_on():
    page = card(CONFIG, told(OF_THE_HUB | {"for_base": "org/base-4bit", "for_base_revision": "beef"}))
    assert ModelCard(page).data.base_model == "org/base-4bit"
    assert 'from_pretrained("org/base-4bit")' in page


def test_what_is_carried_and_what_is_left_out_stands_with_its_size(adapter):
    report = json.loads((adapter / "phlora_report.json").read_text())
    page = (adapter / "README.md").read_text()
    norms = {row["weight"]: row["delta_norm"] ** 2 for row in report["rows"]}
    everything = sum(norms.values())
    of = {kind: sum(v for k, v in norms.items() if kind in k) / everything for kind in ("q_proj", "lm_head")}
    assert re.search(rf"\| `q_proj` \| 2 \| 4 \| .* \| {of['q_proj']:.1%} \|", page)
    assert f"| head (carried with --head) | 1 | {of['lm_head']:.1%} |" in page
    assert sum(one["weights"] for one in report["by_kind"]) == report["totals"]["extracted"]
    assert sum(one["tensors"] for one in report["by_reason"]) == report["totals"]["left_out"]
    assert sum(one["of_all"] for one in [*report["by_kind"], *report["by_reason"]]) == pytest.approx(1)


def test_the_page_loads_the_adapter_as_it_says(adapter, llama_pair):
    code = re.search(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL)[1]
    found = {}
    exec(code.replace("path/to/this/folder", str(adapter)), found)
    assert found["model"].peft_config["default"].r == 8


@pytest.mark.parametrize("make", ["resize", "combine", "fix"])
def test_an_adapter_made_of_adapters_has_one_too(make, adapter, tmp_path):
    {
        "resize": lambda: resize(adapter, 2).save(tmp_path / "out"),
        "combine": lambda: combine([adapter, adapter], [1, 1]).save(tmp_path / "out"),
        "fix": lambda: fix(adapter, tmp_path / "out"),
    }[make]()
    page = (tmp_path / "out/README.md").read_text()
    assert f"`{adapter}`" in page
    assert "vllm serve" in page


def test_refined_distances_stand_beside_the_energies_of_before():
    score = {"task": {"kl": 0.5, "top1": 0.75}}
    refined = {"base": score, "before": score, "after": {"task": {"kl": 0.125, "top1": 0.875}}}
    page = card(CONFIG, {"refined": refined, "start": told(OF_THE_HUB), "provenance": {"refined": "out"}})
    assert "| like the task's | 0.5000 | 0.5000 | 0.1250 | 87.5% |" in page
    assert "Energies are of those before" in page


def test_a_card_that_somebody_wrote_stays(llama_pair, tmp_path):
    found = extract(*llama_pair, 2)
    place = found.save(tmp_path / "out")
    Path(place, "README.md").write_text("# Mine")
    found.save(place, force=True)
    assert Path(place, "README.md").read_text() == "# Mine"
