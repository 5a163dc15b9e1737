"""The adapters of one training run: what is made of which checkpoint, where it goes, and what is still to be made."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import nn

from hf_callbacks.base import Base
from hf_callbacks.card import card, summary
from hf_callbacks.extraction import Extraction
from hf_callbacks.jobs import KILLED, Done, Job, Jobs
from hf_callbacks.pin import pin
from hf_callbacks.plot import plot
from peft_posthoc.errors import CheckpointError, MissingExtraError, one_line
from peft_posthoc.peft_format import REPORT

FINAL = "final"
PICTURE = "energy.png"


class Run:
    """The folder of a training run, and its adapters.

    Args:
        folder: Where the Trainer saves its checkpoints.
        extraction: What to extract.
        out: Where the adapters go; `folder/phlora` by default.
        keep: How many adapters of steps stay; all by default.
    """

    def __init__(
        self, folder: Path, extraction: Extraction, *, out: Path | None = None, keep: int | None = None
    ) -> None:
        self.folder = folder
        self.out = out or folder / "phlora"
        # What begins with an underscore is not uploaded: here are links to whole models, and unfinished adapters.
        self.work = folder / "_phlora"
        self.base: Base | None = None
        self._extraction = extraction
        self._keep = keep
        self._jobs = Jobs()
        self._stale: set[int] = set()

    def checkpoints(self) -> dict[int, Path]:
        """The checkpoints that are there, by step."""
        return _by_step("checkpoint", self.folder.glob("checkpoint-*"))

    def adapters(self) -> dict[int, Path]:
        """The adapters of this run that are there, by step."""
        found = _by_step("step", (path.parent for path in self.out.glob(f"step-*/{REPORT}")))
        return {step: path for step, path in found.items() if step not in self._stale}

    def missing(self) -> dict[int, Path]:
        """What has no adapter yet and none on its way: checkpoints, and what an interrupted run held on to."""
        # What is held can be read; a checkpoint of the same step may hold DeepSpeed's partitions.
        held = self.checkpoints() | _by_step("step", self.work.glob("pinned/step-*"))
        done = self.adapters()
        oldest = min(done) if self._keep and len(done) >= self._keep else 0
        wanted = (step for step in sorted(held) if step >= oldest and step not in done)
        return {step: held[step] for step in wanted if _name(step) not in self._jobs}

    def make(self, source: Path | nn.Module, step: int, *, name: str = "", background: bool = False) -> list[Done]:
        """Make the adapter of a checkpoint or of the live model, or put it in the queue.

        Args:
            source: A checkpoint, or the model as it is now: that one is never put in the queue.
            step: When it was saved.
            name: Of the adapter's folder; `step-N` by default.
            background: In another process, after those that were asked for before.

        Returns:
            What came to its end by now.
        """
        name = name or _name(step)
        made = self.work / "made" / name
        tuned = f"{self.folder.name}/checkpoint-{step}"
        pinned = None
        try:
            if self.base is None:
                raise CheckpointError("it is not known which model this run started from. Give `base=`")
            if isinstance(source, Path):
                inside = source.is_relative_to(self.work)
                source = pinned = source if inside else pin(source, self.work / "pinned" / name)
                if background:
                    revision = ["--base-revision", self.base.revision] if self.base.revision else []
                    arguments = ["extract", self.base.source, str(source), str(made), *self._extraction.flags()]
                    arguments += [*revision, "--tuned-name", tuned, "--force", "--quiet"]
                    self._jobs.add(Job(name, step, arguments, made, pinned))
                    return self.poll()
            self._extraction.run(self.base.source, source, made, base_revision=self.base.revision, tuned_name=tuned)
        except Exception as error:  # whatever it is, it must not end a training run
            return [self._ended(Done(Job(name, step, (), made, pinned), one_line(error).removesuffix(".")))]
        return [self._ended(Done(Job(name, step, (), made, pinned), None))]

    def copy(self, step: int, *, name: str) -> Done:
        """Put a copy of a step's adapter under another name."""
        made = self.work / "made" / name
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(self.adapters()[step], made)
        return self._ended(Done(Job(name, step, (), made, None), None))

    def poll(self) -> list[Done]:
        """What has come to its end since it was last asked: adapters are in their places."""
        return [self._ended(done) for done in self._jobs.poll()]

    def wait(self) -> Iterator[Done]:
        """All that is in the queue, each when it comes to its end."""
        yield from map(self._ended, self._jobs.wait())

    def __len__(self) -> int:
        """How many adapters are in the queue."""
        return len(self._jobs)

    def draw(self) -> None:
        """Put a picture of the adapters onto their page, where matplotlib is installed."""
        adapters = self.adapters()
        if not adapters:
            return
        with contextlib.suppress(MissingExtraError):
            plot(adapters).savefig(self.out / PICTURE, dpi=150)
            (self.out / "README.md").write_text(summary(adapters, picture=PICTURE), encoding="utf-8")

    def stop(self) -> None:
        """End what runs in the background. What it worked on is still held, for when the run is resumed."""
        self._jobs.stop()

    def start_over(self) -> None:
        """Let go of what an earlier run in the same folder held on to; its adapters are not this run's."""
        self._stale = set(self.adapters())
        for folder in ("pinned", "made", "pushed"):
            shutil.rmtree(self.work / folder, ignore_errors=True)

    def _ended(self, done: Done) -> Done:
        job, failure = done
        if failure is None:
            try:
                self._place(job)
            except OSError as error:
                failure = one_line(error)
        # One that was killed can be made again.
        if job.pinned is not None and not (failure or "").startswith(KILLED):
            shutil.rmtree(job.pinned, ignore_errors=True)
        return Done(job, failure)

    def _place(self, job: Job) -> None:
        """Move a finished adapter into its place, with its card; then let go of those that are too old."""
        (job.made / "README.md").write_text(card(job.made, step=job.step), encoding="utf-8")
        self.out.mkdir(parents=True, exist_ok=True)
        beside, target = self.out / f".{job.name}", self.out / job.name
        shutil.rmtree(beside, ignore_errors=True)
        shutil.move(job.made, beside)  # perhaps to another file system; what follows is a rename
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)
        if job.name != FINAL:
            self._stale.discard(job.step)
        for old in sorted(self.adapters())[: -self._keep] if self._keep else ():
            shutil.rmtree(self.out / _name(old))
        (self.out / "README.md").write_text(summary(self.adapters()), encoding="utf-8")


def _name(step: int) -> str:
    return f"step-{step}"


def _by_step(word: str, folders: Iterable[Path]) -> dict[int, Path]:
    matches = ((re.fullmatch(rf"{word}-(\d+)", path.name), path) for path in folders if path.is_dir())
    return {int(match[1]): path for match, path in matches if match}
