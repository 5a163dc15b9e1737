"""transformers' Trainer: a LoRA adapter beside every checkpoint of a full fine-tune.

    trainer = Trainer(..., callbacks=[PosthocLoraCallback(rank=32)])

Adapters come to lie in `output_dir/phlora/step-N` and `output_dir/phlora/final`.
"""

from hf_callbacks.callback import PosthocLoraCallback

__all__ = ["PosthocLoraCallback"]
