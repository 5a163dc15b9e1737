import itertools

import pytest
import torch

from peft_posthoc import extract
from tests.make import architectures, models

# In a live model their tensors have other names than on disk, or are stacked.
OTHER = ["vit", "llava", "gemma3-images", "mixtral"]
NAMES = [*OTHER, "qwen3_vl_moe", "llama4", "wav2vec2", "t5"]
SIDES = [sides for sides in itertools.product(["folder", "live"], repeat=2) if "live" in sides]


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory):
    """(the pair's folders and live models, the adapter of the folders in either form)"""
    pair = architectures.pair_of(request.param, tmp_path_factory.mktemp("pair"))
    sources = [{"folder": folder, "live": models.load(folder)} for folder in pair]
    forms = {"portable": architectures.EVERYTHING, "peft": {"form": "peft"}}
    return sources, {form: (options, extract(*pair, 4, **options)) for form, options in forms.items()}


@pytest.mark.parametrize("name", OTHER)
def test_a_live_model_may_have_other_names_than_its_folder(name, tmp_path):
    base, _ = architectures.pair_of(name, tmp_path)
    assert not models.names_of(base) <= models.load(base).state_dict().keys()


@pytest.mark.parametrize("sides", SIDES, ids="-".join)
@pytest.mark.parametrize("form", ["portable", "peft"])
def test_live_models_give_the_adapter_of_their_folders(form, sides, case):
    sources, adapters = case
    options, wanted = adapters[form]
    found = extract(*(source[side] for source, side in zip(sources, sides, strict=True)), 4, **options)
    tensors, expected = found.tensors(), wanted.tensors()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    config, expected = (one.file.config(one.provenance) for one in (found, wanted))
    assert config | {"base_model_name_or_path": None} == expected | {"base_model_name_or_path": None}
    energy = [sum(row.delta_norm**2 for row in adapter.report.rows) for adapter in (found, wanted)]
    assert energy[0] == pytest.approx(energy[1], rel=1e-9)


def test_they_are_what_peft_finds_in_the_live_model(case, tmp_path):
    base, tuned = (source["live"] for source in case[0])
    model = models.load_adapter(base, extract(base, tuned, 4).save(tmp_path / "out"))
    assert models.lora_deltas(model).keys() >= extract(base, tuned, 4).factors.keys()
