"""Adapters of many fine-tunes of one base, which is read once."""
