"""How much of what a small rank loses comes back by refining? `refine.py WORK [RANK...]` prints docs/refine.md's table.

For each pair an adapter of the linear layers and the head is extracted, and refined without data and with 64 unlabelled
prompts of the task. Measured are the loss on batches of the task that no model has seen, and KL(tuned || adapted) on
general text that the base wrote and nothing was fitted on. Rows that are there already are not made again.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rank_pairs import Batch, Pair, make_pairs
from ranks import loss
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_posthoc import Prompts, Sampled, extract, refine
from peft_posthoc.refinement.distance import distances
from peft_posthoc.refinement.live import says
from peft_posthoc.refinement.texts import Texts, Writers
from peft_posthoc.running.load import with_adapter

PROMPTS, GENERAL, SEED_OF_GENERAL = 64, 64, 99
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Models:
    """A pair in memory, and what adapters of it are judged by."""

    pair: Pair
    tuned: Any
    tokenizer: Any
    general: Sequence[Any]

    @classmethod
    def of(cls, pair: Pair) -> Models:
        """Load both models, and let the base write."""
        base, tuned = (_load(path) for path in (pair.base, pair.tuned))
        tokenizer = AutoTokenizer.from_pretrained(pair.base, trust_remote_code=False)
        writers = Writers(base, tuned, tokenizer, len(tokenizer))
        written = Sampled().write(writers, count=2 * GENERAL, length=128, seed=SEED_OF_GENERAL, progress=False)
        return cls(pair, tuned, tokenizer, [text for text in written if text.kind == "general"])

    def score(self, model: Any) -> dict[str, float]:
        """The loss on the task, and the distance on general text."""
        found = distances(says(model), says(self.tuned), self.general, size=16, device=CPU)
        return {"loss": loss(model, self.pair.test), "general": found["general"].kl}

    def prompts(self) -> list[str]:
        """Prompts of the task without their answers; of prose, how each sample begins."""
        rows = [row for batch in self.pair.test for row in _prompts(batch)]
        return [self.tokenizer.decode(row) for row in rows[:PROMPTS]]


def _load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False).eval()


def _prompts(batch: Batch) -> Iterable[list[int]]:
    for ids, mask, labels in zip(*batch, strict=True):
        asked = ids[mask.bool() & (labels == -100)]
        yield (asked if len(asked) else ids[:32]).tolist()


def rows(pair: Pair, work: Path, ranks: Sequence[int], seeds: Sequence[int]) -> Iterable[dict[str, Any]]:
    """What each adapter of a pair comes to."""
    models = Models.of(pair)
    yield {"method": "base", **models.score(_load(pair.base))}
    yield {"method": "tuned", **models.score(models.tuned)}
    for rank in ranks:
        start = work / f"svd-r{rank}"
        extract(str(pair.base), str(pair.tuned), rank, head=True, dtype=torch.float32).save(start, force=True)
        yield {"method": "SVD", "rank": rank, **models.score(with_adapter(_load(pair.base), start))}
        given: dict[str, tuple[Texts, int]] = {
            "refined, no data": (Sampled(), 960),
            f"refined, {PROMPTS} prompts": (Prompts(models.prompts()), 480),
        }
        for method, (texts, sequences) in given.items():
            for seed in seeds:
                began = time.monotonic()
                refined = refine(start, pair.base, pair.tuned, texts=texts, sequences=sequences, seed=seed)
                seconds = time.monotonic() - began
                refined.save(work / "refined", force=True)
                found = models.score(with_adapter(_load(pair.base), work / "refined"))
                yield {"method": method, "rank": rank, "seed": seed, "seconds": round(seconds), **found}


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterable[str]:
    """A row for every adapter; of several seeds the mean, and the spread in brackets."""
    yield "| pair | rank | adapter | task loss | of the gap closed | general KL | seconds |"
    yield "|---|--:|---|--:|--:|--:|--:|"
    for name, own in found.items():
        (tuned,) = (row["loss"] for row in own if row["method"] == "tuned")
        for rank in sorted({row["rank"] for row in own if "rank" in row}):
            (svd,) = (row["loss"] for row in own if row["method"] == "SVD" and row["rank"] == rank)
            for method in dict.fromkeys(row["method"] for row in own if row.get("rank") == rank):
                same = [row for row in own if row["method"] == method and row.get("rank") == rank]
                losses, general = ([row[key] for row in same] for key in ("loss", "general"))
                closed = statistics.mean((svd - one) / (svd - tuned) for one in losses)
                seconds = statistics.mean(row.get("seconds", 0) for row in same)
                spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
                yield (
                    f"| {name} (tuned {tuned:.3f}) | {rank} | {method} | {statistics.mean(losses):.3f}{spread} | "
                    f"{'' if method == 'SVD' else f'{closed:.0%}'} | {statistics.mean(general):.3f} | "
                    f"{'' if method == 'SVD' else f'{seconds:.0f}'} |"
                )


if __name__ == "__main__":
    work, ranks = Path(sys.argv[1]), [int(rank) for rank in sys.argv[2:]] or [8]
    done: dict[str, list[dict[str, Any]]] = {}
    for pair in make_pairs(work):
        name = f"{pair.title}, {pair.task}, {pair.lr:g}"
        kept = work / f"refine-{name.replace(' ', '-').replace(',', '')}-{'-'.join(map(str, ranks))}.json"
        if not kept.exists():
            kept.write_text(json.dumps(list(rows(pair, work, ranks, seeds=(0,)))))
        done[name] = json.loads(kept.read_text())
        print("\n".join(table(done)), flush=True)
