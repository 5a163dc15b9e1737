"""Adapters of every kind that PEFT makes, and what they add."""

import json
import warnings

import peft
import torch
from torch import nn

from tests.make import models

LEAVES = ["q_proj", "k_proj", "v_proj", "down_proj"]


def adapt(model, folder, *, seed=0, size=0.1, **config):
    """An adapter that PEFT saved, every tensor in it drawn at random; returns its folder and the model with it."""
    with warnings.catch_warnings():
        # PEFT says that it saves embeddings; that is what is wanted.
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**config)).eval()
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.copy_(size * torch.randn(parameter.shape, generator=draw))
        adapted.save_pretrained(folder)
    return folder


def with_adapter(model, folder):
    """Stock PEFT's model with the adapter, which it takes without a warning or a missing or stray key."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        found = peft.PeftModel.from_pretrained(model, folder).eval()
        keys = found.load_adapter(folder, adapter_name="again")
    assert not [key for key in keys.missing_keys if ".again." in key]
    assert not keys.unexpected_keys
    found.delete_adapter("again")
    return found


def deltas(model, folder):
    return models.lora_deltas(with_adapter(model, folder))


def best(delta, rank):
    """The best approximation, by a full SVD in float64; of a stack of matrices each by itself."""
    u, s, vh = torch.linalg.svd(delta.double().flatten(2) if delta.ndim == 3 else delta.double().flatten(1))
    return ((u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]).reshape(delta.shape)


def same(found, wanted, *, tolerance=1e-5):
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert torch.allclose(found[name].double(), delta.double(), rtol=0, atol=tolerance * float(delta.norm())), name


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 12, 1)
        self.third = nn.Conv2d(12, 8, 2, groups=2)
        self.last = nn.Linear(8, 10)

    def forward(self, x):
        return self.last(self.third(self.second(self.first(x))).mean(dim=(2, 3)))


def copy_of(model):
    other = Pixels()
    other.load_state_dict(model.state_dict())
    return other
