"""Adapters that go to the hub, with the real client and a hub of our own."""

import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hf_callbacks import PosthocLoraCallback
from peft_posthoc import PosthocError
from tests.make.fake_hub import FakeHub, environment
from tests.make.limits import HANG
from tests.make.push_run import ADAPTERS, WHOLE
from tests.make.trainer_runs import STEPS, trainer

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "phlora_report.json"}


@pytest.fixture(scope="module")
def pushed(llama_pair, tmp_path_factory):
    """(the hub, the run's folder, what was printed) after a run whose hub did not answer before `final` was made."""
    folder = tmp_path_factory.mktemp("push")
    hub = FakeHub()
    hub.token = "secret"
    hub.gates[ADAPTERS] = gate = threading.Event()
    with hub.serve() as address:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.make.push_run", str(folder / "run"), llama_pair[0], hub.token],
            env=environment(address, folder / "home"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until = time.monotonic() + HANG
        while not (folder / "run/phlora/final").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert (folder / "run/phlora/final").exists(), "training was held up by the hub"
        assert ADAPTERS not in hub.repositories
        gate.set()
        stdout, stderr = process.communicate(timeout=HANG)
    assert process.returncode == 0, stderr[-3000:]
    return hub, folder / "run", stdout


def test_every_adapter_is_there_and_the_last_one_at_the_root(pushed):
    hub, run, _ = pushed
    files = hub.repositories[ADAPTERS].files
    steps = {f"step-{step}/{name}" for step in (2, 4, 6) for name in FILES}
    assert set(files) == FILES | steps
    for name in FILES - {"README.md"}:
        assert files[name] == (run / "phlora/final" / name).read_bytes()
        assert files[f"step-6/{name}"] == (run / "phlora/step-6" / name).read_bytes()
    # What `keep=1` let go of before the hub answered.
    assert [path.name for path in run.glob("phlora/step-*")] == ["step-6"]
    assert json.loads(files["step-2/phlora_report.json"])["provenance"]["tuned"] == "run/checkpoint-2"
    assert list((run / "_phlora/pushed").iterdir()) == []


def test_the_repository_is_private_and_stock_peft_loads_it_by_its_name(pushed):
    hub, _, printed = pushed
    assert hub.repositories[ADAPTERS].private
    assert "final is the same: True" in printed
    assert "step-2 is another: True" in printed


def test_the_cards_on_the_hub_say_how_to_load_from_there(pushed):
    hub, run, _ = pushed
    cards = {name: content.decode() for name, content in hub.repositories[ADAPTERS].files.items() if "README" in name}
    assert f'from_pretrained(base_model, "{ADAPTERS}")' in cards["README.md"]
    assert f"--lora-modules tuned={ADAPTERS}\n" in cards["README.md"]
    assert f'from_pretrained(base_model, "{ADAPTERS}", subfolder="step-4")' in cards["step-4/README.md"]
    assert "at step 4" in cards["step-4/README.md"]
    assert "path/to/this/folder" in (run / "phlora/final/README.md").read_text()


def test_the_trainers_own_pushes_take_the_adapters_along_and_nothing_that_is_being_worked_on(pushed):
    hub, run, _ = pushed
    names = set(hub.repositories[WHOLE].files)
    assert (run / "_phlora/base.json").is_file()
    assert not any("_phlora" in name for name in names)
    assert {"model.safetensors", "phlora/README.md", *(f"phlora/final/{name}" for name in FILES)} <= names
    assert not any(name.startswith("checkpoint-") for name in names)


def test_what_was_not_uploaded_is_when_the_run_is_resumed(llama_pair, tmp_path, caplog):
    """The tests' own process is offline, and its client refuses by itself."""
    caplog.set_level(logging.WARNING, logger="hf_callbacks")
    callback = PosthocLoraCallback(8, background=False, push_to_hub=ADAPTERS)
    trainer(llama_pair[0], tmp_path, callback, max_steps=4).train()
    held = Path(tmp_path / "_phlora/pushed")
    assert sorted(path.name for path in held.glob("*/*")) == ["final", "step-2", "step-4"]
    assert "`step-4` was not uploaded" in caplog.text
    hub = FakeHub()
    hub.token = "secret"
    with hub.serve() as address:
        ran = subprocess.run(
            [sys.executable, "-c", RESUME, llama_pair[0], str(tmp_path), hub.token],
            env=environment(address, tmp_path / "home"),
            capture_output=True,
            text=True,
            timeout=HANG,
            check=False,
        )
    assert ran.returncode == 0, ran.stderr[-3000:]
    names = {name for name in hub.repositories[ADAPTERS].files if name.endswith(".safetensors")}
    weights = "adapter_model.safetensors"
    assert names == {weights, *(f"step-{step}/{weights}" for step in (2, 4, 6))}
    assert not hub.repositories[ADAPTERS].private
    assert list(held.iterdir()) == []


RESUME = """
import sys
from hf_callbacks import PosthocLoraCallback
from tests.make.trainer_runs import trainer
base, folder, token = sys.argv[1:]
callback = PosthocLoraCallback(8, background=False, strict=True, push_to_hub="me/adapters")
options = {"hub_token": token, "hub_private_repo": False}
trainer(base, folder, callback, **options).train(resume_from_checkpoint=True)
"""


def test_strict_raises_what_the_hub_says(llama_pair, tmp_path):
    callback = PosthocLoraCallback(8, background=False, strict=True, when="end", push_to_hub=ADAPTERS)
    training = trainer(llama_pair[0], tmp_path, callback)
    with pytest.raises(PosthocError, match=r"`final` was not uploaded to `me/adapters`: .*offline"):
        training.train()
    assert training.state.global_step == STEPS


@pytest.mark.parametrize("wrong", [True, "adapters", "https://huggingface.co/me/adapters", ""])
def test_what_is_no_repository_is_refused(wrong):
    with pytest.raises(ValueError, match="`push_to_hub` must be a repository such as 'me/adapters'"):
        PosthocLoraCallback(push_to_hub=wrong)
