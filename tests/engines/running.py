"""Engines, where they are installed, and what they did with adapters.

An engine is one entry of `ENGINES`: the driver that runs in it, what a base and an adapter must be turned into for it,
and whose rules are about it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peft_posthoc import PosthocError, export

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
HOME = Path(os.environ.get("PHLORA_ENGINES") or ROOT / ".work/engines")
# One driver with all adapters of a base takes half a minute on a quiet machine.
PATIENCE = 1800


Made = Path | str
"""What an engine is given for an adapter, or the words in which that was refused."""


def _as_they_are(adapters: Mapping[str, Path], out: Path, base: Path) -> dict[str, Made]:
    return dict(adapters)


def _exported(to: str, ending: str) -> Callable[[Mapping[str, Path], Path, Path], dict[str, Made]]:
    """`phlora export --to ...`."""

    def make(adapters: Mapping[str, Path], out: Path, base: Path) -> dict[str, Made]:
        made: dict[str, Made] = {}
        for number, (name, adapter) in enumerate(adapters.items()):
            made[name] = out / f"adapter-{number}{ending}"
            try:
                export(adapter, made[name], to, base=base)
            except PosthocError as error:
                made[name] = f"{type(error).__name__}: {error}"
        return made

    return make


def _converted(adapters: Mapping[str, Path], out: Path, base: Path) -> dict[str, Made]:
    """llama.cpp's `convert_lora_to_gguf.py`."""
    files = {name: out / f"adapter-{number}.gguf" for number, name in enumerate(adapters)}
    (out / "convert.json").write_text(json.dumps([(str(adapters[name]), str(files[name])) for name in adapters]))
    _llama_cpp("convert_adapters.py", HOME / "llama.cpp/convert_lora_to_gguf.py", base, out / "convert.json")
    return {name: file if file.exists() else file.with_suffix(".txt").read_text() for name, file in files.items()}


def _with_old_keys(base: Path, out: Path) -> Path:
    """MLX-LM does not know the names that transformers 5 gives these settings; models on the hub have the old ones."""
    folder = Path(shutil.copytree(base, out / "base"))
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    if "num_local_experts" in config:
        config["num_experts"] = config["num_local_experts"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _gguf_base(base: Path, out: Path) -> Path:
    _llama_cpp("convert_base.py", base, out / "base.gguf")
    return out / "base.gguf"


def _llama_cpp(script: str, *arguments: Path) -> None:
    sources = HOME / "llama.cpp"
    environment = os.environ | {"PYTHONPATH": f"{sources / 'gguf-py'}:{sources}", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, HERE / script, *arguments], capture_output=True, env=environment, check=True)


@dataclass(frozen=True)
class Engine:
    """Something that runs a base with adapters."""

    title: str
    driver: str
    rules: str | None = None
    """The engine of `peft_posthoc.serving.engines` whose rules are about it."""
    environment: str | None = None
    """The folder under `HOME`; this interpreter if there is none."""
    adapters: Callable[[Mapping[str, Path], Path, Path], Mapping[str, Made]] = _as_they_are
    """Adapter folders by name, a folder to write to, and the base: what the driver gets."""
    base: Callable[[Path, Path], Path] = field(default=lambda base, out: base)
    mixtures: bool = True
    """Whether mixtures of experts run in it here."""

    @property
    def python(self) -> str:
        """The interpreter that the driver runs in."""
        return sys.executable if self.environment is None else str(HOME / self.environment / "bin/python")

    @property
    def installed(self) -> bool:
        """Whether it can be run here."""
        return self.environment is None or (HOME / self.environment / ".ready").exists()


