"""llama.cpp's own converter of adapters, many in one process: `python convert_adapters.py CONVERTER BASE JOB`.

JOB is JSON: by name, an adapter's folder and the GGUF file to write. It gets `NAME.txt` beside the file instead where
the converter ends otherwise.
"""

import json
import runpy
import sys
from pathlib import Path

converter, base, job = sys.argv[1:]
for source, out in json.loads(Path(job).read_text()):
    sys.argv = [converter, source, "--base", base, "--outfile", out]
    try:
        runpy.run_path(converter, run_name="__main__")
    except (Exception, SystemExit) as error:
        Path(out).unlink(missing_ok=True)
        Path(out).with_suffix(".txt").write_text(f"{type(error).__name__}: {error}")
