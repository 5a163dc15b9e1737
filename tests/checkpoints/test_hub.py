import json
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_posthoc import extract, preflight, verify
from tests.make import coded_folders, gguf_files, models
from tests.make.fake_hub import environment
from tests.make.hub_session import HUGE, adapter_of, refused


def with_company(folder):
    """What a real repository holds beside its weights."""
    (folder / "README.md").write_text("A model.")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights once more")
    (folder / "optimizer.pt").write_bytes(b"twice as large as the model")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"weights of something else")
    return folder


def test_the_command_extracts_from_two_repositories_what_it_extracts_from_two_folders(served, hub, tmp_path):
    model = models.llama()
    base = with_company(models.save(model, tmp_path / "base"))
    tuned = with_company(models.save(models.tuned_from(model), tmp_path / "tuned"))
    later = models.save(models.tuned_from(model), tmp_path / "later")
    v1 = hub.repository("first/base").commit(base, "v1", "main")
    hub.repository("first/base").commit(later, "main")  # the branch went on after the tag
    commit = hub.repository("first/tuned").commit(tuned, "main")
    command = [sys.executable, "-m", "peft_posthoc", "extract", "first/base", "first/tuned"]
    how = {"cwd": tmp_path, "env": environment(served[1], tmp_path / "home"), "capture_output": True, "text": True}

    ran = subprocess.run([*command, "out", "--base-revision", "v1", "--rank", "4"], **how)
    assert ran.returncode == 0, ran.stderr
    tensors, config, provenance = adapter_of(tmp_path / "out")
    extract(str(base), str(tuned), 4).save(tmp_path / "expected")
    expected, _, _ = adapter_of(tmp_path / "expected")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert config["base_model_name_or_path"] == provenance["base"] == "first/base"
    assert config["revision"] == provenance["base_revision"] == v1
    assert (provenance["tuned"], provenance["tuned_revision"]) == ("first/tuned", commit)
    files = ("config.json", "model.safetensors", "generation_config.json")
    needed = {(repo, file) for repo in ("first/base", "first/tuned") for file in files}
    assert set(hub.fetched) == needed
    assert len(hub.fetched) == len(needed)

    hub.fetched.clear()
    ran = subprocess.run([*command, "again", "--base-revision", v1, "--rank", "4", "--quiet"], **how)
    assert (ran.returncode, ran.stdout) == (0, "")
    assert all(line.startswith("Warning: ") for line in ran.stderr.splitlines())
    assert hub.fetched == [], "cached files were fetched twice"
    again, _, _ = adapter_of(tmp_path / "again")
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


def test_without_a_revision_the_default_branch_is_read_at_one_commit(hub, phlora, pair, tmp_path):
    commits = [hub.repository(f"plain/{path.name}").commit(path, "main") for path in pair]
    status, _, stderr = phlora("extract", "plain/base", "plain/tuned", tmp_path / "out")
    assert status == 0, stderr
    _, config, provenance = adapter_of(tmp_path / "out")
    assert [provenance["base_revision"], provenance["tuned_revision"]] == commits
    assert config["revision"] == commits[0]


