"""Base and tuned under one set of names, experts and rows."""
