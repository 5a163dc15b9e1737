import os

import pytest
from safetensors import safe_open

from peft_posthoc import extract
from peft_posthoc.extraction.forms.lay_out import lay_out
from peft_posthoc.extraction.sizing import FoundSizing
from tests.make import architectures
from tests.make.diagonal import diagonal, pair_with

NAMES = ["llama-tied", "qwen2", "gpt2", "mixtral", "gpt_oss", "vit", "bert"]


@pytest.fixture(scope="module", params=[(name, form) for name in NAMES for form in ("portable", "peft")], ids="-".join)
def made(request, tmp_path_factory):
    """An adapter, and the file that it was saved in."""
    name, form = request.param
    folder = tmp_path_factory.mktemp("made")
    options = {"portable": architectures.EVERYTHING, "peft": {"form": "peft"}}[form]
    adapter = extract(*architectures.pair_of(name, folder), 0.9, **options)
    return adapter, adapter.save(folder / "out") / "adapter_model.safetensors"


def header_of(path):
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_it_names_every_tensor_of_the_file_with_its_shape_and_type(made):
    adapter, path = made
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: (tuple(one.shape), one.dtype) for name, one in found.items()} == adapter.file.tensors


def test_header_and_numbers_are_the_file(made):
    adapter, path = made
    layout = adapter.file
    assert layout.header_bytes(adapter.provenance) == header_of(path)
    assert layout.header_bytes(adapter.provenance) + layout.bytes == os.path.getsize(path)
    assert layout.bytes == sum(layout.bytes_by_module.values()) + sum(layout.bytes_of_whole.values())


def test_it_is_known_from_headers_and_ranks_before_there_is_a_factor(made):
    adapter, _ = made
    ranks = {name: len(layer.factors.s) for name, layer in adapter.layers.items()}
    changed = {name for name, kept in adapter.kept.items() if kept.delta_norm}
    layout = lay_out(adapter.form, adapter.plan, ranks, changed, adapter.dtype)
    assert layout == adapter.file
    assert layout.config(adapter.provenance) == adapter.file.config(adapter.provenance)


def test_at_lower_ranks_it_is_that_of_the_adapter_cut_to_them(made):
    adapter, _ = made
    ranks = dict.fromkeys(adapter.layers, 1)
    cut = adapter.cut(ranks, "one")
    assert adapter.file_at(ranks) == cut.file
    sizing = FoundSizing(adapter, "one")
    assert sizing.size(ranks, params=False) == cut.file.bytes
    assert sizing.size(ranks, params=True) == sum(tensor.numel() for tensor in cut.tensors().values())
    assert sizing.header(ranks, 3) == cut.file.header_bytes(cut.provenance) + 3 * len(cut.tensors())


def test_to_know_a_size_no_factor_is_needed():
    base, tuned = pair_with({"a.weight": diagonal(4.0, 3.0), "b.weight": diagonal(2.0)})
    without, adapter = (extract(base, tuned, 2, form="peft", keep_factors=keep) for keep in (False, True))
    assert without.file == adapter.file
    assert FoundSizing(without, "x").header({}, 0) == FoundSizing(adapter, "x").header({}, 0)


def test_an_adapter_in_one_form_tells_its_size_in_the_other(llama_pair):
    adapters = {form: extract(*llama_pair, 0.9, form=form, exclude="norm|embed|head") for form in ("portable", "peft")}
    assert adapters["portable"].file_at({}, "peft") == adapters["peft"].file
    assert adapters["peft"].file_at({}, "portable") == adapters["portable"].file
