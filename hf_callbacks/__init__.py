"""transformers' Trainer: a LoRA adapter beside every checkpoint of a full fine-tune.

    trainer = Trainer(..., callbacks=[PosthocLoraCallback(rank=32)])

Adapters come to lie in `output_dir/phlora/step-N` and `output_dir/phlora/final`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_callbacks.callback import PosthocLoraCallback

__all__ = ["PosthocLoraCallback"]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import, and the process that makes adapters does not need it.
    if name == "PosthocLoraCallback":
        from hf_callbacks.callback import PosthocLoraCallback

        return PosthocLoraCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
