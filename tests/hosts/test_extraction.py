import inspect

import pytest
import torch

from hf_callbacks import PosthocLoraCallback
from hf_callbacks.extraction import Extraction
from peft_posthoc import extract
from peft_posthoc.cli import main as cli

ASKED = Extraction(
    rank=4,
    include=("layers", "head"),
    exclude=("norm",),
    embeddings=True,
    head=True,
    exact=True,
    dtype=torch.float16,
    form="peft",
    conv=True,
    experts="fused",
    vocab="extend",
    rename=("a=>b", r"(c)\.d=>\1"),
    serve_as="LlamaForCausalLM",
)


def test_another_process_is_told_the_same():
    given = cli.main.commands["extract"].make_context("extract", ["base", "tuned", "out", *ASKED.flags()]).params
    names = (
        "include",
        "exclude",
        "embeddings",
        "head",
        "exact",
        "form",
        "conv",
        "experts",
        "vocab",
        "rename",
        "serve_as",
    )
    assert {name: given[name] for name in names} == {name: getattr(ASKED, name) for name in names}
    assert (given["dtype"], given["device"]) == ("float16", "cpu")


def test_every_choice_that_extract_has_is_the_callback_s_too():
    """But for those that name the models, and for Python functions."""
    choices = set(inspect.signature(extract).parameters) - {"base", "tuned", "tuned_revision", "tuned_name", "choose"}
    choices -= {"leave_out", "out", "processes", "progress", "keep_factors"}
    assert choices <= set(inspect.signature(PosthocLoraCallback).parameters)
    assert choices - {"base_revision"} <= set(Extraction.__dataclass_fields__)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"experts": "all"}, "`experts` must be one of"),
        ({"vocab": "extend"}, "only `--form peft` can"),
        ({"form": "peft", "experts": "per-expert"}, "takes `--experts fused`"),
    ],
)
def test_a_choice_that_makes_no_sense_is_told_before_training(choice, said):
    with pytest.raises(ValueError, match=said):
        PosthocLoraCallback(4, **choice)
