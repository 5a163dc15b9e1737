"""Tiny pipelines of diffusers around given components, and text encoders for them."""


def clip(projection=False, width=32):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=96,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=0,
        eos_token_id=1,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def loader(mixin, **components):
    """What loads LoRAs as a pipeline of diffusers does: its mixin, around these components alone."""
    import diffusers.loaders as loaders
    from diffusers import DiffusionPipeline

    cls = type("Pipe", (DiffusionPipeline, getattr(loaders, mixin)), {"__init__": lambda self: None})
    pipe = cls()
    for name, component in components.items():
        object.__setattr__(pipe, name, component)
    type(pipe).components = property(lambda self: components)
    return pipe


def fused(pipe, folder, **where):
    """The state of each component after a file was loaded and fused, and how many tensors of LoRA layers came of it."""
    pipe.load_lora_weights(folder, **where)
    loaded = sum(".lora_" in name for component in pipe.components.values() for name in component.state_dict())
    pipe.fuse_lora(components=list(pipe.components))
    states = {}
    for name, component in pipe.components.items():
        state = component.state_dict()
        states[name] = {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}
    return states, loaded
