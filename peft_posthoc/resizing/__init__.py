"""Smaller adapters, and sums of adapters."""
