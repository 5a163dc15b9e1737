"""Adapters that a run lacks when it is over: of its checkpoints, and `final`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from hf_callbacks.metrics import read_report
from hf_callbacks.run import FINAL, Run
from peft_posthoc.errors import PosthocError, one_line
from peft_posthoc.json_file import read_json
from peft_posthoc.progress import progress_bar
from peft_posthoc.refinement.refining import Refining


class CaughtUp(NamedTuple):
    """What there is now."""

    out: Path
    adapters: list[str]
    failures: list[str]
    warnings: list[str]

    def table(self) -> str:
        """A line for a terminal."""
        return f"{len(self.adapters)} adapters are in {self.out}"

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
    steps = progress_bar(missing.items(), progress=progress, desc="Adapters")
    done = [done for step, folder in steps for done in run.make(folder, step)]
    if run.adapters() and refining is not None and not _is_refined(run):
        step = _final_step(run, warnings, best=best)
        if step not in run.checkpoints():
            raise PosthocError(f"The checkpoint of step {step} is gone, and `{FINAL}` cannot be refined.")
        done += run.make(run.checkpoints()[step], step, name=FINAL, refining=refining)
    elif run.adapters() and not (run.out / FINAL).exists():
        done.append(run.copy(_final_step(run, warnings, best=best), name=FINAL))
    failures = [f"There is no adapter `{job.name}`: {failure}" for job, failure, *_ in done if failure is not None]
    failures += [f"`{one.job.name}` is not refined: {one.unrefined}" for one in done if one.unrefined is not None]
    try:
        run.draw()
    except (PosthocError, OSError) as error:
        failures.append(f"There is no page of the adapters: {one_line(error)}")
    made = [path.name for _, path in sorted(run.adapters().items())]
    made += [FINAL] if (run.out / FINAL).is_dir() else []
    return CaughtUp(run.out, made, failures, warnings)


def _is_refined(run: Run) -> bool:
    try:
        return "refined" in read_report(run.out / FINAL)
    except PosthocError:
        return False


def _final_step(run: Run, warnings: list[str], *, best: bool | None) -> int:
    """The step whose adapter is `final`; a warning where it is not the one that was asked for."""
    adapters = run.adapters()
    states = sorted((step, folder / "trainer_state.json") for step, folder in run.checkpoints().items())
    if best is not False and states:
        try:
            step = read_json(states[-1][1]).get("best_global_step")
        except (ValueError, AttributeError):  # saved without one, or damaged
            step = None
        if step in adapters:
            return int(step)
        if step:
            warnings.append(f"The best checkpoint, of step {step}, has no adapter: `final` is the last one's.")
    return max(adapters)
