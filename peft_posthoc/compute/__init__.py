"""The ground: device, float32 that is float32, one thread a weight."""
