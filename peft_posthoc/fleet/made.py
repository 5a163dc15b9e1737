"""The adapters of a fleet that are made, so that the same command does not make them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_posthoc.adapters.card import REPORT
from peft_posthoc.files import write_whole
from peft_posthoc.fleet.member import Member
from peft_posthoc.json_file import read_json

FILE = ".phlora_fleet.json"


class Made:
    """What lies in the fleet's folder about its adapters.

    Each is noted before it is written, with a digest of the report that will lie beside it: adapters appear whole or
    not at all, so that after a kill at any moment the two together say whether it is there.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / FILE
        try:
            found = read_json(self._path)
            self._noted: dict[str, Any] = dict(found["adapters"]) if found["format"] == 1 else {}
        except (OSError, ValueError, KeyError, TypeError):  # It is not there, or somebody else's.
            self._noted = {}

    def has(self, member: Member) -> bool:
        """Whether the adapter is there, made of the same inputs with the same options."""
        noted, spool = self._noted.get(member.name), member.work.spool
        if spool is None or not isinstance(noted, Mapping) or noted.get("key") != spool.key:
            return False
        report = report_of(member.place)
        return report is not None and noted.get("rows") == _digest(report)

    def note(self, member: Member, report: Mapping[str, Any]) -> None:
        """Note an adapter that is about to be written.

        Raises:
            OutputError: The fleet's folder cannot be written to.
        """
        if member.work.spool is not None:
            self._noted[member.name] = {"key": member.work.spool.key, "rows": _digest(report)}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps({"format": 1, "adapters": self._noted}, indent=2, sort_keys=True) + "\n")


def report_of(place: Path) -> Mapping[str, Any] | None:
    """The report beside an adapter; None where there is none."""
    try:
        found = read_json(place / REPORT)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _digest(report: Mapping[str, Any]) -> str:
    # Its rows hold how long each weight took: no two runs write the same.
    return hashlib.sha256(json.dumps(report.get("rows"), sort_keys=True, default=str).encode()).hexdigest()
