"""The same laws (`tests/make/laws.py`) for everything that a checkpoint is read from, and for views of it."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from peft_posthoc import open_checkpoint
from peft_posthoc.checkpoints.shared import Shared
from peft_posthoc.checkpoints.wrappers import unwrapped
from peft_posthoc.pairing.names import renamed
from peft_posthoc.pairing.pair import match
from peft_posthoc.sources import open_pair
from tests.make import coded_folders, gguf_files, laws, models
from tests.make.by_peft import by_peft
from tests.make.fake_hub import FakeHub, environment
from tests.make.limits import HANG


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of one layer whose head is tied to the embeddings, a copy of which each source is made of."""
    torch.manual_seed(0)
    made = models.llama(num_hidden_layers=1, tie_word_embeddings=True)
    return models.save(made, tmp_path_factory.mktemp("model") / "model")


# Each writes the source into a folder and gives how it is opened.


def folder(model, where):
    shutil.copytree(model, where / "model")
    return lambda: open_checkpoint(where / "model")


def sharded(model, where):
    models.save(models.load(model), where / "model", max_shard_size="20KB")
    assert len(list((where / "model").glob("model-*.safetensors"))) > 2
    return lambda: open_checkpoint(where / "model")


def pickled(model, where):
    shutil.copytree(model, where / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(models.load(model).state_dict(), where / "model/pytorch_model.bin")
    return lambda: open_checkpoint(where / "model")


def file(model, where):
    shutil.copy(models.weights_of(model), where / "weights.safetensors")
    return lambda: open_checkpoint(where / "weights.safetensors")


def state_dict(model, where):
    loaded = models.load(model)
    return lambda: open_checkpoint(loaded.state_dict())


def module(model, where):
    loaded = models.load(model)
    return lambda: open_checkpoint(loaded)


def shards(model, where):
    """As a training run saves it: a tied weight has both its names there, and its base tells."""
    state = dict(models.load(model).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # That this is one process.
        dcp.save({"model": state}, checkpoint_id=where / "run/shards", no_dist=True)
    return lambda: open_pair(model, where / "run")[1]


def adapted(model, where):
    shutil.copytree(model, where / "model")
    by_peft(where / "lora", models.load(model))
    return lambda: open_checkpoint(f"{where / 'model'}+{where / 'lora'}")


def compiled(model, where):
    """With the names that wrappers put before the model's own."""
    weights = {f"module._orig_mod.{name}": tensor for name, tensor in load_file(models.weights_of(model)).items()}
    save_file(weights, where / "weights.safetensors")
    return lambda: unwrapped(open_checkpoint(where / "weights.safetensors"))


def under_other_names(model, where):
    opened = folder(model, where)
    return lambda: renamed(opened(), {"model.norm.weight": "final.weight"})


def experts(model, where):
    """As stacks, of a folder that has a file of each expert's own matrices."""
    made = models.qwen3_moe(num_hidden_layers=1, tie_word_embeddings=True)
    models.save(made, where / "model")
    return lambda: match(open_checkpoint(where / "model"), open_checkpoint(made), experts="fused").base


def fewer_rows(model, where):
    """Of a fine-tune whose vocabulary is larger than the base's; what lies beyond has a name of its own."""
    larger = models.load(model)
    larger.resize_token_embeddings(laws.VOCABULARY + 5, mean_resizing=False)
    models.save(larger, where / "model")
    return lambda: match(open_checkpoint(model), open_checkpoint(where / "model"), vocab="truncate").tuned


def for_llama_cpp(model, where):
    gguf_files.save(models.load(model), where / "model.gguf", "llama")
    return lambda: open_checkpoint(where / "model.gguf")


def stored(model, where):
    """In a place that fsspec knows, each tensor fetched when it is read."""
    models.save(models.load(model), where / "model", max_shard_size="20KB")
    return lambda: open_checkpoint(f"file://{where / 'model'}")


def held(model, where):
    """By all that read it together."""
    opened = folder(model, where)
    return lambda: Shared(opened())


def coded(model, where):
    """In 4-bit floats, decoded as they are read."""
    coded_folders.quantise(model, where / "model", coded_folders.nvfp4)
    return lambda: open_checkpoint(where / "model")


def averaged(model, where):
    """Of itself and another, which stand in for a base that nobody has."""
    shutil.copytree(model, where / "model")
    models.save(models.tuned_from(models.load(model)), where / "other")
    return lambda: open_checkpoint(f"mean:{where / 'model'},{where / 'other'}")


ON_DISK = [
    averaged,
    coded,
    folder,
    sharded,
    stored,
    held,
    pickled,
    file,
    for_llama_cpp,
    shards,
    adapted,
    compiled,
    under_other_names,
    experts,
    fewer_rows,
]
SOURCES = [*ON_DISK, state_dict, module]


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)
def test_of_every_source(law, source, model, tmp_path):
    law(source(model, tmp_path)())


@pytest.fixture(scope="module")
def partitions(tmp_path_factory):
    """What two processes of DeepSpeed wrote, of a model whose head is its own."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed.")
    where = tmp_path_factory.mktemp("zero")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ours = {**os.environ, "DS_ACCELERATOR": "cpu"}
    subprocess.run([*launcher, "-m", "tests.make.zero_run", str(where)], check=True, timeout=HANG, env=ours)
    return where / "zero2"


@pytest.mark.parametrize("law", [law for law in laws.LAWS if "tied" not in law.__name__], ids=lambda law: law.__name__)
def test_of_partitions(law, partitions):
    law(open_checkpoint(partitions))


@pytest.mark.parametrize("source", ON_DISK, ids=lambda source: source.__name__)
def test_the_identity_changes_when_a_file_does_and_no_earlier(source, model, tmp_path):
    opened = source(model, tmp_path)
    before = opened().identity
    assert before is not None
    assert opened().identity == before
    written = [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".bin", ".distcp", ".gguf")]
    assert written
    for path in written:
        was = path.stat().st_mtime_ns
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(was, was + 1))  # A file system's clock may be coarse.
        after = opened().identity
        assert after != before, path
        before = after


@pytest.mark.parametrize("source", [state_dict, module], ids=lambda source: source.__name__)
def test_what_is_in_memory_has_no_identity_and_no_folder(source, model, tmp_path):
    checkpoint = source(model, tmp_path)()
    assert checkpoint.identity is checkpoint.folder is None


@pytest.mark.parametrize("source", ON_DISK, ids=lambda source: source.__name__)
def test_a_folder_is_one_that_transformers_reads(source, model, tmp_path):
    found = source(model, tmp_path)().folder
    assert found is None or (found / "config.json").is_file()


# The hub's client reads its address and its cache when it is imported.
ON_HUB = """
import json, sys
from peft_posthoc import open_checkpoint
from tests.make import laws
for line in sys.stdin:
    law, repository = json.loads(line)
    checkpoint = open_checkpoint(repository)
    try:
        if law == "folder":
            assert checkpoint.folder.is_dir()
            assert isinstance(checkpoint, laws.Checkpoint)
            said = str(checkpoint.folder), checkpoint.identity
        else:
            said = getattr(laws, law)(checkpoint)
        print(json.dumps([True, said]), flush=True)
    except Exception as error:
        print(json.dumps([False, repr(error)]), flush=True)
"""


@pytest.fixture(scope="module")
def hub():
    made = FakeHub()
    with made.serve() as address:
        made.address = address
        yield made


@pytest.fixture(scope="module")
def ask(hub, tmp_path_factory):
    """Hold a repository against a law."""
    process = subprocess.Popen(
        [sys.executable, "-c", ON_HUB],
        env=environment(hub.address, tmp_path_factory.mktemp("home")),
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(*what):
        process.stdin.write(json.dumps(what) + "\n")
        process.stdin.flush()
        right, said = json.loads(process.stdout.readline())
        assert right, said
        return said

    yield ask
    process.stdin.close()
    assert process.wait(timeout=HANG) == 0
    process.stdout.close()


@pytest.mark.parametrize("law", [law.__name__ for law in laws.LAWS])
def test_of_the_hub(law, model, hub, ask):
    # Each law has a repository of its own: what is fetched once is a folder.
    hub.repository(f"laws/{law}").commit(model, "main")
    ask(law, f"laws/{law}")


def test_of_the_hub_to_ask_for_the_folder_fetches_nothing(model, hub, ask):
    commit = hub.repository("laws/folder").commit(model, "main")
    folder, identity = ask("folder", "laws/folder")
    assert commit in folder
    assert identity == ["laws/folder", commit]
    assert ("laws/folder", "config.json") in hub.fetched
    assert ("laws/folder", "model.safetensors") not in hub.fetched


def test_of_the_hub_another_commit_is_another_identity(model, hub, ask, tmp_path):
    hub.repository("laws/moving").commit(model, "main")
    before = ask("folder", "laws/moving")[1]
    assert ask("folder", "laws/moving")[1] == before
    hub.repository("laws/moving").commit(models.save(models.llama(), tmp_path / "other"), "main")
    assert ask("folder", "laws/moving")[1] != before
