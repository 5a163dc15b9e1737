"""Inspections of models that were never trained: spectra by formula, on shapes alone."""

import torch
import transformers

from peft_posthoc.extraction.adapter import Adapter
from peft_posthoc.extraction.outcomes import Layer, Skipped
from peft_posthoc.extraction.plan import by_flags, make_plan
from peft_posthoc.inspection.inspection import Inspection
from peft_posthoc.linalg.lowrank import Triplets
from peft_posthoc.linalg.noise import Noise, white
from peft_posthoc.linalg.spectrum import Spectrum
from peft_posthoc.ranks.rules import signal_rank
from peft_posthoc.sources import open_pair


def llama(layers=32, width=4096, inner=11008, *, rank=512, dtype=torch.bfloat16, measured=True):
    """What `phlora inspect` tells of a Llama of this size (7B by default) whose deltas follow power laws."""
    with torch.device("meta"):
        config = transformers.LlamaConfig(
            vocab_size=32000,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=width // 128 or 1,
        )
        model = transformers.LlamaForCausalLM(config).to(dtype)
    base, tuned = open_pair(model, model, base_revision=None, tuned_revision=None)
    plan = make_plan(base, tuned, include=[], exclude=[], choose=by_flags())
    draw = torch.Generator().manual_seed(0)
    exponents = {"q_proj": 0.6, "k_proj": 0.65, "v_proj": 0.5, "o_proj": 0.48, "gate_proj": 0.42, "up_proj": 0.4}
    outcomes = [Skipped(name, fate.text, 1.0, 100.0, None, 0.0) for name, fate in plan.left_out.items()]
    for name, (place, *_) in plan.carried.items():
        _, m, n = plan.slots[place.module]
        depth = int(name.split(".")[2]) / layers
        exponent = (
            exponents.get(name.split(".")[-2], 0.45) + 0.25 * depth**2 + 0.02 * float(torch.randn((), generator=draw))
        )
        s = (torch.arange(min(m, n), dtype=torch.float64) + 2) ** -exponent
        energy = float((s**2).sum())
        noise = Noise((0.02 + 0.4 * depth**3) * energy, white(m, n)) if measured else None
        held = s[: min(rank, len(s))]
        share = float((held**2).sum()) / energy
        known = Triplets((m, n), held, share, energy**0.5, 0.0, held * 0)
        spectrum = Spectrum(held, energy, (m, n), noise)
        outcomes.append(Layer(name, known, 20 * energy**0.5, 0.0, noise, signal_rank(spectrum) if measured else None))
    return Inspection.of(Adapter.of(base, tuned, plan, outcomes, dtype=dtype, options={}))
