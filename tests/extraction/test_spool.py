"""Interrupted runs, and runs of several processes."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from peft_posthoc import AdapterError, CheckpointError, extract
from peft_posthoc.adapters import writer
from peft_posthoc.extraction import spool as spool_module
from peft_posthoc.extraction import work as factor_module
from peft_posthoc.extraction.processes import Processes
from peft_posthoc.extraction.spool import Spool
from peft_posthoc.linalg import svd as svd_module
from peft_posthoc.ranks.rules import limited
from tests.make import architectures, models
from tests.make.limits import HANG

FILES = ("adapter_model.safetensors", "adapter_config.json")


def same(one, two):
    return all((one / file).read_bytes() == (two / file).read_bytes() for file in FILES)


def spools(folder):
    return [path for path in folder.iterdir() if ".spool-" in path.name]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(Spool, "patience", 0.0)


def test_what_is_kept_comes_back_bit_for_bit(llama_pair, tmp_path, impatient):
    adapter = extract(*llama_pair, 4)
    spool = Spool(tmp_path / "out", "identity")
    for outcome in [*adapter.layers.values(), *adapter.skipped.values()]:
        spool.put(outcome)
    back = {outcome.weight: outcome for outcome in spool.outcomes([*adapter.layers, *adapter.skipped, "another"])}
    assert len(back) == len(spool) == 21
    for name, skipped in adapter.skipped.items():
        assert back[name] == skipped
    for name, layer in adapter.layers.items():
        for field, tensor in layer.factors._asdict().items():
            other = getattr(back[name].factors, field)
            assert torch.equal(tensor, other) if isinstance(tensor, torch.Tensor) else tensor == other
        assert (back[name].base_norm, back[name].seconds) == (layer.base_norm, layer.seconds)


def test_what_is_whole_comes_back_bit_for_bit(tmp_path, impatient):
    adapter = extract(*architectures.pair_of("resnet", tmp_path), 4, form="peft")
    spool = Spool(tmp_path / "out", "identity")
    for kept in adapter.kept.values():
        spool.put(kept)
    back = spool.outcomes(adapter.kept)
    assert len(back) == len(adapter.kept) > 10
    assert {kept.value.dtype for kept in back} == {torch.float32, torch.int64}
    for kept in back:
        assert torch.equal(kept.value, adapter.kept[kept.weight].value)
        assert kept._replace(value=None) == adapter.kept[kept.weight]._replace(value=None)


def interrupted_after(count, monkeypatch):
    done = []
    real = svd_module.truncated_svd

    def svd(*args, **kwargs):
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(None)
        return real(*args, **kwargs)

    monkeypatch.setattr(factor_module, "truncated_svd", svd)
    return done


def test_an_interrupted_run_goes_on_from_there(llama_pair, tmp_path, monkeypatch, impatient):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        interrupted_after(9, patched)
        with pytest.raises(KeyboardInterrupt) as interrupt:
            extract(*llama_pair, 4, out=out)
    assert "of 21 weights are done and kept in" in interrupt.value.__notes__[0]
    assert len(spools(tmp_path)) == 1
    with monkeypatch.context() as patched:
        done = interrupted_after(100, patched)
        extract(*llama_pair, 4, out=out).save(out)
    assert len(done) == 14 - 9
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    extract(*llama_pair, 4).save(tmp_path / "whole")
    assert same(out, tmp_path / "whole")


def test_other_inputs_and_other_options_start_anew(llama_pair, tied_pair, tmp_path, impatient):
    for pair, options in ((llama_pair, {"rank": 4}), (llama_pair, {"rank": 5}), (tied_pair, {"rank": 4})):
        extract(*pair, out=tmp_path / "out", **options)
    assert len(spools(tmp_path)) == 3
    folder = spools(tmp_path)[0].stat()
    extract(*llama_pair, 4, out=tmp_path / "out")
    assert len(spools(tmp_path)) == 3
    assert folder.st_ino
    extract(*llama_pair, 4).save(tmp_path / "out")
    assert spools(tmp_path) == []


def test_a_short_run_keeps_nothing(llama_pair, tmp_path):
    extract(*llama_pair, 4, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hidden", [False, True])
def test_a_rule_that_is_a_function_is_named_where_nothing_can_be_kept_for_it(llama_pair, tmp_path, hidden, impatient):
    def rule(spectrum):
        raise KeyboardInterrupt

    rank, out = (limited(rule, most=4) if hidden else rule), tmp_path / "out"
    with pytest.raises(ValueError, match="a rank rule that is no dataclass, such as a function"):
        extract(*llama_pair, rank, out=out, processes=Processes(0, 2))
    with pytest.raises(KeyboardInterrupt) as interrupt:
        extract(*llama_pair, rank, out=out)
    assert "Nothing is kept of what is done: a rank rule that is no dataclass" in interrupt.value.__notes__[-1]
    assert list(tmp_path.iterdir()) == []
    live = [{"a.weight": torch.eye(4) * i} for i in (1, 2)]
    for sides, place, why in ((live, out, "not on disk"), (llama_pair, None, "no `out`")):
        with pytest.raises(ValueError, match=why):
            extract(*sides, 2, out=place, processes=Processes(0, 2))


def test_a_run_that_fails_keeps_nothing(tmp_path, impatient):
    base = {f"layers.{i}.weight": torch.zeros(8, 8) for i in range(4)}
    tuned = {name: torch.eye(8) for name in base} | {"layers.3.weight": torch.full((8, 8), float("nan"))}
    for name, tensors in (("base", base), ("tuned", tuned)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    for out in (tmp_path / "out", tmp_path / "new" / "deep" / "out"):
        with pytest.raises(CheckpointError, match="NaN"):
            extract(tmp_path / "base", tmp_path / "tuned", 2, out=out)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "tuned"}


def a_faster_run_saves_meanwhile(adapter, out, monkeypatch):
    put = Spool.put

    def put_and_save(self, outcome):
        put(self, outcome)
        if not out.exists():
            adapter.save(out)

    monkeypatch.setattr(Spool, "put", put_and_save)


def test_the_slower_of_two_identical_runs_leaves_nothing_beside_the_adapter(
    llama_pair, tmp_path, monkeypatch, impatient
):
    out = tmp_path / "out"
    a_faster_run_saves_meanwhile(extract(*llama_pair, 4), out, monkeypatch)
    adapter = extract(*llama_pair, 4, out=out)
    assert len(spools(tmp_path)) == 1
    with pytest.raises(AdapterError, match="exists and is not empty"):
        adapter.save(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_slower_of_two_other_runs_is_told_what_it_keeps(llama_pair, tmp_path, monkeypatch, impatient):
    out = tmp_path / "out"
    a_faster_run_saves_meanwhile(extract(*llama_pair, 5), out, monkeypatch)
    with pytest.raises(AdapterError, match="exists and is not empty") as refused:
        extract(*llama_pair, 4, out=out).save(out)
    (kept,) = spools(tmp_path)
    assert f"kept in `{kept}`. The same command goes on from there." in refused.value.__notes__[0]


def test_a_run_of_several_processes_does_not_wait_for_what_another_run_removed(
    llama_pair, tmp_path, monkeypatch, impatient
):
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        assert len(naps) < 100, "It waits for ever."

    a_faster_run_saves_meanwhile(extract(*llama_pair, 4), tmp_path / "out", monkeypatch)
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(AdapterError, match="Another run has written its adapter"):
        extract(*llama_pair, 4, out=tmp_path / "out", processes=Processes(0, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_full_at_the_end_costs_no_finished_layer(llama_pair, tmp_path, monkeypatch, impatient):
    out = tmp_path / "out"
    adapter = extract(*llama_pair, 4, out=out)

    def save_file(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_file", save_file)
        with pytest.raises(AdapterError, match="No space left") as full:
            adapter.save(out)
    (kept,) = spools(tmp_path)
    assert f"Finished layers are kept in `{kept}`" in full.value.__notes__[0]
    extract(*llama_pair, 4, out=out).save(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_result_is_worked_out_again(llama_pair, tmp_path, impatient):
    extract(*llama_pair, 4, out=tmp_path / "out")
    (folder,) = spools(tmp_path)
    for path in list(folder.iterdir())[:5]:
        path.write_bytes(path.read_bytes()[:20])
    extract(*llama_pair, 4, out=tmp_path / "out").save(tmp_path / "out")
    extract(*llama_pair, 4).save(tmp_path / "whole")
    assert same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_processes_share_every_weight_once_and_evenly(size):
    sizes = {f"w{i}": 10 + i * i for i in range(20)}
    shares = [Processes(rank, size).share(sizes) for rank in range(size)]
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    loads = [sum(sizes[name] for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values())


def torchrun(*arguments, before=""):
    run = f"{before}\nfrom peft_posthoc.cli.main import main\nmain(prog_name='phlora')"
    script = ["--no-python", sys.executable, "-c", run] if before else ["-m", "peft_posthoc"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    return subprocess.run([*launcher, *script, *arguments], capture_output=True, text=True, timeout=HANG, check=False)


@pytest.fixture(scope="module")
def wide_pair(tmp_path_factory):
    """Wide enough for the iteration, whose bits depend on how many threads multiply."""
    torch.manual_seed(0)
    model = models.llama(hidden_size=384, intermediate_size=512)
    return models.save_pair(model, tmp_path_factory.mktemp("wide"), rank=300)


def test_two_processes_write_the_same_bits_as_one(wide_pair, tmp_path):
    run = torchrun("extract", *wide_pair, str(tmp_path / "two"), "--rank", "8")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Adapter written") == 1
    extract(*wide_pair, 8).save(tmp_path / "one")
    assert same(tmp_path / "one", tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_a_process_that_is_killed_is_started_again_and_goes_on(wide_pair, tmp_path):
    kill = f"""
