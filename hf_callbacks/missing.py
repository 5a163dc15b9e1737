"""Adapters that a run lacks when it is over: of its checkpoints, and `final`."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hf_callbacks.jobs import Done, Job
from hf_callbacks.metrics import eval_losses, read_report
from hf_callbacks.run import FINAL, Run, checkpoint_name
from peft_posthoc.checkpoints.model_files import weight_files
from peft_posthoc.errors import PosthocError, one_line
from peft_posthoc.extraction.request import Request
from peft_posthoc.fleet.extract_many import extract_many
from peft_posthoc.json_file import read_json
from peft_posthoc.progress import progress_bar
from peft_posthoc.refinement.refining import Refining
from peft_posthoc.sources import open_checkpoint
from peft_posthoc.text import counted


class CaughtUp(NamedTuple):
    """What there is now."""

    out: Path
    adapters: list[str]
    failures: list[str]
    warnings: list[str]

    def table(self) -> str:
        """A line for a terminal."""
        return f"{counted(len(self.adapters), 'adapter is', 'adapters are')} in {self.out}"

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return {"out": str(self.out), "adapters": self.adapters, "failures": self.failures, "warnings": self.warnings}


def make_missing(run: Run, *, best: bool | None, refining: Refining | None, progress: bool) -> CaughtUp:
    """Make what is missing.

    Args:
        run: The run.
        best: Whether `final` is its best checkpoint's; None: as the trainer's state says.
        refining: How `final` is refined.
        progress: Show a bar.

    Raises:
        PosthocError: There is nothing to make adapters of.
    """
    missing, warnings = run.missing(), list[str]()
    if not missing and not run.adapters():
        raise PosthocError(f"There are no checkpoints in `{run.folder}`.")
    done = _together(run, missing, progress=progress)
    left = {step: folder for step, folder in missing.items() if step not in {one.job.step for one in done}}
    steps = progress_bar(left.items(), progress=progress, desc="Adapters")
    done += [done for step, folder in steps for done in run.make(folder, step)]
    if run.adapters() and refining is not None and _is_refined(run):
        warnings.append(f"`{FINAL}` is refined already, and stays as it is. Remove it to have it refined anew.")
    elif run.adapters() and (refining is not None or not (run.out / FINAL).exists()):
        step = _final_step(run, warnings, best=best)
        if refining is not None and step in run.checkpoints():
            done += run.make(run.checkpoints()[step], step, name=FINAL, refining=refining)
        else:
            why = None if refining is None else f"the checkpoint of step {step} is gone"
            done.append(run.copy(step, name=FINAL)._replace(unrefined=why))
    failures = [f"There is no adapter `{job.name}`: {failure}" for job, failure, *_ in done if failure is not None]
    failures += [f"`{one.job.name}` is not refined: {one.unrefined}" for one in done if one.unrefined is not None]
    run.losses = eval_losses(_state(run).get("log_history"))
    try:
        run.draw()
    except (PosthocError, OSError) as error:
        failures.append(f"There is no page of the adapters: {one_line(error)}")
    made = [path.name for _, path in sorted(run.adapters().items())]
    made += [FINAL] if (run.out / FINAL).is_dir() else []
    return CaughtUp(run.out, made, failures, warnings)


def _together(run: Run, missing: Mapping[int, Path], *, progress: bool) -> list[Done]:
    """Make the adapters that can be made from one reading of the base.

    What goes wrong is left to be told where each is made by itself; so are DeepSpeed's partitions, of which some take a
    whole model's memory as soon as they are opened.
    """
    made, jobs, opened = run.work / "made", {}, {}
    for step, folder in missing.items():
        if not weight_files({path.name for path in folder.iterdir()}):
            continue
        with contextlib.suppress(PosthocError):
            checkpoint = open_checkpoint(folder, role="tuned", modules=True)
            checkpoint.label = checkpoint_name(run.folder, step)
            opened[f"step-{step}"] = checkpoint
            held = folder if folder.is_relative_to(run.work) else None
            jobs[f"step-{step}"] = Job(f"step-{step}", step, None, made / f"step-{step}", held)
    if run.base is None or len(opened) < 2:
        return []
    request = Request.of(run.request, base_revision=run.base.revision)
    try:
        fleet = extract_many(run.base.source, opened, request, out=made, force=True, progress=progress)
    except (PosthocError, ValueError):
        return []
    done = [run.ended(Done(jobs[one.name], None)) for one in fleet.members if one.error is None]
    shutil.rmtree(made, ignore_errors=True)
    return done


def _is_refined(run: Run) -> bool:
    try:
        return "refined" in read_report(run.out / FINAL)
    except PosthocError:
        return False


def _final_step(run: Run, warnings: list[str], *, best: bool | None) -> int:
    """The step whose adapter is `final`; a warning where it is not the one that was asked for."""
    adapters = run.adapters()
    step = _state(run).get("best_global_step") if best is not False else None
    if isinstance(step, int) and step in adapters:
        return step
    if step:
        warnings.append(f"The best checkpoint, of step {step}, has no adapter: `final` is the last one's.")
    return max(adapters)


def _state(run: Run) -> dict[str, Any]:
    """What the trainer wrote of itself into the last checkpoint; nothing where it did not, or it is damaged."""
    checkpoints = sorted(run.checkpoints().items())
    try:
        return dict(read_json(checkpoints[-1][1] / "trainer_state.json"))
    except (ValueError, TypeError, LookupError):
        return {}
