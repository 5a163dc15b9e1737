"""Weights in the order of their model, whatever the order of their file."""

import pytest

from peft_posthoc import preflight
from peft_posthoc.models.order import index, natural
from tests.make import models


def test_numbers_in_names_sort_as_numbers():
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "x[10]", "x[9]", "layers"]
    assert sorted(names, key=natural) == ["layers", "layers.2.a", "layers.2.b", "layers.10.a", "x[9]", "x[10]"]


def test_digits_that_can_count_nothing_are_a_word():
    assert [index(part) for part in ("7", "9" * 5000, "q_proj")] == [7, None, None]
    assert sorted([f"layers.{'9' * 5000}", "layers.2"], key=natural) == [f"layers.{'9' * 5000}", "layers.2"]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "model",
    [
        lambda: models.llama(num_hidden_layers=11),
        lambda: models.gemma2(num_hidden_layers=11),
        lambda: models.mixtral(num_hidden_layers=11),
        models.t5,
    ],
    ids=["llama", "gemma2", "mixtral", "t5"],
)
def test_rows_are_in_the_order_of_the_class_and_without_one_by_number(tmp_path, model, known):
    """The files of these folders are sorted by name, layer 10 before layer 2."""
    model = model()
    sides = [tmp_path / side for side in ("base", "tuned")]
    for side, one in zip(sides, (model, models.tuned_from(model)), strict=True):
        one.save_pretrained(side)
        if not known:
            (side / "config.json").unlink()
    found = preflight(*sides, 4, form="peft" if known else "portable").rows
    rows = [row.modules[0] for row in found if row.status == "carried"]
    if known or type(model).__name__ == "LlamaForCausalLM":
        # Matrices of experts are a parameter's, and stand where its module does.
        modules = dict.fromkeys(name.rpartition(".")[0] if "[" in name else name for name in rows)
        assert [*modules] == [name for name, _ in model.named_modules() if name in modules]
    blocks = [[int(part) for part in name.split(".") if part.isdecimal()] for name in rows]
    numbered = [block[0] for block, name in zip(blocks, rows, strict=True) if block and "decoder" not in name]
    assert numbered == sorted(numbered)
