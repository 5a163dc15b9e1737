"""Files whose matrices transformers splits, or puts together, when it loads them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft_posthoc import export, extract, open_checkpoint, verify
from peft_posthoc.checkpoints.memory import InMemory
from peft_posthoc.models.as_model import as_model
from peft_posthoc.models.find import layout_of
from tests.make import models, pieces

RANK = 128
EPS = torch.finfo(torch.float32).eps
CLOSE = 1e-4


@pytest.fixture(scope="module", params=pieces.MODELS)
def pair(request, tmp_path_factory):
    return pieces.pair_of(pieces.MODELS[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gte(tmp_path_factory):
    return pieces.pair_of(pieces.MODELS["gte"], tmp_path_factory.mktemp("gte"))


def told(adapter):
    return adapter.report.totals.energy_of_all


def same_factors(adapter, other):
    assert adapter.factors.keys() == other.factors.keys()
    for module, factors in other.factors.items():
        assert all(torch.equal(x, y) for x, y in zip(adapter.factors[module], factors, strict=True)), module


@pytest.mark.parametrize("form", ["portable", "peft"])
def test_what_is_told_of_the_fine_tune_is_what_peft_has_of_it(form, pair, tmp_path):
    base, tuned = pair
    adapter = extract(base, tuned, RANK, form=form)
    out = adapter.save(tmp_path / "out")
    assert told(adapter) == pytest.approx(pieces.true_share(base, tuned, pieces.merged(base, out)), abs=CLOSE)


def test_every_matrix_that_is_stored_otherwise_is_carried(pair):
    base, tuned = pair
    opened = open_checkpoint(base)
    layout = layout_of(opened)
    seen = as_model(opened, layout)
    assert layout.conversions
    assert not {source for one in layout.conversions for source in one.sources} & seen.headers.keys()
    live = dict(models.load(base).named_parameters())
    made = seen.headers.keys() - opened.headers.keys()
    assert made
    for name in made:
        assert torch.equal(seen.read(name), live[name])
        assert seen.headers[name].shape == live[name].shape
    rows = {row.weight: row.status for row in extract(base, tuned, 4, form="peft").report.rows}
    assert {rows[name] for name in made if name in rows} <= {"extracted", "whole"}


def test_a_fine_tune_under_the_live_model_s_names_gives_the_same_adapter(pair, tmp_path):
    base, tuned = pair
    live = pieces.under_live_names(tuned, tmp_path / "live")
    adapter, plain = extract(base, live, RANK, form="peft"), extract(base, tuned, RANK, form="peft")
    same_factors(adapter, plain)
    assert told(adapter) == pytest.approx(told(plain), abs=1e-2)  # It has no buffers.
    same_factors(extract(pieces.under_live_names(base, tmp_path / "base"), tuned, RANK, form="peft"), plain)


def test_a_wrapper_s_names_before_either_change_nothing(gte, tmp_path):
    base, tuned = gte
    plain = extract(base, tuned, 4)
    live = pieces.under_live_names(tuned, tmp_path / "live")
    for folder in (Path(tuned), live):
        tensors = {f"policy.{name}": one for name, one in load_file(folder / "model.safetensors").items()}
        same_factors(extract(base, tensors, 4), plain)


def test_a_live_model_is_its_file(gte):
    base, tuned = gte
    plain = extract(base, tuned, 4)
    same_factors(extract(models.load(base), tuned, 4), plain)
    same_factors(extract(base, models.load(tuned), 4), plain)


def test_merged_the_file_has_its_own_names_and_pieces(pair, tmp_path):
    base, tuned = pair
    out = extract(base, tuned, RANK, form="peft").save(tmp_path / "a")
    export(out, tmp_path / "out", "merged", base=base)
    before, wanted, got = (load_file(Path(one) / "model.safetensors") for one in (base, tuned, tmp_path / "out"))
    assert {name: one.shape for name, one in got.items()} == {name: one.shape for name, one in wanted.items()}
    layout = layout_of(open_checkpoint(base))
    for name in (source for conversion in layout.conversions for source in conversion.sources):
        change = (wanted[name] - before[name]).norm()
        assert (got[name] - wanted[name]).norm() < 1e-4 * change, name


def test_base_and_adapter_are_the_tuned_model(pair, tmp_path):
    base, tuned = pair
    adapter = extract(base, tuned, RANK, form="peft")
    out = adapter.save(tmp_path / "a")
    assert verify(out, base, tuned, outputs=False).energy == pytest.approx(told(adapter), abs=CLOSE)
    again = extract(base, f"{base}+{out}", RANK, form="peft")
    assert again.factors.keys() == adapter.factors.keys()
    assert told(again) == pytest.approx(1, abs=CLOSE)


def test_what_fits_no_model_stays_as_it_is_and_is_told(gte):
    base, tuned = (load_file(Path(folder) / "model.safetensors") for folder in gte)
    name = next(name for name in base if "qkv_proj.weight" in name)
    config = open_checkpoint(gte[0]).config
    sides = []
    for tensors in (base, tuned):
        side = InMemory({**tensors, name: tensors[name][:-3]}, label="cut")
        side.config = config
        sides.append(side)
    layout = layout_of(*sides)
    assert name in as_model(sides[0], layout).headers
    rows = {row.weight: row.status for row in extract(*sides, 4).report.rows}
    assert rows[name] == "left out"


def test_a_checkpoint_with_the_whole_and_its_pieces_is_left_alone(gte):
    base, _ = (open_checkpoint(folder) for folder in gte)
    layout = layout_of(base)
    conversion = layout.conversions[0]
    (whole,), pieces_of_it = conversion.sources, as_model(base, layout).headers.keys() - base.headers.keys()
    piece = next(name for name in conversion.make(base.read(whole)))
    assert piece in pieces_of_it
    both = InMemory({name: base.read(name) for name in base.headers} | {piece: torch.zeros(32, 32)}, label="both")
    assert {whole, piece} < as_model(both, layout).headers.keys()
