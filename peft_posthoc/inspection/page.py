"""An inspection as one page of HTML that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

from peft_posthoc.inspection.drawing import called
from peft_posthoc.inspection.found import Found
from peft_posthoc.inspection.plots import drawings
from peft_posthoc.text import percent, sized

_HERE = "peft_posthoc.inspection"


def page(inspection: Found) -> str:
    """The page's HTML.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    return rendered(_HERE, inspection=inspection, drawings=drawings(inspection))


def rendered(package: str, **values: Any) -> str:
    """The page of a package, `page.html.jinja`, with the style and the script that all pages have."""
    # It comes with torch, but is not loaded with it.
    from jinja2 import Environment, StrictUndefined

    # What checkpoints bring (names, labels) is escaped; the drawings are matplotlib's, which escapes it too.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_read(package, "page.html.jinja"))
    script = _read(_HERE, "page.js")
    return template.render(
        called=called,
        percent=percent,
        sized=sized,
        style=_read(_HERE, "page.css"),
        script=script,
        # The one script that a browser may run here.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )


def _read(package: str, name: str) -> str:
    return (resources.files(package) / name).read_text(encoding="utf-8")
