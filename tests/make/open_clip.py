"""CLIP's text encoder by the names of OpenCLIP, as SD 2 and SDXL have it in a single file."""

import torch

_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_AROUND = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def under_open_clip(tensors, prefix):
    """The tensors of a text encoder of transformers, q, k and v as one."""
    found, thirds = {}, {}
    for name, value in tensors.items():
        own = name.removeprefix("text_model.")
        if own == "text_projection.weight":
            found["text_projection"] = value.T
        elif own in _AROUND:
            found[_AROUND[own]] = value
        else:
            _, _, number, rest = own.split(".", 3)
            module, _, leaf = rest.rpartition(".")
            if module in _LAYER:
                found[f"transformer.resblocks.{number}.{_LAYER[module]}.{leaf}"] = value
            else:
                thirds.setdefault(f"transformer.resblocks.{number}.attn.in_proj_{leaf}", {})[module] = value
    for name, parts in thirds.items():
        found[name] = torch.cat([parts[f"self_attn.{one}_proj"] for one in "qkv"])
    return {f"{prefix}{name}": value.contiguous() for name, value in found.items()}