import os, signal
from peft_posthoc.extraction import work as factor
real, calls = factor.truncated_svd, []
def svd(*args, **kwargs):
    calls.append(None)
    open({str(tmp_path)!r} + "/calls", "a").write("x")
    if len(calls) == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
factor.truncated_svd = svd
"""
    run = torchrun("extract", *wide_pair, str(tmp_path / "two"), "--rank", "8", before=kill)
    assert run.returncode == 0, run.stderr
    extract(*wide_pair, 8).save(tmp_path / "one")
    assert same(tmp_path / "one", tmp_path / "two")
    # Three weights of the killed process' share were not done again, whatever the other one had to repeat.
    assert len((tmp_path / "calls").read_text()) < 2 * 14


def test_a_terminated_run_leaves_no_adapter_and_can_go_on(wide_pair, tmp_path):
    slow = """
import time
from peft_posthoc.extraction import work as factor
from peft_posthoc.extraction import spool
spool.Spool.patience = 0.0
real = factor.truncated_svd
def svd(*args, **kwargs):
    time.sleep(0.5)
    return real(*args, **kwargs)
factor.truncated_svd = svd
from peft_posthoc.cli.main import main
main(prog_name="phlora")
"""
    arguments = ["extract", *wide_pair, str(tmp_path / "out"), "--rank", "8", "--quiet"]
    process = subprocess.Popen([sys.executable, "-c", slow, *arguments])
    deadline = time.monotonic() + HANG
    while not any(len(list(folder.iterdir())) > 2 for folder in spools(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=HANG) != 0
    assert not (tmp_path / "out").exists()
    (kept,) = spools(tmp_path)
    assert spool_module.Spool is Spool
    before = len(list(kept.glob("*.safetensors")))
    assert 2 <= before < 21
    extract(*wide_pair, 8, out=tmp_path / "out").save(tmp_path / "out")
    extract(*wide_pair, 8).save(tmp_path / "one")
    assert same(tmp_path / "one", tmp_path / "out")
    assert spools(tmp_path) == []
