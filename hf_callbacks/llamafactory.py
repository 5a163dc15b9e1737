"""LLaMA-Factory: its training with the callback, which no setting of its own can add.

`python -m hf_callbacks.llamafactory run.yaml` in place of `llamafactory-cli train run.yaml`, with `phlora: {rank: 16}`
in the YAML. On several devices: `torchrun --nproc-per-node 2 -m hf_callbacks.llamafactory run.yaml`.
"""

from __future__ import annotations

from llamafactory.hparams.parser import read_args
from llamafactory.train.tuner import run_exp

from hf_callbacks.callback import PosthocLoraCallback


def main() -> None:
    """Train as the YAML and the overrides on the command line say."""
    args = read_args()
    options = args.pop("phlora", None) if isinstance(args, dict) else None
    run_exp(args, callbacks=[PosthocLoraCallback(**(options or {}))])


if __name__ == "__main__":
    main()