def test_of_a_sharded_repository_the_index_and_its_shards_are_fetched(hub, phlora, tmp_path):
    model = models.llama()
    base = models.save(model, tmp_path / "base", max_shard_size="20KB")
    tuned = models.save(models.tuned_from(model), tmp_path / "tuned")
    shards = {path.name for path in base.glob("model-*.safetensors")}
    assert len(shards) > 2
    (base / "pytorch_model-00001-of-00001.bin").write_bytes(b"once more")
    (base / "consolidated.safetensors").write_bytes(b"and again")
    hub.repository("sharded/base").commit(base, "main")
    hub.repository("sharded/tuned").commit(tuned, "main")
    status, _, stderr = phlora("extract", "sharded/base", "sharded/tuned", tmp_path / "out")
    assert status == 0, stderr
    needed = {"config.json", "generation_config.json", "model.safetensors.index.json", *shards}
    assert {file for repo, file in hub.fetched if repo == "sharded/base"} == needed
    extract(str(base), str(tuned)).save(tmp_path / "expected")
    tensors, expected = adapter_of(tmp_path / "out")[0], adapter_of(tmp_path / "expected")[0]
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_of_a_repository_of_gguf_files_the_one_that_is_named_is_fetched(hub, phlora, tmp_path):
    model = models.llama()
    tuned = models.save(models.tuned_from(model), tmp_path / "tuned")
    (tmp_path / "repo/parts").mkdir(parents=True)
    for name in ("one.gguf", "two.gguf", "parts/three.gguf"):
        gguf_files.save(model, tmp_path / "repo" / name, "llama")
    gguf_files.split(tmp_path / "repo/parts/three.gguf")
    (tmp_path / "none").mkdir()
    commit = hub.repository("for/llama.cpp").commit(tmp_path / "repo", "main")
    said = phlora("extract", "for/llama.cpp", tuned, tmp_path / "out")
    refused(said, tmp_path / "none", "2 models in GGUF: one.gguf, two.gguf. Give one of them: `for/llama.cpp/one.gguf`")
    parts = [f"parts/three-0000{number}-of-00002.gguf" for number in (1, 2)]
    for name, wanted in (("two.gguf", ["two.gguf"]), (parts[0], parts)):
        hub.fetched.clear()
        status, _, stderr = phlora("extract", f"for/llama.cpp/{name}", tuned, tmp_path / "out", "--force")
        assert status == 0, stderr
        assert sorted(file for _, file in hub.fetched) == wanted
        _, config, provenance = adapter_of(tmp_path / "out")
        assert (provenance["base"], provenance["base_revision"]) == (f"for/llama.cpp/{name}", commit)
        assert config["base_model_name_or_path"] == provenance["base"]
    said = phlora("extract", "for/llama.cpp/four.gguf", tuned, tmp_path / "out", "--force")
    refused(said, tmp_path / "none", "`for/llama.cpp` on the hub has no file `four.gguf`")


def test_of_tokenizers_the_small_files_are_fetched_and_compared(hub, phlora, pair):
    for folder, end in zip(pair, ("</s>", "<|im_end|>"), strict=True):
        (folder / "tokenizer.json").write_text("large")
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        hub.repository(f"worded/{folder.name}").commit(folder, "main")
    status, said, stderr = phlora("inspect", "worded/base", "worded/tuned", "--max-rank", "2", "--json")
    assert status == 0, stderr
    assert [one["told"] for one in json.loads(said)["differences"]] == ['`eos_token` "</s>" -> "<|im_end|>"']
    assert "tokenizer.json" not in {file for _, file in hub.fetched}


def test_a_dry_run_fetches_no_weights(hub, phlora, tmp_path):
    model = models.llama()
    for name, one in (("base", model), ("tuned", models.tuned_from(model))):
        hub.repository(f"dry/{name}").commit(models.save(one, tmp_path / name, max_shard_size="20KB"), "main")
    status, said, stderr = phlora("extract", "dry/base", "dry/tuned", tmp_path / "out", "--dry-run", "--json")
    assert status == 0, stderr
    assert (
        json.loads(said)["rows"]
        == json.loads(json.dumps(preflight(tmp_path / "base", tmp_path / "tuned").to_dict()))["rows"]
    )
    small = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert {file for _, file in hub.fetched} == small
    assert {file for _, file in hub.begun} == {path.name for path in (tmp_path / "base").glob("model-*.safetensors")}


def test_a_dry_run_fetches_no_codes_either(hub, phlora, tmp_path):
    model = models.llama()
    models.save(model, tmp_path / "plain")
    models.save(models.tuned_from(model), tmp_path / "tuned")
    hub.repository("coded/tuned").commit(tmp_path / "tuned", "main")
    for how in (coded_folders.int4, coded_folders.fp8_blocks):
        base = coded_folders.quantise(tmp_path / "plain", tmp_path / how.__name__, how)
        hub.repository(f"coded/{how.__name__}").commit(tmp_path / how.__name__, "main")
        status, said, stderr = phlora(
            "extract", f"coded/{how.__name__}", "coded/tuned", tmp_path / "out", "--dry-run", "--json"
        )
        assert status == 0, stderr
        wanted = preflight(base, tmp_path / "tuned")
        assert json.loads(said)["rows"] == json.loads(json.dumps(wanted.to_dict()))["rows"]
    assert "model.safetensors" not in {file for _, file in hub.fetched}


