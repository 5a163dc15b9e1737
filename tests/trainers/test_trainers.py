"""The lines of docs/trainers.md, run as printed, with a tiny model and small settings beside them."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from peft_posthoc import extract
from tests.make import models, texts
from tests.make.trainer_runs import adapters, same_factors

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = Path(os.environ.get("PHLORA_TRAINERS", ROOT / ".work/trainers"))
BLOCKS = re.findall(
    r"```(yaml|sh|python)\n(.*?)```", (ROOT / "docs/trainers.md").read_text(encoding="utf-8"), re.DOTALL
)
TEMPLATE = "{% for one in messages %}{{ one['content'] }} {% endfor %}"
# What makes a run small, in each one's own words.
STEPS = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3}
SMALL = {
    "axolotl.yml": {
        **STEPS,
        "datasets": [{"path": "data/rows.jsonl", "ds_type": "json", "type": "completion", "field": "text"}],
        "dataset_prepared_path": "prepared",
        "sequence_len": 32,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "optimizer": "adamw_torch",
        "bf16": False,
        "val_set_size": 0,
    },
    "llamafactory.yml": {
        **STEPS,
        "dataset": "rows",
        "dataset_dir": "data",
        "template": "empty",
        "cutoff_len": 32,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
    },
}
FLAGS = {
    "trl": "--max_steps 4 --save_steps 2 --learning_rate 1e-3 --max_length 32 --report_to none --use_cpu true "
    "--bf16 false",
    "swift": "--dataset data/rows.jsonl --model_type llama --template dummy --use_hf true --max_steps 4 --save_steps 2 "
    "--learning_rate 1e-3 --max_length 32 --torch_dtype float32 --use_cpu true --report_to none "
    "--split_dataset_ratio 0",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model, its tokenizer, and data as each of them reads it."""
    monkeypatch.chdir(tmp_path)
    models.save(models.llama(), tmp_path / "base")
    tokenizer = texts.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "data").mkdir()
    columns = {"prompt": "instruction", "response": "output"}
    files = {"rows": {"file_name": "rows.jsonl", "columns": columns}}
    (tmp_path / "data/dataset_info.json").write_text(json.dumps(files))
    return tmp_path


def write_rows(folder, trainer):
    def row(text):
        asked, answer = text[: len(text) // 2], text[len(text) // 2 :]
        said = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        by = {"llamafactory": {"instruction": asked, "output": answer}, "swift": {"messages": said}}
        return by.get(trainer, {"text": text})

    (folder / "data/rows.jsonl").write_text("\n".join(json.dumps(row(text)) for text in texts.PROMPTS))
    if trainer == "trl":
        (folder / "data/dataset_info.json").unlink()


def run(line, programs):
    """A line of the page, in an environment of its own."""
    words = shlex.split(line)
    program = programs / words[0]
    path = f"{program.parent}:{os.environ['PATH']}"
    told = {"PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "AXOLOTL_DO_NOT_TRACK": "1"}
    done = subprocess.run(
        [program, *words[1:]], capture_output=True, text=True, timeout=1000, env={**os.environ, **told}
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


@pytest.mark.parametrize("trainer", ["trl", "axolotl", "llamafactory", "swift"])
def test_the_lines_of_the_page_leave_the_adapters_of_every_checkpoint(trainer, here):
    programs = Path(sys.executable).parent if trainer == "trl" else ENVIRONMENTS / trainer / "bin"
    if not (programs / ("trl" if trainer == "trl" else "python")).exists():
        pytest.skip(f"{trainer} is not installed: make test-trainers")
    write_rows(here, trainer)
    for kind, block in BLOCKS:
        name = block.partition("\n")[0].removeprefix("# ")
        if kind == "yaml":
            settings = {**yaml.safe_load(block), **SMALL[name]}
            Path(name).write_text(yaml.safe_dump(settings))
        elif kind == "python":
            Path(name).write_text(block)
    (lines,) = (
        [*block.splitlines()] for kind, block in BLOCKS if kind == "sh" and f"{trainer}" in block.split("\n")[0]
    )
    for line in lines:
        run(f"{line} {FLAGS[trainer]}" if line.startswith((f"{trainer} ",)) and trainer in FLAGS else line, programs)
    (made,) = here.glob(f"run-{trainer}/**/phlora")
    assert adapters(made) == ["final", "step-2", "step-4"]
    extract(here / "base", made.parent / "checkpoint-2", 4).save(here / "by-hand")
    assert same_factors(made / "step-2", here / "by-hand")
    assert same_factors(made / "step-4", made / "final")
