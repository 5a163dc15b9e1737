"""For each rule of `peft_posthoc.serving.rules` an adapter that it is about; and the page that has them all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from peft_posthoc.serving.check import ALL
from peft_posthoc.serving.engines import ENGINES
from peft_posthoc.serving.rules import images
from peft_posthoc.serving.rules.table import RULES
from tests.make import architectures, coded_folders, models

LAYER = "base_model.model.model.layers.0"
HEAD = "base_model.model.lm_head"
EMBEDDING = "base_model.model.model.embed_tokens"
RANK = 16
IN_LAYER = [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
QUANTISED = {  # by name: of what base, how, and which modules are left as they are
    "llama in NF4": ("llama", coded_folders.nf4, ()),
    "llama in INT4": ("llama", coded_folders.int4, ()),
    "llama in asymmetric GPTQ": ("llama", coded_folders.gptq, ()),
    "llama in FP8 but for v": ("llama", coded_folders.fp8, ("v_proj",)),
    "mixture in FP8 by rows": ("qwen3_moe", coded_folders.fp8_rows, ()),
}
BASES: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": models.llama,
    "tied": lambda: models.llama(tie_word_embeddings=True),
    "qwen2": models.qwen2,
    "qwen3_moe": models.qwen3_moe,
    "gpt_oss": architectures.ARCHITECTURES["gpt_oss"].make,
    "laguna": models.laguna,
}


class Parts:
    """An adapter in the portable form that can be spoiled before it is written again."""

    def __init__(self, good: Path) -> None:
        self.config: dict[str, Any] = json.loads((good / "adapter_config.json").read_text())
        self.tensors = load_file(good / "adapter_model.safetensors")
        self.files: dict[str, Any] = {}
        self.pickled = False

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        if self.pickled:
            torch.save(tensors, folder / "adapter_model.bin")
        else:
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        for name, content in {"adapter_config.json": self.config, **self.files}.items():
            if name.endswith(".json"):
                (folder / name).write_text(json.dumps(content))
            else:
                save_file(content, folder / name)
        return folder

    # Spoilers.

    def configure(self, **settings: Any) -> None:
        """Set keys of the configuration; `...` takes one out."""
        self.config |= settings
        self.config = {key: value for key, value in self.config.items() if value is not ...}

    def cut(self, rank: int, *, only: str = "") -> None:
        """Give modules with this in their name another rank, larger or smaller."""
        for name in [name for name in self.tensors if only in name]:
            tensor = self.tensors[name]
            shape = (rank, tensor.shape[1]) if ".lora_A." in name else (tensor.shape[0], rank)
            resized = torch.zeros(shape, dtype=tensor.dtype)
            rows, columns = (min(new, old) for new, old in zip(shape, tensor.shape, strict=True))
            resized[:rows, :columns] = tensor[:rows, :columns]
            self.tensors[name] = resized

    def drop(self, part: str) -> None:
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if part not in name}

    def rename(self, old: str, new: str) -> None:
        self.tensors = {name.replace(old, new): tensor for name, tensor in self.tensors.items()}

    def add(self, name: str, *shape: int) -> None:
        self.tensors[name] = torch.full(shape, 0.5, dtype=torch.float16 if len(shape) > 1 else torch.float32)

    def factor(self, module: str, m: int, n: int, *, embedding: bool = False) -> None:
        a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        self.add(f"{module}.{a}", RANK, n)
        self.add(f"{module}.{b}", m, RANK)


Spoil = Callable[[Parts], object]


class Case(NamedTuple):
    """An adapter that a rule is about, and the base that it is served on."""

    spoil: Spoil
    base: str | None = None


def _config(**settings: Any) -> Spoil:
    return lambda parts: parts.configure(**settings)


def _all(*spoilers: Spoil) -> Spoil:
    return lambda parts: [spoil(parts) for spoil in spoilers]


def _pickle(parts: Parts) -> None:
    parts.pickled = True


def _other_file(parts: Parts) -> None:
    parts.files["earlier.safetensors"] = {name: tensor / 2 for name, tensor in parts.tensors.items()}


def adapted_head(parts: Parts) -> None:
    parts.factor(HEAD, 96, 32)
    parts.configure(target_modules=[*parts.config["target_modules"], "lm_head"])


def adapted_embedding(parts: Parts) -> None:
    parts.factor(EMBEDDING, 32, 96, embedding=True)
    parts.configure(target_modules=[*parts.config["target_modules"], "embed_tokens"])


def _experts(*leaves: str) -> Spoil:
    return lambda parts: [parts.factor(f"{LAYER}.mlp.experts.0.{leaf}", 16, 32) for leaf in leaves]


def _shared_expert(parts: Parts) -> None:
    parts.factor(f"{LAYER}.mlp.shared_experts.up_proj", 16, 32)


def _new_tokens(parts: Parts) -> None:
    for module in (HEAD, EMBEDDING):
        parts.add(f"{module}.weight", 104, 32)
    parts.configure(modules_to_save=["lm_head", "embed_tokens"])


def _fused(parts: Parts) -> None:
    parts.configure(target_parameters=["mlp.experts.down_proj"])
    parts.factor(f"{LAYER}.mlp.experts", 32, 16)


def _in_fp8(parts: Parts) -> None:
    parts.cut(24)
    parts.tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in parts.tensors.items()}


def _names_of_adapter(parts: Parts) -> None:
    parts.rename("lora_A.weight", "lora_A.default.weight")
    parts.rename("lora_B.weight", "lora_B.default.weight")


OWN_RANK = _all(lambda parts: parts.cut(8, only="q_proj"), _config(rank_pattern={"q_proj": 8}))
OWN_SCALE = _config(alpha_pattern={"q_proj": 4})
RSLORA = _config(use_rslora=True)
DORA = _config(use_dora=True)
MAGNITUDE = _all(DORA, lambda parts: parts.add(f"{LAYER}.self_attn.q_proj.lora_magnitude_vector", 32))
PISSA = _config(init_lora_weights="pissa")
REPLICATION = _config(layer_replication=[[0, 2], [1, 2]])


def NORM(parts: Parts) -> None:
    parts.add(f"{LAYER}.input_layernorm.weight", 32)


def BIAS(parts: Parts) -> None:
    parts.add(f"{LAYER}.self_attn.q_proj.bias", 32)


def LORA_BIAS(parts: Parts) -> None:
    parts.add(f"{LAYER}.self_attn.q_proj.lora_B.bias", 32)


def WHOLE_HEAD(parts: Parts) -> None:
    parts.add(f"{HEAD}.weight", 96, 32)


def TOWER(parts: Parts) -> None:
    parts.factor("base_model.model.model.vision_tower.layers.0.self_attn.o_proj", 32, 32)


CASES: dict[str, Case] = {
    "pickled": Case(_pickle),
    "pickled-for-transformers": Case(_pickle),
    "other-safetensors": Case(_other_file),
    "no-peft-type": Case(_config(peft_type=...)),
    "missing-keys": Case(_config(target_modules=...)),
    "missing-rank": Case(_config(r=...)),
    "missing-alpha": Case(_config(lora_alpha=...)),
    "unknown-keys": Case(_config(lora_bias=False)),
    "float-alpha": Case(_config(lora_alpha=float(RANK))),
    "rank-not-as-configured": Case(_config(r=8, lora_alpha=8), "llama"),
    "patterns-before-0.32": Case(OWN_SCALE),
    "mixed-ranks": Case(OWN_RANK),
    "scale-sglang": Case(RSLORA),
    "scale-lorax": Case(OWN_SCALE),
    "mixed-ranks-of-a-leaf": Case(_all(lambda p: p.cut(8, only="layers.0"), _config(rank_pattern={r".*\.0\..*": 8}))),
    "padded-rank": Case(_all(lambda parts: parts.cut(12), _config(r=12, lora_alpha=12))),
    "rank-for-one-gpu": Case(_all(lambda parts: parts.cut(8), _config(r=8, lora_alpha=8))),
    "rank-above-128": Case(_all(lambda parts: parts.cut(144), _config(r=144, lora_alpha=144))),
    "rslora-lorax": Case(RSLORA),
    "scale-trtllm": Case(OWN_SCALE),
    "scale-llamacpp": Case(RSLORA),
    "rank-above-512": Case(_all(lambda parts: parts.cut(528), _config(r=528, lora_alpha=528))),
    "dora": Case(DORA),
    "dora-ignored": Case(DORA),
    "dora-flag-gguf": Case(DORA),
    "dora-gguf": Case(MAGNITUDE),
    "dora-trtllm": Case(DORA),
    "init-vllm": Case(PISSA),
    "init-peft": Case(PISSA),
    "init-ignored": Case(PISSA),
    "variants": Case(REPLICATION),
    "variants-ignored": Case(REPLICATION),
    "bias-setting": Case(_config(bias="all")),
    "biases-ignored": Case(BIAS),
    "biases": Case(BIAS),
    "lora-bias": Case(LORA_BIAS),
    "lora-bias-ignored": Case(LORA_BIAS),
    "modules-to-save": Case(_config(modules_to_save=["norm"])),
    "modules-to-save-missing": Case(_config(modules_to_save=["norm"]), "llama"),
    "whole-weights": Case(WHOLE_HEAD),
    "whole-weights-ignored": Case(WHOLE_HEAD),
    "whole-weights-sglang": Case(lambda parts: parts.add(f"{LAYER}.self_attn.q_proj.weight", 32, 32)),
    "whole-weights-trtllm": Case(lambda parts: parts.add(f"{LAYER}.self_attn.q_proj.weight", 32, 32)),
    "whole-head-trtllm": Case(WHOLE_HEAD),
    "overwrites-base": Case(NORM, "llama"),
    "norms": Case(NORM),
    "norms-ignored": Case(NORM),
    "norms-llamacpp": Case(NORM),
    "other-norms-llamacpp": Case(lambda parts: parts.add(f"{LAYER}.self_attn.q_norm.weight", 8)),
    "names-trtllm": Case(lambda parts: parts.rename(".mlp.", ".")),
    "base-copies": Case(_all(adapted_head, lambda parts: parts.add(f"{HEAD}.base_layer.weight", 96, 32))),
    "other-base-copies": Case(
        _all(adapted_head, lambda parts: parts.add(f"{HEAD}.base_layer.weight", 96, 32)),
        "llama",
    ),
    "target-pattern": Case(_config(target_modules=r".*_proj")),
    "target-all-linear": Case(_config(target_modules="all-linear")),
    "untargeted": Case(_config(target_modules=["q_proj", "v_proj"])),
    "untargeted-in-peft": Case(_config(target_modules=r".*q_proj"), "llama"),
    "q-without-v": Case(lambda parts: parts.drop("v_proj")),
    "up-without-gate": Case(lambda parts: parts.drop("gate_proj")),
    "missing-layers": Case(lambda parts: parts.drop("layers.0.self_attn.o_proj")),
    "no-prefix": Case(lambda parts: parts.rename("base_model.model.", ""), "llama"),
    "adapter-in-names": Case(_names_of_adapter, "llama"),
    "adapter-in-names-ignored": Case(_names_of_adapter),
    "wrong-path": Case(lambda parts: parts.rename("model.layers", "model.language_model.layers"), "llama"),
    "unknown-names-llamacpp": Case(lambda parts: parts.rename(".mlp.", "."), "llama"),
    "mlx-export": Case(DORA),
    "another-base": Case(lambda parts: None, "qwen2"),
    "maybe-another-base": Case(_config(base_model_name_or_path="some-org/other"), "llama"),
    "fused-names": Case(lambda parts: parts.rename("q_proj", "qkv_proj"), "llama"),
    "other-shapes": Case(lambda parts: parts.add(f"{LAYER}.self_attn.q_proj.lora_B.weight", 40, RANK), "llama"),
    "larger-shapes": Case(lambda parts: parts.add(f"{LAYER}.self_attn.q_proj.lora_B.weight", 40, RANK), "llama"),
    "smaller-shapes": Case(lambda parts: parts.add(f"{LAYER}.self_attn.q_proj.lora_B.weight", 24, RANK), "llama"),
    "dropped-by-peft": Case(_shared_expert, "laguna"),
    "refused-by-peft": Case(
        _all(
            lambda parts: parts.add(f"{LAYER.rpartition('.layers')[0]}.norm.weight", 33),
            _config(modules_to_save=["model.norm"]),
        ),
        "llama",
    ),
    "resized-vocabulary": Case(_new_tokens, "llama"),
    "added-tokens": Case(lambda parts: parts.files.update({"added_tokens.json": {"<new>": 96}}), "llama"),
    "embeddings-vllm": Case(adapted_head, "qwen2"),
    "embeddings-vllm-unknown": Case(adapted_embedding),
    "vocabulary-vllm": Case(lambda parts: parts.factor(HEAD, 258049, 32)),
    "head-prompt-logprobs": Case(adapted_head),
    "embeddings-ignored": Case(adapted_embedding),
    "head-ignored": Case(adapted_head),
    "tied-llamacpp": Case(adapted_head, "tied"),
    "maybe-tied-llamacpp": Case(adapted_embedding),
    "tied-merge": Case(adapted_head, "tied"),
    "towers": Case(TOWER),
    "towers-vllm": Case(TOWER),
    "towers-llamacpp": Case(TOWER),
    "fused-experts-peft": Case(_fused),
    "fused-experts-vllm": Case(_fused),
    "fused-experts": Case(_fused),
    "fused-experts-ignored": Case(_fused),
    "single-experts-unread": Case(_experts("gate_proj", "up_proj", "down_proj")),
    "single-experts-stacked": Case(_experts("gate_proj", "up_proj", "down_proj"), "gpt_oss"),
    "dense-beside-experts": Case(_experts("gate_proj", "up_proj", "down_proj")),
    "partial-experts": Case(_experts("gate_proj")),
    "expert-names-trtllm": Case(_experts("gate_proj", "up_proj", "down_proj")),
    "format-vllm": Case(lambda parts: None, "llama in NF4"),
    "gptq-vllm": Case(lambda parts: None, "llama in asymmetric GPTQ"),
    "format-tgi": Case(lambda parts: None, "llama in NF4"),
    "format-lorax": Case(lambda parts: None, "llama in INT4"),
    "fused-in-part": Case(lambda parts: None, "llama in FP8 but for v"),
    "quantised-experts": Case(_experts("gate_proj", "up_proj", "down_proj"), "mixture in FP8 by rows"),
    "quantised-experts-sglang": Case(_experts("gate_proj", "up_proj", "down_proj"), "mixture in FP8 by rows"),
    "quantised-experts-trtllm": Case(_experts("gate_proj", "up_proj", "down_proj"), "mixture in FP8 by rows"),
    "fp8-rank-trtllm": Case(_in_fp8),
}

# Close to what a rule is about, and right: these rules must not see them.
FINE: dict[str, tuple[tuple[str, ...], Case]] = {
    "patterns that say what is so anyway": (
        ("patterns-before-0.32", "mixed-ranks", "scale-sglang", "scale-lorax", "scale-trtllm", "scale-llamacpp"),
        Case(_config(rank_pattern={"q_proj": RANK}, alpha_pattern={"v_proj": RANK})),
    ),
    "own ranks under one alpha, which goes by the tensor's rank": (("scale-trtllm", "scale-llamacpp"), Case(OWN_RANK)),
    "rank 48": (
        ("padded-rank", "rank-for-one-gpu", "rank-above-128"),
        Case(_all(lambda parts: parts.cut(48), _config(r=48, lora_alpha=48))),
    ),
    "rank 12 of one name": (
        ("padded-rank",),
        Case(_all(lambda p: p.cut(12), lambda p: [p.drop(x) for x in ("self_attn", "gate", "up")], _config(r=12))),
    ),
    "own ranks that are padded to r": (
        ("padded-rank",),
        Case(_all(lambda p: p.cut(9, only="mlp"), _config(rank_pattern={r".*\.mlp\..*": 9}))),
    ),
    "a rank that is padded to that of the others": (
        ("mixed-ranks-of-a-leaf",),
        Case(_all(lambda parts: parts.cut(12, only="layers.0"), _config(rank_pattern={r".*\.0\..*": 12}))),
    ),
    "a file of something else": (
        ("other-safetensors",),
        Case(lambda parts: parts.files.update({"optimizer.safetensors": {"state": torch.zeros(3)}})),
    ),
    "names of a wrapper's language model": (
        ("unknown-names-llamacpp",),
        Case(lambda parts: parts.rename("model.layers", "model.language_model.layers"), "llama"),
    ),
    "own ranks, which the export pads": (("mlx-export",), Case(OWN_RANK)),
    "norms in modules_to_save": (("overwrites-base",), Case(_all(NORM, _config(modules_to_save=["input_layernorm"])))),
    "a classifier": (("modules-to-save",), Case(_config(modules_to_save=["score"]))),
    "full names as targets": (
        ("untargeted", "untargeted-in-peft"),
        Case(_config(target_modules=[f"layers.{i}.{name}" for i in range(2) for name in IN_LAYER])),
    ),
    "v and k without q": (("q-without-v",), Case(lambda parts: parts.drop("q_proj"))),
    "gate without up": (("up-without-gate",), Case(lambda parts: parts.drop("up_proj"))),
    "a name that no layer has": (("missing-layers",), Case(lambda parts: parts.drop("o_proj"), "llama")),
    "tokens that the base has": (
        ("added-tokens",),
        Case(lambda parts: parts.files.update({"added_tokens.json": {"<old>": 95}}), "llama"),
    ),
    "a head of a class that takes it": (("embeddings-vllm", "embeddings-vllm-unknown"), Case(adapted_head, "llama")),
    "a head that is not tied": (("tied-llamacpp", "tied-merge", "maybe-tied-llamacpp"), Case(adapted_head, "llama")),
    "whole experts": (
        ("partial-experts", "dense-beside-experts", "expert-names-trtllm"),
        Case(_all(lambda p: p.drop(".mlp."), _experts("w1", "w2", "w3"))),
    ),
    "a base that is quantised, all of it": (
        ("format-vllm", "format-tgi", "fused-in-part", "quantised-experts", "wrong-path"),
        Case(lambda parts: None, "llama in INT4"),
    ),
    "initial weights that leave the base alone": (("init-vllm", "init-peft"), Case(_config(init_lora_weights="eva"))),
}


def make(case: Case, good: Path, folder: Path) -> Path:
    """The adapter of a case, written into a folder."""
    parts = Parts(good)
    case.spoil(parts)
    return parts.write(folder)


def base_of(case: Case, folder: Path) -> Path | None:
    """The base of a case, written into a folder once."""
    if case.base is None:
        return None
    where = folder / case.base
    if case.base in QUANTISED and not where.exists():
        plain, how, but = QUANTISED[case.base]
        coded_folders.quantise(base_of(Case(case.spoil, plain), folder), where, how, but=but)
    elif not where.exists():
        torch.manual_seed(0)
        models.save(BASES[case.base](), where)
    return where


_PAGE = """# Serving an adapter

