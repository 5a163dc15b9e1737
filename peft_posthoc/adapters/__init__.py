"""PEFT's LoRA folder: read, understood, held on a model, written."""
