"""What a process that this project starts does once, before it works: import PyTorch, the fast way."""

import gc
import sys


def import_torch() -> None:
    """Import PyTorch, and take what is there then out of every search for garbage.

    Of the half a million objects that the import makes none is garbage. Looking through them on the way takes a tenth
    of its time, and once more as Python ends two tenths: 0.3 s of each run. In a process of somebody else's the
    collector is theirs.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
