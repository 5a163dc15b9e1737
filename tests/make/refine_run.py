"""`phlora refine` in one of several processes, which says what it found.

With FAIL, the second fails on the way; with LATE, its clock says that next to nothing is left.
"""

import hashlib
import importlib
import os

from peft_posthoc.cli.main import main
from peft_posthoc.errors import PosthocError

refine = importlib.import_module("peft_posthoc.refinement.refine")
distil = importlib.import_module("peft_posthoc.refinement.distil")
real, divergence, calls = refine.refine, distil.divergence, []


def told(*args, **options):
    found = real(*args, **options)
    digest = hashlib.sha256(b"".join(x.numpy().tobytes() for x in found.tensors.values())).hexdigest()
    print(f"found {digest} {found.steps}", flush=True)
    return found


def fails(*args):
    calls.append(None)
    if os.environ.get("FAIL") and os.environ["RANK"] == "1" and len(calls) == 4:
        raise PosthocError("It is too dark here.")
    return divergence(*args)


if os.environ.get("LATE") and os.environ["RANK"] == "1":
    seconds = refine.Clock.seconds
    refine.Clock.seconds = property(lambda clock: seconds.fget(clock) / 1000)
refine.refine, distil.divergence = told, fails
main(prog_name="phlora")
