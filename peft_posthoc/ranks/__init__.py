"""How many triplets: of one layer, or of all within a size."""
