"""Models and what is made of them, of which it is known who comes from whom."""

import torch


def model(seed, columns=64, layers=4):
    torch.manual_seed(seed)
    return {f"layers.{at}.q_proj.weight": torch.randn(64, columns) for at in range(layers)}


def tune(model, seed, size=0.01):
    torch.manual_seed(seed)
    return {name: weight + size * torch.randn_like(weight) for name, weight in model.items()}


def lora(model, seed, rank=4):
    torch.manual_seed(seed)
    return {n: w + 0.01 * torch.randn(len(w), rank) @ torch.randn(rank, w.shape[1]) for n, w in model.items()}


def some_layers(model, seed):
    """A fine-tune of the last layer alone."""
    return {**model, **tune(dict([list(model.items())[-1]]), seed)}


def int8(model):
    steps = {name: weight.abs().amax(1, keepdim=True) / 127 for name, weight in model.items()}
    return {name: (weight / steps[name]).round() * steps[name] for name, weight in model.items()}
