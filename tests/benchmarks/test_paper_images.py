"""The loaders of images and clips on files in their own formats, and their metrics by hand."""

import io
import json
import math

import pandas
import pytest
from PIL import Image

from benchmarks.paper.captions import Cider, rouge_l
from benchmarks.paper.msvd import MSVD
from benchmarks.paper.vqarad import VQARad, similarity


def test_vqa_rad_as_the_hub_has_it(tmp_path):
    held = io.BytesIO()
    Image.new("L", (4, 3)).save(held, "JPEG")
    (tmp_path / "data").mkdir()
    for part, answer in (("train", "yes"), ("test", "Right lung.")):
        row = {"image": {"bytes": held.getvalue(), "path": None}, "question": "where?", "answer": answer}
        pandas.DataFrame([row]).to_parquet(tmp_path / "data" / f"{part}-00000-of-00001-eb8844602202be60.parquet")
    (train,), (test,) = VQARad().load(tmp_path)
    assert (train.prompt, train.answer, train.image.size, train.image.mode) == ("where?", "yes", (4, 3), "RGB")
    assert VQARad().score(test, "right lung") == {"similarity": 1, "exact": 1}
    assert VQARad().score(test, "light lung") == {"similarity": 0.9, "exact": 0}
    assert VQARad().score(test, "") == {"similarity": 0, "exact": 0}
    with pytest.raises(FileNotFoundError, match=r"no `train-\*.parquet` in .*vqa-rad"):
        VQARad().load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ("kitten", "sitting", 1 - 3 / 7),
        ("", "", 1),
        ("", "abc", 0),
        ("abc", "xyz", 0),
        ("ab", "ba", 0),
        ("no", "no", 1),
    ],
)
def test_similarity(one, other, share):
    assert similarity(one, other) == similarity(other, one) == pytest.approx(share)


def clips(folder, count):
    told = [
        {"video_path": f"{i}.avi", "question": "What happens?", "captions": [f"a man cooks dish {i}", f"cooking {i}"]}
        for i in range(count)
    ]
    (folder / "msvc.json").write_text(json.dumps(told))
    return told


def test_msvd_as_the_hub_has_it(tmp_path):
    for one in clips(tmp_path, 12)[:10]:
        (tmp_path / one["video_path"]).touch()
    train, test = MSVD().load(tmp_path)
    assert (len(train), len(test)) == (16, 2)  # of ten clips that are there eight, twice, and two, once
    assert not {one.image for one in train} & {one.image for one in test}
    assert train[0].image.is_file()
    found = MSVD().score(test[0], test[0].answer)
    assert found["ROUGE-L"] == 1
    assert MSVD().score(test[0], "") == {"ROUGE-L": 0, "CIDEr": 0}


def test_clips_that_are_not_there_are_a_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no `msvc.json` in .*Multi-Source-Video-Captioning"):
        MSVD().load(tmp_path)
    clips(tmp_path, 2)
    with pytest.raises(FileNotFoundError, match=r"None of the 2 clips .*`0\.avi`"):
        MSVD().load(tmp_path)


def test_rouge_l_takes_the_best_precision_and_the_best_recall():
    # Of "a dog runs fast" three words in order are in the first, and both words of the second.
    precision, recall = 3 / 4, 1
    weighted = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert rouge_l("a dog runs fast", ["A dog, he runs!", "runs fast"]) == pytest.approx(weighted)
    assert rouge_l("same words", ["same words"]) == 1
    assert rouge_l("", ["a dog"]) == rouge_l("a cat", [""]) == 0


def test_cider_weighs_words_by_how_few_clips_have_them():
    cider = Cider([["red dog"], ["red cat"]])
    # "red" is in both clips and weighs nothing; of unigrams "dog" is left, and the one bigram; no longer ones.
    assert cider("red dog", ["red dog"]) == pytest.approx(10 * (1 + 1) / 4)
    assert cider("red cat", ["red dog"]) == 0
    assert cider("dog", ["red dog"]) == pytest.approx(10 * 1 / 4 * math.exp(-1 / 72))  # a word too short
    assert cider("dog dog red", ["red dog"]) == pytest.approx(
        10 * (1 / 2) / 4 * math.exp(-1 / 72)
    )  # min(2, 1) * 1 / (2 * 1)
    assert cider("red dog", ["red dog", "red cat"]) == pytest.approx(10 * (1 + 1) / 4 / 2)  # the mean over references
    assert cider("", ["red dog"]) == 0
    assert Cider([["red dog"]])("red dog", ["red dog"]) == 0  # of one clip no word tells it from others
