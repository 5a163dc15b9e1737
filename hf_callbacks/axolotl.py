"""axolotl: the callback as a plugin, with its options in the YAML.

plugins: [hf_callbacks.axolotl.Phlora]
phlora: {rank: 16}
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from hf_callbacks.callback import PosthocLoraCallback


class PhloraArgs(BaseModel):
    """What the plugin adds to the YAML."""

    phlora: dict[str, Any] | None = None
    """Arguments of `PosthocLoraCallback`; `base` is `base_model` by default."""


class Phlora(BasePlugin):  # type: ignore[misc]
    """Puts the callback into the trainer."""

    def get_input_args(self) -> str:
        """Where axolotl finds what the YAML may hold."""
        return "hf_callbacks.axolotl.PhloraArgs"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[PosthocLoraCallback]:
        """The callback, made of `phlora:` in the YAML."""
        options = {"base": cfg.base_model, **(cfg.phlora or {})}
        return [PosthocLoraCallback(**options).attach(trainer)]
