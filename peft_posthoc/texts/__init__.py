"""Text that models are compared on, or fitted on: where it comes from, as token ids, and how far models are on it."""
