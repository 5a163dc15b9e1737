"""Models written as GGUF, as llama.cpp's converter does it, with the names and the writer of the `gguf` package."""

import gguf
import numpy as np
import torch

QUANT = gguf.GGMLQuantizationType
# What the converter adds one to, turns about, or cuts in two.
NORMS_PLUS_ONE = ("gemma2", "gemma3", "nemotron")
TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")


def save(model, path, arch, *, kind=QUANT.F32, kinds=(), leave_out=(), more=(), metadata=()):
    """Write a model of transformers as GGUF.

    Args:
        model: With values.
        path: Where to.
        arch: llama.cpp's name of its architecture.
        kind: The type of its matrices; vectors are float32.
        kinds: Other types, by the names in the file.
        leave_out: Names in the file of tensors that are not written.
        more: Tensors that are written too, by name.
        metadata: More of it, under the architecture's name.
    """
    writer = gguf.GGUFWriter(path, arch)
    _describe(writer, model.config, dict(metadata))
    for name, tensor in {**as_llama_cpp_has_it(model, arch), **dict(more)}.items():
        if name not in leave_out:
            own = dict(kinds).get(name, kind if tensor.dim() > 1 else QUANT.F32)
            writer.add_tensor(name, gguf.quantize(tensor.numpy(), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_llama_cpp_has_it(model, arch):
    """Names and values of the tensors of a model in llama.cpp."""
    (own,) = (one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(own, model.config.num_hidden_layers)
    found = {}
    for name, tensor in model.named_parameters():
        tensor = tensor.detach().float()
        if name.endswith("experts.gate_up_proj") and arch != "gpt-oss":
            for half, part in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
                found[f"{names.get_name(name.replace('gate_up', half))}.weight"] = part.contiguous()
            continue
        if arch == "llama" and name.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            tensor = by_turns(
                tensor, model.config.head_dim or model.config.hidden_size // model.config.num_attention_heads
            )
        if arch in NORMS_PLUS_ONE and name.endswith("norm.weight"):
            tensor = tensor + 1
        if arch == "gpt2" and name.endswith(TRANSPOSED):
            tensor = tensor.T.contiguous()
        if name.endswith("shared_expert_gate.weight"):
            tensor = tensor[0]
        if arch == "gpt-oss" and "experts." in name:
            found |= _of_gpt_oss(name, tensor)
            continue
        if ".query_key_value." in name:
            tensor = by_kind(tensor, model.config)
        own = names.get_name(name, (".weight", ".bias")) or names.get_name(
            name.removeprefix("transformer."), (".weight", ".bias")
        )
        found[own if own.endswith((".weight", ".bias")) else f"{own}.weight"] = tensor
    return found


def _of_gpt_oss(name, tensor):
    """A stack of experts, or its bias: out x in features, of gate and up every second row."""
    block, what = name.split(".")[2], "bias" if name.endswith("_bias") else "weight"
    turned = tensor if what == "bias" else tensor.mT
    if "down_proj" in name:
        return {f"blk.{block}.ffn_down_exps.{what}": turned.contiguous()}
    return {
        f"blk.{block}.ffn_{half}_exps.{what}": turned[:, at::2].contiguous() for at, half in enumerate(("gate", "up"))
    }


def by_kind(rows, config):
    """All heads' queries, then all keys, then all values, of what has them group by group."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_kv_heads", heads)
    if getattr(config, "multi_query", False) and not config.new_decoder_architecture:
        groups = 1
    width = len(rows) // (heads + 2 * groups)
    kinds = [[], [], []]
    for group in range(groups):
        own = rows[group * len(rows) // groups :][: len(rows) // groups]
        of_queries = heads // groups * width
        for kind, part in zip(
            kinds, (own[:of_queries], own[of_queries:][:width], own[of_queries + width :]), strict=True
        ):
            kind.append(part)
    return torch.cat([part for kind in kinds for part in kind])


def by_turns(rows, width):
    """The rows of each head, one of the first half and one of the second by turns: 0, 4, 1, 5, ... of eight."""
    half = width // 2
    within = [turn * half + row for row in range(half) for turn in range(2)]
    return rows[[head + row for head in range(0, len(rows), width) for row in within]]


def split(path):
    """The file as two, of which the first has the metadata."""
    reader = gguf.GGUFReader(path)
    halves = reader.tensors[:5], reader.tensors[5:]
    made = []
    for number, tensors in enumerate(halves, start=1):
        place = path.with_name(f"{path.stem}-{number:05}-of-00002.gguf")
        writer = gguf.GGUFWriter(place, reader.fields["general.architecture"].contents())
        for name, field in reader.fields.items() if number == 1 else ():
            if not name.startswith(("GGUF.", "general.architecture")):
                sub = field.types[1] if len(field.types) > 1 else None
                writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
        writer.add_uint16("split.no", number - 1)
        writer.add_uint16("split.count", 2)
        for tensor in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        made.append(place)
    path.unlink()
    return made


def _describe(writer, config, metadata):
    """The metadata that the converter makes of a configuration."""
    heads = config.num_attention_heads
    width, rotary = getattr(config, "head_dim", None), getattr(config, "rope_parameters", {})
    said = {
        "block_count": config.num_hidden_layers,
        "context_length": getattr(config, "max_position_embeddings", 64),
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None),
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", getattr(config, "num_kv_heads", None)),
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": width if width and config.model_type in ("llama", "mistral", "mixtral") else None,
        "rope.freq_base": rotary.get("rope_theta"),
        "rope.scaling.type": "yarn" if rotary.get("rope_type") == "yarn" else None,
        "rope.scaling.factor": rotary.get("factor"),
        "rope.scaling.original_context_length": rotary.get("original_max_position_embeddings"),
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": getattr(config, "norm_epsilon", getattr(config, "layer_norm_epsilon", None)),
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
        "expert_count": getattr(config, "num_local_experts", getattr(config, "num_experts", None)),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
        "expert_shared_feed_forward_length": getattr(config, "shared_expert_intermediate_size", None),
        **metadata,
    }
    for key, value in said.items():
        if value is not None:
            key = key if key.startswith(("general.", "tokenizer.")) else f"{writer.arch}.{key}"
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
            add[type(value)](key, value)
