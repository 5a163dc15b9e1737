"""A training run whose adapters go to a hub: `-m tests.make.push_run FOLDER BASE TOKEN`, in the hub's environment."""

import sys

import peft
import torch
import transformers

from hf_callbacks import PosthocLoraCallback
from tests.make.trainer_runs import trainer

ADAPTERS, WHOLE = "me/adapters", "me/whole"


def main(folder, base, token):
    callback = PosthocLoraCallback(8, background=False, keep=1, push_to_hub=ADAPTERS)
    training = trainer(base, folder, callback, push_to_hub=True, hub_model_id=WHOLE, hub_token=token)
    training.train()
    training.push_to_hub()
    ids = torch.arange(40)[None]

    def logits(place, **where):
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        return peft.PeftModel.from_pretrained(model, place, **where).eval()(ids).logits

    local = logits(f"{folder}/phlora/final")
    print("final is the same:", torch.equal(logits(ADAPTERS, token=token), local))
    print("step-2 is another:", not torch.equal(logits(ADAPTERS, subfolder="step-2", token=token), local))


if __name__ == "__main__":
    main(*sys.argv[1:])
