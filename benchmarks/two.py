"""Start a command twice, as two processes that share its work with one thread each, and wait for both."""

import os
import subprocess
import sys

shared = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
both = [subprocess.Popen(sys.argv[1:], env={**shared, "RANK": str(rank)}) for rank in range(2)]
sys.exit(max(process.wait() for process in both))
