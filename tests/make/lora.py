"""Adapters that real PEFT made, with random factors."""

import warnings

import torch

from tests.make import models


def adapter(base, out, *, dtype=torch.float32, **config):
    """Save a LoRA adapter of the model in a folder; every factor is random, so that all of it matters."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(models.load(base), peft.LoraConfig(**config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.normal_(std=0.1)
        model.to(dtype).save_pretrained(out)
    return out


def served(base, out):
    """The base with the adapter beside it, unmerged."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(models.load(base), out).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(20)[None])[0].float()
