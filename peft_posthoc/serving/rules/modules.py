"""Rules about embeddings, the head, and towers of other modalities."""

from __future__ import annotations

from collections.abc import Iterable

from peft_posthoc.serving.rules.rule import BOTH_READ, CONVERT, REFUSED, SGLANG_RUN, TRT_READ, WARNING, WRONG, Rule
from peft_posthoc.serving.subject import Subject

# vLLM classes that declare no `embedding_modules`; and those that do, as far as they were looked at (0.32).
_NO_EMBEDDINGS = (
    "qwen2",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "phi3",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "glm4",
)
_EMBEDDINGS = ("llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "qwen3_5", "exaone", "jamba", "solar", "lfm2")
_VLLM_MAX_VOCABULARY = 258048
_OTHER_MODALITIES = ("vision", "visual", "audio", "speech")


def of_model(subject: Subject, names: Iterable[str], *types: str) -> tuple[str, ...]:
    """The names, if the base is of one of these model types."""
    return tuple(names) if subject.base is not None and subject.base.model_type in types else ()


def not_of_model(subject: Subject, names: Iterable[str], *types: str) -> tuple[str, ...]:
    """The names, unless the base is known to be of one of these model types."""
    return () if subject.base is not None and subject.base.model_type in types else tuple(names)


def tied(subject: Subject) -> tuple[str, ...]:
    """Embeddings and heads with factors, of a base that ties them."""
    return (*subject.embeddings, *subject.heads) if subject.base is not None and subject.base.tied else ()


def maybe_tied(subject: Subject) -> tuple[str, ...]:
    """Embeddings and heads with factors, where no base tells whether it ties them."""
    return (*subject.embeddings, *subject.heads) if subject.base is None else ()


def other_modalities(subject: Subject) -> tuple[str, ...]:
    """Modules of a vision or audio tower."""
    return tuple(
        module
        for module in subject.modules
        if any(word in part for part in module.split(".") for word in _OTHER_MODALITIES)
    )


RULES: tuple[Rule, ...] = (
    # Embeddings and head.
    Rule(
        name="embeddings-vllm",
        engines=("vllm",),
        severity=REFUSED,
        finds=lambda s: of_model(s, (*s.embeddings, *s.heads), *_NO_EMBEDDINGS),
        message="its class of this model declares no `embedding_modules`",
        way_out="extract without `--embeddings` and `--head`, or serve the merged model",
        source="run: llama (has them), qwen2 (has none); read: the others",
        needs_base=True,
    ),
    Rule(
        name="embeddings-vllm-unknown",
        engines=("vllm",),
        severity=WARNING,
        finds=lambda s: not_of_model(s, (*s.embeddings, *s.heads), *_NO_EMBEDDINGS, *_EMBEDDINGS),
        message="takes them only where its class of the model declares `embedding_modules`",
        way_out="see that class; Llama, Mistral, Mixtral and Qwen3 have them, Qwen2, Gemma and Phi3 have not",
        source="run: llama, qwen2",
    ),
    Rule(
        name="vocabulary-vllm",
        engines=("vllm",),
        severity=REFUSED,
        finds=lambda s: tuple(head for head in s.heads if s.modules[head].m > _VLLM_MAX_VOCABULARY),
        message=f"takes heads of vocabularies up to {_VLLM_MAX_VOCABULARY}",
        way_out="extract without `--head`, or serve the merged model",
        source="read: vllm/lora/layers",
    ),
    Rule(
        name="head-prompt-logprobs",
        engines=("vllm",),
        severity=WARNING,
        finds=lambda s: s.heads,
        message="does not apply the head's factors to `prompt_logprobs`",
        way_out="do not compare prompts' log-probabilities",
        source="vllm #51594",
    ),
    Rule(
        name="embeddings-ignored",
        engines=("lorax", "tgi", "trtllm"),
        severity=WRONG,
        finds=lambda s: s.embeddings,
        message="does not load factors of embeddings",
        way_out="extract without `--embeddings`, or serve the merged model",
        source=f"{BOTH_READ}; {TRT_READ}",
    ),
    Rule(
        name="head-ignored",
        engines=("tgi", "trtllm"),
        severity=WRONG,
        finds=lambda s: s.heads,
        message="does not load factors of the head",
        way_out="extract without `--head`, or serve the merged model",
        source=f"read: TGI's adapter_layers; {TRT_READ}",
    ),
    Rule(
        name="tied-llamacpp",
        engines=("llamacpp",),
        severity=REFUSED,
        finds=tied,
        message=(
            "aborts (GGML_ASSERT for the embedding) or finds no output.weight (for the head) where the base ties them"
        ),
        way_out="extract without `--embeddings` and `--head`, or serve the merged model",
        source="run: llama.cpp #9065",
        needs_base=True,
    ),
    Rule(
        name="maybe-tied-llamacpp",
        engines=("llamacpp",),
        severity=WARNING,
        finds=maybe_tied,
        message="aborts where the base ties embeddings and head",
        way_out="give `--base` to know",
        source="run: llama.cpp #9065",
    ),
    Rule(
        name="tied-merge",
        engines=("peft",),
        severity=WARNING,
        finds=tied,
        message="computes it exactly, but `merge_and_unload` gives another model where the base ties them",
        way_out="serve it unmerged",
        source="run: off by 6 to 7 nats",
        needs_base=True,
    ),
    # Towers.
    Rule(
        name="towers",
        engines=("sglang", "trtllm"),
        severity=WRONG,
        finds=other_modalities,
        message="goes by the number in `layers.N`: a tower's layer is taken for the language model's",
        way_out="extract the language model's layers only (`--exclude`)",
        source=f"{SGLANG_RUN}; {TRT_READ}",
    ),
    Rule(
        name="towers-vllm",
        engines=("vllm",),
        severity=WRONG,
        finds=other_modalities,
        message="ignores or refuses them, but with `enable_tower_connector_lora` and for models that support it",
        way_out="extract the language model's layers only (`--exclude`)",
        source="read: vllm/lora/model_manager.py",
    ),
    Rule(
        name="towers-llamacpp",
        engines=("llamacpp",),
        severity=WRONG,
        finds=other_modalities,
        message=f"{CONVERT} skips them",
        way_out="extract the language model's layers only (`--exclude`)",
        source=f"read: {CONVERT}",
    ),
)
