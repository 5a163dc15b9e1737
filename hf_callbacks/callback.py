"""The Trainer's events: when a base is looked for, when an adapter is made, what is logged."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Unpack, cast

from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_callbacks.base import Base, find_base, given
from hf_callbacks.data import on_data_of
from hf_callbacks.ended import Ended
from hf_callbacks.gather import gather, is_partitioned, is_sharded, saves_partitions, trains_adapter
from hf_callbacks.log import Log, calling_trainer, is_summary
from hf_callbacks.memory import Memory, remember
from hf_callbacks.push import Push
from hf_callbacks.run import FINAL, Run
from hf_callbacks.turns import others_wait
from peft_posthoc.checkpoints.hub import is_repo_id
from peft_posthoc.errors import one_line
from peft_posthoc.extraction.request import Options, Request, takes_options, with_options
from peft_posthoc.ranks.rules import Rank, as_rule, several
from peft_posthoc.refinement.refining import Refining
from peft_posthoc.sources import open_checkpoint

logger = logging.getLogger(__name__)

Event = Callable[..., None]
# Options that the run itself sets.
_TOLD_BY_THE_RUN = {"tuned_revision", "tuned_name", "choose", "leave_out"}


def _on_all(event: Event) -> Event:
    """Make a method an event of the Trainer's in which the first process works, and the others wait for it.

    Whatever goes wrong is told and does not end the training, but for a callback that is `strict`.
    """

    @functools.wraps(event)
    def harmless(
        self: PosthocLoraCallback,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        with others_wait(first=state.is_world_process_zero):
            self._log.guarded(f"`{event.__name__}` failed", lambda: event(self, args, state, control, **kwargs))

    return harmless


class PosthocLoraCallback(TrainerCallback):  # type: ignore[misc]
    """Leaves a LoRA adapter beside every checkpoint of a full fine-tune (PHLoRA, arXiv 2509.10971).

    Adapters come to lie in `output_dir/phlora/step-N`, the last or best one in `output_dir/phlora/final`. They stay
    when `save_total_limit` deletes their checkpoints. Nothing is written into a checkpoint.

    Training is not held up: the work is done by another process at low priority, one checkpoint at a time. It is not
    endangered either: what fails is logged as a warning with its reason. The trainer's control, its state, its random
    numbers and the order of its collectives are what they are without the callback.

    Args:
        rank: How many singular triplets of each delta to keep: an int is a rank, a float in (0, 1] the share of the
            delta's energy, `"auto"` what stands out of its noise, a `RankRule` anything else; or a `budget` of all
            layers together.
        base: The model that the fine-tune starts from: a folder or a hub id. By default where the model was loaded
            from, if that holds it still and lies outside of the run's folder; otherwise a snapshot of the initial
            weights is kept in `output_dir/_phlora/base`.
        out: Where adapters go, in place of `output_dir/phlora`.
        when: `"save"`, after every save; a number `n`, after every n-th; `"end"`, only `final`.
        background: Work in another process; otherwise training waits for every adapter.
        refine: Fit `final` to what the tuned model computes, on the trainer's eval set, or its train set if it has
            none, without labels, on `device`. True, or arguments of `refine`: `{"minutes": 10}`, `texts` of your own.
            Where that fails `final` stays as it was extracted, and the reason is told.
        strict: Raise what is otherwise a warning.
        keep: How many adapters of steps stay, the newest; all by default.
        push_to_hub: A repository on the hub, `org/name`, that every adapter is uploaded to while training goes on:
            `final` to its root, the others to folders of their names. If there is none it is made, a private one
            unless the trainer's `hub_private_repo` is False.
        **options: As `Options` has them.

    Raises:
        ValueError: An argument makes no sense.
    """

    @takes_options
    def __init__(
        self,
        rank: Rank = 32,
        *,
        base: str | PathLike[str] | None = None,
        out: str | PathLike[str] | None = None,
        when: Literal["save", "end"] | int = "save",
        background: bool = True,
        strict: bool = False,
        keep: int | None = None,
        push_to_hub: str | None = None,
        refine: bool | Mapping[str, Any] = False,
        **options: Unpack[Options],
    ) -> None:
        if when not in ("save", "end") and (isinstance(when, bool) or not isinstance(when, int) or when < 1):
            raise ValueError(f"`when` must be 'save', 'end', or a number of saves of at least 1. Got {when!r}.")
        if keep is not None and keep < 1:
            raise ValueError(f"`keep` must be at least 1, or None for all. Got {keep!r}.")
        if push_to_hub is not None and not (isinstance(push_to_hub, str) and is_repo_id(push_to_hub)):
            raise ValueError(f"`push_to_hub` must be a repository such as 'me/adapters'. Got {push_to_hub!r}.")
        if own := sorted(_TOLD_BY_THE_RUN & set(options)):
            raise ValueError(f"`{own[0]}` is known of every checkpoint of a run. Leave it out.")
        if isinstance(served := options.get("for_base"), str | PathLike):
            options["for_base"] = given(served, None).source
        self._request = Request.of(rank, **options)
        if isinstance(as_rule(rank), several):
            raise ValueError("One adapter is made of every checkpoint, at one rank. Several are given.")
        self._refining = Refining.of(refine)
        self._told_request = self._spelled(background)
        self._given = None if base is None else given(base, options.get("base_revision"))
        self._out = None if out is None else Path(out).absolute()
        self._when, self._background, self._strict, self._keep = when, background, strict, keep
        self._repo_id = push_to_hub
        self._log = Log(strict=strict)
        self._ended = Ended(self._log, by=self)
        self._run: Run | None = None
        self._push: Push | None = None
        self._run_dir = ""
        self._saves, self._is_training = 0, False
        self._on_disk: set[int] = set()  # steps whose weights can be read from files
        self._idle = False  # there is nothing to extract in this run

    def _spelled(self, background: bool) -> dict[str, Any] | None:
        """The request for other processes; None where it is for this one alone."""
        try:
            if background and self._refining is not None:
                self._refining.to_json()
            return self._request.to_json()
        except ValueError as error:
            if background:  # said now, where it can still be mended
                raise ValueError(f"{one_line(error)} Work in this one: `background=False`.") from error
            return None

    def attach(self, trainer: Trainer) -> PosthocLoraCallback:
        """Say which trainer's log gets the numbers, where it cannot be found by itself."""
        self._log.trainer = trainer
        return self

    @_on_all
    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep hold of the initial weights: a resumed run changes them before its first step."""
        model = cast(nn.Module, kwargs["model"])
        if state.is_world_process_zero and model is not None and not trains_adapter(model):
            run = self._opened(args, state)
            if self._given is None and not (run.work / "base.json").is_file():
                self._log.guarded("the base was not found", lambda: self._find(model))

    @_on_all
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Settle on a base, and catch up with what an interrupted run left."""
        model = cast(nn.Module, kwargs["model"])
        self._saves, self._on_disk, self._is_training = 0, set(), True
        self._log.trackers_are_open, self._ended.is_first = True, True
        self._idle = trains_adapter(model)
        if not state.is_world_process_zero:
            return
        if self._idle:
            self._log.warn(
                "this run trains a PEFT adapter of its own (LoRA or the like): its checkpoints are adapters already, "
                "and none is extracted"
            )
            return
        run = self._opened(args, state)
        resumed = state.global_step > 0
        self._log.guarded("what lies there was not kept apart", lambda: _say(run.begin(state.global_step)))
        self._log.guarded("the base was not found", lambda: self._settle(model, args, resumed=resumed))
        if run.base is None:
            return
        logger.info("phlora: the base is %s: %s.", run.base.source, run.base.how)
        if self._repo_id is not None:
            self._log.guarded("adapters are not uploaded", lambda: self._open_hub(args))
        if resumed and self._when == "save":
            self._catch_up()

    @_on_all
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make an adapter of what was saved."""
        if self._idle:
            return
        # The same on every process, as `_take` waits for all of them.
        step, first, partitions = state.global_step, state.is_world_process_zero, saves_partitions(args)
        self._saves += 1
        chosen = self._when == "save" or (isinstance(self._when, int) and self._saves % self._when == 0)
        if chosen or not partitions:
            self._on_disk.add(step)
        taken = self._take(kwargs["model"], f"step-{step}", first=first) if chosen and partitions else None
        if not first or not chosen or self._run is None or self._run.base is None:
            return  # if there is no base, that was told when training began
        run = self._opened(args, state)
        if (source := taken if partitions else run.checkpoints().get(step)) is not None:
            self._ended.adapters(self._run, self._push, run.make(source, step, background=self._background))
        elif not partitions:
            self._log.warn(f"no checkpoint of step {step} in `{run.folder}`")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See what has been finished."""
        self._log.state = state
        self._log.guarded("finished adapters were not looked for", self._look)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """When training is summed up, wait for the adapters of steps: trackers close with the event that follows."""
        # A user may log the same row later, perhaps in one process alone, for which the others would wait.
        if is_summary(kwargs["logs"]) and self._is_training:
            self._is_training, self._log.state = False, state
            with others_wait(first=state.is_world_process_zero):
                self._log.guarded("adapters are missing", self._finish_steps)

    @_on_all
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make `final`, and wait for it."""
        first, model = state.is_world_process_zero, cast(nn.Module, kwargs["model"])
        taken = None
        last = (args.load_best_model_at_end and state.best_global_step) or state.global_step
        if not self._idle and is_partitioned(model) and last not in self._on_disk:  # the same on every process
            taken = self._take(model, FINAL, first=first)
        self._log.trackers_are_open = self._is_training = False
        if not first or self._idle or self._run is None:
            return
        run = self._opened(args, state)
        try:
            if run.base is not None:
                self._finish_steps()
                self._log.guarded(f"there is no adapter `{FINAL}`", lambda: self._finish(args, state, model, taken))
                self._log.guarded("there is no picture of the adapters", run.draw)
                self._log.guarded("uploads are missing", self._wait_for_hub)
        finally:
            run.stop()

    def _opened(self, args: TrainingArguments, state: TrainerState) -> Run:
        """The run that the events are about; where its trainer saves checkpoints now."""
        self._log.state = state
        self._log.trainer = calling_trainer() or self._log.trainer
        folder, trainer = args.output_dir, self._log.trainer
        if trainer is not None:
            # A folder of its own for every trial of a hyperparameter search.
            folder = trainer._get_output_dir(getattr(trainer, "_trial", None))
        if self._run is None or self._run_dir != folder:
            self._run_dir = folder
            self._run = Run(Path(folder), self._request, out=self._out, keep=self._keep)
            self._run.base = self._given
        _say(self._run.claim())
        # The program may have changed its working folder; the adapters stay together, in the first one.
        self._run.folder = Path(folder).absolute()
        return self._run

    def _find(self, model: nn.Module) -> None:
        if self._run is not None:
            self._run.base = find_base(model, self._run.folder, self._run.work)

    def _settle(self, model: nn.Module, args: TrainingArguments, *, resumed: bool) -> None:
        if (run := self._run) is None:
            return
        if self._given is not None:  # what cannot be read is told now, not after the first save
            open_checkpoint(self._given.source, revision=self._given.revision, role="base")
        elif resumed:
            run.resume()
        elif run.base is None:
            self._find(model)
        if run.base is not None:
            best = bool(args.load_best_model_at_end)
            self._log.guarded(
                "the run's base and options were not written down",
                lambda: remember(Memory(cast(Base, run.base), self._told_request, best), run.work),
            )

    def _finish(self, args: TrainingArguments, state: TrainerState, model: nn.Module, taken: Path | None) -> None:
        run = cast(Run, self._run)
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        step = int(Path(best).name.rpartition("-")[2]) if best else state.global_step
        # Without a checkpoint, the model as it is: the best one, where that was to be loaded.
        source = taken or run.checkpoints().get(step) or model
        refining = None if self._refining is None else on_data_of(self._log.trainer, self._refining)
        spread = source is model and (is_partitioned(model) or is_sharded(model))
        if taken is None and step in run.adapters() and (refining is None or spread):
            why = None if refining is None else "the weights are spread over processes, and were not saved"
            self._ended.adapters(run, self._push, [run.copy(step, name=FINAL)._replace(unrefined=why)])
        elif spread:
            self._log.warn(f"there is no adapter `{FINAL}`: the weights are spread over processes, and were not saved")
        else:
            made = run.make(source, step, name=FINAL, background=self._background, refining=refining)
            self._ended.adapters(run, self._push, made)
            self._wait()

    def _open_hub(self, args: TrainingArguments) -> None:
        run, repo_id = cast(Run, self._run), cast(str, self._repo_id)
        private = args.hub_private_repo is not False  # by default: an adapter may tell what it was trained on
        self._push = Push(repo_id, run.work / "pushed", private=private, token=args.hub_token)

    def _take(self, model: nn.Module, name: str, *, first: bool) -> Path | None:
        """Save the live model where its checkpoint holds no weights. Every process calls this; the first gets it."""
        run = self._run
        if not first or run is None or run.base is None:
            gather(model, None)
            return None
        to = run.work / "pinned" / name
        self._log.guarded(f"there is no adapter `{name}`", lambda: gather(model, to))
        return to if to.is_dir() else None

    def _look(self) -> None:
        if self._run is not None and len(self._run):
            self._ended.adapters(self._run, self._push, self._run.poll())
        if self._push is not None and len(self._push):
            self._ended.uploads(self._push, self._push.poll())

    def _finish_steps(self) -> None:
        if not self._idle and self._run is not None and self._run.base is not None:
            if self._when == "save":
                self._catch_up()
            self._wait()

    def _catch_up(self) -> None:
        """Checkpoints that were saved without an event, or whose adapter failed, and what an interrupted run held."""
        if self._run is not None:
            for step, folder in self._run.missing().items():
                self._ended.adapters(self._run, self._push, self._run.make(folder, step, background=self._background))

    def _wait(self) -> None:
        if self._run is not None and len(self._run):
            for done in tqdm(self._run.wait(), total=len(self._run), desc="Adapters", disable=None):
                self._ended.adapters(self._run, self._push, [done])

    def _wait_for_hub(self) -> None:
        if self._push is not None and len(self._push):
            for sent in tqdm(self._push.wait(), total=len(self._push), desc="Uploads", disable=None):
                self._ended.uploads(self._push, [sent])


PosthocLoraCallback.__doc__ = with_options(PosthocLoraCallback.__doc__ or "")


def _say(message: str | None) -> None:
    if message is not None:
        logger.warning("phlora: %s.", message)
