"""ms-swift: the callback under the name that `--callbacks` takes.

`--external_plugins phlora.py --callbacks phlora`, where `phlora.py` holds

    from hf_callbacks.swift import register

    register(rank=16)
"""

from __future__ import annotations

from typing import Any

from swift.callbacks import callbacks_map

from hf_callbacks.callback import PosthocLoraCallback


def register(name: str = "phlora", **options: Any) -> None:
    """Give ms-swift the callback.

    Args:
        name: What `--callbacks` calls it.
        **options: Arguments of `PosthocLoraCallback`.
    """
    callbacks_map[name] = lambda args, trainer: PosthocLoraCallback(**options).attach(trainer)
