"""The page of an inspection, as text and in a browser."""

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("matplotlib")

from peft_posthoc import extract
from peft_posthoc.inspection.inspection import Inspection, inspect
from tests.make import llama_spectra
from tests.make.diagonal import diagonal, pair_with
from tests.make.limits import HANG

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


def browse(page, tmp_path, *arguments):
    """What headless Chromium says of a page."""
    quiet = ("--disable-gpu", "--disable-background-networking", "--no-first-run", "--hide-scrollbars")
    return subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", *quiet, f"--user-data-dir={tmp_path / 'profile'}", *arguments, page],
        capture_output=True,
        text=True,
        check=True,
        timeout=HANG,
    ).stdout


def with_script(page, script, tmp_path):
    """A copy of a page that runs one more script."""
    own = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = page.read_text().replace("script-src ", f"script-src 'sha256-{own}' ")
    (tmp_path / "copy.html").write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    return tmp_path / "copy.html"


def colours(page, tmp_path):
    """How many pixels of each colour a screenshot has."""
    from matplotlib.image import imread

    shot = tmp_path / "shot.png"
    browse(page.as_uri(), tmp_path, "--window-size=1280,1600", f"--screenshot={shot}")
    pixels = (torch.from_numpy(imread(shot))[..., :3] * 255).round().long().reshape(-1, 3)
    return torch.unique(pixels @ torch.tensor([1 << 16, 1 << 8, 1]), return_counts=True)


@pytest.fixture(scope="module")
def large():
    return llama_spectra.llama(layers=8, width=512, inner=1024, rank=128)


@pytest.fixture(scope="module")
def page(large, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    large.html(path)
    return path


@in_a_browser
def test_in_a_browser_it_is_not_blank(page, tmp_path):
    empty = tmp_path / "empty.html"
    empty.write_text("<!DOCTYPE html><title>empty</title>")
    blank, _ = colours(empty, tmp_path)
    found, counts = colours(page, tmp_path)
    assert len(blank) == 1
    assert len(found) > 500
    assert counts.max() < 0.95 * counts.sum()
    # The lines of the modules, in their colours: the drawings are there.
    assert {0x0072B2, 0xD55E00, 0x009E73} <= set(found.tolist())


@in_a_browser
@pytest.mark.parametrize(("clicks", "expected"), [(0, "as written"), (1, "largest"), (2, "smallest")])
def test_a_click_on_a_heading_sorts_the_layers(clicks, expected, large, page, tmp_path):
    click = f"""
        const button = [...document.querySelectorAll(".layers button")].find((one) => one.textContent === "E at 32");
        for (let i = 0; i < {clicks}; i++) button.click();
    """
    dom = browse(with_script(page, click, tmp_path).as_uri(), tmp_path, "--dump-dom")
    names = re.findall(r'<tr><th scope="row" title="([^"]+)">', dom[dom.index('class="sortable layers"') :])
    shown = {name: round(large.curves.at(name, 32), 3) for name in names}
    assert sorted(names) == sorted(large.spectra)
    order = list(shown.values())
    if expected == "as written":
        assert names == list(large.spectra)
        assert order not in (sorted(order), sorted(order, reverse=True))
    else:
        assert order == sorted(order, reverse=expected == "largest")


@in_a_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser_nothing_is_cut(width, large, page, tmp_path):
    # A narrow window may scroll a table, never the page.
    parts = '["html", ".scroll"]' if width == 1280 else '["html"]'
    measure = f"""
        const over = {parts}.flatMap((one) => [...document.querySelectorAll(one)])
          .map((one) => one.scrollWidth - one.clientWidth);
        document.title = `over ${{Math.max(...over)}}`;
    """
    dom = browse(with_script(page, measure, tmp_path).as_uri(), tmp_path, f"--window-size={width},900", "--dump-dom")
    assert "<title>over 0</title>" in dom


def test_it_needs_nothing_else(page):
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert not re.search(r"url\((?!#)", text)
    assert not re.search(r"@import|<link|<iframe|<object", text)
    assert "default-src 'none'" in text
    assert len(page.read_bytes()) < 300_000
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in text


def test_no_name_in_a_page_is_given_twice(page):
    ids = re.findall(r' id="([^"]*)"', page.read_text())
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', page.read_text())) <= set(ids)


def test_the_same_inspection_gives_the_same_page(large, page, tmp_path):
    large.html(tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x onload=f()>', "$\\frac$", "_x", "&amp;"])
def test_names_are_text_whatever_they_hold(name, tmp_path):
    weight = f"layers.0.{name}.weight"
    inspect(*pair_with({weight: diagonal(4.0, 3.0), "layers.1.b.weight": diagonal(4.0)})).html(tmp_path / "page.html")
    read = Read((tmp_path / "page.html").read_text())
    assert read.tags.count("script") == 1
    assert "img" not in read.tags
    assert not [attribute for attribute in read.attributes if attribute.startswith("on")]
    assert read.texts.count(name) == 5  # three legends, and the rows of two heat maps
    assert weight.removesuffix(".weight") in read.texts


class Read(HTMLParser):
    """What a browser would see."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]

    def handle_data(self, data):
        self.texts.append(data.strip("\N{ZERO WIDTH SPACE}"))


def test_the_page_of_an_adapter_shows_what_was_written(tmp_path):
    adapter = extract(*pair_with({"a.weight": diagonal(4.0, 3.0), "b.weight": diagonal(4.0)}), 0.9)
    Inspection.of(adapter, {"as written": adapter}).html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<code>as written</code>" in text
    assert "Ranks of as written" in text
    assert "--rank auto" not in text


def test_of_several_that_were_written_the_answer_is_the_first_that_keeps_most():
    adapter = extract(*pair_with({"a.weight": diagonal(*[1.0] * 8, side=16)}), 8, exact=True)
    written = {"r2": adapter.at(2), "r8": adapter}
    assert Inspection.of(adapter, written).kept().startswith("The adapter (r8) keeps 100.0% ")
    assert Inspection.of(adapter.at(2)).kept().startswith("--energy 0.5 keeps >25.0% ")


def test_the_picture_is_of_any_format_that_matplotlib_knows(large, tmp_path):
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        large.plot(tmp_path / f"plot{suffix}")
        assert (tmp_path / f"plot{suffix}").read_bytes().startswith(start)


def test_the_page_begins_with_the_answer(tmp_path):
    deltas = {"layers.0.a.weight": diagonal(*[1.0] * 8), "lm_head.weight": diagonal(2.0, 2.0, 2.0, 2.0, side=4)}
    inspect(*pair_with(deltas)).html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    answer = text.index("Rank 8 keeps 100.0% of the change of the 1 weight that it carries, 33.3% of the whole change")
    assert answer < text.index("lm_head holds 66.7% of the whole change and is not carried.") < text.index("<dl")
    assert '<td data-value="512" class="larger">larger: 160.0%</td>' in text
