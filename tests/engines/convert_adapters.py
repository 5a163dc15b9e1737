"""llama.cpp's own converter of adapters, many in one process: `python convert_adapters.py CONVERTER BASE JOB`.

JOB is JSON: pairs of an adapter's folder and the GGUF file to write. Where the converter ends otherwise, its words are
in a `.txt` of that name instead.
"""

import json
import logging
import runpy
import sys
from pathlib import Path


class Errors(logging.Handler):
    """What the converter logs before it ends."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


errors = Errors()
logging.getLogger().addHandler(errors)
converter, base, job = sys.argv[1:]
for source, out in json.loads(Path(job).read_text()):
    errors.said.clear()
    sys.argv = [converter, source, "--base", base, "--outfile", out]
    try:
        runpy.run_path(converter, run_name="__main__")
    except (Exception, SystemExit) as error:
        Path(out).unlink(missing_ok=True)
        Path(out).with_suffix(".txt").write_text(" ".join([f"{type(error).__name__}: {error}", *errors.said]))
