"""Interrupted fits: they go on from where they were, to the same bits; and a budget of time."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from peft_posthoc import PosthocError, Sampled, blocks, compensated, distil, extract, refine
from peft_posthoc.cli.main import main
from peft_posthoc.errors import OutputError
from peft_posthoc.refinement import blocks as blocks_module
from peft_posthoc.refinement import compensated as compensated_module
from peft_posthoc.refinement import distil as distil_module
from peft_posthoc.refinement import state as state_module
from peft_posthoc.refinement.pace import At, Pace
from peft_posthoc.refinement.state import State
from peft_posthoc.refinement.steps import Steps
from peft_posthoc.refinement.streamed import Streamed
from peft_posthoc.refinement.walk import Walk
from peft_posthoc.running.live import Live
from peft_posthoc.texts import sampling as sampling_module
from peft_posthoc.texts.sequences import Tokens
from tests.make.limits import HANG
from tests.make.texts import tokenizer

QUICK: dict[str, Any] = {"sequences": 48, "length": 12}
# Ends itself at once, as `kill -9` does, when the state is written for the third time.
KILLED = """
import os, signal
from peft_posthoc.cli.main import main
from peft_posthoc.refinement.state import State
State.patience, keep, times = 0.0, State.keep, []
def keep_and_die(*args):
    keep(*args)
    args[0].patience = 0.0
    times.append(None)
    if len(times) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
State.keep = keep_and_die
main()
"""


@dataclass(frozen=True)
class Counted(Sampled):
    """Text that says when it is written."""

    times: ClassVar[list[None]] = []

    def write(self, *args: Any, **options: Any) -> list[Tokens]:
        self.times.append(None)
        return super().write(*args, **options)


@pytest.fixture
def adapter(llama_pair: tuple[str, str], tmp_path: Path) -> Path:
    return extract(*llama_pair, 2, dtype=torch.float32).save(tmp_path / "svd")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    keep = State.keep

    def kept(state: State, *args: Any) -> None:
        keep(state, *args)
        state.patience = 0.0

    monkeypatch.setattr(State, "patience", 0.0)
    monkeypatch.setattr(State, "keep", kept)
    Counted.times.clear()


def _fails_at(step: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = distil_module.divergence, []

    def fails(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == step:
            raise error
        return real(*args)

    monkeypatch.setattr(distil_module, "divergence", fails)


def _breaks_off(step: int, *args: Any, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patched:
        _fails_at(step, MemoryError(), patched)
        with pytest.raises(MemoryError):
            refine(*args, **options)


def _kept(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if ".refine-" in path.name]


def _same(one: Any, other: Any) -> bool:
    return one.after == other.after and all(torch.equal(x, other.tensors[name]) for name, x in one.tensors.items())


@pytest.mark.parametrize("lr", [0.05, 1.0], ids=["usual", "leads away at first"])
def test_a_fit_that_broke_off_goes_on_to_the_same_bits(
    llama_pair: tuple[str, str], adapter: Path, tmp_path: Path, lr: float
) -> None:
    options, out = {"texts": Counted(), "method": distil(lr=lr), **QUICK}, tmp_path / "out"
    Counted.times.clear()
    whole = refine(adapter, *llama_pair, **options)
    assert not whole.kept
    for step in (4, 6, 20):
        _breaks_off(step, adapter, *llama_pair, out=out, **options)
    again = refine(adapter, *llama_pair, out=out, **options)
    assert len(Counted.times) == 2
    assert (again.steps, again.lr) == (whole.steps, whole.lr)
    assert whole.lr == 0.05 if lr == 0.05 else whole.lr < lr
    assert _same(again, whole)
    assert len(_kept(tmp_path)) == 1
    again.save(out)
    assert not _kept(tmp_path)


@pytest.mark.parametrize(
    ("method", "module", "work", "ends"),
    [(compensated(), compensated_module, "regress", [5, 5]), (blocks(passes=1), blocks_module, "_judged", [3])],
    ids=["compensated", "blocks"],
)
def test_layers_and_blocks_that_are_fitted_are_not_fitted_again(
    llama_pair: tuple[str, str], adapter: Path, tmp_path: Path, method: Any, module: Any, work: str, ends: list[int]
) -> None:
    real, calls, last = getattr(module, work), list[None](), [10**6]

    def counted(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == last[0]:
            raise MemoryError
        return real(*args)

    def fitted(**options: Any) -> Any:
        calls.clear()
        return refine(adapter, *llama_pair, method=method, **options, **QUICK)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, work, counted)
        whole = fitted()
        assert not whole.kept
        number = len(calls)
        for last[0] in ends:  # Each time one or more are done by then.
            with pytest.raises(MemoryError):
                fitted(out=tmp_path / "out")
        last[0] = 10**6
        again = fitted(out=tmp_path / "out")
    assert len(calls) <= number - 2
    assert (again.steps, again.unmoved) == (whole.steps, whole.unmoved)
    assert _same(again, whole)


def test_a_command_that_was_killed_goes_on(llama_pair: tuple[str, str], adapter: Path, tmp_path: Path) -> None:
    options = ["--base", llama_pair[0], "--tuned", llama_pair[1], "--sequences", "48", "--length", "12", "--quiet"]
    command = ["refine", str(adapter), str(tmp_path / "out"), *options]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=HANG,
        check=False,
        capture_output=True,
    )
    assert killed.returncode == -9, killed.stderr
    assert len(_kept(tmp_path)) == 1
    assert CliRunner().invoke(main, command).exit_code == 0
    assert not _kept(tmp_path)
    assert CliRunner().invoke(main, [*command[:2], str(tmp_path / "whole"), *options]).exit_code == 0
    found = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "whole")]
    assert all(torch.equal(x, found[1][name]) for name, x in found[0].items())


def test_ctrl_c_keeps_the_best_so_far_and_the_rest_can_be_done_later(
    llama_pair: tuple[str, str], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        _fails_at(9, KeyboardInterrupt(), patched)
        stopped = refine(adapter, *llama_pair, out=out, **QUICK)
    assert stopped.interrupted
    assert not stopped.kept
    assert "the best so far is kept" in stopped.table()
    assert str(_kept(tmp_path)[0]) in stopped.table()
    stopped.save(out)
    rest = refine(adapter, *llama_pair, out=out, **QUICK)
    rest.save(out, force=True)
    assert not _kept(tmp_path)
    assert _same(rest, refine(adapter, *llama_pair, **QUICK))


def test_what_was_refined_in_place_is_not_gone_on_from(
    llama_pair: tuple[str, str], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factors that the fit began with are no more."""
    with monkeypatch.context() as patched:
        _fails_at(9, KeyboardInterrupt(), patched)
        stopped = refine(adapter, *llama_pair, out=adapter, **QUICK)
    assert not stopped.kept
    assert "the same again starts from here" in stopped.table()
    assert _kept(tmp_path)  # Until it is written: the disk may be full.
    stopped.save(adapter, force=True)
    assert not _kept(tmp_path)
    assert "was not used" not in refine(adapter, *llama_pair, out=adapter, **QUICK).table()


