"""A merged checkpoint is the tuned model, to rounding, and transformers loads it as it loads the base."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import AdapterError, CheckpointError, export, extract, open_checkpoint
from tests.make import architectures, coded_folders, lora, models
from tests.make.grids import OnGrid

EPS = torch.finfo(torch.float32).eps
NAMES = ("llama", "llama-tied", "gpt2", "qwen2", "mixtral", "qwen2_moe", "gpt_oss", "bert", "t5", "resnet")


def full(base, tuned, out, **how):
    """Everything that changed, at full rank."""
    return extract(base, tuned, 4096, form="peft", experts="fused", **how).save(out)


def assert_is(merged, tuned, base):
    got, wanted, before = (dict(models.load(one).named_parameters()) for one in (merged, tuned, base))
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (got[name] - value).norm() < 20 * EPS * value.norm() < (before[name] - value).norm(), name


@pytest.mark.parametrize("name", NAMES)
def test_at_full_rank_it_is_the_tuned_model(name, tmp_path):
    base, tuned = architectures.pair_of(name, tmp_path)
    found = export(full(base, tuned, tmp_path / "a"), tmp_path / "out", "merged", base=base)
    assert_is(tmp_path / "out", tuned, base)
    assert found.notes == ()
    on_disk, after = (load_file(folder / "model.safetensors") for folder in (Path(base), tmp_path / "out"))
    assert {name: value.shape for name, value in on_disk.items()} == {name: v.shape for name, v in after.items()}


@pytest.mark.parametrize("experts", ["per-expert", "fused"])
@pytest.mark.parametrize("stored", ["by expert", "stacked"])
def test_experts_are_merged_however_either_side_has_them(experts, stored, tmp_path):
    base, tuned = architectures.pair_of("mixtral", tmp_path)
    out = extract(base, tuned, 4096, experts=experts).save(tmp_path / "a")
    export(out, tmp_path / "out", "merged", base=base if stored == "by expert" else models.load(base))
    wanted, got = (load_file(folder / "model.safetensors") for folder in (Path(tuned), tmp_path / "out"))
    if stored == "stacked":
        got = dict(models.load(tmp_path / "out").named_parameters())
        wanted = dict(models.load(tuned).named_parameters())
    names = [name for name in got if ".experts." in name]
    assert len(names) == (4 if stored == "stacked" else 12)
    for name in names:
        assert (got[name] - wanted[name]).norm() < 20 * EPS * wanted[name].norm()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_divided_base_gives_a_divided_model(suffix, tmp_path, monkeypatch):
    base, tuned = models.save_pair(models.llama(), tmp_path)
    shutil.rmtree(base)
    model = models.load(tuned)
    model.save_pretrained(base, max_shard_size="20KB")
    files = {path.name for path in Path(base).glob("model-*.safetensors")}
    assert len(files) > 2
    out = full(base, models.tuned_from(model), tmp_path / "a")
    if suffix == "bin":
        for path in Path(base).glob("model*"):
            path.unlink()
        torch.save(model.state_dict(), Path(base) / "pytorch_model.bin")
        monkeypatch.setattr("peft_posthoc.formats.merged._SHARD", "20KB")
    export(out, tmp_path / "out", "merged", base=base)
    made = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert made == files if suffix == "safetensors" else len(made) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert {name for file in made for name in load_file(tmp_path / "out" / file)} == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert torch.allclose(lora.logits(models.load(tmp_path / "out")), lora.logits(lora.served(base, out)), atol=1e-5)


def test_one_shard_at_a_time_is_in_memory(tmp_path, monkeypatch):
    base, tuned = models.save_pair(models.llama(num_hidden_layers=4), tmp_path)
    model = models.load(base)
    shutil.rmtree(base)
    model.save_pretrained(base, max_shard_size="20KB")
    sizes = []

    def save(tensors, path, **options):
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, path, **options)

    monkeypatch.setattr("peft_posthoc.formats.merged.save_file", save)
    export(full(base, tuned, tmp_path / "a"), tmp_path / "out", "merged", base=base)
    assert len(sizes) > 3
    assert max(sizes) < 24_000 < sum(sizes)


def test_a_half_precision_base_stays_one_and_is_rounded_once(tmp_path):
    base, tuned = models.save_pair(models.llama(), tmp_path, dtype=torch.bfloat16)
    out = extract(base, tuned, 3, dtype=torch.float32).save(tmp_path / "a")
    export(out, tmp_path / "out", "merged", base=base)
    export(out, tmp_path / "wide", "merged", base=base, dtype=torch.float32)
    narrow, wide = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "wide"))
    assert {value.dtype for value in narrow.values()} == {torch.bfloat16}
    assert all(torch.equal(value.bfloat16(), narrow[name]) for name, value in wide.items())
    assert sum(not torch.equal(value, narrow[name].float()) for name, value in wide.items()) == 14
    for name, told in (("out", "bfloat16"), ("wide", "float32")):
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == told


def test_scales_of_every_kind_are_peft_s_own(tmp_path):
    base, _ = models.save_pair(models.llama(), tmp_path)
    out = lora.adapter(
        *(base, tmp_path / "a"),
        **{"r": 4, "lora_alpha": 7, "use_rslora": True, "target_modules": ["q_proj", "down_proj", "o_proj"]},
        **{"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"o_proj": 3}, "modules_to_save": ["norm"]},
    )
    export(out, tmp_path / "out", "merged", base=base)
    assert torch.allclose(lora.logits(models.load(tmp_path / "out")), lora.logits(lora.served(base, out)), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_bit_for_bit_what_base_and_adapter_are_read_as(dtype, tmp_path):
    base, _ = models.save_pair(models.llama(), tmp_path, dtype=dtype)
    out = lora.adapter(base, tmp_path / "a", r=6, lora_alpha=7, target_modules=["q_proj", "down_proj"])
    export(out, tmp_path / "out", "merged", base=base)
    read = open_checkpoint(f"{base}+{out}")
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(read.read(name).to(dtype), value), name


@pytest.mark.parametrize("make", [models.llama, models.gpt2])
def test_an_adapter_of_the_head_alone_unties_it(make, tmp_path):
    tied = {} if make is models.gpt2 else {"tie_word_embeddings": True}
    base, _ = models.save_pair(make(**tied), tmp_path)
    out = lora.adapter(base, tmp_path / "a", r=4, target_modules=["lm_head"])
    found = export(out, tmp_path / "out", "merged", base=base)
    (note,) = found.notes
    assert "no longer tied" in note
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    merged = models.load(tmp_path / "out")
    assert not torch.equal(merged.lm_head.weight, merged.get_input_embeddings().weight)
    assert torch.equal(merged.get_input_embeddings().weight, models.load(base).get_input_embeddings().weight)
    assert torch.allclose(lora.logits(merged), lora.logits(lora.served(base, out)), atol=1e-5)


def test_an_encoder_decoder_s_head_is_not_untied(tmp_path):
    base, _ = models.save_pair(models.t5(), tmp_path)
    out = lora.adapter(base, tmp_path / "a", r=4, target_modules=["lm_head"])
    with pytest.raises(AdapterError, match=r"one weight in .* unmerged"):
        export(out, tmp_path / "out", "merged", base=base)
    assert not (tmp_path / "out").exists()


def test_what_lies_beside_the_weights_comes_along(tmp_path):
    base, tuned = models.save_pair(models.llama(), tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt", "README.md", "optimizer.pt"):
        (Path(base) / name).write_text(f"the base's {name}")
    (Path(base) / "additional_chat_templates").mkdir()
    (Path(base) / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    adapter = extract(base, tuned, 2).save(tmp_path / "a")
    export(adapter, tmp_path / "out", "merged", base=base)
    told = json.loads((tmp_path / "out" / "phlora_report.json").read_text())
    made = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert made == {*told["files"], "phlora_report.json"}
    assert made == {
        *("config.json", "generation_config.json", "model.safetensors", "phlora_report.json"),
        *("tokenizer.json", "tokenizer_config.json", "merges.txt", "additional_chat_templates/tools.jinja"),
    }
    assert not any("names" in note for note in told["notes"])
    # The tokenizer that was trained with comes first.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter / name).write_text(f"the adapter's {name}")
    found = export(adapter, tmp_path / "out", "merged", base=base, force=True)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "the adapter's tokenizer.json"
    assert not (tmp_path / "out" / "merges.txt").exists()
    assert any("tokenizer" in note for note in found.notes)


@pytest.mark.parametrize("rows", [104, 90], ids=["more", "fewer"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_vocabulary_that_the_adapter_brings_is_written_with_its_size(tied, rows, tmp_path):
    torch.manual_seed(0)
    model = models.llama(tie_word_embeddings=tied)
    base = models.save(model, tmp_path / "base")
    model.resize_token_embeddings(rows, mean_resizing=False)
    tuned = models.save(models.tuned_from(model), tmp_path / "tuned")
    adapter = extract(base, tuned, 64, form="peft", vocab="extend", dtype=torch.float32).save(tmp_path / "a")
    found = export(adapter, tmp_path / "out", "merged", base=base)
    said = f"The vocabulary is the adapter's ({rows} tokens) and the tokenizer the base's (96): use the tuned model's."
    assert said in found.notes
    tokens = torch.arange(rows)[None, -20:]
    with torch.no_grad():
        wanted, found = (models.load(tmp_path / name)(tokens).logits for name in ("tuned", "out"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    applied = open_checkpoint(f"{base}+{adapter}")
    assert applied.config["vocab_size"] == rows == json.loads((tmp_path / "out/config.json").read_text())["vocab_size"]


def test_a_head_of_another_size_than_the_embeddings_is_refused(tmp_path):
    base, tuned = models.save_pair(models.llama(), tmp_path)
    adapter = extract(base, tuned, 2).save(tmp_path / "a")
    tensors = load_file(adapter / "adapter_model.safetensors")
    larger = {"base_model.model.model.embed_tokens.weight": torch.ones(99, 32)}
    save_file(tensors | larger, adapter / "adapter_model.safetensors")
    told = r"holds `model\.embed_tokens\.weight` for 99 tokens, and with it `lm_head\.weight` of the base .* is for 96"
    with pytest.raises(AdapterError, match=told):
        export(adapter, tmp_path / "out", "merged", base=base)
    with pytest.raises(AdapterError, match=told):
        open_checkpoint(f"{base}+{adapter}")


def test_what_has_no_place_in_a_checkpoint_is_refused(llama_pair, tmp_path):
    base, tuned = llama_pair
    adapter = full(base, tuned, tmp_path / "a")
    other, _ = models.save_pair(models.llama(hidden_size=16), tmp_path / "other")
    with pytest.raises(AdapterError, match=r"adapts `.*` as .* in the base"):
        export(adapter, tmp_path / "out", "merged", base=other)
    with pytest.raises(AdapterError, match="does not have as a layer"):
        export(adapter, tmp_path / "out", "merged", base=models.save(models.gpt2(), tmp_path / "gpt2"))
    assert not (tmp_path / "out").exists()


def test_a_base_in_eight_bits_is_refused(llama_pair, tmp_path):
    base, tuned = llama_pair
    adapter = extract(base, tuned, 2).save(tmp_path / "a")
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({n: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for n, v in load_file(file).items()}, file)
    with pytest.raises(
        CheckpointError, match=r"quantised \(float8\), and its numbers need their scales. Give the model"
    ):
        export(adapter, tmp_path / "out", "merged", base=tmp_path / "base")


def test_a_quantised_base_is_written_decoded_and_what_its_grid_would_not_keep_is_told(llama_pair, tmp_path):
    base, tuned = llama_pair
    low = OnGrid(load_file(f"{base}/model.safetensors"), label="low", group=16)
    codes = {key: {"bits": 4} for key in ("quantization_config", "compression_config")}
    low.config = json.loads(Path(base, "config.json").read_text()) | codes
    shares = []
    for size in (1.0, 0.01):
        adapter = full(base, tuned, tmp_path / f"a{size}")
        deltas = load_file(adapter / "adapter_model.safetensors")
        save_file({n: x * size**0.5 for n, x in deltas.items()}, adapter / "adapter_model.safetensors")
        done = export(adapter, tmp_path / f"out{size}", "merged", base=low)
        config = json.loads((tmp_path / f"out{size}/config.json").read_text())
        assert config.keys().isdisjoint(codes)
        merged = load_file(tmp_path / f"out{size}/model.safetensors")
        inside = total = 0
        for module, delta in models.lora_deltas(models.load_adapter(base, adapter)).items():
            name = f"{module}.weight"
            assert torch.allclose(merged[name], low.read(name) + delta, atol=1e-6)
            inside += int((delta.abs() < low.steps(name) / 2).sum())
            total += delta.numel()
        shares.append(inside / total)
        assert any("written in floating point" in note for note in done.notes)
        told = [note for note in done.notes if "within half a step of the grid of `low`" in note]
        assert len(told) == (shares[-1] > 0.5)
        assert all(f"{100 * shares[-1]:.1f}% of what the adapter changes" in note for note in told)
    assert shares[0] < 0.5 < shares[1]


def test_a_base_in_fp8_becomes_a_plain_model_with_all_that_lies_beside_it(llama_pair, tmp_path):
    base, tuned = llama_pair
    low = coded_folders.quantise(base, tmp_path / "low", coded_folders.fp8)
    (Path(low) / "tokenizer_config.json").write_text("{}")
    adapter = extract(low, tuned, 32).save(tmp_path / "a")
    export(adapter, tmp_path / "out", "merged", base=low)
    assert (tmp_path / "out/tokenizer_config.json").is_file()
    read, merged = open_checkpoint(tmp_path / "out"), models.load(tmp_path / "out").state_dict()
    wanted = models.load(tuned).state_dict()
    for name, value in wanted.items():
        if "_proj" in name:
            assert torch.allclose(merged[name], value, atol=1e-5), name
            assert read.headers[name].dtype is torch.float32


def test_what_is_merged_into_the_base_in_16_bits_is_held_against_the_grid_of_the_one_that_is_served(
    llama_pair, tmp_path
):
    base, tuned = llama_pair
    low = coded_folders.quantise(base, tmp_path / "low", coded_folders.nf4)
    adapter = extract(base, tuned, 32, for_base=low).save(tmp_path / "a")
    near = extract(base, nearer(base, tuned, tmp_path / "near"), 32, for_base=low).save(tmp_path / "b")
    told = [export(one, tmp_path / f"{one.name}-out", "merged", base=base).notes for one in (adapter, near)]
    assert [any("within half a step of the grid of `" in note for note in notes) for notes in told] == [False, True]
    assert not any("written in floating point" in note for note in told[1])


def nearer(base, tuned, folder):
    """The same fine-tune, a hundred times smaller."""
    shutil.copytree(base, folder)
    before, after = (load_file(f"{one}/model.safetensors") for one in (base, tuned))
    save_file({n: x + (after[n] - x) / 100 for n, x in before.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_lora_bias_needs_a_bias_to_be_added_to(tmp_path):
    base, _ = models.save_pair(models.llama(), tmp_path)
    out = lora.adapter(base, tmp_path / "a", r=4, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(AdapterError, match=r"adds to the bias of `.*q_proj`, which has none"):
        export(out, tmp_path / "out", "merged", base=base)


def test_a_full_disk_is_seen_before_the_work_and_survived_during_it(llama_pair, tmp_path, monkeypatch):
    base, tuned = llama_pair
    adapter = extract(base, tuned, 2).save(tmp_path / "a")
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
        with pytest.raises(AdapterError, match=r"needs .* kB; the disk has 1.0 kB free"):
            export(adapter, tmp_path / "deep" / "out", "merged", base=base)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("peft_posthoc.formats.merged.save_file", full_disk)
        with pytest.raises(AdapterError, match=r"No space left on device\. Nothing was left"):
            export(adapter, tmp_path / "deep" / "out", "merged", base=base)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