ENGINES: Mapping[str, Engine] = {
    "peft": Engine("PEFT", "drive_peft.py", "peft"),
    "transformers": Engine("transformers, `load_adapter`", "drive_transformers.py"),
    "vllm": Engine("vLLM on CPU", "drive_vllm.py", "vllm", "vllm", mixtures=False),
    "sglang": Engine("SGLang's LoRA code", "drive_sglang.py", "sglang", "sglang", mixtures=False),
    "llamacpp": Engine(
        *("llama.cpp, through its `convert_lora_to_gguf.py`", "drive_llamacpp.py", "llamacpp", "llamacpp"),
        adapters=_converted,
        base=_gguf_base,
    ),
    "llamacpp-export": Engine(
        *("llama.cpp, through `phlora export --to gguf`", "drive_llamacpp.py", "llamacpp", "llamacpp"),
        adapters=_exported("gguf", ".gguf"),
        base=_gguf_base,
    ),
    "mlx": Engine(
        *("MLX-LM on CPU, through `phlora export --to mlx`", "drive_mlx.py", "mlx", "mlx"),
        adapters=_exported("mlx", ""),
        base=_with_old_keys,
    ),
}


@dataclass(frozen=True)
class Run:
    """What an engine did with a base and its adapters."""

    versions: Mapping[str, str]
    base: np.ndarray
    """Log-probabilities of the next token after each prompt (prompts x vocabulary)."""
    adapters: Mapping[str, np.ndarray | str]
    """The same by adapter, or the words in which the engine refused it."""
    beside: Mapping[str, np.ndarray | str]
    """The base's own, while the adapter is loaded, where the engine tells the two apart."""
    mixed: np.ndarray | str | None
    """One batch of several adapters (rows x vocabulary), where the driver has a way to run one."""


def run(
    engine: Engine,
    base: Path,
    adapters: Mapping[str, Path],
    prompts: Sequence[Sequence[int]],
    *,
    mixed: Sequence[tuple[str | None, int]] = (),
    dtype: str = "float32",
) -> Run:
    """Have an engine run a base, without an adapter and with each.

    Args:
        engine: One of `ENGINES`.
        base: The model's folder.
        adapters: PEFT adapter folders by name.
        prompts: Token ids.
        mixed: Rows of one batch over several adapters: an adapter's name, or None, and a prompt's number.
        dtype: What vLLM computes in.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        made = engine.adapters(adapters, out, base)
        ready = {name: str(one) for name, one in made.items() if isinstance(one, Path)}
        found: dict[str, Any] = {name: one for name, one in made.items() if isinstance(one, str)}
        job = {
            **{"base": str(engine.base(base, out)), "adapters": ready, "prompts": list(prompts)},
            **{"rank": max(map(_rank, adapters.values()), default=8), "mixed": list(mixed), "dtype": dtype},
        }
        (out / "job.json").write_text(json.dumps(job))
        _drive(engine, out)

        def outcome(name: str) -> np.ndarray | str | None:
            if (out / f"{name}.npy").exists():
                return np.load(out / f"{name}.npy")
            refusal = out / f"{name}.txt"
            return refusal.read_text() if refusal.exists() else None

        rows = outcome("base")
        if not isinstance(rows, np.ndarray):
            raise RuntimeError(f"{engine.title} does not run the base: {rows}")
        found |= {name: outcome(name) for name in ready}
        beside = {name: one for name in ready if (one := outcome(f"{name}.beside")) is not None}
        versions = json.loads((out / "versions.json").read_text())
        return Run(versions, rows, {name: found[name] for name in adapters}, beside, outcome("mixed"))


def _drive(engine: Engine, out: Path) -> None:
    """Run the driver until every adapter has an outcome: where it dies of one, that one is refused."""
    now = out / "now"
    while True:
        command = [engine.python, HERE / engine.driver, out / "job.json", out]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{engine.title} took more than {PATIENCE} s.") from error
        if ran.returncode == 0:
            return
        told = f"the process ended with {ran.returncode}: {_said(ran.stderr)}"
        if not now.exists():
            raise RuntimeError(f"{engine.title} did not start: {told}\n{ran.stderr[-2000:]}")
        (out / f"{now.read_text()}.txt").write_text(told)
        now.unlink()


def _rank(adapter: Path) -> int:
    return int(json.loads((adapter / "adapter_config.json").read_text()).get("r") or 8)


def _said(text: str) -> str:
    lines = text.strip().splitlines() or ["no word"]
    return next((line for line in lines if "ASSERT" in line), lines[-1])


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference of two sets of log-probabilities."""
    return float(np.abs(found - wanted).max())
