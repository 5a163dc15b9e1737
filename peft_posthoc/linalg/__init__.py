"""Matrices to factors, with a certificate."""
