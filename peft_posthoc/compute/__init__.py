"""The ground: device and its memory, float32 that is float32, threads, and processes that work together."""
