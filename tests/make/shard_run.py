"""Adapters refined in one of several processes that models are split among.

It is given folders of an adapter, its base and the tuned model, three and three. The first process writes each adapter
beside its own; each says as JSON what it found, and how many elements of the base it held: its part, and as a whole
while a block ran.
"""

import hashlib
import importlib
import json
import os
import sys

from peft_posthoc import distil, refine
from peft_posthoc.extraction.processes import Processes
from peft_posthoc.refinement.chain import blocks_of

LENGTH, SEQUENCES = 12, 45


def weights(module):
    return {own for name, own in module.named_parameters() if ".lora_" not in name}


def count(own):
    return sum(one.numel() for one in own)


def is_part(own):
    return hasattr(own, "to_local")


def watched(load, told):
    """Count what is held as models are loaded, and whenever a part of a block runs."""

    def loaded(*args, **options):
        live = load(*args, **options)
        blocks = [weights(block) for block in blocks_of(live.model)]
        own = weights(live.model)
        told.update(
            own=count(one.to_local() for one in own if is_part(one)),
            whole=0,
            block=max(map(count, blocks)),
            around=count(own) - sum(map(count, blocks)),
            all=count(one for one in own if is_part(one)),
        )

        def look(*_):
            told["whole"] = max(told["whole"], count(one for one in weights(live.model) if not is_part(one)))

        for block in blocks_of(live.model):
            for part in block.children():
                part.register_forward_pre_hook(look)
        return live

    return loaded


def say(what):
    os.write(1, f"{what}\n".encode())  # at once: there is another that writes


def refined(folders, processes):
    told, opened = {}, importlib.import_module("peft_posthoc.refinement.opened")
    opened.load_sharded = watched(opened.load_sharded, told)
    for adapter, base, tuned in zip(folders, folders, folders, strict=True):
        how = {"method": distil(shard=True), "length": LENGTH, "sequences": SEQUENCES}
        found = refine(adapter, base, tuned, processes=processes, **how)
        digest = hashlib.sha256(b"".join(x.numpy().tobytes() for x in found.tensors.values())).hexdigest()
        say(json.dumps({"adapter": adapter, "factors": digest, **told}))
        if not processes.rank:
            found.save(f"{adapter}-refined")


if __name__ == "__main__":
    refined(iter(sys.argv[1:]), Processes.from_environment())
