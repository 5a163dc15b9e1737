"""Adapters that real PEFT made, with random factors."""

import warnings

import torch

from tests.make import models

LEAVES = ["q_proj", "v_proj", "down_proj"]


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


def trained(base, where, *, dtype=None, **fields):
    """An adapter that PEFT made for the model in a folder, every tensor of it random; and PEFT's model."""
    import peft

    model = models.load(base) if dtype is None else models.load(base).to(dtype)
    with warnings.catch_warnings():
        # It remarks on tied weights, on biases where there are none, and that it saves embeddings.
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**{"target_modules": LEAVES, "r": 4, "init_lora_weights": False} | fields)
        model = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and ("lora_" in name or "modules_to_save" in name):
                    parameter += 0.1 * torch.randn_like(parameter)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(where)
    return model.eval()


def merged(model):
    """The weights of PEFT's model once it is merged, tied ones under each of their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = model.merge_and_unload()
    return {name: parameter.detach() for name, parameter in plain.named_parameters(remove_duplicate=False)}
