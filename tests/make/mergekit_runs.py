"""Merges on tiny models: what is run, and what comes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

import peft_posthoc
from mergekit_plugin import command, register
from tests.make import mergekit_runs, models


def config(base, *tuned, method="phlora", **parts):
    """A configuration; `parameters` go to the top, `each` to every model."""
    each = parts.pop("each", None)
    models = [{"model": str(one)} | ({"parameters": each} if each else {}) for one in tuned]
    base = {} if base is None else {"base_model": str(base)}
    listed = {} if "slices" in parts else {"models": models}
    return {"merge_method": method, **base, **listed, **parts}


def written(content, folder):
    folder.mkdir(exist_ok=True)
    path = folder / "config.yml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def phlora(content, out, *flags, main=None):
    """`mergekit-phlora` in this process; the result of click's runner."""
    arguments = [str(written(content, out.parent / f"{out.name}-config")), str(out), *flags]
    return CliRunner().invoke(main or command.main, [*arguments, "--quiet"], catch_exceptions=False)


def merged_by(content, out, *flags):
    """The tensors that `mergekit-phlora` merges."""
    result = phlora(content, out, *flags)
    assert result.exit_code == 0, result.output
    return tensors(out)


def stock(content, out, *flags):
    """The tensors that mergekit's own command merges, once it knows the method."""
    from mergekit.scripts import run_yaml

    register()
    result = phlora(content, out, *flags, main=run_yaml.main)
    assert result.exit_code == 0, result.output
    return tensors(out)


def tensors(folder):
    return {
        name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def expected(base, tuned, rank, **options):
    """By weight: base + b @ a of `peft_posthoc.extract`, and the base's where nothing is carried."""
    adapter = peft_posthoc.extract(str(base), str(tuned), rank, **options)
    found = tensors(base)
    for name, layer in adapter.layers.items():
        matrix = layer.factors.b @ layer.factors.a
        found[name] = found[name] + adapter.plan.carried[name][0].kind.matrix(matrix)
    return found


def run(*arguments, cwd, **environment):
    """A command in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )


EXAMPLES = Path(__file__).parents[2] / "examples/mergekit"


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


def adapters_are_the_same(one, other):
    same(mergekit_runs.tensors(one), mergekit_runs.tensors(other))
    configs = [json.loads((Path(folder) / "adapter_config.json").read_text()) for folder in (one, other)]
    assert configs[0] == configs[1]


def with_tokenizers(folder, *sizes, turned=False):
    """A base and a fine-tune of it, of vocabularies that begin alike; or of which the second is the first, turned."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = models.llama(vocab_size=max(sizes))
    for name, one, size in zip(("base", "tuned"), (model, models.tuned_from(model)), sizes, strict=True):
        one.resize_token_embeddings(size)
        models.save(one, folder / name)
        order = reversed(range(size)) if turned and name == "tuned" else range(size)
        words = Tokenizer(WordLevel({f"w{i}": at for at, i in enumerate(order)}, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder / name)
    return str(folder / "base"), str(folder / "tuned")


def refused(result, *words):
    assert result.exit_code == 1, result.output
    assert result.output.count("\n") == 1
    for word in words:
        assert word in result.output
