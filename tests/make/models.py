"""Tiny host models made from configurations in milliseconds, and full fine-tunes of them."""

import copy
import json
import warnings
from pathlib import Path

import torch
import transformers
from safetensors import safe_open


def decoder(name, **changes):
    """A model of transformers' class `{name}ForCausalLM`."""
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    config = getattr(transformers, f"{name}Config")(**sizes | changes)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def llama(**changes):
    return decoder("Llama", **changes)


def qwen2(**changes):
    return decoder("Qwen2", **changes)


def gemma2(**changes):
    return decoder("Gemma2", head_dim=8, **changes)


def mixtral(**changes):
    return decoder("Mixtral", num_local_experts=2, num_experts_per_tok=1, **changes)


def qwen3_moe(**changes):
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    return decoder("Qwen3Moe", **{"head_dim": 8} | experts | changes)


def laguna(**changes):
    """A mixture with shared experts, which PEFT 0.21 with transformers 5 renames when it loads an adapter."""
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "mlp_layer_types": ["sparse"]}
    kinds = {"layer_types": ["full_attention"], "sliding_window": 8, "num_attention_heads_per_layer": None}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8, "num_hidden_layers": 1}
    return decoder("Laguna", **experts | kinds | special | {"shared_expert_intermediate_size": 16} | changes)


def gpt2(**changes):
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, **changes)
    )


def bert(**changes):
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            **changes,
        )
    )


def t5(**changes):
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **changes
        )
    )


def tuned_from(model, *, scale=0.02, rank=None, only=None):
    """A full fine-tune: every parameter, or those that `only` accepts by name, moves; matrices by `rank` if given."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if only is not None and not only(name):
                continue
            if rank is not None and parameter.ndim == 2:
                rows, columns = parameter.shape
                step = torch.randn(rows, rank) @ torch.randn(rank, columns) / rank**0.5
            else:
                step = torch.randn_like(parameter)
            parameter += scale * step
    return tuned


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def save_pair(model, folder, *, dtype=None, **how):
    """Save a model and a full fine-tune of it; returns the two folders as strings."""
    tuned = tuned_from(model, **how)
    for name, one in (("base", model), ("tuned", tuned)):
        save(one if dtype is None else copy.deepcopy(one).to(dtype), folder / name)
    return str(folder / "base"), str(folder / "tuned")


def load(folder):
    """The model in a folder, of the class its configuration names, in float32; a copy of one that is loaded."""
    if isinstance(folder, torch.nn.Module):
        return copy.deepcopy(folder)
    config = json.loads((Path(folder) / "config.json").read_text())
    if "_class_name" in config:
        import diffusers

        return getattr(diffusers, config["_class_name"]).from_pretrained(folder).eval()
    cls = getattr(transformers, config["architectures"][0])
    return cls.from_pretrained(folder, dtype=torch.float32).eval()


def weights_of(folder):
    """The one file of weights in a model's folder."""
    (found,) = Path(folder).glob("*.safetensors")
    return found


def names_of(folder):
    """The names in its file of weights."""
    with safe_open(weights_of(folder), "pt") as file:
        return set(file.keys())


def load_adapter(base, adapter, *, tied=False, unbiased=False):
    """Stock PEFT's model, after asserting that it takes the folder without a warning, a missing or a stray key."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # peft 0.21 asks transformers 5.23 for an attribute under its old name, whatever the adapter.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        if tied:
            # PEFT says that merging such an adapter is no good idea; so does our report.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer is part")
            # GPT-2's head is another kind of layer than all the others: PEFT sees it, and says so.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True but the target module is")
        if unbiased:
            # It gives LoRA's biases to layers that have none, and says so; so does our report.
            warnings.filterwarnings("ignore", message="`lora_bias=True` was passed but the targeted layer")
        model = peft.PeftModel.from_pretrained(load(base), adapter)
        # It says what it does not find in the file, and drops in silence what it has no place for: so once more.
        found = peft.load_peft_weights(adapter, device="cpu")
        result = peft.set_peft_model_state_dict(model, found)
    assert not any(".default." in key for key in result.missing_keys), result.missing_keys
    assert not result.unexpected_keys, result.unexpected_keys
    return model.eval()


def lora_deltas(model, adapter_name="default"):
    """What stock PEFT adds to each module, in the module's own orientation."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix("base_model.model."): module.get_delta_weight(adapter_name).detach().float()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.scaling
    }


def true_deltas(base, tuned):
    """tuned - base of every parameter, by name, tied ones under each of their names."""
    before = dict(load(base).named_parameters(remove_duplicate=False))
    after = dict(load(tuned).named_parameters(remove_duplicate=False))
    return {name: (after[name] - before[name]).detach() for name in before if name in after}