def test_what_a_file_on_the_hub_says_of_itself_is_read_with_its_headers(hub, phlora, tmp_path):
    models.save(models.llama(), tmp_path / "tuned")
    codes = {"x.weight": torch.ones(4, 256, dtype=torch.int8), "x.weight_scale": torch.ones(4, 1)}
    said = {"_quantization_metadata": json.dumps({"layers": {"x": {"format": "int8_tensorwise", "convrot": True}}})}
    (tmp_path / "base").mkdir()
    save_file(codes, tmp_path / "base" / "model.safetensors", said)
    hub.repository("comfy/base").commit(tmp_path / "base", "main")
    status, _, stderr = phlora("extract", "comfy/base", tmp_path / "tuned", tmp_path / "out", "--dry-run")
    assert status == 1
    assert "in ComfyUI's form `int8_tensorwise, rotated`" in stderr
    assert "model.safetensors" not in {file for _, file in hub.fetched}


def test_no_weights_are_fetched_of_two_that_do_not_fit(hub, phlora, pair, work):
    save_file({"layers.0.proj.weight": torch.zeros(9, 9)}, pair[1] / "model.safetensors")
    for path in pair:
        hub.repository(f"apart/{path.name}").commit(path, "main")
    refused(phlora("extract", "apart/base", "apart/tuned", work / "out"), work, "in tuned than in base")
    assert hub.fetched == []


def test_a_configuration_of_two_that_do_not_fit_fetches_none_either(hub, phlora, pair, work):
    save_file({"layers.0.proj.weight": torch.zeros(9, 9)}, pair[1] / "model.safetensors")
    for path in pair:
        hub.repository(f"config/{path.name}").commit(path, "main")
    refused(phlora("from-delta", "config/base", "config/tuned"), work, "in tuned than in base")
    assert hub.fetched == []


def test_where_there_are_only_pickles_they_are_fetched_and_no_other(hub, phlora, pair, tmp_path):
    base, tuned = pair
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    torch.save({"step": 1}, base / "optimizer.pt")
    torch.save({"lr": 1}, base / "training_args.bin")
    (base / "model.safetensors").unlink()
    hub.repository("pickled/base").commit(base, "main")
    status, _, stderr = phlora("extract", "pickled/base", tuned, tmp_path / "out")
    assert status == 0, stderr
    assert hub.fetched == [("pickled/base", "pytorch_model.bin")]


@pytest.mark.parametrize("role", ["base", "tuned"])
def test_a_missing_repository_is_named_with_its_role(role, hub, phlora, pair, work):
    sources = dict(zip(("base", "tuned"), pair, strict=True)) | {role: "nobody/nothing"}
    ran = phlora("extract", sources["base"], sources["tuned"], work / "out")
    refused(ran, work, f"The {role} `nobody/nothing`", "Check the name")


def test_a_missing_revision_is_named(hub, phlora, pair, work):
    hub.repository("revised/base").commit(pair[0], "main")
    ran = phlora("extract", "revised/base", pair[1], work / "out", "--base-revision", "v9")
    refused(ran, work, "The base `revised/base`", "no revision `v9`", "tag")
    assert hub.fetched == []


def test_a_repository_without_the_default_branch_is_told_so(hub, phlora, pair, work):
    hub.repository("branchless/base").commit(pair[0], "v1")
    refused(phlora("extract", "branchless/base", pair[1], work / "out"), work, "no revision `main`")


def test_a_revision_of_a_folder_is_refused(hub, phlora, pair, work):
    ran = phlora("extract", *pair, work / "out", "--tuned-revision", "v1")
    refused(ran, work, "'v1'", "tuned", "hub id", status=2)


def test_an_adapter_on_the_hub_is_read_on_its_base(hub, phlora, pair, tmp_path, work):
    extract(*map(str, pair), 4).save(tmp_path / "lora")
    commit = hub.repository("lora/tuned").commit(tmp_path / "lora", "main")
    for tuned in ("lora/tuned", f"{pair[0]}+lora/tuned"):
        status, _, stderr = phlora("extract", pair[0], tuned, work / "out", "--rank", "8", "--force", "--quiet")
        assert status == 0, stderr
        # Besides the base that the adapter names, which is a folder, nothing is needed.
        assert {file for _, file in hub.fetched} == {"adapter_config.json", "adapter_model.safetensors"}
        _, _, provenance = adapter_of(work / "out")
        assert provenance["tuned"] == f"{pair[0]}+lora/tuned"
        found = verify(work / "out", pair[0], pair[1], outputs=False)
        assert found.cosine == pytest.approx(verify(tmp_path / "lora", *pair, outputs=False).cosine, abs=1e-6)
        if tuned == "lora/tuned":
            assert provenance["tuned_revision"] == commit


