"""What every rank and every rank rule would keep."""
