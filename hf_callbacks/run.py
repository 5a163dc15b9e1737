"""The adapters of one training run: what is made of which checkpoint, where it goes, and what is still to be made."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout
from torch import nn

from hf_callbacks.base import Base
from hf_callbacks.card import summary
from hf_callbacks.jobs import Done, Job, Jobs
from hf_callbacks.memory import remembered
from hf_callbacks.metrics import read_report
from hf_callbacks.pin import pin
from hf_callbacks.plot import plot
from hf_callbacks.random_numbers import numbers_kept
from hf_callbacks.task import Task
from peft_posthoc.adapters.card import CARD, REPORT, card_of, is_our_card
from peft_posthoc.adapters.writer import adapter_files
from peft_posthoc.errors import AdapterError, CheckpointError, MissingExtraError, PosthocError, one_line
from peft_posthoc.extraction.request import Request
from peft_posthoc.files import staged, write_whole
from peft_posthoc.refinement.refining import Refining

FINAL = "final"
PICTURE = "energy.png"


class Run:
    """The folder of a training run, and its adapters.

    Args:
        folder: Where the Trainer saves its checkpoints.
        request: What to extract.
        out: Where the adapters go; `folder/phlora` by default.
        keep: How many adapters of steps stay; all by default.
    """

    def __init__(self, folder: Path, request: Request, *, out: Path | None = None, keep: int | None = None) -> None:
        # The adapters' place stays where it is when the program changes its working folder.
        self.folder = folder.absolute()
        self.out = (out or folder / "phlora").absolute()
        # What begins with an underscore is not uploaded: here are links to whole models, and unfinished adapters.
        self.work = self.folder / "_phlora"
        self.base: Base | None = None
        self.losses: Mapping[int, Mapping[str, float]] = {}
        """Of evaluations, by step and name: the page shows them beside the energies."""
        self.request = request
        self._keep = keep
        self._jobs = Jobs(self.work)
        self._lock: FileLock | None = None
        self._others: dict[int, int] = {}  # checkpoints that are not of this run: step, and when it was written

    def claim(self) -> str | None:
        """See that no other process works in the same folders; if one does, take others.

        Returns:
            What is to be told; None if no other process is at work.
        """
        if self._lock is not None:
            return None
        told = None
        place, out = self.work, self.out
        for number in range(2, 100):
            # One for all of this process: a run that was interrupted in a notebook is no other run.
            self._lock = FileLock(self.work / "lock", blocking=False, is_singleton=True)
            try:
                self.work.mkdir(parents=True, exist_ok=True)
                self._lock.acquire()
            except Timeout:
                self.work, self.out = place.with_name(f"{place.name}-{number}"), out.with_name(f"{out.name}-{number}")
                self._jobs = Jobs(self.work)
                told = (
                    f"another run is at work in `{self.folder}`, and each overwrites the other's checkpoints. "
                    f"This run's adapters go to `{self.out}`"
                )
                continue
            except (OSError, NotImplementedError):  # a file system without locks
                self._lock = None
            break
        return told

    def begin(self, step: int) -> str | None:
        """Keep apart what an earlier run in the same folder has left, or this one after the step it goes on from.

        Its adapters are moved into a folder `earlier-N` beside this run's. Its checkpoints get no adapters.

        Args:
            step: Where this run begins: 0, or the step of the checkpoint that it is resumed from.

        Returns:
            What is to be told; None if there was nothing.
        """
        self._others = {at: _written(path) for at, path in self.checkpoints().items() if at > step}
        for unfinished in self.work.glob(".*"):  # of a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        if step == 0:
            for folder in ("pinned", "made", "pushed"):
                shutil.rmtree(self.work / folder, ignore_errors=True)
        for at, path in self._pinned().items():
            if at > step:
                shutil.rmtree(path, ignore_errors=True)
        earlier = [path for at, path in self._made().items() if at > step]
        if step == 0 and (self.out / FINAL / REPORT).is_file():
            earlier.append(self.out / FINAL)
        if not earlier:
            return None
        place = _free(self.out / "earlier")
        place.mkdir()
        pages = [self.out / PICTURE] if step == 0 else []
        pages += [self.out / CARD] if step == 0 and is_our_card(self.out / CARD) else []
        for path in [*earlier, *pages]:
            if path.exists():
                path.rename(place / path.name)
        names = ", ".join(f"`{path.name}`" for path in sorted(earlier))
        return f"adapters of an earlier run ({names}) were moved to `{place}`"

    def resume(self) -> None:
        """Take the base that the run began with.

        Raises:
            CheckpointError: What was written down of it is damaged.
            PosthocError: It is not known.
        """
        memory, found = remembered(self.work), self.base
        # Found when this process began, it may be a checkpoint of this very run that the model was loaded from.
        own = found is not None and Path(found.source).is_relative_to(self.work)
        if memory is not None:
            self.base = memory.base
        elif found is None or own:
            self.base = None
            raise PosthocError("this run was begun without the callback; give `base=`")

    def checkpoints(self) -> dict[int, Path]:
        """The checkpoints of this run that are there, by step."""
        found = _by_step("checkpoint", self.folder.glob("checkpoint-*"))
        others = self._others
        return {step: path for step, path in found.items() if step not in others or others[step] != _written(path)}

    def adapters(self) -> dict[int, Path]:
        """The adapters that are there, by step."""
        return {step: path for step, path in self._made().items() if _is_readable(path)}

    def _made(self) -> dict[int, Path]:
        return _by_step("step", (path.parent for path in self.out.glob(f"step-*/{REPORT}")))

    def missing(self) -> dict[int, Path]:
        """Sources, by step, that have no adapter yet and none on its way: checkpoints, and what is still held."""
        # What is held can be read; a checkpoint of the same step may hold DeepSpeed's partitions.
        held = self.checkpoints() | self._pinned()
        done = self.adapters()
        newest = sorted(done)[-self._keep :] if self._keep else []
        oldest = newest[0] if self._keep and len(newest) == self._keep else 0
        wanted = (step for step in sorted(held) if step >= oldest and step not in done)
        return {step: held[step] for step in wanted if _name(step) not in self._jobs}

    def make(
        self,
        source: Path | nn.Module,
        step: int,
        *,
        name: str = "",
        background: bool = False,
        refining: Refining | None = None,
    ) -> list[Done]:
        """Make the adapter of a checkpoint or of the live model, or put it in the queue.

        Args:
            source: A checkpoint, or the model as it is now: that one is never put in the queue.
            step: When it was saved.
            name: Of the adapter's folder; `step-N` by default.
            background: In another process, after those that were asked for before.
            refining: How it is refined then; the step's adapter, if that is there.

        Returns:
            What came to its end by now.
        """
        name = name or _name(step)
        made = self.work / "made" / name
        tuned = checkpoint_name(self.folder, step)
        job = Job(name, step, None, made, None, refines=refining is not None)
        try:
            if self.base is None:
                raise CheckpointError("it is not known which model this run started from. Give `base=`")
            shutil.rmtree(made, ignore_errors=True)
            if extracted := refining is not None and step in self.adapters():
                shutil.copytree(self.adapters()[step], made)
            request = Request.of(self.request, base_revision=self.base.revision, tuned_name=tuned)
            task = Task(self.base.source, str(source), str(made), {}, extracted=extracted)
            if isinstance(source, Path):
                inside = source.is_relative_to(self.work)
                job = job._replace(pinned=source if inside else pin(source, self.work / "pinned" / name))
                task = replace(task, tuned=str(job.pinned))
                if background:
                    told = None if refining is None else refining.to_json()
                    self._jobs.add(job._replace(task=replace(task, request=request.to_json(), refining=told)))
                    return self.poll()
            with numbers_kept():
                task.run(None if isinstance(source, Path) else source, request, refining)
        except Exception as error:  # whatever it is, it must not end a training run
            return [self.ended(Done(job, one_line(error).removesuffix(".")))]
        return [self.ended(Done(job, None))]

    def copy(self, step: int, *, name: str) -> Done:
        """Put a copy of a step's adapter under another name."""
        made = self.work / "made" / name
        job = Job(name, step, None, made, None)
        try:
            shutil.rmtree(made, ignore_errors=True)
            shutil.copytree(self.adapters()[step], made)
        except OSError as error:
            shutil.rmtree(made, ignore_errors=True)
            return Done(job, one_line(error))
        return self.ended(Done(job, None))

    def poll(self) -> list[Done]:
        """Jobs that came to their end since it was last asked: adapters are in their places."""
        return [self.ended(done) for done in self._jobs.poll()]

    def wait(self) -> Iterator[Done]:
        """All that is in the queue, each when it comes to its end."""
        yield from map(self.ended, self._jobs.wait())

    def __len__(self) -> int:
        """How many adapters are in the queue."""
        return len(self._jobs)

    def write_page(self) -> None:
        """Write the page of the adapters, a table.

        Raises:
            AdapterError: A file of that name is not ours.
            OSError: It cannot be written.
        """
        self._write_page(self.adapters(), picture=None)

    def draw(self) -> None:
        """Write the page of the adapters with a picture, where matplotlib is installed.

        Raises:
            AdapterError: A file of that name is not ours.
            OSError: It cannot be written.
        """
        adapters = self.adapters()
        if not adapters:
            return
        picture = self.out / PICTURE
        with (
            contextlib.suppress(MissingExtraError),
            staged(picture, what="The picture of the adapters", force=True) as new,
        ):
            plot(adapters, self.losses).savefig(new, dpi=150, format="png")
        self._write_page(adapters, picture=PICTURE if picture.is_file() else None)

    def stop(self) -> None:
        """End what runs in the background. What it worked on is still held, for when the run is resumed."""
        self._jobs.stop()
        if self._lock is not None:
            self._lock.release(force=True)
            self._lock = None

    def _pinned(self) -> dict[int, Path]:
        return _by_step("step", self.work.glob("pinned/step-*"))

    def ended(self, done: Done) -> Done:
        """The end of a job: its adapter is in its place, or why there is none."""
        job, failure, killed, unrefined = done
        if failure is not None and job.refines and (job.made / REPORT).is_file():  # it was extracted before that
            failure, unrefined = None, failure
        if failure is None:
            try:
                self._place(job)
            except Exception as error:  # as in `make`
                failure = one_line(error).removesuffix(".")
        # One that was killed can be made again.
        if job.pinned is not None and not killed:
            shutil.rmtree(job.pinned, ignore_errors=True)
        if failure is not None:
            shutil.rmtree(job.made, ignore_errors=True)
        job.made.with_name(f"{job.made.name}.json").unlink(missing_ok=True)
        return Done(job, failure, killed, unrefined)

    def _place(self, job: Job) -> None:
        """Move a finished adapter into its place, with its card; then let go of those that are too old."""
        write_whole(job.made / CARD, card_of(job.made, step=job.step).encode())
        target = self.out / job.name
        if target.exists() and not (target / REPORT).is_file():
            raise AdapterError(f"There is something else than an adapter at `{target}`. Move it away")
        ours = adapter_files(target) if target.is_dir() else ()
        with staged(target, what="The adapter", force=True, ours=ours) as new:
            shutil.move(job.made, new)
        adapters = self.adapters()
        for old in sorted(adapters)[: -self._keep] if self._keep else ():
            shutil.rmtree(self.out / _name(old), ignore_errors=True)

    def _write_page(self, adapters: Mapping[int, Path], *, picture: str | None) -> None:
        page = self.out / CARD
        if page.exists() and not is_our_card(page):
            raise AdapterError(f"`{page}` was not written by this program, and is left as it is")
        final = self.out / FINAL if _is_readable(self.out / FINAL) else None
        write_whole(page, summary(adapters, final=final, picture=picture, losses=self.losses).encode())


def checkpoint_name(folder: Path, step: int) -> str:
    """What an adapter calls the checkpoint of a run that it was made of."""
    return f"{folder.name}/checkpoint-{step}"


def _name(step: int) -> str:
    return f"step-{step}"


def _by_step(word: str, folders: Iterable[Path]) -> dict[int, Path]:
    matches = ((re.fullmatch(rf"{word}-(\d{{1,18}})", path.name), path) for path in folders if path.is_dir())
    return {int(match[1]): path for match, path in matches if match}


def _written(folder: Path) -> int:
    """When the last of a folder's files was written, in nanoseconds."""
    return max((path.stat().st_mtime_ns for path in folder.iterdir()), default=0)


def _is_readable(adapter: Path) -> bool:
    try:
        read_report(adapter)
    except PosthocError:
        return False
    return True


def _free(path: Path) -> Path:
    """The first of `path-1`, `path-2`, ... that is not there."""
    numbers = (path.with_name(f"{path.name}-{number}") for number in range(1, 10**6))
    return next(each for each in numbers if not each.exists())
