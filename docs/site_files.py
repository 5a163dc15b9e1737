"""Pages and files of the repository that lie outside docs/, brought onto the site where a page links to them."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Every file of the repository that a page links to, and those that these link to."""
    waiting = [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("benchmarks/*.md"), *ROOT.glob("docs/**/*.md")]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        if path.suffix == ".md":
            waiting += [(path.parent / link).resolve() for link in LINK.findall(path.read_text(encoding="utf-8"))]
        if files.get_file_from_path(_place(path)) is None:
            files.append(File.generated(config, _place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository, as links between pages of the site."""
    source = ROOT / (page.file.src_uri if page.file.generated_by else f"docs/{page.file.src_uri}")
    above = "../" * page.file.src_uri.count("/")
    return LINK.sub(lambda found: above + _place((source.parent / found[1]).resolve()), markdown)


def _place(path: Path) -> str:
    """Where a file of the repository is on the site: what is in docs/ at the top."""
    place = path.relative_to(ROOT)
    return place.relative_to("docs").as_posix() if place.parts[0] == "docs" else place.as_posix()
