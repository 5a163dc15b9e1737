"""What serving engines do with an adapter that is not as they expect: one table, from their code and from running it.

A new rule is one new entry. The texts end up in `docs/serving.md` too (`python -m tests.serving`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from peft_posthoc import faults
from peft_posthoc.engines import ENGINES
from peft_posthoc.portable import safe_rank
from peft_posthoc.subject import Factored, Subject

Severity = Literal["refused", "silently wrong", "warning"]
REFUSED: Severity = "refused"
WRONG: Severity = "silently wrong"
WARNING: Severity = "warning"


@dataclass(frozen=True)
class Rule:
    """One thing in an adapter that some engines do not take."""

    name: str
    engines: tuple[str, ...]
    severity: Severity
    finds: Callable[[Subject], tuple[str, ...]]
    """What of the adapter is at fault: tensors, modules or settings; nothing where all is well."""
    message: str
    """What the engine does."""
    way_out: str
    source: str
    """Where it is seen; "run" where the engine's own code was run on such an adapter."""
    versions: str = ""
    """Those it is true for, where not of those examined (`ENGINES`)."""
    needs_base: bool = False

    def applies_to(self, engine: str) -> bool:
        """Whether it is a rule of that engine, or of one that it hands the adapter to."""
        return bool({engine, *ENGINES[engine].backends} & {*self.engines})


FIX = "`--fix OUT` rewrites it"
WRITE_THEM = "write what the adapter was trained with into the configuration"
FIX_BASE = "`--fix OUT --base BASE` rewrites it"
LEAVE_OUT = "`--fix OUT` leaves them out and tells their size; or merge the adapter and serve the whole model"
MERGE = "merge the adapter into its base (PEFT's `merge_and_unload`) and serve that, or extract from it again"
LORAX_READ = "read: lorax_server/adapters/lora.py"
BOTH_READ = "read: lorax_server/adapters/lora.py; TGI adapters/lora.py"
TRT_READ = "read: tensorrt_llm/_torch/peft/lora/loaders.py"
SGLANG_RUN = "run: SGLang's srt/lora/lora.py under stubs"
VLLM_HELPER = "vllm/lora/peft_helper.py"
CONVERT = "convert_lora_to_gguf.py"

