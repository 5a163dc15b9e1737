"""Run the engines that are installed (or those named), keep what they did, and write the page of it.

python -m tests.engines [ENGINE ...]
"""

import sys

from tests.engines.page import PAGE, page
from tests.engines.record import record
from tests.engines.running import ENGINES

names = sys.argv[1:] or [name for name, engine in ENGINES.items() if engine.installed]
record(names)
PAGE.write_text(page(), encoding="utf-8")
