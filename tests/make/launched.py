"""What `torchrun` does, with processes that have imported torch and the hosts already: to import them took most of it.

Where the launcher itself is of interest (restarts, several nodes, how it ends processes), tests call the real one.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from subprocess import CompletedProcess

from tests.make.limits import HANG

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.make.imported"])


def launched(
    module: str, *arguments: object, count: int = 2, cwd: Path | None = None, **environment: str
) -> CompletedProcess[str]:
    """Run `python -m module arguments` in several processes of one group. If one fails, the others are ended.

    Args:
        module: By its name.
        *arguments: Its own.
        count: How many processes; of one there is no group.
        cwd: The folder to run in, if not this one.
        **environment: More variables for each.
    """
    line = [module, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder, socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        group = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port.getsockname()[1]),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
        }
        port.close()
        processes = []
        for rank in range(count):
            own = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            variables = {**os.environ, **own, **environment}
            process = _PROCESSES.Process(target=_run, args=(line, cwd or Path.cwd(), variables, Path(folder)))
            process.start()
            processes.append(process)
        until = time.monotonic() + HANG
        while any(process.is_alive() for process in processes) and time.monotonic() < until:
            if any(process.exitcode for process in processes):
                break
            time.sleep(0.02)
        for process in processes:
            process.terminate()
            process.join(30)
            process.kill()
            process.join()
        codes = [process.exitcode or 0 for process in processes]
        told = [(Path(folder) / name).read_text(encoding="utf-8") for name in ("out", "err")]
    return CompletedProcess(line, next((code for code in codes if code > 0), min(codes)), *told)


def torchrun(module: str, *arguments: object, **environment: str) -> CompletedProcess[str]:
    """The same by the real one, with two processes."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module]
        + [str(argument) for argument in arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )


def _run(line: list[str], cwd: Path, environment: dict[str, str], folder: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    sys.argv = line
    assert "tests.make.imported" in sys.modules, "forkserver passes over what it cannot import"
    try:
        runpy.run_module(line[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing's processes end without.
