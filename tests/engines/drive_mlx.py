"""MLX-LM on CPU: its own loader of models and adapters, on `phlora export --to mlx`."""

from importlib import metadata
from pathlib import Path
from typing import Any

import driving
import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)


class Mlx:
    def __init__(self, job: dict[str, Any]) -> None:
        self.base = Path(job["base"])
        self.versions = {name: metadata.version(name) for name in ("mlx", "mlx-lm")}

    def next_token(self, adapter: str | None, prompts: list[list[int]]) -> Any:
        model, _ = load_model(self.base)
        if adapter is not None:
            load_adapters(model, adapter)
        model.eval()
        rows = [model(mx.array([prompt]))[0, -1].astype(mx.float32) for prompt in prompts]
        return driving.log_softmax([np.array(row) for row in rows])


driving.drive(Mlx)
