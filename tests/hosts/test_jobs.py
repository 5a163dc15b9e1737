"""Extractions in other processes."""

import subprocess
import sys
import time

import torch
from safetensors.torch import save_file

from hf_callbacks.jobs import Job, Jobs
from hf_callbacks.task import Task
from peft_posthoc.extraction.request import Request
from tests.make.limits import HANG
from tests.make.trainer_runs import adapters, alive


def test_jobs_run_one_at_a_time_in_order(llama_pair, tmp_path):
    jobs = Jobs()
    for step in (1, 2):
        task = Task(*map(str, llama_pair), str(tmp_path / f"made-{step}"), Request.of(8).to_json())
        jobs.add(Job(f"step-{step}", step, task, tmp_path / f"made-{step}", None))
    assert len(jobs) == 2
    assert jobs.poll() == []
    assert not (tmp_path / "made-2").exists()
    assert [(done.job.step, done.failure) for done in jobs.wait()] == [(1, None), (2, None)]
    assert len(jobs) == 0
    assert adapters(tmp_path) == ["made-1", "made-2"]


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    # So large that LAPACK takes much longer than the rest of this test.
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        save_file({"layers.0.proj.weight": torch.randn(4000, 4000)}, tmp_path / name / "model.safetensors")
    places = [str(tmp_path / name) for name in ("base", "tuned", "out")]
    start = f"""
import os
import time
from pathlib import Path
from hf_callbacks.jobs import Job, Jobs
from peft_posthoc.extraction.request import Request
from hf_callbacks.task import Task
jobs = Jobs()
task = Task(*{places}, {Request.of(32, exact=True).to_json()})
jobs.add(Job("step-1", 1, task, Path({places[2]!r}), None))
jobs.poll()
print(Path(f"/proc/self/task/{{os.getpid()}}/children").read_text(), flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        time.sleep(4)
        assert alive(child)
        parent.kill()
    until = time.monotonic() + HANG
    while alive(child) and time.monotonic() < until:
        time.sleep(0.1)
    assert not alive(child)
    assert not (tmp_path / "out").exists()
