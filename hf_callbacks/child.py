"""An extraction at low priority, ending with the process that started it.

    python -m hf_callbacks.child TASK.json

Its standard input is a pipe that nobody writes to: it ends when whoever holds the other end does, however that ends.
"""

import contextlib
import os
import signal
import sys
import threading
import time

PATIENCE = 5.0  # seconds to clean up in


def end_with_parent() -> None:
    """Wait for the other end of the pipe to close, then interrupt the work."""
    os.read(0, 1)  # not `sys.stdin`: its lock, held here, would abort the interpreter when it ends
    signal.raise_signal(signal.SIGINT)
    time.sleep(PATIENCE)
    os._exit(1)


if __name__ == "__main__":
    with contextlib.suppress(AttributeError, OSError):  # there is no such thing on Windows
        os.nice(19)
    threading.Thread(target=end_with_parent, daemon=True).start()

    from peft_posthoc.compute.own_process import import_torch

    import_torch()
    from hf_callbacks.task import Task
    from peft_posthoc.errors import one_line

    try:
        Task.read(sys.argv[1]).run()
    except Exception as error:
        sys.exit(one_line(error))  # the last line of standard error is the reason
