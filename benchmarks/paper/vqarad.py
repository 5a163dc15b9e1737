"""VQA-RAD (Lau et al., 2018): questions on radiology images.

The paper's average normalised similarity has no formula there. Here it is 1 less the edits (of a letter, Levenshtein's)
from one text to the other, as a share of the longer one's letters, without regard to case, spaces at the ends and a
full stop. Two empty texts are alike.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from .task import Question, Sets

HOME = "flaviagiammarino/vqa-rad"
ORIGIN = f"https://huggingface.co/datasets/{HOME}"


class VQARad:
    """A question on an image."""

    about = f"VQA-RAD (Lau et al., 2018), {ORIGIN}, CC0 1.0"
    metrics = ("similarity", "exact")
    kind = "images"
    home = HOME

    def load(self, source: Path) -> Sets:
        return Sets(list(_read(source, "train")), list(_read(source, "test")))

    def score(self, question: Question, said: str) -> Mapping[str, float]:
        likeness = similarity(_plain(said), _plain(question.answer))
        return {"similarity": likeness, "exact": float(likeness == 1)}


def similarity(one: str, other: str) -> float:
    """Levenshtein's distance, as a likeness from 0 to 1."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, row = row, [i]
        for j, against in enumerate(other, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (letter != against)))
    return 1 - row[-1] / max(len(one), len(other), 1)


def _plain(text: str) -> str:
    return text.strip().lower().removesuffix(".").rstrip()


def _read(source: Path, part: str) -> Iterator[Question]:
    """The rows of a part's parquet files, as the hub has them in `data/`: an image as the bytes of its file.

    Raises:
        FileNotFoundError: There are none.
    """
    import pandas
    from PIL import Image

    files = sorted((source / "data").glob(f"{part}-*.parquet")) or sorted(source.glob(f"{part}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"There is no `{part}-*.parquet` in `{source}`: it comes from {ORIGIN}.")
    for file in files:
        for place, row in enumerate(pandas.read_parquet(file).to_dict("records")):
            image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
            yield Question(
                f"{part}-{file.name[len(part) + 1 : len(part) + 6]}-{place}",
                row["question"],
                row["answer"],
                None,
                image,
            )
