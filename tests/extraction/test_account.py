"""Of any two sets of tensors, the report accounts for each exactly once."""

import math
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from peft_posthoc import AdapterError, extract

LEAVES = ["q_proj", "embed_tokens", "lm_head", "norm", "c_attn", "conv", "0", "experts.1.up_proj", "to_out.0"]
PARTS = ["weight", "weight", "weight", "bias", "scale"]
SHAPES = [(), (1,), (7,), (5, 7), (7, 5), (6, 6), (1, 4), (4, 3, 2, 2), (3, 2, 5)]
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]
SIDES = ["both", "both", "both", "both", "both", "base", "tuned", "reshaped"]
PREFIX = "base_model.model."


class Given(NamedTuple):
    """One tensor of two checkpoints."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, torch.dtype]
    where: str
    """In `both`, of one shape or `reshaped`; or in one only."""
    rank: int
    """Of what changed; 0 if nothing did."""
    tied: str
    """To the tensor before, where it has the same shape: in `base`, in `tuned`, in `both` or in `none`."""


ONE = Given("model.layers.0.k_proj.weight", (6, 6), (torch.float32, torch.float32), "both", 2, "none")


@st.composite
def tensors(draw):
    # One that can be carried: without, there is an error and no report.
    found = {ONE.name: ONE}
    for index in range(draw(st.integers(0, 8))):
        where = draw(st.sampled_from(SIDES))
        # Names of one side alone that end alike would be taken for one another, and rightly.
        leaf = draw(st.sampled_from(LEAVES)) if where != "base" and where != "tuned" else f"only{index}"
        block = draw(st.sampled_from(["model", "model.layers.0", "model.layers.1", "visual.blocks.0", "a"]))
        name = f"{block}.{leaf}.{draw(st.sampled_from(PARTS))}"
        dtype, other = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
        same = not (dtype.is_floating_point and other.is_floating_point) or draw(st.booleans())
        found[name] = Given(
            name,
            draw(st.sampled_from(SHAPES)),
            (dtype, dtype if same else other),
            where,
            draw(st.sampled_from([0, 1, 2, 9])),
            draw(st.sampled_from(["none", "none", "none", "both", "base", "tuned"])),
        )
    # Biases of layers.
    for weight in [one for one in found.values() if one.name.endswith(".weight") and len(one.shape) == 2]:
        name = weight.name.removesuffix("weight") + "bias"
        if name not in found and weight.where == "both" and draw(st.booleans()):
            found[name] = weight._replace(name=name, shape=weight.shape[:1], rank=draw(st.sampled_from([0, 1])))
    return list(found.values())


def step(shape, rank):
    """What is added: of this rank, where it is a matrix; whole numbers, so that integers change too."""
    if rank == 0:
        return torch.zeros(shape)
    if len(shape) != 2:
        return torch.randint(1, 4, shape).float()
    return torch.randint(1, 4, (shape[0], rank)).float() @ torch.randint(1, 4, (rank, shape[1])).float()


def checkpoints(given, seed):
    """Base and tuned, tied tensors being one object; and the names that each has after ties are told apart."""
    torch.manual_seed(seed)
    base, tuned = {}, {}
    last = None
    for one in given:
        before = torch.randint(-3, 4, one.shape).to(one.dtypes[0])
        after = (before.to(one.dtypes[1]) + step(one.shape, one.rank).to(one.dtypes[1])).to(one.dtypes[1])
        if one.where == "reshaped":
            after = torch.randint(-3, 4, (*one.shape, 2)).to(one.dtypes[1])
        if one.where != "tuned":
            base[one.name] = before
        if one.where != "base":
            tuned[one.name] = after
        if last is not None:
            for side, tensors in (("base", base), ("tuned", tuned)):
                if one.tied in (side, "both") and one.name in tensors and last.name in tensors:
                    twin = tensors[last.name]
                    if twin.shape == tensors[one.name].shape and twin.dtype == tensors[one.name].dtype:
                        tensors[one.name] = twin
        last = one
    return base, tuned


def stored(tensors):
    """Without second names: as safetensors stores them."""
    seen = set()
    return {name: t for name, t in tensors.items() if not (id(t) in seen or seen.add(id(t)))}


def extracted(base, tuned, **options):
    """The adapter, and what its file holds."""
    apart = [name for name in stored(base) if name in stored(tuned) and base[name].shape != tuned[name].shape]
    try:
        adapter = extract(
            base, tuned, 64, experts="none", exclude=[f"^{re.escape(name)}$" for name in apart], **options
        )
        with tempfile.TemporaryDirectory() as folder:
            path = adapter.save(Path(folder) / "out") / "adapter_model.safetensors"
            return adapter, load_file(path)
    except AdapterError as error:
        event(str(error).partition("`")[0])
        assume(False)


def norm(tensor):
    return float(tensor.double().norm())


def check(rows, base, tuned):
    """Each tensor of both is in one row, which has its norms."""
    base, tuned = stored(base), stored(tuned)
    assert sorted(row.weight for row in rows) == sorted(base.keys() | tuned.keys())
    for row in rows:
        before, after = base.get(row.weight), tuned.get(row.weight)
        if before is None or after is None or before.shape != after.shape:
            assert row.status == "left out"
            assert row.delta_norm is None
            assert row.base_norm == (None if before is None else pytest.approx(norm(before)))
            assert row.tuned_norm == (None if after is None else pytest.approx(norm(after)))
        else:
            assert row.delta_norm == pytest.approx(norm(after.double() - before.double()), rel=1e-5)
            assert row.base_norm == pytest.approx(norm(before), rel=1e-5)
            assert (row.status == "unchanged") == (norm(after.double() - before.double()) == 0)


def test_a_bias_of_another_shape_than_its_layer_is_no_bias_of_loras():
    """What hypothesis once found: a single number beside a matrix, for which room was counted as for a bias."""
    tensors = [
        Given("model.layers.0.k_proj.weight", (6, 6), (torch.float32, torch.float32), "both", 2, "none"),
        Given("visual.blocks.0.conv.weight", (5, 7), (torch.float32, torch.float32), "both", 1, "none"),
        Given("visual.blocks.0.conv.bias", (), (torch.float32, torch.float32), "both", 1, "none"),
    ]
    adapter, file = extracted(*checkpoints(tensors, 0), form="peft")
    assert adapter.report.totals.bytes == sum(tensor.nbytes for tensor in file.values())
    assert not any(name.endswith("conv.lora_B.bias") for name in file)


@settings(deadline=None, max_examples=60)
@given(tensors(), st.integers(0, 99), st.sampled_from(["portable", "peft"]), st.booleans(), st.booleans())
def test_each_tensor_is_accounted_for_once(given, seed, form, embeddings, head):
    base, tuned = checkpoints(given, seed)
    adapter, file = extracted(base, tuned, form=form, embeddings=embeddings, head=head)
    found = adapter.report
    check(found.rows, base, tuned)
    totals = found.totals
    assert totals.extracted + totals.whole + totals.unchanged + totals.left_out == len(found.rows)
    assert sum(row.status == "extracted" for row in found.rows) == totals.extracted > 0
    assert totals.bytes == sum(tensor.nbytes for tensor in file.values())
    # Whole numbers of a counter are no weights.
    of_all = [r for r in found.rows if r.delta_norm and "float" in r.dtype and r.cause != "not-floating"]
    held = [row for row in of_all if row.status in ("extracted", "whole")]
    # What the tuned model has and nothing can be compared with counts as changed like the other values.
    odd = [r for r in found.rows if r.cause == "not-floating" and len(r.shape) > 1]
    odd += [r for r in found.rows if r.delta_norm is None and r.cause != "only-in-base" and r not in odd]
    new = sum(math.prod(row.shape) for row in odd)
    compared = sum(math.prod(r.shape) for r in found.rows if r.delta_norm is not None and r not in odd)
    whole = sum(row.delta_norm**2 for row in of_all) * (1 + new / compared)
    assert totals.energy_of_all == pytest.approx(sum(row.delta_norm**2 for row in held) / whole, rel=1e-4)
    of_tuned = sum(math.prod(row.shape) for row in found.rows if row.cause != "only-in-base")
    assert totals.unknown == pytest.approx(new / of_tuned)


@settings(deadline=None, max_examples=40)
@given(tensors(), st.integers(0, 99))
def test_at_full_rank_all_that_is_not_left_out_is_reproduced(given, seed):
    base, tuned = checkpoints(given, seed)
    adapter, file = extracted(base, tuned, form="peft", dtype=torch.float32)
    used = set()

    def take(name):
        used.add(f"{PREFIX}{name}")
        return file.get(f"{PREFIX}{name}")

    for row in adapter.report.rows:
        module = row.weight.rpartition(".")[0]
        a, b = (take(f"{module}.lora_{x}.weight") for x in "AB") if row.weight.endswith(".weight") else (None, None)
        embedding = row.weight.endswith(".weight") and a is None
        if embedding:
            a, b = (take(f"{module}.lora_embedding_{x}") for x in "AB")
        bias = take(f"{module}.lora_B.bias") if row.weight.endswith(".bias") else None
        whole = take(row.weight)
        if row.status == "left out":
            assert whole is None
            assert a is None or not b.any()
            continue
        got, wanted = base.get(row.weight), tuned[row.weight]
        if whole is not None:
            got = whole
        elif a is not None:
            product = b @ a
            got = got.double() + (product.mT if embedding else product)
        elif bias is not None:
            got = got.double() + bias
        assert (got.double() - wanted.double()).norm() <= 1e-5 * max(1.0, norm(wanted))
    # Biases of layers that have none are zero.
    assert not any(file[name].any() for name in file.keys() - used)


@pytest.mark.parametrize("wrong", [lambda rows: rows[1:], lambda rows: [*rows, rows[0]]], ids=["dropped", "twice"])
def test_a_report_that_drops_a_tensor_or_has_one_twice_is_found_out(wrong):
    base, tuned = ({f"a.{leaf}.weight": torch.full((4, 4), scale) for leaf in "xy"} for scale in (1.0, 2.0))
    adapter, _ = extracted(base, tuned)
    with pytest.raises(AssertionError):
        check(wrong(list(adapter.report.rows)), base, tuned)
