"""MSVD's clips (Chen and Dolan, 2011) with the captions of Multi-Source-Video-Captioning: the paper's CaptionGen.

The captions are a file, `msvc.json`: clips of several sets, each with a question and several captions. The clips are
not in it; those are used that lie beside it. One in five, by the paper's seed, is asked about once and scored against
all its captions; of the others each caption is trained on. The paper does not say how it comes to 2,000 and 500: they
are the most here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .captions import Cider, rouge_l
from .task import Question, Sets, needed, sample

ORIGIN = "https://huggingface.co/datasets/DAMO-NLP-SG/Multi-Source-Video-Captioning"
TRAIN, TEST = 2000, 500


class MSVD:
    """A question on a clip, and captions."""

    about = (
        f"MSVD (Chen and Dolan, 2011) with captions of Multi-Source-Video-Captioning (DAMO-NLP-SG), {ORIGIN}, MIT; "
        "the clips are YouTube's"
    )
    metrics = ("ROUGE-L", "CIDEr")
    kind = "clips"
    home = None

    def load(self, source: Path) -> Sets:
        told = json.loads(needed(source, "msvc.json", ORIGIN).read_text(encoding="utf-8"))
        clips = [one for one in told if (source / one["video_path"]).is_file()]
        if told and not clips:
            raise FileNotFoundError(
                f"None of the {len(told)} clips of `msvc.json` is in `{source}`, not even `{told[0]['video_path']}`: "
                "they come from MSVD's authors (Chen and Dolan, 2011)."
            )
        chosen = {one["video_path"] for one in sample(clips, len(clips) // 5)}
        scored = sample([one for one in clips if one["video_path"] in chosen], TEST)
        cider = Cider([one["captions"] for one in scored])
        train = [
            Question(f"{one['video_path']}-{place}", one["question"], caption, None, source / one["video_path"])
            for one in clips
            if one["video_path"] not in chosen
            for place, caption in enumerate(one["captions"])
        ]
        test = [
            Question(path, one["question"], one["captions"][0], (one["captions"], cider), source / path)
            for one in scored
            for path in [one["video_path"]]
        ]
        return Sets(sample(train, TRAIN), test)

    def score(self, question: Question, said: str) -> Mapping[str, float]:
        references, cider = question.gold
        return {"ROUGE-L": rouge_l(said, references), "CIDEr": cider(said, references)}
