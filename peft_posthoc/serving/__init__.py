"""Answers of engines to an adapter, and adapters that they all take."""
