"""What module and kind each weight of a model is."""
