"""The usual ways to factor a delta, in a loop as small as ours: `rivals.py METHOD BASE TUNED OUT RANK`."""

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def svd(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


def lowrank(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Ten columns more than the rank and two iterations: PyTorch's default, and what most extractors take.
    u, s, v = torch.svd_lowrank(delta, q=min(rank + 10, *delta.shape), niter=2)
    return u[:, :rank], s[:rank], v[:, :rank].T


def main(method: str, base_folder: str, tuned_folder: str, out: str, rank: str) -> None:
    torch.manual_seed(0)
    base, tuned = (safe_open(f"{folder}/model.safetensors", "pt") for folder in (base_folder, tuned_folder))
    tensors = {}
    for name in base.keys():  # noqa: SIM118
        if "proj" not in name:
            continue
        delta = tuned.get_tensor(name).float() - base.get_tensor(name).float()
        u, s, vh = {"svd": svd, "lowrank": lowrank}[method](delta, min(int(rank), *delta.shape))
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = (s.sqrt()[:, None] * vh).bfloat16().contiguous()
        tensors[f"{module}.lora_B.weight"] = (u * s.sqrt()).bfloat16().contiguous()
    Path(out).mkdir(parents=True)
    save_file(tensors, f"{out}/adapter_model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(*sys.argv[1:])
