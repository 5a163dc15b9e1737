"""A rule about adapters, and words that several rules share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from peft_posthoc.serving.engines import ENGINES

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
    finds: Callable[[Any], tuple[str, ...] | str]
    """Of a `Subject` or an `ImageSubject`: the tensors, modules or settings at fault, or the words of a refusal;
    nothing where all is well."""
    message: str
    """The engine's own behaviour."""
    way_out: str
    source: str
    """The code or issue that shows it; "run" where the engine's own code was run on such an adapter."""
    versions: str = ""
    """The engine's versions that do so, where these are not those examined (`ENGINES`)."""
    needs_base: bool = False
    of_base: bool = False
    """Whether it is the base that the engine does not load, with whatever adapter."""

    def applies_to(self, engine: str) -> bool:
        """Tell whether the rule is one of this engine, or of an engine that it hands the adapter to."""
        backends = ENGINES[engine].backends if engine in ENGINES else ()
        return bool({engine, *backends} & {*self.engines})


FIX = "`--fix OUT` rewrites it"
WRITE_THEM = "write what the adapter was trained with into the configuration"
FIX_BASE = "`--fix OUT --base BASE` rewrites it"
LEAVE_OUT = "`--fix OUT` leaves them out and tells their size; or merge the adapter and serve the whole model"
MERGE = "merge the adapter into its base (PEFT's `merge_and_unload`) and serve that, or extract from it again"
BOTH_READ = "read: lorax_server/adapters/lora.py; TGI adapters/lora.py"
TRT_READ = "read: tensorrt_llm/_torch/peft/lora/loaders.py"
SGLANG_RUN = "run: SGLang's srt/lora with stand-ins"
VLLM_HELPER = "vllm/lora/peft_helper.py"
CONVERT = "convert_lora_to_gguf.py"
