"""`hf_callbacks` under the library's own name: `from peft_posthoc.callbacks import PosthocLoraCallback`."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    # By name: the library imports none of the packages on top of it.
    return getattr(importlib.import_module("hf_callbacks"), name)
