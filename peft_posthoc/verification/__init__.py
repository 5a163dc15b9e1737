"""Base plus adapter against the fine-tune."""