def test_a_pipeline_on_the_hub_is_no_model(hub, phlora, pair, tmp_path, work):
    hub.repository("pipe/line").put(
        {"model_index.json": b"{}", "v1.safetensors": b"", "unet/config.json": b"{}"}, "main"
    )
    refused(phlora("extract", pair[0], "pipe/line", work / "out"), work, "`pipe/line`", "diffusers pipeline")
    assert hub.fetched == []


def test_a_repository_without_weights_is_told_what_it_holds(hub, phlora, pair, tmp_path, work):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.onnx").write_bytes(b"ONNX")
    hub.repository("other/base").commit(tmp_path / "other", "main")
    refused(phlora("extract", "other/base", pair[1], work / "out"), work, "`other/base`", "model.onnx")
    assert hub.fetched == []


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/secret.safetensors", "..\\secret.safetensors", "C:secret"]
)
def test_a_remote_index_cannot_name_a_file_elsewhere(place, hub, phlora, pair, work):
    base, tuned = pair
    index = {"weight_map": {"layers.0.proj.weight": place}}
    (base / "model.safetensors").rename(base / "fine.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.repository("wicked/base").commit(base, "main")
    refused(phlora("extract", "wicked/base", tuned, work / "out"), work, f"`{place}`", "Refused")
    assert hub.fetched == [("wicked/base", "model.safetensors.index.json")]
    assert not any("secret" in path for path in hub.asked)


def test_no_shard_is_fetched_when_one_is_missing(hub, phlora, pair, work):
    base, tuned = pair
    (base / "model.safetensors").rename(base / "one.safetensors")
    index = {"weight_map": {"layers.0.proj.weight": "one.safetensors", "layers.1.proj.weight": "two.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.repository("halved/base").commit(base, "main")
    refused(phlora("extract", "halved/base", tuned, work / "out"), work, "`halved/base`", "two.safetensors")
    assert ("halved/base", "one.safetensors") not in hub.fetched


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_a_connection_there_is_one_clear_line(offline, pair, tmp_path, work):
    command = [sys.executable, "-m", "peft_posthoc", "extract", "org/base", str(pair[1]), str(work / "out")]
    with socket.socket() as silent:  # it holds a port and never listens on it
        silent.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        env = environment(address, tmp_path / "home") | {"HF_HUB_OFFLINE": offline}
        ran = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    line = refused((ran.returncode, ran.stdout, ran.stderr), work, "The base `org/base`", "give a local folder")
    assert ran.stderr == f"{line}\n"


def test_an_export_fetches_of_its_base_what_it_needs(hub, phlora, llama_pair, tmp_path):
    base, tuned = llama_pair
    folder = tmp_path / "repository"
    shutil.copytree(base, folder)
    (folder / "tokenizer.json").write_text("{}")
    hub.repository("org/exported").commit(with_company(folder), "main")
    adapter = extract(base, tuned, 2).save(tmp_path / "adapter")
    assert phlora("export", adapter, tmp_path / "mlx", "--to", "mlx", "--base", "org/exported")[0] == 0
    assert {file for _, file in hub.fetched} == {"config.json"}
    hub.repository("org/exported").claimed = {"model.safetensors": HUGE}
    status, _, stderr = phlora("export", adapter, tmp_path / "merged", "--to", "merged", "--base", "org/exported")
    assert status == 1
    assert "To download `org/exported` takes 100000000.0 GB" in stderr
    hub.repository("org/exported").claimed = {}
    assert phlora("export", adapter, tmp_path / "merged", "--to", "merged", "--base", "org/exported")[0] == 0
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {file for _, file in hub.fetched} == wanted
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {*wanted, "phlora_report.json"}
    status, _, stderr = phlora("export", adapter, tmp_path / "no", "--to", "mlx", "--base", "org/nowhere")
    assert status == 1
    assert "neither a local folder nor a repository on the hub" in stderr
