"""Merges of slices of models, and their adapters."""

import pytest
import torch

from tests.make import mergekit_runs
from tests.make.mergekit_runs import refused, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def test_slices_of_the_models_as_they_are(llama_pair, tmp_path):
    config = mergekit_runs.config(llama_pair[0], parameters={"rank": 8}, slices=slices(llama_pair, (0, 1), (1, 2)))
    same(mergekit_runs.merged_by(config, tmp_path / "out"), mergekit_runs.expected(*llama_pair, 8))


def test_slices_that_renumber_layers_merge_but_have_no_adapter(llama_pair, tmp_path):
    config = mergekit_runs.config(llama_pair[0], parameters={"rank": 8}, slices=slices(llama_pair, (0, 2), (1, 2)))
    got = mergekit_runs.stock(config, tmp_path / "stock")
    second = {name: tensor for name, tensor in got.items() if "layers.2" in name}
    base, tuned = (mergekit_runs.tensors(folder) for folder in llama_pair)
    for name in (name for name in second if "proj" in name):
        stored = name.replace("layers.2", "layers.1")
        delta, step = tuned[stored] - base[stored], second[name] - base[stored]
        assert torch.linalg.matrix_rank(step, rtol=1e-4) == 8
        tail = torch.linalg.svdvals(delta.double())[8:].norm()
        torch.testing.assert_close((delta - step).double().norm(), tail, rtol=1e-4, atol=0)
    result = mergekit_runs.phlora(config, tmp_path / "out")
    assert result.exit_code == 1
    assert "layer 2 of the result is layer 1 of" in result.output
    assert not (tmp_path / "out").exists()


def test_slices_of_fewer_layers_have_no_adapter(llama_pair, tmp_path):
    config = mergekit_runs.config(llama_pair[0], parameters={"rank": 8}, slices=slices(llama_pair, (0, 1)))
    refused(mergekit_runs.phlora(config, tmp_path / "out"), "The result has 1 layers", "has 2")


def test_slices_of_two_bases_have_no_adapter(three, tmp_path):
    one, two = slices((str(three / "base"), str(three / "tuned")), (0, 1), (1, 2))
    other = {"sources": [two["sources"][1], {**two["sources"][0], "model": str(three / "tuned-too")}]}
    other["base_model"] = str(three / "tuned-too")
    config = mergekit_runs.config(three / "base", parameters={"rank": 8}, slices=[one, other])
    refused(mergekit_runs.phlora(config, tmp_path / "out"), "is made from the base", "tuned-too")


def test_a_base_that_only_the_slices_name_is_found(llama_pair, tmp_path):
    parts = [{**piece, "base_model": llama_pair[0]} for piece in slices(llama_pair, (0, 1), (1, 2))]
    config = mergekit_runs.config(None, parameters={"rank": 8}, slices=parts, base_model=llama_pair[0])
    wanted = mergekit_runs.expected(*llama_pair, 8)
    same(mergekit_runs.merged_by(config, tmp_path / "both"), wanted)
    same(mergekit_runs.merged_by({**config, "base_model": None}, tmp_path / "out"), wanted)


def slices(pair, *ranges):
    return [{"sources": [{"model": folder, "layer_range": list(one)} for folder in pair]} for one in ranges]
