"""Checkpoints as live models of transformers, and something to say to them."""
