"""The ranks that every engine scales alike."""

from __future__ import annotations


def safe_rank(rank: int) -> int:
    """The smallest rank of at least `rank` that every engine scales by one: 8, or a multiple of 16.

    LoRAX and TGI pad other ranks themselves and then divide `lora_alpha` by the padded rank.
    """
    return 8 if rank <= 8 else -(-rank // 16) * 16
