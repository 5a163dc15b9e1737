"""llama.cpp through llama-cpp-python's own bindings of its C functions: a GGUF base, GGUF adapters."""

import ctypes
from typing import Any

import driving
import llama_cpp
import numpy as np

GGML_TYPE_F32 = 0


class LlamaCpp:
    def __init__(self, job: dict[str, Any]) -> None:
        self.versions = {"llama-cpp-python": llama_cpp.__version__}
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(job["base"].encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {job['base']}")
        self.size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def next_token(self, adapter: str | None, prompts: list[list[int]]) -> Any:
        parameters = llama_cpp.llama_context_default_params()
        # The defaults, float16 and flash attention, are coarser: 6e-3 for the base alone.
        parameters.type_k = parameters.type_v = GGML_TYPE_F32
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.n_ctx, parameters.n_threads = 64, 1
        context = llama_cpp.llama_init_from_model(self.model, parameters)
        try:
            if adapter is not None:
                loaded = llama_cpp.llama_adapter_lora_init(self.model, adapter.encode())
                if not loaded:
                    raise RuntimeError("llama_adapter_lora_init gives no adapter")
                adapters = (type(loaded) * 1)(loaded)
                scales = (ctypes.c_float * 1)(1.0)
                if llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales):
                    raise RuntimeError("llama_set_adapters_lora does not set the adapter")
            return driving.log_softmax([self._after(context, prompt) for prompt in prompts])
        finally:
            llama_cpp.llama_free(context)

    def _after(self, context: Any, prompt: list[int]) -> np.ndarray:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        tokens = (llama_cpp.llama_token * len(prompt))(*prompt)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(prompt))):
            raise RuntimeError("llama_decode fails")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return np.ctypeslib.as_array(logits, shape=(self.size,)).copy()


driving.drive(LlamaCpp)
