import pytest
import torch
from click.testing import CliRunner

from peft_posthoc import budget, extract, resize
from peft_posthoc.cli.main import main
from tests.make import architectures


@pytest.fixture(scope="module", params=["portable", "peft", "mixtral"])
def adapter(request, tmp_path_factory):
    """(folder, form) of an adapter of rank 24."""
    folder = tmp_path_factory.mktemp("adapter")
    name = request.param if request.param == "mixtral" else "qwen2"
    form = "portable" if request.param == "portable" else "peft"
    out = extract(*architectures.pair_of(name, folder), 24, form=form, dtype=torch.float16).save(folder / "out")
    return out, form


def bytes_of(folder):
    return (folder / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("share", [0.8, 0.9, 5.0])
def test_the_file_has_at_most_the_size_that_is_asked_for(share, adapter, tmp_path):
    source, form = adapter
    limit = int(share * bytes_of(source))
    resized = resize(source, budget(limit), form=form)
    size = bytes_of(resized.save(tmp_path / "out"))
    assert size <= limit
    if share > 1:
        assert resized.report.totals.energy == pytest.approx(1, abs=1e-6)
    elif form == "peft":
        assert size > 0.6 * limit


def test_below_the_smallest_adapter_its_size_is_told(adapter):
    source, form = adapter
    with pytest.raises(ValueError, match=r"`size=1000` is below the smallest adapter of these layers, [\d,]+ bytes"):
        resize(source, budget(1000), form=form)


def test_more_room_keeps_more(adapter, tmp_path):
    source, form = adapter
    kept = [resize(source, budget(int(share * bytes_of(source))), form=form) for share in (0.8, 0.9, 1.2)]
    energies = [one.report.totals.energy for one in kept]
    assert energies == sorted(energies)


def test_the_command_takes_a_size_and_refuses_a_share_of_what_it_does_not_see(adapter, tmp_path):
    source, form = adapter
    asked = ["resize", str(source), str(tmp_path / "out"), "--form", form, "--quiet"]
    done = CliRunner().invoke(main, [*asked, "--budget", f"{2 * bytes_of(source)}B"])
    assert done.exit_code == 0, done.stderr
    refused = CliRunner().invoke(main, [*asked, "--force", "--budget", "50%"])
    assert refused.exit_code == 2
    assert "`--budget 50%` is a share of the tuned checkpoint, which is not there: give a size" in refused.stderr
