"""The streaming floor: import torch, read both checkpoints, subtract in float32, take norms."""

import sys

import torch  # noqa: F401  (its import is part of the floor)
from safetensors import safe_open

base, tuned = (safe_open(f"{folder}/model.safetensors", "pt") for folder in sys.argv[1:])
for name in base.keys():  # noqa: SIM118
    delta = tuned.get_tensor(name).float() - base.get_tensor(name).float()
    delta.norm().item()
