import warnings

import pytest
import torch
from safetensors.torch import load_file

from peft_posthoc import MismatchError, extract, open_checkpoint, verify
from peft_posthoc.adapters.experts import pack
from peft_posthoc.adapters.module import Module
from peft_posthoc.adapters.tensors import Factored
from peft_posthoc.models.kinds import EXPERT, LINEAR
from peft_posthoc.models.layout import Stack
from peft_posthoc.pairing.pair import match
from tests.make import architectures, models
from tests.make.architectures import ARCHITECTURES

EPS = torch.finfo(torch.float32).eps
PER_EXPERT = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe-no-dense", "deepseek_v3", "phimoe", "jamba", "qwen3_next")
STACKED = ("gpt_oss", "granitemoe", "granitemoehybrid", "jetmoe", "qwen3_vl_moe", "llama4")
# Whose dense or shared MLPs PEFT takes for experts.
BESIDE = ("qwen2_moe", "qwen3_moe", "deepseek_v3")


@pytest.fixture(scope="module", params=[*PER_EXPERT, *STACKED])
def pair(request, tmp_path_factory):
    return request.param, *architectures.pair_of(request.param, tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return architectures.pair_of("mixtral", tmp_path_factory.mktemp("mixtral"))


def live(folder):
    return models.load(folder)


def merged(base, out):
    """The parameters of base + adapter, merged by stock PEFT."""
    import peft

    with warnings.catch_warnings():
        # PEFT 0.21's own conversion of experts gives itself a pattern that it then complains of.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match")
        warnings.filterwarnings("ignore", message="The following alpha_pattern keys did not match")
        model = peft.PeftModel.from_pretrained(live(base), out)
    return dict(model.merge_and_unload().named_parameters())


def expert_parameters(model):
    return {
        f"{name}.{own}": parameter
        for name, module in model.named_modules()
        if "Experts" in type(module).__name__
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim > 1
    }


def test_however_they_are_stored_the_matrices_are_the_same(pair):
    _, base, tuned = pair
    stored = match(open_checkpoint(base), open_checkpoint(tuned), experts="fused")
    stacked = match(open_checkpoint(live(base)), open_checkpoint(live(tuned)), experts="fused")
    units = [unit for stack in stored.layout.stacks for unit in stack.units]
    assert set(units) <= stored.base.headers.keys() & stacked.base.headers.keys()
    for unit in units:
        for one, other in zip(stored[:2], stacked[:2], strict=True):
            assert torch.equal(one.read(unit), other.read(unit))
            assert one.headers[unit].shape == tuple(one.read(unit).shape)
    assert len(units) == sum(1 if p.ndim == 2 else len(p) for p in expert_parameters(live(base)).values())


@pytest.mark.parametrize("name", PER_EXPERT)
def test_stacked_experts_are_seen_under_the_names_they_have_on_disk(name, tmp_path):
    base, tuned = architectures.pair_of(name, tmp_path)
    on_disk = load_file(f"{tuned}/model.safetensors")
    after = match(open_checkpoint(base), open_checkpoint(live(tuned)), experts="per-expert").tuned
    of_experts = [own for own in on_disk if ".experts." in own]
    assert of_experts
    for own in of_experts:
        assert torch.equal(after.read(own), on_disk[own])
        assert after.headers[own].shape == tuple(on_disk[own].shape)


@pytest.mark.parametrize("experts", ["none", "fused", "per-expert"])
def test_one_side_on_disk_and_one_live_give_what_two_on_disk_give(experts, mixtral):
    base, tuned = mixtral
    stored = extract(base, tuned, 4, experts=experts)
    mixed = extract(base, live(tuned), 4, experts=experts)
    assert mixed.factors.keys() == stored.factors.keys()
    for module, factors in stored.factors.items():
        assert all(torch.equal(one, other) for one, other in zip(factors, mixed.factors[module], strict=True))
    assert sum(row.delta_norm**2 for row in mixed.report.rows) == pytest.approx(
        sum(row.delta_norm**2 for row in stored.report.rows)
    )


@pytest.mark.parametrize("experts", ["fused", "per-expert"])
def test_at_full_rank_stock_peft_has_the_tuned_experts(experts, mixtral, tmp_path):
    base, tuned = mixtral
    out = extract(base, tuned, 4096, experts=experts).save(tmp_path / "out")
    found, wanted = merged(base, out), expert_parameters(live(tuned))
    before = expert_parameters(live(base))
    assert wanted
    for name, parameter in wanted.items():
        assert (found[name] - parameter).norm() < 100 * EPS * parameter.norm() < (before[name] - parameter).norm()


def test_the_fused_form_is_for_every_mixture(pair, tmp_path):
    _, base, tuned = pair
    out = extract(base, tuned, 4096, experts="fused").save(tmp_path / "out")
    found, wanted = merged(base, out), expert_parameters(live(tuned))
    matrices = [own for own, parameter in wanted.items() if parameter.ndim == 3]
    assert matrices
    for own in matrices:
        assert (found[own] - wanted[own]).norm() < 100 * EPS * wanted[own].norm()


def test_verify_reads_what_extract_wrote(pair, tmp_path):
    name, base, tuned = pair
    ways = ["fused"] if name in STACKED else ["fused", "per-expert"]
    for experts in ways:
        adapter = extract(base, tuned, 2, experts=experts)
        found = verify(adapter.save(tmp_path / experts), base, tuned, outputs=False)
        assert found.energy == pytest.approx(adapter.report.totals.energy_of_all, abs=1e-5)
        assert 0.05 < found.energy < 0.95


@pytest.mark.parametrize("name", STACKED)
def test_experts_that_are_one_parameter_have_no_names_of_their_own(name, tmp_path):
    with pytest.raises(MismatchError, match=r"one parameter .*experts='fused'"):
        extract(*architectures.pair_of(name, tmp_path), 4, experts="per-expert")


def test_by_default_experts_are_left_out_and_the_report_says_so(pair):
    _, base, tuned = pair
    report = extract(base, tuned, 4).report
    layout = match(open_checkpoint(base), open_checkpoint(tuned)).layout
    of_experts = [row for row in report.rows if layout.of_experts(row.weight)]
    assert of_experts
    assert {row.status for row in of_experts} == {"left out"}
    assert all("expert (carried with --experts)" in row.reason or "bias" in row.reason for row in of_experts)
    assert any("--experts" in warning for warning in report.warnings)


@pytest.mark.parametrize("name", BESIDE)
def test_per_expert_files_that_peft_misreads_say_that_they_are_for_engines(name, tmp_path):
    """PEFT 0.21 drops the factors of the MLPs beside the experts, in silence: were it mended, this would tell."""
    base, tuned = architectures.pair_of(name, tmp_path)
    adapter = extract(base, tuned, 4096, experts="per-expert")
    assert any("serving engines only" in warning for warning in adapter.report.warnings)
    found, before = merged(base, adapter.save(tmp_path / "out")), dict(live(base).named_parameters())
    mlps = [name for name in found if "mlp" in name and "gate.weight" not in name and "bias" not in name]
    assert any(torch.equal(found[name], before[name]) for name in mlps)


def test_mixtures_without_such_mlps_are_for_peft_too(mixtral):
    assert not any("engines only" in w for w in extract(*mixtral, 4, experts="per-expert").report.warnings)


def test_gate_up_and_down_of_all_experts_are_in_the_file_if_one_is(mixtral, tmp_path):
    base, _ = mixtral
    weights = {name: tensor.clone() for name, tensor in load_file(f"{base}/model.safetensors").items()}
    changed = "model.layers.1.block_sparse_moe.experts.0.w3.weight"
    weights[changed] += torch.randn(weights[changed].shape)
    tensors = load_file(
        extract(base, weights, 8, experts="per-expert").save(tmp_path / "out") / "adapter_model.safetensors"
    )
    found = {name for name in tensors if ".experts." in name and name.endswith("lora_B.weight")}
    assert len(found) == 2 * 2 * 3  # layers, experts, w1 to w3
    assert [name for name in found if tensors[name].any()] == [
        f"base_model.model.{changed.removesuffix('.weight')}.lora_B.weight"
    ]


@pytest.mark.parametrize("experts", ["fused", "none"])
def test_the_peft_form_takes_only_stacked_experts(experts, mixtral):
    with pytest.raises(ValueError, match="experts='fused'"):
        extract(*mixtral, 4, form="peft", experts="per-expert")
    report = extract(*mixtral, 4, form="peft", experts=experts).report
    statuses = {row.status for row in report.rows if ".experts" in row.weight}
    assert statuses == {"extracted" if experts == "fused" else "left out"}


def test_there_are_only_these_ways():
    with pytest.raises(ValueError, match="`experts` must be one of none, per-expert, fused"):
        extract({"a.weight": torch.eye(2)}, {"a.weight": torch.eye(2)}, experts="all")


def test_packing_is_undone_by_unpacking_and_puts_experts_where_peft_reads_them():
    stack = Stack("m.experts.w", (3, 5, 4), EXPERT, ())
    factors = {unit: (torch.randn(2, 4), torch.randn(5, 2)) for unit in stack.units}
    a, b = pack(stack, factors, 2, torch.float32)
    assert (a.shape, b.shape) == ((6, 4), (5, 6))
    filed = Factored(LINEAR, "a", "b", tuple(a.shape), tuple(b.shape))
    back = Module("m.experts", "experts", 2, 1.0, filed, experts=3).split(a, b)
    for unit, own in zip(stack.units, back, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(own, factors[unit], strict=True))
    # As PEFT computes: `o r e, e r i -> e o i`.
    product = torch.einsum("ore,eri->eoi", b.reshape(5, 2, 3), a.reshape(3, 2, 4))
    for index, unit in enumerate(stack.units):
        torch.testing.assert_close(product[index], factors[unit][1] @ factors[unit][0])


def test_all_mixtures_of_the_matrix_are_tested_here():
    assert {name for name in ARCHITECTURES if "moe" in name} <= {*PER_EXPERT, *STACKED}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_from_delta_takes_stacked_experts_as_peft_names_them(name, tmp_path):
    from peft_posthoc import LoraConfig, get_peft_model

    base, tuned = architectures.pair_of(name, tmp_path)
    ends = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig.from_delta(base, tuned, 96, target_modules=["q_proj"], target_parameters=ends, lora_alpha=24)
    model = get_peft_model(live(base), config, init="posthoc")
    found, wanted = dict(model.merge_and_unload().named_parameters()), dict(live(tuned).named_parameters())
    before = dict(live(base).named_parameters())
    for own, parameter in wanted.items():
        carried = own.endswith((*ends, "q_proj.weight"))
        apart = (found[own] - (wanted if carried else before)[own]).norm()
        assert apart <= 100 * EPS * parameter.norm()


def test_from_delta_leaves_experts_alone_that_are_not_named(mixtral):
    from peft_posthoc import LoraConfig

    assert not any("experts" in module for module in LoraConfig.from_delta(*mixtral, 4).delta.adapter.factors)
