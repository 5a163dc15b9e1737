"""What a fleet's extraction would do and need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_posthoc.checkpoints.shared import Shared
from peft_posthoc.files import free_at
from peft_posthoc.fleet.member import Member
from peft_posthoc.text import shorten, size, took


@dataclass(frozen=True)
class Planned:
    """What would be read, written and needed, from headers alone."""

    shared: Sequence[Shared]
    members: Sequence[Member]
    out: Path
    seconds: tuple[float, float]
    """About how long the work takes on this machine, from deltas of low rank to noise; without fetching."""

    @property
    def failed(self) -> list[Member]:
        """Those of which no adapter can be made."""
        return [member for member in self.members if member.error is not None]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        good = [member for member in self.members if member.error is None]
        sides = [*self.shared, *(member.work.prepared.tuned for member in good)]
        return {
            "format": 1,
            "adapters": [
                {
                    "name": member.name,
                    "tuned": str(member.source) if isinstance(member.source, str | Path) else member.name,
                    "error": member.error,
                    **({} if member.error else {"preflight": member.work.needs.to_dict()}),
                }
                for member in self.members
            ],
            # Each base once.
            "read_bytes": sum(header.bytes for side in sides for header in side.headers.values()),
            "download_bytes": sum(side.to_fetch for side in sides),
            "stream_bytes": sum(getattr(side, "to_stream", 0) for side in sides),
            "adapter_bytes": sum(member.work.needs.adapter_bytes for member in good),
            "disk_bytes": sum(member.work.needs.disk_bytes for member in good),
            "disk_free": free_at(self.out),
            "seconds": list(self.seconds),
            "memory_bytes": max((member.work.needs.memory_bytes for member in good), default=0),
        }

    def table(self) -> str:
        """For a terminal: a row for each fine-tune, and what all need."""
        told = self.to_dict()
        lines = [f"{'adapter':<36} {'weights':>8} {'size':>10}  left out"]
        for member in self.members:
            if member.error is not None:
                lines.append(f"{shorten(member.name, 36):<36} failed: {member.error}")
                continue
            rows, needs = member.work.needs.rows, member.work.needs
            carried, out = (sum(row.status == what for row in rows) for what in ("carried", "left out"))
            lines.append(f"{shorten(member.name, 36):<36} {carried:>8} {size(needs.adapter_bytes):>10}  {out}")
        fetch = f", of which {size(told['download_bytes'])} are downloaded" if told["download_bytes"] else ""
        if told["stream_bytes"]:
            fetch += f", {'and' if fetch else 'of which'} {size(told['stream_bytes'])} are fetched as they are read"
        lines += [
            "",
            f"Adapters: at most {size(told['adapter_bytes'])}. To read: {size(told['read_bytes'])}, the base once"
            f"{fetch}. Disk needed: {size(told['disk_bytes'])} of {size(told['disk_free'])} that are free. Memory: "
            f"about {size(told['memory_bytes'])}.{took(self.seconds)}",
        ]
        return "\n".join(lines)
