"""Named tensors: one protocol, its readers, and views made of pieces."""
