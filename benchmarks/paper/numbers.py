"""Numbers as financial reports write them: `$1,234.5`, `(12)`, `17.7%`, `3 million`."""

from __future__ import annotations

import re

SCALES = {"": 1.0, "thousand": 1e3, "million": 1e6, "billion": 1e9, "percent": 0.01}
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)")


def number(text: str) -> float | None:
    """The value of a text that is one number, with currency, separators, brackets for minus, a scale; or None."""
    text, scale = split_scale(text.lower().replace(",", ""))
    text = re.sub(r"[$£€¥]|us\$", "", text).strip()
    negative = text.startswith("(") and text.endswith(")")
    text = text[1:-1].strip() if negative else text
    text = re.sub(r"^[$£€¥]", "", text).strip()
    share = text.endswith("%")
    text = text.removesuffix("%").strip()
    if not _NUMBER.fullmatch(text):
        return None
    value = float(text) * (-1 if negative else 1)
    return value * SCALES["percent" if share else scale]


def split_scale(text: str) -> tuple[str, str]:
    """A text, and the scale that its last word names; none where there is none."""
    text = text.strip()
    words = text.split()
    last = words[-1].lower().rstrip(".") if words else ""
    for scale in SCALES:
        if scale and last in (scale, scale + "s"):
            return " ".join(words[:-1]), scale
    return text, ""
