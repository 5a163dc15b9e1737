"""Module and kind of each weight of a model."""