`phlora check ADAPTER` tells, for any PEFT LoRA adapter, what each engine would do with it, and how to start it. It
reads the configuration and the tensors' headers, and only such tensors as have to be compared with the base's. With
`--base` it holds names, shapes, layers and ties against the model that is served; with `--fix OUT` it writes the
adapter again as all engines read it. The exit status is 1 if a chosen engine (`--engine`) would refuse the adapter or
compute something else than PEFT; without `--engine`, one that loads no base of this format is told and not counted.

```sh
phlora check adapter                                    # every engine
phlora check adapter --engine vllm --engine sglang --base base
phlora check adapter --base base --fix adapter-for-all  # scales folded in, one rank, complete layers, plain names
```

`--fix` leaves out whole weights, norms and biases, and tells their sizes. It refuses what it cannot rewrite without
loss: DoRA, initial weights taken out of the base, factors of all experts at once or of convolutions. Where a scale is
no power of two, factors are rounded to their dtype once more, and it says by how much (`--dtype float32`).

A LoRA file of an image model is checked for diffusers, ComfyUI and A1111, a PEFT folder where one of these is named:
[`images.md`](images.md).

In Python: `peft_posthoc.check("adapter", engines=["vllm"], base="base").wrong` has the names of the engines, and
`peft_posthoc.fix("adapter", "out", base="base")` is `--fix`.

