"""The layout of a file in either form."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import get_args

import torch

from peft_posthoc.extraction.forms.layout import FileLayout, Form
from peft_posthoc.extraction.forms.peft import peft
from peft_posthoc.extraction.forms.portable import portable
from peft_posthoc.extraction.plan import Plan

FORMS: tuple[Form, ...] = get_args(Form)


def lay_out(
    form: Form, plan: Plan, ranks: Mapping[str, int], changed: Collection[str], dtype: torch.dtype
) -> FileLayout:
    """Lay an adapter's file out, as far as it can be known without a tensor.

    Args:
        form: Which one.
        plan: What is carried, and what is kept whole.
        ranks: By weight that is factored.
        changed: The weights without factors that differ from the base's.
        dtype: Of the factors.

    Raises:
        AdapterError: The form cannot hold these modules.
        NothingToCarryError: Nothing that changed can be in the file.
    """
    by_module = {place.module: ranks[name] for name in plan.carried if name in ranks for place in plan.carried[name]}
    return portable(plan, by_module, dtype) if form == "portable" else peft(plan, by_module, changed, dtype)
