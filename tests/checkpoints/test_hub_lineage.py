"""`phlora whose` without candidates: what the hub and its local cache know, from a few kilobytes of each."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.make import trees

CARD = "---\nbase_model: {}\n---\n# A model\n"


@pytest.fixture
def save(tmp_path):
    def made(name, tensors, kind, card=None):
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        if card is not None:
            (folder / "README.md").write_text(CARD.format(card))
        return folder

    return made


def asked(phlora, *words):
    status, said, stderr = phlora("whose", *words, "--json", "--quiet")
    assert status == 0, stderr
    found = json.loads(said)
    return found, {one["name"]: one["kind"] for one in found["candidates"]}


def test_the_chain_of_cards_is_followed_and_no_weights_are_downloaded(hub, phlora, save):
    root = {f"layers.{at}.{kind}.weight": torch.randn(512, 256) for at in range(4) for kind in "qkv"}
    parent = trees.tune(root, 1)
    hub.repository("chain/root").commit(save("root", root, "chain"), "main")
    hub.repository("chain/parent").commit(save("parent", parent, "chain", "chain/root"), "main")
    tuned = save("tuned", trees.tune(parent, 2), "chain", "[chain/parent, chain/absent]")
    found, kinds = asked(phlora, tuned)
    assert found["base"] == "chain/parent"
    assert kinds == {"chain/parent": "parent", "chain/absent": "failed", "chain/root": "sibling or grandparent"}
    assert ("chain/root", "model.safetensors") not in hub.fetched
    whole = len(hub.repository("chain/root").files["model.safetensors"])
    assert sum(last - first for _, _, first, last in hub.parts) < 0.1 * 2 * whole
    # The same of a fine-tune that is on the hub itself, and of candidates that are named.
    hub.repository("chain/tuned").commit(tuned, "main")
    assert asked(phlora, "chain/tuned")[0] == found | {"tuned": "chain/tuned"}
    assert asked(phlora, "chain/tuned", "chain/root", "chain/parent")[0]["base"] == "chain/parent"


def test_the_local_cache_is_searched_for_models_of_its_kind_offline_too(hub, phlora, save):
    root = trees.model(1)
    sibling, stranger = trees.tune(root, 1), trees.model(2)
    for name, tensors, kind in (("root", root, "kept"), ("sibling", sibling, "kept"), ("stranger", stranger, "kept")):
        hub.repository(f"kept/{name}").commit(save(name, tensors, kind), "main")
    hub.repository("kept/other").commit(save("other", root, "of another kind"), "main")
    tuned = save("tuned", trees.tune(root, 3), "kept")
    with pytest.raises(AssertionError, match="names no base, and the hub's local cache holds no model of its kind"):
        asked(phlora, tuned)
    like_other = save("like-other", trees.tune(root, 4), "of another kind")
    for name, beside in (("root", tuned), ("sibling", tuned), ("stranger", tuned), ("other", like_other)):
        status, _, stderr = phlora("inspect", f"kept/{name}", beside, "--unrelated", "--quiet")
        assert status == 0, stderr
    hub.asked.clear()
    found, kinds = asked(phlora, tuned)
    assert (found["base"], found["passed_over"]) == ("kept/root", 1)
    assert kinds == {"kept/root": "parent", "kept/sibling": "sibling or grandparent"}
    assert hub.asked == []
    status, said, _ = phlora("whose", tuned)
    assert status == 0
    assert said.endswith("and 1 in the hub's local cache that are none of its relatives\n")


def test_one_that_is_named_and_alone_is_unsure_and_said_to_be_named(hub, phlora, save):
    root = trees.model(3)
    hub.repository("alone/root").commit(save("root", root, "alone"), "main")
    found, kinds = asked(phlora, save("tuned", trees.tune(root, 1), "alone", "alone/root"))
    assert kinds == {"alone/root": "related"}
    assert found["base"] is None
    assert found["reason"].endswith("; `alone/root` is what it names")


def test_pickles_that_are_not_in_the_cache_are_not_downloaded(hub, phlora, save):
    root = trees.model(4)
    folder = save("root", root, "pickled")
    (folder / "model.safetensors").unlink()
    torch.save(root, folder / "pytorch_model.bin")
    hub.repository("pickled/root").commit(folder, "main")
    found, kinds = asked(phlora, save("tuned", trees.tune(root, 1), "pickled", "pickled/root"))
    assert kinds == {"pickled/root": "failed"}
    assert "is not in the local cache" in found["candidates"][0]["evidence"]
    assert ("pickled/root", "pytorch_model.bin") not in hub.fetched


def test_extractions_ask_about_siblings_by_their_cards_on_the_hub(hub, phlora, save, work):
    root = trees.model(5)
    for seed, name in enumerate(("one", "other")):
        hub.repository(f"cards/{name}").commit(save(name, trees.tune(root, seed), "cards", "cards/root"), "main")
    status, _, stderr = phlora("extract", "cards/one", "cards/other", work / "out", "--rank", "2")
    assert status == 0, stderr
    notes = json.loads((work / "out" / "phlora_report.json").read_text())["notes"]
    assert "Are `cards/other` and `cards/one` siblings? Both name `cards/root` as their base." in notes