def test_ctrl_c_before_the_fit_tells_what_is_kept(
    llama_pair: tuple[str, str], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(distil, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        refine(adapter, *llama_pair, out=tmp_path / "out", **QUICK)
    assert "The same command goes on" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("method", "module", "work"),
    [(compensated(), compensated_module, "regress"), (blocks(passes=1), blocks_module, "_judged")],
    ids=["compensated", "blocks"],
)
def test_ctrl_c_while_a_fit_is_judged_loses_nothing_of_it(
    llama_pair: tuple[str, str], adapter: Path, tmp_path: Path, method: Any, module: Any, work: str
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    options = {"method": method, "out": tmp_path / "out", **QUICK}
    whole = refine(adapter, *llama_pair, method=method, **QUICK)
    for where, kept in (("finite", "The text is"), ("kept_or_put_back", "Text and fit are")):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(State, "patience", 10.0**6)
            patched.setattr(module, where, never)
            with pytest.raises(KeyboardInterrupt) as caught:
                refine(adapter, *llama_pair, **options)
        assert caught.value.__notes__[0].startswith(f"{kept} kept in")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, work, never)
        assert _same(refine(adapter, *llama_pair, **options), whole)


def test_a_full_disk_takes_nothing_of_what_is_done(
    llama_pair: tuple[str, str], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    options = {"method": compensated(), "out": tmp_path / "out", "texts": Counted(), **QUICK}
    with monkeypatch.context() as patched:
        patched.setattr("torch.save", full)
        with pytest.raises(OutputError, match="Is the disk full") as caught:
            refine(adapter, *llama_pair, **options)
    assert "The text is kept" in caught.value.__notes__[0]
    again = refine(adapter, *llama_pair, **options)
    assert len(Counted.times) == 1
    assert _same(again, refine(adapter, *llama_pair, method=compensated(), texts=Counted(), **QUICK))


def test_text_of_another_tokenizer_is_not_gone_on_from(
    llama_pair: tuple[str, str], adapter: Path, tmp_path: Path
) -> None:
    out, own = tmp_path / "out", tokenizer()
    for template, written in ((None, 1), (None, 1), ("{{ messages[0].content }} w1", 2)):
        own.chat_template = template
        _breaks_off(3, adapter, *llama_pair, out=out, tokenizer=own, texts=Counted(), **QUICK)
        assert len(Counted.times) == written


@pytest.mark.parametrize("other", [{"seed": 1}, {"length": 11}, {"method": distil(lr=0.01)}, {"texts": Sampled("a")}])
def test_another_fit_begins_anew_and_says_so(
    llama_pair: tuple[str, str],
    adapter: Path,
    tmp_path: Path,
    other: dict[str, Any],
) -> None:
    out = tmp_path / "out"
    _breaks_off(3, adapter, *llama_pair, out=out, **QUICK)
    if "texts" in other:  # There is no tokenizer: what fails for good takes its own state away, and no other.
        with pytest.raises(PosthocError, match="tokenizer"):
            refine(adapter, *llama_pair, out=out, **QUICK, **other)
        assert len(_kept(tmp_path)) == 1
        return
    another = refine(adapter, *llama_pair, out=out, **{**QUICK, **other})
    assert "was not used" in another.table()
    assert _same(another, refine(adapter, *llama_pair, **{**QUICK, **other}))
    another.save(out)
    assert not _kept(tmp_path)


def test_a_damaged_state_is_done_again(llama_pair: tuple[str, str], adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _breaks_off(5, adapter, *llama_pair, out=out, **QUICK)
    for file in _kept(tmp_path)[0].iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert _same(refine(adapter, *llama_pair, out=out, **QUICK), refine(adapter, *llama_pair, **QUICK))


def test_no_time_at_all_is_told(llama_pair: tuple[str, str], adapter: Path) -> None:
    with pytest.raises(PosthocError, match="Give more time: `minutes="):
        refine(adapter, *llama_pair, **QUICK, minutes=1.0, since=time.monotonic() - 60)


def test_time_leaves_room_for_the_last_step_and_the_last_judging(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pace = Pace(At(share=0.5, seconds=7.0), 50.0, 10.0)
    assert pace.at(0, 1000, 0) == At(0, 0.5, 0, 7.0)
    now[0] += 10
    at = pace.at(1, 1000, 0)
    assert (at.share, at.seconds) == (0.5 + 0.5 * 20 / 40, 17.0)
    assert pace.due(at) == 0  # Judging takes long: once, at the end.
    now[0] += 20
    assert pace.at(2, 1000, 0).share == 1
    assert Pace(At(), 50.0, 0.0).due(At(share=1.0)) == 6  # No time that a clock can tell.


class Takes:
    """A clock that the work itself moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch, self.passed = monkeypatch, 0.0
        monkeypatch.setattr("time.monotonic", lambda: 100.0 + self.passed)

    def __call__(self, seconds: float, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def slow(*args: Any, **options: Any) -> Any:
            self.passed += seconds
            return real(*args, **options)

        self._monkeypatch.setattr(owner, name, slow)


def test_writing_stops_in_time_for_a_fit(
    llama_pair: tuple[str, str], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More text than can be written in that time."""
    takes = Takes(monkeypatch)
    takes(2.0, sampling_module, "_written")
    takes(0.5, Steps, "step")
    refined = refine(adapter, *llama_pair, method=distil(passes=100), sequences=20_000, length=16, minutes=1.0)
    assert 0 < sum(refined.texts.values()) < 18_000
    assert 20 < refined.steps <= 60  # Text has half of the minute.
    assert takes.passed <= 60


@pytest.mark.parametrize("method", [distil(passes=10**4), blocks(passes=10**4), compensated()], ids=str)
def test_a_budget_is_kept_with_all_that_takes_time(
    llama_pair: tuple[str, str], adapter: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    takes = Takes(monkeypatch)
    for kind in (Live, Streamed):
        takes(4.0, kind, "distances")
    takes(0.5, Steps, "step")
    takes(0.3, blocks_module, "_judged")
    takes(0.1, Walk, "_write")
    takes(9.0, compensated, "_fit")
    refined = refine(adapter, *llama_pair, method=method, minutes=1.0, **QUICK)
    assert refined.steps > 1
    assert 40 < takes.passed <= 60


@pytest.mark.parametrize(
    ("method", "module"), [(distil(passes=10**4), distil_module), (blocks(passes=10**4), blocks_module)], ids=str
)
def test_of_a_fit_that_time_ends_the_bar_is_full(
    llama_pair: tuple[str, str], adapter: Path, monkeypatch: pytest.MonkeyPatch, method: Any, module: Any
) -> None:
    bars, moved, real = [], [], module.progress_bar

    def seen(**told: Any) -> Any:
        bars.append(bar := real(**told | {"progress": True}))
        update = bar.update

        def moves(steps: int = 1) -> None:
            update(steps)
            moved.append(bar.n / bar.total)

        bar.update = moves
        return bar

    monkeypatch.setattr(module, "progress_bar", seen)
    takes = Takes(monkeypatch)
    for kind in (Live, Streamed):
        takes(1.0, kind, "distances")
    takes(0.5, Steps, "step")
    refined = refine(adapter, *llama_pair, method=method, minutes=1.0, **QUICK)
    (bar,) = bars
    assert 1 < refined.steps <= 120
    assert bar.n == bar.total
    half = len(moved) // 2
    assert 0.3 < moved[half] < 0.7


@pytest.mark.parametrize("method", [blocks(), compensated()], ids=str)
def test_where_nothing_was_fitted_nothing_is_judged_again(
    llama_pair: tuple[str, str], adapter: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    takes = Takes(monkeypatch)
    for kind in (Live, Streamed):
        takes(40.0, kind, "distances")
    refined = refine(adapter, *llama_pair, method=method, minutes=1.0, **QUICK)
    assert (refined.kept, refined.steps) == (True, 0)
    assert takes.passed == 80  # The base, and the start.


def test_texts_that_are_kept_come_back_as_they_were(tmp_path: Path) -> None:
    texts = [Tokens((1, 2, 3), "task", (0, 2), 2), Tokens((4,), "general")]
    State(tmp_path / "out", "of one run").keep_texts(texts)
    assert State(tmp_path / "out", "of one run").texts() == texts


def test_what_ends_before_there_is_text_leaves_nothing(
    llama_pair: tuple[str, str], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*_: Any, **__: Any) -> None:
        assert len(_kept(tmp_path)) == 1
        raise error

    monkeypatch.setattr(Sampled, "write", stops)
    for error in (KeyboardInterrupt(), MemoryError()):
        with pytest.raises(type(error)) as raised:
            refine(adapter, *llama_pair, out=tmp_path / "out", **QUICK)
        assert not hasattr(raised.value, "__notes__")
        assert not _kept(tmp_path)


def test_another_teacher_or_another_adapter_begins_anew(
    llama_pair: tuple[str, str], adapter: Path, tmp_path: Path
) -> None:
    tuned = Path(shutil.copytree(llama_pair[1], tmp_path / "tuned"))
    out, options = tmp_path / "out", {"texts": Counted(), **QUICK}
    _breaks_off(6, adapter, llama_pair[0], tuned, out=out, **options)
    tensors = load_file(tuned / "model.safetensors")
    save_file(tensors | {"model.norm.weight": 1.5 * tensors["model.norm.weight"]}, tuned / "model.safetensors")
    _breaks_off(6, adapter, llama_pair[0], tuned, out=out, **options)
    assert len(Counted.times) == 2
    factors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: 1.01 * x for name, x in factors.items()}, adapter / "adapter_model.safetensors")
    _breaks_off(6, adapter, llama_pair[0], tuned, out=out, **options)
    assert len(Counted.times) == 3
    assert len(_kept(tmp_path)) == 3


def test_what_counted_otherwise_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    State(tmp_path / "out", "of one run").keep_texts([Tokens((1, 2), "task")])
    monkeypatch.setattr(state_module, "_FORM", state_module._FORM + 1)
    later = State(tmp_path / "out", "of one run")
    assert later.texts() is None
    assert len(later.others) == 1
