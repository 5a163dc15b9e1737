"""The ground: device and its memory, float32 that is float32, threads, processes that work together or start."""