# vLLM classes that declare no `embedding_modules`; and those that do, as far as they were looked at (0.32).
_NO_EMBEDDINGS = ("qwen2", "gemma2", "gemma3", "gemma3_text", "phi3", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4")
_EMBEDDINGS = ("llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "qwen3_5", "exaone", "jamba", "solar", "lfm2")
# vLLM classes with `is_3d_moe_weight` (0.32).
_STACKED_EXPERTS = ("gpt_oss", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen3_omni_moe", "interns1_pro")
_VLLM_MAX_VOCABULARY = 258048


def _global(s: Subject) -> Callable[[Factored], float]:
    return lambda own: s.alpha / (math.sqrt(s.r) if s.rslora else s.r)


def _own_rank(s: Subject) -> Callable[[Factored], float]:
    return lambda own: s.alpha / (math.sqrt(own.rank) if s.rslora else own.rank)


def _llamacpp(s: Subject) -> Callable[[Factored], float]:
    return lambda own: s.alpha / own.rank if s.alpha else 1.0


RULES: tuple[Rule, ...] = (
    # Files.
    Rule(
        "pickled",
        ("lorax", "tgi"),
        REFUSED,
        lambda s: () if s.weights_name.endswith(".safetensors") else (s.weights_name,),
        "reads safetensors only",
        FIX,
        "read: LoRAX and TGI load *.safetensors of the folder",
    ),
    Rule(
        "pickled-for-transformers",
        ("peft",),
        WARNING,
        lambda s: () if s.weights_name.endswith(".safetensors") else (s.weights_name,),
        "`PeftModel` reads it; transformers' `load_adapter` raises FileNotFoundError for a local folder",
        FIX,
        "run",
        "transformers 5.23.0",
    ),
    Rule(
        "other-safetensors",
        ("sglang", "lorax", "tgi"),
        WRONG,
        lambda s: tuple(s.others),
        "loads every safetensors file of the folder as part of the adapter",
        "move the others out of the folder; `--fix OUT` leaves them behind",
        "read: SGLang's DefaultModelLoader; LoRAX, TGI",
    ),
    # What the configuration must have.
    Rule(
        "no-peft-type",
        ("peft", "sglang"),
        REFUSED,
        lambda s: s.without("peft_type"),
        "cannot tell what adapter it is",
        FIX,
        "run: PEFT; SGLang raises KeyError (srt/lora/lora.py)",
    ),
    Rule(
        "missing-keys",
        ("vllm", "sglang"),
        REFUSED,
        lambda s: s.without("r", "lora_alpha", "target_modules"),
        "needs these keys in the configuration (ValueError in vLLM, KeyError in SGLang)",
        WRITE_THEM,
        f"run: {VLLM_HELPER}; SGLang's srt/lora/lora_config.py",
    ),
    Rule(
        "missing-rank",
        ("trtllm",),
        REFUSED,
        lambda s: s.without("r", "lora_alpha"),
        "needs these keys in the configuration",
        WRITE_THEM,
        "read: tensorrt_llm/_torch/peft/lora/manager.py",
    ),
    Rule(
        "missing-alpha",
        ("llamacpp",),
        REFUSED,
        lambda s: s.without("lora_alpha"),
        f"{CONVERT} needs it",
        WRITE_THEM,
        f"run: {CONVERT}",
    ),
    Rule(
        "unknown-keys",
        ("peft",),
        WARNING,
        faults.unknown_keys,
        "PEFT 0.6 to 0.13 raises TypeError at keys that it does not know",
        FIX,
        "peft #2275, textgen #6819, ms-swift #3141",
        "0.6 to 0.13",
    ),
    Rule(
        "float-alpha",
        ("llamacpp",),
        WARNING,
        lambda s: (f"lora_alpha={s.config['lora_alpha']}",) if isinstance(s.config.get("lora_alpha"), float) else (),
        "Ollama's own import of safetensors parses an unsigned integer",
        f"{FIX}; or give Ollama a GGUF",
        "read: Ollama's convert/convert.go, git fb30760",
    ),
    # Scale.
    Rule(
        "rank-not-as-configured",
        ("peft",),
        REFUSED,
        faults.misranked,
        "builds the layers from `r` and `rank_pattern`, and finds tensors of another size",
        "correct `r` or `rank_pattern` in the configuration",
        "run",
    ),
    Rule(
        "patterns-before-0.32",
        ("vllm",),
        WARNING,
        lambda s: faults.misscaled(s, _global(s)),
        "vLLM before 0.32 never reads `rank_pattern` and `alpha_pattern`, and scales these layers wrongly in silence",
        FIX,
        f"read: {VLLM_HELPER} of 0.11.0 to 0.31.0",
        "0.11 to 0.31",
    ),
    Rule(
        "mixed-ranks",
        ("sglang",),
        REFUSED,
        faults.other_ranks,
        "its buffers have one rank: an assertion stops the scheduler when a batch is prepared, or `torch.cat` fails",
        FIX,
        f"{SGLANG_RUN}; read: srt/lora/mem_pool.py",
    ),
    Rule(
        "scale-sglang",
        ("sglang",),
        WRONG,
        lambda s: faults.misscaled(s, lambda own: s.alpha / s.r),
        "multiplies every layer by lora_alpha / r; it reads neither `use_rslora` nor the patterns",
        FIX,
        f"{SGLANG_RUN}; sglang #40835",
        "0.5.23; later sources refuse patterns when they load (srt/lora/lora_config.py)",
    ),
    Rule(
        "scale-lorax",
        ("lorax", "tgi"),
        WRONG,
        lambda s: faults.misscaled(s, _global(s)),
        "multiplies every layer by one scale; it does not read the patterns",
        FIX,
        BOTH_READ,
    ),
    Rule(
        "mixed-ranks-of-a-leaf",
        ("lorax", "tgi"),
        REFUSED,
        faults.mixed_leaves,
        "stacks all layers of a name, which must have one rank after padding (`torch.stack` fails)",
        FIX,
        BOTH_READ,
    ),
    Rule(
        "padded-rank",
        ("lorax", "tgi"),
        WRONG,
        faults.padded_rank,
        "pads the rank to 8 or a multiple of 16, and from the second name on divides lora_alpha by the padded rank",
        FIX,
        f"{BOTH_READ} (`config.r` is overwritten)",
    ),
    Rule(
        "rank-for-one-gpu",
        ("lorax", "tgi"),
        WARNING,
        lambda s: (f"rank {s.r}",) if s.r == safe_rank(s.r) < 16 else (),
        "is right on one GPU; on N it pads the rank to 8 N and scales by the padded one",
        "write a rank that is a multiple of 16 and at least 8 N",
        BOTH_READ,
    ),
    Rule(
        "rank-above-128",
        ("lorax", "tgi"),
        WARNING,
        lambda s: (f"rank {s.max_rank}",) if s.max_rank > 128 else (),
        "has kernels for ranks up to 128 (on every GPU)",
        "cut the adapter to a lower rank",
        "read: lorax_server/utils/sgmv.py",
    ),
    Rule(
        "rslora-lorax",
        ("lorax",),
        WRONG,
        lambda s: faults.misscaled(s, lambda own: s.alpha / s.r) if s.rslora else (),
        "LoRAX's lockfile pins PEFT 0.4.0, which drops `use_rslora`: the scale is lora_alpha / r",
        FIX,
        "read: LoRAX's server lockfile",
    ),
    Rule(
        "scale-trtllm",
        ("trtllm",),
        WRONG,
        lambda s: faults.misscaled(s, _own_rank(s)),
        "divides lora_alpha by the tensor's own rank; it does not read `alpha_pattern`",
        FIX,
        "read: tensorrt_llm/_torch/peft/lora/manager.py (`load_from_hf`); TensorRT-LLM #1668",
    ),
    Rule(
        "scale-llamacpp",
        ("llamacpp",),
        WRONG,
        lambda s: faults.misscaled(s, _llamacpp(s)),
        "divides lora_alpha by the tensor's own rank, and takes 0 to mean 1; a GGUF has neither rsLoRA nor patterns",
        FIX,
        "run: src/llama-adapter.h (`get_scale`)",
    ),
    Rule(
        "mixed-ranks-mlx",
        ("mlx",),
        REFUSED,
        faults.other_ranks,
        "has one rank for the adapter",
        f"{FIX}, and that can be converted",
        "run: mlx_lm/tuner/lora.py",
    ),
    Rule(
        "rank-above-512",
        ("vllm",),
        REFUSED,
        lambda s: (f"rank {s.max_rank}",) if s.max_rank > 512 else (),
        "takes ranks up to 512",
        "cut the adapter to a lower rank",
        "read: vllm/config/lora.py",
    ),
    # DoRA, initial weights, variants.
    Rule(
        "dora",
        ("vllm", "sglang"),
        REFUSED,
        lambda s: (*s.setting("use_dora"), *s.magnitudes),
        "does not support DoRA",
        MERGE,
        f"run: {VLLM_HELPER}; read: SGLang's `validate_new_adapter`",
    ),
    Rule(
        "dora-ignored",
        ("lorax", "tgi"),
        WRONG,
        lambda s: (*s.setting("use_dora"), *s.magnitudes),
        "does not read DoRA's magnitudes and adds the factors alone",
        MERGE,
        BOTH_READ,
    ),
    Rule(
        "dora-flag-gguf",
        ("llamacpp",),
        WRONG,
        lambda s: s.setting("use_dora") if not s.magnitudes else (),
        "does not read `use_dora` and adds the factors alone",
        MERGE,
        f"run: {CONVERT}",
    ),
    Rule(
        "dora-gguf",
        ("llamacpp",),
        REFUSED,
        lambda s: s.magnitudes,
        f"{CONVERT} ends at DoRA's magnitudes",
        MERGE,
        f"run: {CONVERT}",
    ),
    Rule(
        "dora-trtllm",
        ("trtllm",),
        WARNING,
        lambda s: (*s.setting("use_dora"), *s.magnitudes),
        "supports DoRA, but not for experts nor with FP8 adapters",
        MERGE,
        "read: tensorrt_llm/_torch/peft/lora/manager.py",
    ),
    Rule(
        "init-vllm",
        ("vllm",),
        REFUSED,
        faults.mutating_init,
        "refuses initial weights that PEFT takes out of the base when it loads them",
        "convert it with PEFT's `save_pretrained(path_initial_model_for_weight_conversion=...)`",
        f"read: {VLLM_HELPER}",
        "0.32 and later",
    ),
    Rule(
        "init-peft",
        ("peft",),
        WARNING,
        faults.mutating_init,
        "changes the base when it loads the adapter: right for one trained so, wrong for factors of a plain delta",
        "set `init_lora_weights` to true where the factors are a plain delta; else convert it as for vLLM, or keep it",
        "run",
    ),
    Rule(
        "init-ignored",
        ("sglang", "lorax", "tgi", "trtllm", "llamacpp", "mlx"),
        WARNING,
        faults.mutating_init,
        "does not change the base as PEFT does: right for factors of a plain delta, wrong for an adapter trained so",
        "convert it with PEFT's `save_pretrained(path_initial_model_for_weight_conversion=...)`",
        "read: none of them reads `init_lora_weights`",
    ),
    Rule(
        "variants",
        ("vllm",),
        REFUSED,
        faults.variants,
        "refuses kinds of LoRA that compute something else",
        MERGE,
        f"read: {VLLM_HELPER}",
        "0.32 and later",
    ),
    Rule(
        "variants-ignored",
        ("sglang", "lorax", "tgi", "trtllm", "llamacpp", "mlx"),
        WRONG,
        faults.variants,
        "does not read that the adapter computes something else than base + b @ a",
        MERGE,
        f"read: SGLang's srt/lora/lora_config.py; LoRAX's LoraConfig; {TRT_READ}; {CONVERT}",
    ),
    # Biases.
    Rule(
        "bias-setting",
        ("vllm",),
        REFUSED,
        faults.bias_setting,
        "supports no biases",
        FIX + ", without the biases, and tells their size",
        f"run: {VLLM_HELPER}",
    ),
    Rule(
        "biases-ignored",
        ("sglang", "lorax", "tgi"),
        WRONG,
        lambda s: s.biases or faults.bias_setting(s),
        "does not read biases",
        LEAVE_OUT,
        f"{SGLANG_RUN}; {BOTH_READ}",
    ),
    Rule(
        "biases",
        ("trtllm", "llamacpp"),
        REFUSED,
        lambda s: s.biases,
        f"ends at tensors that are no factors (KeyError in TensorRT-LLM, exit in {CONVERT})",
        LEAVE_OUT,
        f"{TRT_READ}; run: {CONVERT}",
    ),
    Rule(
        "lora-bias",
        ("vllm", "sglang", "trtllm", "llamacpp"),
        REFUSED,
        lambda s: s.lora_biases or s.setting("lora_bias"),
        "does not know `lora_bias`",
        LEAVE_OUT,
        f"run: {VLLM_HELPER}, {CONVERT}; SGLang puts it in the slot of B; {TRT_READ}",
    ),
    Rule(
        "lora-bias-ignored",
        ("lorax", "tgi"),
        WRONG,
        lambda s: s.lora_biases,
        "takes `lora_A` and `lora_B` only",
        LEAVE_OUT,
        BOTH_READ,
    ),
    # Whole weights.
    Rule(
        "modules-to-save",
        ("vllm",),
        REFUSED,
        lambda s: s.kept_whole("classifier", "score"),
        "supports `modules_to_save` for classifiers only",
        LEAVE_OUT,
        f"run: {VLLM_HELPER}",
    ),
    Rule(
        "modules-to-save-missing",
        ("peft",),
        REFUSED,
        faults.incompletely_whole,
        "raises KeyError unless every module that `modules_to_save` means is in the file",
        LEAVE_OUT,
        "run",
        needs_base=True,
    ),
    Rule(
        "whole-weights",
        ("vllm", "llamacpp", "mlx"),
        REFUSED,
        lambda s: s.whole,
        "knows no whole weights in an adapter",
        LEAVE_OUT,
        f"vllm #9280; run: {CONVERT} (llama.cpp #11554, #9065), MLX",
    ),
    Rule(
        "whole-weights-ignored",
        ("sglang", "lorax", "tgi"),
        WRONG,
        lambda s: s.whole,
        "does not load whole weights and serves the base's",
        LEAVE_OUT,
        f"{SGLANG_RUN}; {BOTH_READ}",
    ),
    Rule(
        "whole-weights-trtllm",
        ("trtllm",),
        REFUSED,
        lambda s: tuple(name for name in s.whole if "lm_head" not in name and "embed_tokens" not in name),
        "ends at tensors that are no factors (KeyError)",
        LEAVE_OUT,
        TRT_READ,
    ),
    Rule(
        "whole-head-trtllm",
        ("trtllm",),
        WRONG,
        lambda s: tuple(name for name in s.whole if "lm_head" in name or "embed_tokens" in name),
        "skips them, but for the older TensorRT workflow",
        LEAVE_OUT,
        TRT_READ,
    ),
    Rule(
        "norms-overwrite",
        ("peft",),
        WRONG,
        lambda s: tuple(name for name in s.norms if not s.is_kept_whole(name)),
        "writes them over the base without a word: they stay with the adapter disabled, and for other adapters",
        LEAVE_OUT + "; or name them in `modules_to_save`",
        "run",
    ),
    Rule(
        "norms",
        ("vllm", "sglang", "trtllm", "mlx"),
        REFUSED,
        lambda s: s.norms,
        "refuses tensors of norms, as mergekit-extract-lora writes them",
        LEAVE_OUT,
        f"run: vLLM (vllm #6573), MLX; {SGLANG_RUN}; {TRT_READ}",
    ),
    Rule(
        "norms-ignored",
        ("lorax", "tgi", "llamacpp"),
        WRONG,
        lambda s: s.norms,
        "ignores tensors of norms",
        LEAVE_OUT,
        f"run: llama.cpp keeps them in the GGUF and skips them in src/llama-adapter.cpp (PR #11131); {BOTH_READ}",
    ),
    Rule(
        "base-copies",
        tuple(ENGINES),
        WARNING,
        lambda s: s.base_copies,
        "PEFT saved the base's own weights beside the factors of embeddings: bytes that change nothing",
        "`--fix OUT` leaves them out; or `save_pretrained(save_embedding_layers=False)`",
        "run: PEFT",
    ),
    # Targets.
    Rule(
        "target-pattern",
        ("sglang",),
        REFUSED,
        faults.target_pattern,
        '`target_modules` must be a list, "all" or "all-linear"',
        FIX,
        f"{SGLANG_RUN} (srt/lora/utils.py)",
    ),
    Rule(
        "target-all-linear",
        ("sglang",),
        WARNING,
        lambda s: ("target_modules='all-linear'",) if s.config.get("target_modules") == "all-linear" else (),
        "needs `--lora-target-modules`, or finds them out by itself in newer versions",
        FIX,
        "read: srt/lora/utils.py",
    ),
    Rule(
        "untargeted",
        ("sglang",),
        REFUSED,
        faults.untargeted,
        "finds no target for these modules of the file",
        FIX,
        f"{SGLANG_RUN} (srt/lora/utils.py)",
    ),
    Rule(
        "untargeted-in-peft",
        ("peft",),
        WRONG,
        faults.untargeted_in_peft,
        "drops factors of modules that `target_modules` does not mean, with a warning at most",
        FIX,
        "run",
    ),
    Rule(
        "q-without-v",
        ("sglang",),
        REFUSED,
        lambda s: faults.alone(s, "q_proj", without="v_proj", unless=("kv_b_proj", "kv_a_proj_with_mqa")),
        "fuses q, k and v and needs v beside q (KeyError)",
        FIX_BASE,
        f"{SGLANG_RUN} (`normalize_qkv_proj`)",
    ),
    Rule(
        "up-without-gate",
        ("sglang",),
        REFUSED,
        lambda s: faults.alone(s, "up_proj", without="gate_proj"),
        "fuses gate and up and needs gate beside up, but for models that have up alone",
        FIX_BASE,
        f"{SGLANG_RUN} (`normalize_gate_up_proj`)",
    ),
    Rule(
        "missing-layers",
        ("lorax", "tgi"),
        WRONG,
        faults.missing_layers,
        "drops a name for the whole model where one layer lacks it",
        FIX_BASE,
        f"{BOTH_READ} (`prepare_weights` gives None)",
    ),
    # Names.
    Rule(
        "no-prefix",
        ("peft", "lorax", "tgi"),
        WRONG,
        faults.without_prefix,
        "looks for names that begin with base_model.model., and serves the base",
        FIX,
        f"run: PEFT warns of missing keys only; {BOTH_READ}",
    ),
    Rule(
        "adapter-in-names",
        ("vllm", "trtllm", "llamacpp"),
        REFUSED,
        faults.named_after_adapter,
        "does not know names with the adapter's inside",
        FIX,
        f"run: vLLM, {CONVERT}; {TRT_READ}",
    ),
    Rule(
        "adapter-in-names-ignored",
        ("lorax", "tgi"),
        WRONG,
        faults.named_after_adapter,
        "ignores names with the adapter's inside",
        FIX,
        BOTH_READ,
    ),
    Rule(
        "wrong-path",
        ("peft", "vllm", "lorax", "tgi"),
        WRONG,
        faults.strangers,
        "the base's class has no such module: the factors are left out without an error",
        "save the adapter again from the class that is served, or rename its modules",
        f"run: PEFT, vLLM (#34186, #48019, #34591); {BOTH_READ}",
        needs_base=True,
    ),
    Rule(
        "wrong-path-mlx",
        ("mlx",),
        REFUSED,
        faults.strangers,
        "the model has no such module",
        "save the adapter again from the class that is served, or rename its modules",
        "run",
        needs_base=True,
    ),
    Rule(
        "fused-names",
        ("vllm", "sglang", "llamacpp"),
        REFUSED,
        faults.fused_names,
        "the base's class has these projections one by one",
        "train or extract on the class that is served",
        f"run: vLLM, llama.cpp; {SGLANG_RUN}",
        needs_base=True,
    ),
    Rule(
        "other-shapes",
        ("peft", "sglang", "llamacpp", "mlx"),
        REFUSED,
        lambda s: faults.unfitting(s, larger=True, smaller=True),
        "the factors do not have the base's shapes: another base, or a changed vocabulary",
        "give the base that the adapter was made for",
        "run: PEFT, llama.cpp; read: SGLang's srt/lora/mem_pool.py",
        needs_base=True,
    ),
    Rule(
        "larger-shapes",
        ("vllm",),
        REFUSED,
        lambda s: faults.unfitting(s, larger=True, smaller=False),
        "the factors are larger than the base's weights: another base, or a changed vocabulary",
        "give the base that the adapter was made for",
        "read: vllm/lora/layers",
        needs_base=True,
    ),
    Rule(
        "smaller-shapes",
        ("vllm",),
        WRONG,
        lambda s: faults.unfitting(s, larger=False, smaller=True),
        "pads factors that are smaller than the base's weights with zeros in silence",
        "give the base that the adapter was made for",
        "read: vllm/lora/layers",
        needs_base=True,
    ),
    Rule(
        "added-tokens",
        ("sglang",),
        REFUSED,
        faults.new_tokens,
        "refuses adapters whose added_tokens.json has tokens beyond the base's vocabulary",
        "`--fix OUT` leaves the file behind; where the tokens are new, merge the adapter",
        "read: srt/lora/lora_config.py, `validate_new_adapter`",
    ),
    # Embeddings and head.
    Rule(
        "embeddings-vllm",
        ("vllm",),
        REFUSED,
        lambda s: faults.of_model(s, (*s.embeddings, *s.heads), *_NO_EMBEDDINGS),
        "its class of this model declares no `embedding_modules`",
        "extract without `--embeddings` and `--head`, or serve the merged model",
        "run: llama (has them), qwen2 (has none); read: the others",
        needs_base=True,
    ),
    Rule(
        "embeddings-vllm-unknown",
        ("vllm",),
        WARNING,
        lambda s: faults.not_of_model(s, (*s.embeddings, *s.heads), *_NO_EMBEDDINGS, *_EMBEDDINGS),
        "takes them only where its class of the model declares `embedding_modules`",
        "see that class; Llama, Mistral, Mixtral and Qwen3 have them, Qwen2, Gemma and Phi3 have not",
        "run: llama, qwen2",
    ),
    Rule(
        "vocabulary-vllm",
        ("vllm",),
        REFUSED,
        lambda s: tuple(head for head in s.heads if s.modules[head].m > _VLLM_MAX_VOCABULARY),
        f"takes heads of vocabularies up to {_VLLM_MAX_VOCABULARY}",
        "extract without `--head`, or serve the merged model",
        "read: vllm/lora/layers",
    ),
    Rule(
        "head-prompt-logprobs",
        ("vllm",),
        WARNING,
        lambda s: s.heads,
        "does not apply the head's factors to `prompt_logprobs`",
        "do not compare prompts' log-probabilities",
        "vllm #51594",
    ),
    Rule(
        "embeddings-ignored",
        ("lorax", "tgi", "trtllm"),
        WRONG,
        lambda s: s.embeddings,
        "does not load factors of embeddings",
        "extract without `--embeddings`, or serve the merged model",
        f"{BOTH_READ}; {TRT_READ}",
    ),
    Rule(
        "head-ignored",
        ("tgi", "trtllm"),
        WRONG,
        lambda s: s.heads,
        "does not load factors of the head",
        "extract without `--head`, or serve the merged model",
        f"read: TGI's adapter_layers; {TRT_READ}",
    ),
    Rule(
        "tied-llamacpp",
        ("llamacpp",),
        REFUSED,
        faults.tied,
        "aborts (GGML_ASSERT for the embedding) or finds no output.weight (for the head) where the base ties them",
        "extract without `--embeddings` and `--head`, or serve the merged model",
        "run: llama.cpp #9065",
        needs_base=True,
    ),
    Rule(
        "maybe-tied-llamacpp",
        ("llamacpp",),
        WARNING,
        faults.maybe_tied,
        "aborts where the base ties embeddings and head",
        "give `--base` to know",
        "run: llama.cpp #9065",
    ),
    Rule(
        "tied-merge",
        ("peft",),
        WARNING,
        faults.tied,
        "computes it exactly, but `merge_and_unload` gives another model where the base ties them",
        "serve it unmerged",
        "run: off by 6 to 7 nats",
        needs_base=True,
    ),
    # Towers.
    Rule(
        "towers",
        ("sglang", "trtllm"),
        WRONG,
        faults.other_modalities,
        "goes by the number in `layers.N`: a tower's layer is taken for the language model's",
        "extract the language model's layers only (`--exclude`)",
        f"{SGLANG_RUN}; {TRT_READ}",
    ),
    Rule(
        "towers-vllm",
        ("vllm",),
        WRONG,
        faults.other_modalities,
        "ignores or refuses them, but with `enable_tower_connector_lora` and for models that support it",
        "extract the language model's layers only (`--exclude`)",
        "read: vllm/lora/model_manager.py",
    ),
    Rule(
        "towers-llamacpp",
        ("llamacpp",),
        WRONG,
        faults.other_modalities,
        f"{CONVERT} skips them",
        "extract the language model's layers only (`--exclude`)",
        f"read: {CONVERT}",
    ),
    # Mixtures of experts: one pair of factors for all experts, or one for each.
    Rule(
        "fused-experts-peft",
        ("peft",),
        WARNING,
        lambda s: s.fused_experts,
        "PEFT before 0.19 reads the factors of `target_parameters` with in and out swapped",
        "use PEFT 0.19 or later",
        "run: wheels 0.17.1 to 0.21.0",
        "0.17 and 0.18",
    ),
    Rule(
        "fused-experts-vllm",
        ("vllm",),
        REFUSED,
        lambda s: faults.not_of_model(s, s.fused_experts, *_STACKED_EXPERTS),
        "expects factors for each expert, but with `--enable-mixed-moe-lora-format`",
        "write factors for each expert",
        "read; vllm PRs #41384, #52194",
    ),
    Rule(
        "fused-experts",
        ("sglang", "trtllm", "llamacpp"),
        REFUSED,
        lambda s: s.fused_experts,
        "expects factors for each expert",
        "write factors for each expert",
        f'{SGLANG_RUN}; run: {CONVERT} ("Unprocessed experts"); {TRT_READ}',
    ),
    Rule(
        "fused-experts-ignored",
        ("lorax", "tgi"),
        WRONG,
        lambda s: s.fused_experts,
        "takes the modules that it knows by name, and no experts",
        "serve the merged model",
        BOTH_READ,
    ),
    Rule(
        "single-experts-stacked",
        ("vllm",),
        REFUSED,
        lambda s: faults.of_model(s, s.experts, *_STACKED_EXPERTS),
        "expects one pair of factors for all experts of this model, but with `--enable-mixed-moe-lora-format`",
        "write factors for all experts at once (PEFT's `target_parameters`)",
        "read: `is_3d_moe_weight`",
        needs_base=True,
    ),
    Rule(
        "dense-beside-experts",
        ("peft",),
        WRONG,
        faults.dense_beside_experts,
        "with transformers 5 takes a dense or shared MLP for an expert's, or the other way, and drops factors",
        "write factors for all experts at once, or leave either out",
        "run: Qwen2-MoE, Qwen3-MoE with `mlp_only_layers`",
    ),
    Rule(
        "partial-experts",
        ("vllm", "peft"),
        REFUSED,
        faults.partial_experts,
        "needs gate, up and down of an expert together",
        "write zeros for the others",
        "run: PEFT raises ValueError at gate without up; read: vLLM",
    ),
    Rule(
        "expert-names-trtllm",
        ("trtllm",),
        WRONG,
        lambda s: tuple(module for module in s.experts if module.rpartition(".")[2] not in ("w1", "w2", "w3")),
        "knows experts as w1, w2, w3 by default, and skips others with a warning",
        "map the names with `trtllm_modules_to_hf_modules`",
        "read: tensorrt_llm/_torch/peft/lora/config.py",
    ),
)
