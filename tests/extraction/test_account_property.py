"""The share of the whole fine-tune that a report tells is the share that stock PEFT's merged model has."""

import copy
import json
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file, save_model

from peft_posthoc import extract
from tests.make import models
from tests.sweep import share, untie, without_zero_biases


def gte():
    """Its matrices of q, k and v are one on disk, and three in the model."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return transformers.GteForMaskedLM(transformers.GteConfig(**sizes, num_attention_heads=4, pad_token_id=0))


MODELS = {
    "llama": lambda: models.llama(num_hidden_layers=1),
    "llama, tied": lambda: models.llama(num_hidden_layers=1, tie_word_embeddings=True),
    "qwen2": lambda: models.qwen2(num_hidden_layers=1),
    "gpt2": models.gpt2,
    "gte": gte,
}
WAYS = {
    "as transformers saves it": lambda model, file: None,
    "under the head's name": lambda model, file: save_model(model, file, metadata={"format": "pt"}),
    "under live names": lambda model, file: save(dict(model.named_parameters()), file),
    "by a wrapper": lambda model, file: save({f"module.{n}": p for n, p in model.named_parameters()}, file),
}


class Case(NamedTuple):
    """Two models and what is asked for."""

    kind: str
    seed: int
    changed: float
    """About the share of all tensors that the fine-tune has changed."""
    base: str
    tuned: str
    """How they are saved."""
    new: int
    """Rows of a tensor that the tuned model alone has."""
    theta: bool
    """Whether the configuration differs."""
    form: str
    rank: int
    more: bool
    """Whether embeddings and head are carried."""


cases = st.builds(
    Case,
    st.sampled_from(sorted(MODELS)),
    st.integers(0, 99),
    st.sampled_from([0.3, 0.7, 1.0]),
    st.sampled_from(sorted(WAYS)),
    st.sampled_from(sorted(WAYS)),
    st.sampled_from([0, 0, 0, 40]),
    st.booleans(),
    st.sampled_from(["portable", "peft"]),
    st.sampled_from([2, 64]),
    st.booleans(),
)


def save(tensors, file):
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, file)


def saved(model, folder, way):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        WAYS[way](model, folder / "model.safetensors")
    return folder


def fine_tuned(model, case):
    tuned, draw = copy.deepcopy(model), torch.Generator().manual_seed(case.seed)
    # A matrix of a block always: without one there is nothing to carry.
    always = next(name for name, parameter in tuned.named_parameters() if ".0." in name and parameter.ndim == 2)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if torch.rand((), generator=draw) < case.changed or name == always:
                scale = 0.02 * torch.randint(1, 4, (), generator=draw)
                parameter += scale * torch.randn(parameter.shape, generator=draw)
    return tuned


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(cases)
@example(Case("llama, tied", 0, 1.0, "under the head's name", "under the head's name", 0, False, "peft", 64, True))
@example(Case("llama", 0, 1.0, "as transformers saves it", "as transformers saves it", 40, False, "peft", 64, True))
@example(Case("qwen2", 24, 0.3, "as transformers saves it", "as transformers saves it", 0, False, "portable", 2, False))
@example(Case("gte", 0, 1.0, "as transformers saves it", "under live names", 40, False, "portable", 64, False))
def test_the_share_that_is_told_is_the_share_that_arrives(case):
    torch.manual_seed(case.seed)
    model = MODELS[case.kind]()
    tuned = fine_tuned(model, case)
    with tempfile.TemporaryDirectory() as place:
        base, after = saved(model, Path(place, "base"), case.base), saved(tuned, Path(place, "tuned"), case.tuned)
        if case.new:
            tensors = load_file(after / "model.safetensors")
            save({**tensors, "beside.it.weight": torch.ones(case.new, 8)}, after / "model.safetensors")
        if case.theta:
            config = json.loads((after / "config.json").read_text())
            (after / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3, "rms_norm_eps": 1e-3}))
        options = {} if case.form == "peft" else {"embeddings": case.more, "head": case.more}
        adapter = extract(base, after, case.rank, form=case.form, dtype=torch.float32, **options)
        adapter.save(Path(place, "adapter"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.PeftModel.from_pretrained(copy.deepcopy(model), Path(place, "adapter"))
            untie(adapted)  # Merged into the one weight of a tie, each use would get what all of them get.
            without_zero_biases(adapted)
            true, lost = share(model, tuned, adapted.merge_and_unload())
    values = sum(parameter.numel() for parameter in model.parameters())
    new = 8 * case.new / (values + 8 * case.new)
    totals = adapter.report.totals
    assert totals.unknown == pytest.approx(new, abs=1e-3)
    assert totals.energy_of_all == pytest.approx(true * (1 - new), abs=0.01), lost
