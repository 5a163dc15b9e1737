"""How an extracted adapter is laid out in its file."""
