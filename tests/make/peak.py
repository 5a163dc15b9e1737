"""`phlora`, and in the end a line with the most memory that it held, in bytes."""

import re
import sys
from pathlib import Path

from peft_posthoc.cli.main import main

main(sys.argv[1:], standalone_mode=False)
# Of this program alone: `ru_maxrss` begins with what the process had that started it.
print(1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]))
