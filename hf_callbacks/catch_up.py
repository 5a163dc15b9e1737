"""`phlora catch-up`: adapters for the checkpoints of a run that is over."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click

from hf_callbacks.base import Base
from hf_callbacks.jobs import Done, Job
from hf_callbacks.memory import Memory, remembered
from hf_callbacks.metrics import eval_losses, read_report
from hf_callbacks.run import FINAL, Run, checkpoint_name
from peft_posthoc.checkpoints.model_files import weight_files
from peft_posthoc.cli.options import CHOICE, NAMES, OUTPUT, option
from peft_posthoc.cli.output import check_file, show
from peft_posthoc.cli.ranks import RANK, Asked
from peft_posthoc.cli.refining import AND_REFINE, refining_if_asked
from peft_posthoc.errors import PosthocError, one_line
from peft_posthoc.extraction.request import Request
from peft_posthoc.fleet.extract_many import extract_many
from peft_posthoc.json_file import read_json
from peft_posthoc.progress import progress_bar
from peft_posthoc.ranks.words import WORDS
from peft_posthoc.refinement.refining import Refining
from peft_posthoc.sources import open_checkpoint


class _AsTheRun(click.Command):
    """A command whose options are by default those that the callback of the run had."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        run_dir = given.get("run_dir")
        memory = _remembered(Path(run_dir), needed="base" not in given) if isinstance(run_dir, str) else None
        if memory is not None and memory.request is not None:
            run = {**memory.request, **memory.request.get("rank", {})}
            if "rank_pattern" in run:
                run["rank_pattern"] = json.dumps(run["rank_pattern"])
            # A rank that is asked for now takes the place of all that was said of ranks.
            said = _OF_RANKS if _OF_RANKS & set(given) else {"rank"} - set(memory.request.get("rank", {}))
            ctx.default_map = {name: value for name, value in run.items() if name not in said}
        return super().parse_args(ctx, args)


_OF_RANKS = set(WORDS)


class _CaughtUp(NamedTuple):
    """What there is now."""

    out: Path
    adapters: list[str]
    failures: list[str]

    def table(self) -> str:
        return f"{len(self.adapters)} adapters are in {self.out}"

    def to_dict(self) -> dict[str, Any]:
        return {"out": str(self.out), "adapters": self.adapters, "failures": self.failures}


@click.command("catch-up", cls=_AsTheRun)
@click.argument("run_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--base", help="The model that the run started from.  [default: what the callback wrote down]")
@option("base_revision")
@option("device")
@RANK
@option("rank_pattern")
@option("dtype")
@option("form")
@option("min_energy")
@CHOICE
@option("for_base")
@option("vocab")
@option("with_tokenizer")
@NAMES
@AND_REFINE
@OUTPUT
def main(
    run_dir: Path,
    base: str | None,
    base_revision: str | None,
    rank: Asked,
    quiet: bool,
    json_to: str | None,
    **options: Any,
) -> None:
    """Make the adapters that a training run lacks: of every checkpoint in RUN_DIR, and `final`, the last or best one's.

    They go to RUN_DIR/phlora. Options that are not given are those of the run's callback, where there was one.

    Example: phlora catch-up outputs --base Qwen/Qwen2.5-7B --rank 16
    """
    check_file(json_to, "--json")
    memory, refining = _remembered(run_dir, needed=base is None), refining_if_asked(options)
    try:
        request = Request.of(rank.one() or 32, **options)
    except (PosthocError, ValueError) as error:
        raise click.UsageError(one_line(error)) from error
    run = Run(run_dir, request)
    run.base = Base(base, base_revision, "it was given") if base else memory.base if memory else None
    if run.base is None:
        raise click.ClickException(f"It is not known which model `{run_dir}` started from. Give --base.")
    if run.claim() is not None:
        raise click.ClickException(f"A training run is at work in `{run_dir}`. It makes its adapters itself.")
    try:
        failures = _make(run, best=memory.best if memory else None, refining=refining, progress=not quiet)
    finally:
        run.stop()
    made = [path.name for _, path in sorted(run.adapters().items())]
    made += [FINAL] if (run.out / FINAL).is_dir() else []
    show(_CaughtUp(run.out, made, failures), json_to, quiet=quiet)
    if failures:
        raise click.exceptions.Exit(1)


def _make(run: Run, *, best: bool | None, refining: Refining | None, progress: bool) -> list[str]:
    """Make what is missing.

    Args:
        run: The run.
        best: Whether `final` is its best checkpoint's; None: as the trainer's state says.
        refining: How `final` is refined.
        progress: Show a bar.

    Returns:
        What failed, which stderr has too.
    """
    missing = run.missing()
    if not missing and not run.adapters():
        raise click.ClickException(f"There are no checkpoints in `{run.folder}`.")
    done = _together(run, missing, progress=progress)
    left = {step: folder for step, folder in missing.items() if step not in {one.job.step for one in done}}
    steps = progress_bar(left.items(), progress=progress, desc="Adapters")
    done += [done for step, folder in steps for done in run.make(folder, step)]
    if run.adapters() and refining is not None and not _is_refined(run):
        step = _final_step(run, best=best)
        if step not in run.checkpoints():
            raise click.ClickException(f"The checkpoint of step {step} is gone, and `{FINAL}` cannot be refined.")
        done += run.make(run.checkpoints()[step], step, name=FINAL, refining=refining)
    elif run.adapters() and not (run.out / FINAL).exists():
        done.append(run.copy(_final_step(run, best=best), name=FINAL))
    failures = [f"There is no adapter `{job.name}`: {failure}" for job, failure, *_ in done if failure is not None]
    failures += [f"`{one.job.name}` is not refined: {one.unrefined}" for one in done if one.unrefined is not None]
    run.losses = eval_losses(_state(run).get("log_history"))
    try:
        run.draw()
    except (PosthocError, OSError) as error:
        failures.append(f"There is no page of the adapters: {one_line(error)}")
    for failure in failures:
        click.echo(failure, err=True)
    return failures


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


def _final_step(run: Run, *, best: bool | None) -> int:
    """The step whose adapter is `final`."""
    adapters = run.adapters()
    step = _state(run).get("best_global_step") if best is not False else None
    if isinstance(step, int) and step in adapters:
        return step
    if step:
        click.echo(f"The best checkpoint, of step {step}, has no adapter: `final` is the last one's.", err=True)
    return max(adapters)


def _state(run: Run) -> dict[str, Any]:
    """What the trainer wrote of itself into the last checkpoint; nothing where it did not, or it is damaged."""
    checkpoints = sorted(run.checkpoints().items())
    try:
        return dict(read_json(checkpoints[-1][1] / "trainer_state.json"))
    except (ValueError, TypeError, LookupError):
        return {}


def _remembered(run_dir: Path, *, needed: bool) -> Memory | None:
    try:
        return remembered(run_dir / "_phlora")
    except PosthocError as error:
        if not needed:
            return None
        raise click.ClickException(f"{one_line(error)}. Give --base.") from error


if __name__ == "__main__":  # as before it was a command of `phlora`
    from peft_posthoc.cli.main import main as phlora

    phlora(["catch-up", *sys.argv[1:]], prog_name="phlora")