Adapters of `phlora extract` in the portable form, of dense language models, without `--embeddings` and `--head`, at
ranks up to 128, break none of these rules (but for the note on rank 8). This page is made by
`python -m docs.make serving`; for every rule there is an adapter that breaks it in `tests/make/wrong_adapters.py`; what
engines did with these, run here, is in [`engines.md`](engines.md).

## The engines

| `--engine` | engine | examined |
|---|---|---|
{engines}
NIM has the rules of both its backends. llama.cpp and MLX read forms of their own: llama.cpp's rules are about what its
own converter makes, MLX's about `phlora export --to mlx`. The last three are asked about LoRAs of image models alone.

## The rules

*refused*: an error, at the latest when a request comes. *silently wrong*: it computes something else than PEFT does
with the same file, or PEFT itself something else than the file says, and no error tells. *warning*: right under a
condition. "Run" means that the engine's own code was run on such an adapter, "read" that its code was read. Without a
version, those examined are meant.

| rule | engines | what happens | way out | source |
|---|---|---|---|---|
{rules}"""


def page() -> str:
    """The rule table."""
    engines = "".join(f"| `{name}` | {engine.title} | {engine.examined} |\n" for name, engine in ALL.items())
    return _PAGE.format(engines=engines, rules="".join(_row(rule) for rule in (*RULES, *images.RULES)))


def _row(rule: Any) -> str:
    titles = ", ".join(ALL[name].title for name in rule.engines)
    who = "all" if set(rule.engines) == set(ENGINES) else titles
    versions = f" ({rule.versions})" if rule.versions else ""
    base = " With `--base`." if rule.needs_base else ""
    what = f"*{rule.severity}*: {rule.message}.{base}"
    return f"| {rule.name} | {who}{versions} | {what} | {rule.way_out} | {rule.source} |\n"


def copy_of(folder: Path, where: Path) -> Path:
    """The same adapter elsewhere."""
    return Path(shutil.copytree(folder, where))
