"""Rules about names and shapes, held against the base where it is given."""

from __future__ import annotations

import re

from peft_posthoc.adapters.names import PREFIX
from peft_posthoc.adapters.on_model import AdapterOnModel
from peft_posthoc.adapters.open import open_adapter
from peft_posthoc.adapters.tensors import EMBEDDING_FACTOR, FACTOR
from peft_posthoc.errors import AdapterError
from peft_posthoc.formats import mlx
from peft_posthoc.serving.rules.rule import BOTH_READ, CONVERT, FIX, REFUSED, SGLANG_RUN, TRT_READ, WRONG, Rule
from peft_posthoc.serving.subject import Subject, leaf_of
from peft_posthoc.text import asked_on

# `...N.parent.leaf`, `...N.parent.part.leaf` or `...N.parent.experts.N.leaf`.
_LAYERED = re.compile(r"(.*\.)?\d+\.\w+\.\w+(\.\w+|\.\d+\.\w+)?")


def without_prefix(subject: Subject) -> tuple[str, ...]:
    """Tensors that are not called what `PeftModel` calls them."""
    return tuple(name for name in subject.headers if not name.startswith(PREFIX))


def named_after_adapter(subject: Subject) -> tuple[str, ...]:
    """Factors with the adapter's name in theirs (`lora_A.default.weight`)."""
    matches = (FACTOR.fullmatch(name) or EMBEDDING_FACTOR.fullmatch(name) for name in subject.headers)
    return tuple(match.string for match in matches if match and match["adapter"])


def exotic_names(subject: Subject) -> tuple[str, ...]:
    """Modules whose names are not of the form that TensorRT-LLM takes apart: `...N.parent.leaf`."""
    skipped = {*subject.embeddings, *subject.heads}
    return tuple(module for module in subject.modules if module not in skipped and not _LAYERED.fullmatch(module))


def strangers(subject: Subject) -> tuple[str, ...]:
    """Modules that the base's class does not have."""
    if subject.base is None:
        return ()
    layout, handled = subject.base.layout, {*subject.experts}

    def known(module: str) -> bool:
        # By the name on disk too: what transformers renames in a checkpoint, PEFT renames in an adapter.
        return not layout.classes.keys().isdisjoint((module, layout.module_of(f"{module}.weight")))

    return tuple(
        module
        for module in subject.modules
        if module not in handled and not known(re.sub(r"(\.base_layer)+$", "", module))
    )


def unmapped(subject: Subject) -> tuple[str, ...]:
    """Modules that the base's class does not have, with or without a wrapper's `language_model.` in their names."""
    classes = subject.base.layout.classes if subject.base is not None else {}
    return tuple(module for module in strangers(subject) if module.replace("language_model.", "") not in classes)


def fused_names(subject: Subject) -> tuple[str, ...]:
    """Fused projections of a class that has them one by one."""
    parts = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj"}
    classes = subject.base.layout.classes if subject.base is not None else {}
    return tuple(
        module
        for module in strangers(subject)
        if (leaf := leaf_of(module)) in parts and f"{module.removesuffix(leaf)}{parts[leaf]}" in classes
    )


def unfitting(subject: Subject, *, larger: bool, smaller: bool) -> tuple[str, ...]:
    """Modules whose factors are larger or smaller than the base's weight."""
    if subject.base is None:
        return ()
    found = []
    for module, own in subject.modules.items():
        slot = subject.base.slots.get(module)
        if slot is None or (own.m, own.n) == (slot.m, slot.n):
            continue
        if larger if own.m > slot.m or own.n > slot.n else smaller:
            found.append(f"{module} ({own.m} x {own.n}, in the base {slot.m} x {slot.n})")
    return tuple(found)


def new_tokens(subject: Subject) -> tuple[str, ...]:
    """Tokens of `added_tokens.json` that the base's vocabulary does not have, or all, where it is not known."""
    size = subject.base.vocabulary if subject.base is not None else None
    return tuple(token for token, number in subject.added_tokens.items() if size is None or number >= size)


def not_for_mlx(subject: Subject) -> str:
    """The words with which `phlora export --to mlx` refuses the adapter; nothing if it does not."""
    try:
        folder = open_adapter(subject.label)
        if subject.base is not None:
            with asked_on("command line"):  # As all ways out here.
                mlx.check(AdapterOnModel(folder, subject.base.checkpoint, subject.base.layout))
    except AdapterError as error:
        return str(error)
    return ""


