"""Quantised bases in vLLM itself: an adapter on them computes what it does in PEFT on what the codes stand for."""

import re

import peft
import pytest
import torch

from peft_posthoc import check, extract, open_checkpoint
from tests.engines import subjects
from tests.engines.record import difference
from tests.engines.running import ENGINES, run
from tests.make import coded, coded_folders, models

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not ENGINES["vllm"].installed, reason="vLLM is not installed: `make engines`"),
]
GROUP = 128  # Its kernels take groups of 32, 64 and 128.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
GPTQ = coded.BY_HAND["gptq, 3 bits"][0] | {"bits": 4, "group_size": GROUP, "desc_act": False}


def int4(weight):
    return coded_folders.int4(weight, group=GROUP)


def awq(weight):
    return coded.awq(weight)[0]


def asymmetric(weight):
    return coded.gptq(weight, 4, v1=1, act_order=False)[0]


def symmetric(weight):
    scales = (weight.unflatten(1, (-1, GROUP)).abs().amax(2) / 7).half()
    of = torch.arange(weight.shape[1]) // GROUP
    codes = (weight / scales.float()[:, of]).round().clamp(-8, 7).int() + 8
    zeros = torch.full_like(scales.T, 7).int()  # v1 stores one less.
    return {
        **{"qweight": coded.pack(codes, 4).T.contiguous(), "qzeros": coded.pack(zeros, 4)},
        **{"scales": scales.T.contiguous(), "g_idx": of.int()},
    }


CONFIGS = {
    int4: coded_folders.int4_config(GROUP),
    awq: coded.BY_HAND["awq"][0] | {"group_size": GROUP},
    symmetric: GPTQ | {"sym": True},
    asymmetric: GPTQ | {"sym": False},
}


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Makes a base in a form, and an adapter of a fine-tune of the plain one."""
    monkeypatch.setattr(coded, "GROUP", GROUP)
    pair = subjects.save_pair(lambda: models.llama(**SIZES), tmp_path)

    def make(how):
        base = tmp_path / how.__name__
        coded_folders.quantise(pair.base, base, how, said=CONFIGS[how])
        adapter = extract(pair.base, pair.tuned, 8, dtype=torch.float32).save(tmp_path / "adapter")
        return base, adapter

    return make


@pytest.mark.parametrize("how", [int4, awq, symmetric], ids=lambda how: how.__name__)
def test_an_adapter_on_codes_computes_what_peft_does_on_what_they_stand_for(how, served, tmp_path):
    base, adapter = served(how)
    stored = open_checkpoint(base)
    model = models.llama(**SIZES).eval()
    model.load_state_dict({name: stored.read(name).float() for name in stored.headers})
    alone = subjects.next_token(model)
    adapted = subjects.next_token(peft.PeftModel.from_pretrained(model, adapter).eval())
    # The kernels take no float32.
    ran = run(ENGINES["vllm"], base, {"adapter": adapter}, subjects.prompts(), dtype="float16")
    apart, own = difference(adapted, alone), difference(ran.base, alone)
    print(f"{how.__name__}: apart {apart:.3g}, in float16 {own:.3g}, with the adapter", end=" ")
    print(f"{difference(ran.adapters['adapter'], adapted):.3g}, vLLM {ran.versions}")
    assert own < 0.05 * apart
    assert difference(ran.adapters["adapter"], adapted) < 0.05 * apart
    assert not check(adapter, base=base, engines=["vllm"]).wrong


def test_what_check_says_it_refuses_it_does(served):
    base, adapter = served(asymmetric)
    with pytest.raises(RuntimeError, match=re.escape("Unsupported quantization config")):
        run(ENGINES["vllm"], base, {"adapter": adapter}, subjects.prompts(), dtype="float16")
    assert check(adapter, base=base, engines=["vllm"]).wrong == ("vllm",)
