"""The paper's tables, and what the paper did not measure: `python -m benchmarks.paper`."""
