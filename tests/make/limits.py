"""How long a test waits for a process: only a hang takes longer, also where other work has the processors."""

HANG = 1200  # seconds; pytest's own limit, `faulthandler_timeout`, is longer
