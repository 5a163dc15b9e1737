"""Energies that every rank and every rank rule would keep."""