RULES: tuple[Rule, ...] = (
    Rule(
        name="no-prefix",
        engines=("peft", "lorax", "tgi"),
        severity=WRONG,
        finds=without_prefix,
        message="looks for names that begin with base_model.model., and serves the base",
        way_out=FIX,
        source=f"run: PEFT warns of missing keys only; {BOTH_READ}",
    ),
    Rule(
        name="adapter-in-names",
        engines=("vllm", "trtllm", "llamacpp"),
        severity=REFUSED,
        finds=named_after_adapter,
        message="does not know names with the adapter's inside",
        way_out=FIX,
        source=f"run: vLLM, {CONVERT}; {TRT_READ}",
    ),
    Rule(
        name="adapter-in-names-ignored",
        engines=("lorax", "tgi"),
        severity=WRONG,
        finds=named_after_adapter,
        message="ignores names with the adapter's inside",
        way_out=FIX,
        source=BOTH_READ,
    ),
    Rule(
        name="names-trtllm",
        engines=("trtllm",),
        severity=REFUSED,
        finds=exotic_names,
        message="takes names apart into the layer's number, a parent and a leaf, and ends at others (KeyError)",
        way_out="serve the merged model",
        source=f"{TRT_READ} (`HF_LORA_PATTERN`)",
    ),
    Rule(
        name="wrong-path",
        engines=("peft", "vllm", "lorax", "tgi"),
        severity=WRONG,
        finds=strangers,
        message="the base's class has no such module: the factors are left out without an error",
        way_out="save the adapter again from the class that is served, or rename its modules",
        source=f"run: PEFT, vLLM (#34186, #48019, #34591); {BOTH_READ}",
        needs_base=True,
    ),
    Rule(
        name="unknown-names-llamacpp",
        engines=("llamacpp",),
        severity=REFUSED,
        finds=unmapped,
        message=f"{CONVERT} can map names of the base's class only",
        way_out="save the adapter again from the class that is served, or rename its modules",
        source=f"run: {CONVERT}",
        needs_base=True,
    ),
    Rule(
        name="mlx-export",
        engines=("mlx",),
        severity=REFUSED,
        finds=not_for_mlx,
        message="reads a form of its own, and `phlora export --to mlx` refuses to write it",
        way_out="as the refusal says; `--fix OUT` rewrites what it can; or merge the adapter and serve the whole model",
        source="run: MLX-LM, with what the export wrote",
    ),
    Rule(
        name="fused-names",
        engines=("vllm", "sglang", "llamacpp"),
        severity=REFUSED,
        finds=fused_names,
        message="the base's class has these projections one by one",
        way_out="train or extract on the class that is served",
        source=f"run: vLLM, llama.cpp; {SGLANG_RUN}",
        needs_base=True,
    ),
    Rule(
        name="other-shapes",
        engines=("peft", "sglang", "llamacpp"),
        severity=REFUSED,
        finds=lambda s: unfitting(s, larger=True, smaller=True),
        message="the factors do not have the base's shapes: another base, or a changed vocabulary",
        way_out="give the base that the adapter was made for",
        source=f"run: PEFT, llama.cpp; {SGLANG_RUN} (mem_pool.py)",
        needs_base=True,
    ),
    Rule(
        name="larger-shapes",
        engines=("vllm",),
        severity=REFUSED,
        finds=lambda s: unfitting(s, larger=True, smaller=False),
        message="the factors are larger than the base's weights: another base, or a changed vocabulary",
        way_out="give the base that the adapter was made for",
        source="run: vLLM",
        needs_base=True,
    ),
    Rule(
        name="smaller-shapes",
        engines=("vllm",),
        severity=WRONG,
        finds=lambda s: unfitting(s, larger=False, smaller=True),
        message="pads factors that are smaller than the base's weights with zeros in silence",
        way_out="give the base that the adapter was made for",
        source="run: vLLM",
        needs_base=True,
    ),
    Rule(
        name="added-tokens",
        engines=("sglang",),
        severity=REFUSED,
        finds=new_tokens,
        message="refuses adapters whose added_tokens.json has tokens beyond the base's vocabulary",
        way_out="`--fix OUT` leaves the file behind; where the tokens are new, merge the adapter",
        source=f"{SGLANG_RUN} (`validate_new_adapter`)",
    ),
)
