"""SGLang's own code from the adapter's folder to the buffers that its kernels read, on CPU.

A server needs a GPU. `LoRAConfig`, `LoRAManager`'s checks, `LoRAAdapter` and `LoRAMemoryPool` are SGLang's, imported
with stand-ins for what they only mention; the reading of the folder, as its `DefaultModelLoader` does, is one too. The
product of the buffers, times SGLang's scale, is added to the base's weights, and transformers runs that.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import driving
import torch
import transformers
from safetensors.torch import load_file

# SGLang's own; all else of it is a stand-in.
REAL = {
    *(f"sglang.srt.lora.{name}" for name in ("lora", "lora_config", "lora_manager", "mem_pool", "utils")),
    *("sglang.srt.lora.eviction_policy", "sglang.srt.environ", "sglang.srt.layers.utils.common"),
}
ROOT = Path(next(iter(importlib.util.find_spec("sglang").submodule_search_locations)))


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        # A class, so that it can be inherited from, asked for with isinstance, and named in annotations.
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.partition(".")[0] != "sglang":
            return None
        if name in REAL:
            where = ROOT.joinpath(*name.split(".")[1:]).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, where)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> Any:
        module = _StandIn(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: Any) -> None:
        pass


class _Loader:
    """Reads every safetensors file of the folder, or the pickle where there is none."""

    class Source:
        def __init__(self, folder: str, **settings: Any) -> None:
            self.folder = Path(folder)

    def __init__(self, config: Any) -> None:
        pass

    def _get_weights_iterator(self, source: Any) -> Any:
        files = sorted(source.folder.glob("*.safetensors"))
        if not files:
            return iter(torch.load(source.folder / "adapter_model.bin", weights_only=True).items())
        return (pair for file in files for pair in load_file(file).items())


sys.meta_path.insert(0, _Finder())
ONE_PROCESS = types.SimpleNamespace(
    **{"tp_size": 1, "tp_rank": 0, "attn_tp_size": 1, "moe_ep_size": 1, "moe_ep_rank": 0},
    **{"moe_tp_size": 1, "moe_tp_rank": 0, "pp_group": MagicMock(is_last_rank=True)},
)
for module, name, value in (
    ("sglang.srt.runtime_context", "get_parallel", lambda: ONE_PROCESS),
    ("sglang.srt.utils", "is_pin_memory_available", lambda: False),
    ("sglang.srt.model_loader.loader", "DefaultModelLoader", _Loader),
    ("sglang.srt.lora.layers", "unwrap_lora_layer", lambda module: module),
    ("sglang.srt.layers.utils", "get_layer_id", None),
):
    importlib.import_module(module)
    if value is None:
        value = importlib.import_module("sglang.srt.layers.utils.common").get_layer_id
    setattr(sys.modules[module], name, value)

LoRAManager = importlib.import_module("sglang.srt.lora.lora_manager").LoRAManager
LoRAMemoryPool = importlib.import_module("sglang.srt.lora.mem_pool").LoRAMemoryPool


class Sglang:
    def __init__(self, job: dict[str, Any]) -> None:
        self.base = job["base"]
        self.versions = {"sglang": importlib.metadata.version("sglang")}

    @torch.no_grad()
    def next_token(self, adapter: str | None, prompts: list[list[int]]) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32).eval()
        if adapter is not None:
            self._add(model, adapter)
        return driving.log_softmax(torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]))

    def _add(self, model: Any, folder: str) -> None:
        """As when the server is started with this adapter alone."""
        manager = LoRAManager.__new__(LoRAManager)
        manager.__dict__ |= {
            **{"base_hf_config": model.config, "base_model": model, "load_config": None, "lora_backend": None},
            **{"configs": {}, "loras": {}, "lora_refs": {}, "num_pinned_loras": 0, "max_loras_per_batch": 2},
            **{"attn_dp_enabled": False, "lora_added_tokens_size": None, "speculative_algorithm": None},
        }
        manager.create_lora_update_result = lambda success, error_message="": (success, error_message)
        reference = types.SimpleNamespace(lora_id="a", lora_name="a", lora_path=folder, pinned=False)
        loaded, why = manager._load_lora_adapter(reference)
        if not loaded:
            raise ValueError(why)
        manager.init_lora_shapes()
        pool = LoRAMemoryPool(
            **{"base_hf_config": model.config, "max_loras_per_batch": 2, "dtype": torch.float32},
            **{"max_lora_rank": manager.max_lora_rank, "target_modules": manager.target_modules},
            **{"base_model": model, "eviction_policy": "lru", "lora_added_tokens_size": 0},
        )
        lora = manager.loras["a"]
        # The layers of SGLang's own models, which have q, k and v in one, and gate and up.
        whole = types.SimpleNamespace(slice_lora_a_weights=lambda a: a, slice_lora_b_weights=lambda b: b)
        names = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"} & manager.target_modules
        modules = [{f"model.layers.{i}.{name}": whole for name in names} for i in range(pool.num_layer)]
        pool.load_lora_weight_to_buffer("a", 0, lora, modules, object(), object())
        self._write(model, pool, lora.config.r, lora.scaling)

    def _write(self, model: Any, pool: Any, r: int, scale: float) -> None:
        weights = dict(model.named_parameters())
        parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
        if {"embed_tokens", "lm_head"} & pool.target_modules and model.config.tie_word_embeddings:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
            weights["lm_head.weight"] = model.lm_head.weight
        for name, layers in pool.A_buffer.items():
            for number, stacked in enumerate(layers):
                rows = 0
                for place, part in enumerate(parts.get(name, (name,))):
                    (weight,) = (
                        w
                        for key, w in weights.items()
                        if key.endswith(f".{part}.weight") and f"layers.{number}." in key
                    )
                    a = stacked[0, place * r : (place + 1) * r]
                    b = pool.B_buffer[name][number][0, rows : rows + len(weight), :r]
                    weight += scale * b @ a
                    rows += len(weight)
        for a_buffer, b_buffer, key in (
            (pool.embedding_A_buffer, pool.embedding_B_buffer, "embed_tokens"),
            (pool.lm_head_A_buffer, pool.lm_head_B_buffer, "lm_head"),
        ):
            if key in a_buffer:
                product = scale * b_buffer[key][0, :, :r] @ a_buffer[key][0, :r]
                (weight,) = (w for name, w in weights.items() if name.endswith(f"{key}.weight"))
                weight += product if key == "lm_head" else product.T


driving.drive(Sglang)
