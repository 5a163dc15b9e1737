"""What a callback must leave as it is in a training run: `-m tests.make.traces FOLDER BASE NAMES`.

Not in pytest's process, where beartype draws random numbers for its checks.
"""

import hashlib
import json
import random
import sys
import time
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
import transformers

from hf_callbacks import PosthocLoraCallback
from tests.make.trainer_runs import examples

EVENTS = ("train_begin", "epoch_begin", "step_begin", "step_end", "evaluate", "save", "epoch_end", "train_end")
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier", "gather", "scatter")
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_steps": 1}
FEW = {"sequences": 12, "length": 8}
# What is said to the Trainer, beside what all runs share; `callback` is said to ours.
RUNS = {
    "steps": {"eval_strategy": "steps", "eval_steps": 2},
    "epochs": dict.fromkeys(("logging_strategy", "eval_strategy", "save_strategy"), "epoch")
    | {"gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 3},
    "best": {"save_strategy": "best", "eval_strategy": "steps", **BEST},
    "best at the end": {"eval_strategy": "steps", **BEST, "eval_steps": 2, "save_total_limit": 1},
    "silent": {"logging_strategy": "no", "save_strategy": "no"},
    "here": {"eval_on_start": True, "eval_strategy": "epoch", "callback": {"background": False}},
    "at the end": {"logging_first_step": True, "logging_steps": 3, "callback": {"when": "end", "keep": 1}},
    "refined": {"eval_strategy": "epoch", "callback": {"refine": FEW}},
    "refined here": {"callback": {"refine": FEW, "background": False, "when": "end"}, "save_strategy": "no"},
    "stopped early": {"eval_strategy": "steps", **BEST, "stop": True},
    "resumed": {"resume": True},
}


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def randomness():
    states = (random.getstate(), numpy.random.get_state(), torch.get_rng_state().numpy().tobytes())
    return digest(repr(states).encode())


class Trace(transformers.TrainerCallback):
    """Remembers the trainer's control and the random numbers at every event, and every row that is logged."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not any(name.startswith("phlora/") for name in logs):
            self.note("log", control, sorted(logs))

    def note(self, event, control, *more):
        self.seen.append(
            [event, {k: v for k, v in vars(control).items() if k.startswith("should")}, randomness(), *more]
        )


for _event in EVENTS:
    setattr(Trace, f"on_{_event}", lambda self, args, state, control, event=_event, **_: self.note(event, control))


class InTheMiddle(transformers.TrainerCallback):
    """Lets the first adapter be finished between two saves."""

    def __init__(self, ours):
        self.ours = ours

    def on_step_begin(self, args, state, control, **kwargs):
        running = self.ours._run._jobs._running if self.ours._run else None
        while running is not None and running[1].poll() is None:
            time.sleep(0.01)


def rows(history):
    """The rows of a log that are not ours, without what a clock says."""
    clock = ("runtime", "per_second")
    kept = [row for row in history if not any(name.startswith("phlora/") for name in row)]
    return [{name: value for name, value in row.items() if not name.endswith(clock)} for row in kept]


def checkpoints(folder):
    found = {}
    for path in sorted(Path(folder).glob("checkpoint-*/*")):
        name = f"{path.parent.name}/{path.name}"
        if path.name == "trainer_state.json":
            state = json.loads(path.read_text())
            best = state["best_model_checkpoint"]
            found[name] = state | {
                "log_history": rows(state["log_history"]),
                "best_model_checkpoint": best and Path(best).name,
            }
        elif path.name != "training_args.bin":  # which names the folder
            found[name] = digest(path.read_bytes())
    return found


def train(name, folder, base, *, ours):
    """Train once, and say all that there is to say of it."""
    options = dict(RUNS[name])
    said, stop, resume = options.pop("callback", {}), options.pop("stop", False), options.pop("resume", False)
    args = {
        "output_dir": str(folder),
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    trace = Trace()
    for again in (False, True) if resume else (False,):
        transformers.set_seed(3)
        model = transformers.AutoModelForCausalLM.from_pretrained(base, attention_dropout=0.1)
        callbacks = [transformers.EarlyStoppingCallback(1)] if stop else []
        if ours:
            callback = PosthocLoraCallback(4, **said)
            callbacks += [InTheMiddle(callback), callback]
        trainer = transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(**args | ({"max_steps": 4} if resume and not again else {})),
            train_dataset=examples(8),
            eval_dataset=examples(4),
            callbacks=[*callbacks, trace],
        )
        output = trainer.train(resume_from_checkpoint=again or None)
    history = trainer.state.log_history
    weights = {key: digest(value.numpy().tobytes()) for key, value in trainer.model.state_dict().items()}
    return {
        "events": trace.seen,
        "log": rows(history),
        "summary is last": "train_runtime" in history[-1],
        "output": [output.global_step, output.training_loss, *rows([output.metrics])],
        "checkpoints": checkpoints(folder),
        "weights": weights,
        "randomness": randomness(),
        "ours": sum("phlora/energy" in row for row in history),
    }


def note_collectives():
    """Remember the names of collectives from now on, in the order in which they are called."""
    called = []

    def noted(name, work):
        def call(*args, **kwargs):
            called.append(name)
            return work(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, noted(name, getattr(dist, name)))
    return called


def main(folder, base, names):
    """Train with and without the callback, and write down what this process, perhaps one of several, saw."""
    called, said = note_collectives(), {}
    for name in names.split(","):
        for ours in (False, True):
            start = len(called)
            told = train(name, f"{folder}/{name}-{ours}", base, ours=ours)
            said[f"{name}-{ours}"] = told | {"collectives": called[start:]}
            if dist.is_initialized():
                dist.barrier()  # the next run's folder is read by all
    rank = dist.get_rank() if dist.is_initialized() else 0
    Path(folder, f"said-{rank}.json").write_text(json.dumps(said))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
