"""An inspection as one page of HTML that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
import os
from importlib import resources
from pathlib import PurePath

from peft_posthoc.inspection.found import Found
from peft_posthoc.inspection.plots import captions, drawings
from peft_posthoc.text import percent, sized

_TEMPLATE = "page.html.jinja"
_SCRIPT = "page.js"


def page(inspection: Found) -> str:
    """The page's HTML.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    # It comes with torch, but is not loaded with it.
    from jinja2 import Environment, StrictUndefined

    drawn = drawings(inspection)
    # What checkpoints bring (names, labels) is escaped; the drawings are matplotlib's, which escapes it too.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_read(_TEMPLATE))
    script = _read(_SCRIPT)
    return template.render(
        inspection=inspection,
        drawings=drawn,
        captions=captions(inspection),
        short=_short,
        percent=percent,
        sized=sized,
        script=script,
        # The one script that a browser may run here.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _short(label: str) -> str:
    """The end of a path; the whole of anything else."""
    return PurePath(label).name if os.path.isabs(label) else label


def _read(name: str) -> str:
    return (resources.files("peft_posthoc.inspection") / name).read_text(encoding="utf-8")
