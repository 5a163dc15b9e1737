"""`phlora refine` in one of several processes, which says what it found.

With FAIL=1, the second fails on the way, with FAIL=disk the first as it keeps text; with LATE, the second has a clock
that says that next to nothing is left.
"""

import hashlib
import importlib
import os

from peft_posthoc.cli.main import main
from peft_posthoc.errors import AdapterError, PosthocError

refine = importlib.import_module("peft_posthoc.refinement.refine")
distil = importlib.import_module("peft_posthoc.refinement.distil")
real, divergence, calls = refine.refine, distil.divergence, []


def told(*args, **options):
    found = real(*args, **options)
    digest = hashlib.sha256(b"".join(x.numpy().tobytes() for x in found.tensors.values())).hexdigest()
    os.write(1, f"found {digest} {found.steps}\n".encode())  # at once: there is another that writes
    return found


def fails(*args):
    calls.append(None)
    if os.environ.get("FAIL") == "1" and os.environ["RANK"] == "1" and len(calls) == 4:
        raise PosthocError("It is too dark here.")
    return divergence(*args)


def full(*args):
    raise AdapterError("The disk is full.")


if os.environ.get("FAIL") == "disk":
    refine.State.keep_texts = full
if os.environ.get("LATE") and os.environ["RANK"] == "1":
    seconds = refine.Clock.seconds
    refine.Clock.seconds = property(lambda clock: seconds.fget(clock) / 1000)
refine.refine, distil.divergence = told, fails
main(prog_name="phlora")
