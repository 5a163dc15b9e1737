"""Write the pages that are made from code: `python -m docs.make [NAME ...]`, all of them if none is named."""

import sys
from collections.abc import Callable
from pathlib import Path

from docs import report_schema
from tests.engines import page as engines
from tests.make import architectures, wrong_adapters

PAGES: dict[str, Callable[[], str]] = {
    "architectures": architectures.page,
    "engines": engines.page,
    "reference/report.schema.json": report_schema.page,
    "serving": wrong_adapters.page,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or PAGES:
        Path(__file__).with_name(name if "." in name else f"{name}.md").write_text(PAGES[name](), encoding="utf-8")
