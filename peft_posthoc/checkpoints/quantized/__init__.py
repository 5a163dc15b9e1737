"""Quantised weights: a file for each way in which they are stored, and a view that shows them decoded."""
