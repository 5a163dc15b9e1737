"""An adapter's factors, fitted to what the tuned model computes."""
