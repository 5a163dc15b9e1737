"""The engines that adapters are served with: which versions their rules were found in, and how each is started."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_posthoc.adapters.named_base import base_of
from peft_posthoc.checkpoints.gguf import SUFFIX
from peft_posthoc.serving.subject import Subject

# The ranks that vLLM reserves memory for (0.32: `--max-lora-rank`).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Engine:
    """A program that loads adapters."""

    title: str
    examined: str
    """The versions whose code the rules were found in, and how."""
    serve: Callable[[Any], list[str]]
    """The commands that serve the adapter."""
    backends: tuple[str, ...] = ()
    """Engines that it hands the adapter to: their rules are its own."""


def _base(subject: Subject) -> str:
    named = base_of(subject.config)
    known = subject.base.checkpoint.label if subject.base is not None else named.name if named is not None else "BASE"
    return shlex.quote(known)


def _name(subject: Subject) -> str:
    return shlex.quote(Path(subject.label).resolve().name)


def _path(subject: Subject) -> str:
    return shlex.quote(subject.label)


def _vllm_rank(subject: Subject) -> int:
    return next((rank for rank in VLLM_RANKS if rank >= subject.max_rank), VLLM_RANKS[-1])


def _peft(subject: Subject) -> list[str]:
    size = subject.in_peft.vocabulary if subject.in_peft is not None else None
    first = [] if size is None else [f"base.resize_token_embeddings({size})"]
    return [*first, f"PeftModel.from_pretrained(base, {subject.label!r})"]


def _vllm(subject: Subject) -> list[str]:
    # On a CPU (0.32), where no slot is free, requests to the base get the last slot's adapter.
    return [
        f"vllm serve {_base(subject)} --enable-lora --max-lora-rank {_vllm_rank(subject)} --max-loras 1 "
        f"--lora-modules {_name(subject)}={_path(subject)}  # on a CPU --max-loras 2"
    ]


def _sglang(subject: Subject) -> list[str]:
    leaves = " ".join(sorted({module.rpartition(".")[2] for module in subject.modules}))
    return [
        f"python -m sglang.launch_server --model-path {_base(subject)} --enable-lora "
        f"--lora-paths {_name(subject)}={_path(subject)} --max-lora-rank {subject.max_rank} "
        f"--lora-target-modules {leaves} --lora-strict-loading"
    ]


def _lorax(subject: Subject) -> list[str]:
    return [f"lorax-launcher --model-id {_base(subject)} --adapter-id {_path(subject)} --adapter-source local"]


def _tgi(subject: Subject) -> list[str]:
    return [
        f"text-generation-launcher --model-id {_base(subject)} --lora-adapters {_name(subject)}={_path(subject)}",
    ]


def _trtllm(subject: Subject) -> list[str]:
    return [
        f"LLM(model={shlex.split(_base(subject))[0]!r}, lora_config=LoraConfig(lora_dir=[{subject.label!r}], "
        f"max_lora_rank={subject.max_rank}))"
    ]


def _nim(subject: Subject) -> list[str]:
    return [
        f"mkdir -p nim-adapters && cp -r {_path(subject)} nim-adapters/  # a folder for each adapter",
        f'NIM_PEFT_SOURCE="$PWD/nim-adapters", with --enable-lora --max-loras 1 --max-lora-rank {_vllm_rank(subject)}',
    ]


def _llamacpp(subject: Subject) -> list[str]:
    name, base = _name(subject), _base(subject)
    convert, served = (
        f"python convert_lora_to_gguf.py {_path(subject)} --base {base} --outfile {name}.gguf",
        "base.gguf",
    )
    if base.endswith(SUFFIX):  # The converter wants the folder that it was made from.
        convert, served = f"phlora export {_path(subject)} {name}.gguf --to gguf --base {base}", base
    return [convert, f"llama-server -m {served} --lora {name}.gguf  # Ollama: ADAPTER {name}.gguf"]


def _mlx(subject: Subject) -> list[str]:
    out = f"{_name(subject)}-mlx"
    return [
        f"phlora export {_path(subject)} {out} --to mlx --base {_base(subject)}",
        f"mlx_lm.server --model {_base(subject)} --adapter-path {out}",
    ]


ENGINES: Mapping[str, Engine] = {
    "peft": Engine("PEFT", "0.21.2 with transformers 5.23.0 (run)", _peft),
    "vllm": Engine("vLLM", "0.32.0 (dense models run on CPU; mixtures of experts read)", _vllm),
    "sglang": Engine("SGLang", "0.5.23 (its loader and memory pool run, the rest read)", _sglang),
    "lorax": Engine("LoRAX", "git a7394ba, 2026-05-28 (read)", _lorax),
    "tgi": Engine("TGI", "git db931fc, 2026-01-08 (read)", _tgi),
    "trtllm": Engine("TensorRT-LLM", "sources of 2026 (read)", _trtllm),
    "nim": Engine("NIM", "LLM 2.x (its documents), whose backends are vLLM and SGLang", _nim, ("vllm", "sglang")),
    "llamacpp": Engine("llama.cpp", "as in llama-cpp-python 0.3.36 (run)", _llamacpp),
    "mlx": Engine("MLX-LM", "mlx-lm 0.32.2 with mlx 0.32.4 (run on CPU)", _mlx),
}
