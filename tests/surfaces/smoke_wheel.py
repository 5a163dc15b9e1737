"""Install the built wheel into a clean virtual environment and do the main job with it."""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

MAKE_PAIR = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
base = {f"layers.{i}.proj.weight": torch.randn(24, 16) for i in range(2)}
tuned = {name: weight + torch.randn(24, 2) @ torch.randn(2, 16) for name, weight in base.items()}
for folder, tensors in (("base", base), ("tuned", tuned)):
    Path(sys.argv[1], folder).mkdir()
    save_file(tensors, Path(sys.argv[1], folder, "model.safetensors"), metadata={"format": "pt"})
"""
CHECK = """
import importlib, json, pkgutil, sys
from importlib import resources
import peft_posthoc
from peft_posthoc import LoraConfig
for module in pkgutil.walk_packages(peft_posthoc.__path__, "peft_posthoc."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert [name for name in peft_posthoc.__all__ if not hasattr(peft_posthoc, name)] == []
report = json.load(open(sys.argv[1] + "/adapter/phlora_report.json"))
assert report["totals"]["extracted"] == 2 and report["totals"]["energy"] > 0.999999, report["totals"]
assert LoraConfig(r=4).r == 4
pages = {"inspection": ("page.css", "page.html.jinja", "page.js"), "fleet": ("page.html.jinja",)}
assert all((resources.files("peft_posthoc." + of) / name).is_file() for of in pages for name in pages[of])
"""

# With the adapter, every package does its part.
LINES = (
    "inspect base tuned",
    "verify adapter --base base --tuned tuned --weights-only",
    "resize adapter small --rank 1",
    "check adapter --engine peft --fix fixed",
    "export adapter merged --to merged --base base",
    "extract base base+adapter again --rank 2",
)


def main(wheel: str) -> None:
    with tempfile.TemporaryDirectory() as work:
        venv.create(f"{work}/venv", with_pip=True)
        python = f"{work}/venv/bin/python"
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*install, "-c", "constraints.txt", wheel], check=True)
        # From elsewhere, so that nothing of the checkout can stand in for what the wheel lacks.
        subprocess.run([python, "-c", MAKE_PAIR, work], check=True, cwd=work)
        phlora = [f"{work}/venv/bin/phlora"]
        subprocess.run([*phlora, "--version"], check=True, cwd=work)
        subprocess.run([*phlora, "extract", "base", "tuned", "adapter", "--rank", "2"], check=True, cwd=work)
        for line in LINES:
            subprocess.run([*phlora, *line.split(), "--quiet"], check=True, cwd=work)
        subprocess.run([python, "-c", CHECK, work], check=True, cwd=work)
    print(f"{Path(wheel).name}: installs and works in a clean environment")


if __name__ == "__main__":
    main(sys.argv[1])
