"""From two checkpoints to an adapter and an account of it."""
