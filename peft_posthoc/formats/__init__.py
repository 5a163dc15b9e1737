"""Adapters in other programs' formats."""
