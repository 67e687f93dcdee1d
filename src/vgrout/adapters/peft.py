"""A block as a PEFT LoRA folder: what other libraries and rollout engines load.

adapter_model.safetensors  A [r, i] and B [o, r] of each Linear under the names that PEFT gives them
adapter_config.json        a LoRA with delta W = B A and alpha = r, so that nothing scales it

A block's delta is a difference of products, B A - B0 A0 = [dB, B0] [A; dA] (lora2r.py), hence of rank 2R, and both
blocks' is of rank 4R. Where the terms of such a sum cancel, factors in bfloat16 lose the delta. So they are refactored,
in float64:

    B = Q_b R_b,  A^T = Q_a R_a,  R_b R_a^T = U S V^T        QR, QR, SVD of a core [K, K]
    B' = Q_b U S^1/2,  A' = S^1/2 V^T Q_a^T                  B' A' = B A, and nothing cancels

An adapter that is as wide as its weights is no LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from vgrout.adapters.base import BLOCKS, Adapter, BlockLinear
from vgrout.types import State, UserError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PLAIN = dict.fromkeys(BLOCKS, 1.0)  # blocks at their own strength


def blocks(live: State) -> tuple[str, ...]:
    return BLOCKS if live == "full" else ("deployed",)


@torch.no_grad()
def own_factors(
    module: BlockLinear, live: State, scale: Mapping[str, float] = PLAIN
) -> tuple[Float[Tensor, "K i"], Float[Tensor, "o K"]]:
    """(A, B) of a module's delta B A as the blocks have them, side by side, each block times its scale, in float64."""
    parts = [(*module.factors(which), scale[which]) for which in blocks(live)]
    return torch.cat([a for a, _, _ in parts]).double(), torch.cat([b.double() * s for _, b, s in parts], dim=1)


def refactored(
    a: Float[Tensor, "K i"], b: Float[Tensor, "o K"], rank: int
) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
    """Factors of the same product, whose rows and columns are orthogonal and share its singular values evenly; `rank`
    of them, K at least, the last ones zero where the product has fewer."""
    (qb, rb), (qa, ra) = torch.linalg.qr(b), torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    root = s.sqrt()
    short = rank - len(s)
    return (
        torch.nn.functional.pad(root[:, None] * (vh @ qa.T), (0, 0, 0, short)),
        torch.nn.functional.pad(qb @ u * root, (0, short)),
    )


def off(found: Float[Tensor, "o i"], delta: Float[Tensor, "o i"]) -> float:
    """How far a delta is from what it should be, as a share of its Frobenius norm; 0 for one that is zero in both."""
    gap = float((found - delta).norm())
    return gap / float(delta.norm()) if gap else 0.0


def lora_rank(adapter: Adapter, live: State, instead: str) -> int:
    """The rank of the LoRA that an adapter is. Raises UserError where it is as wide as the weights, and says what to do
    `instead`."""
    modules = adapter.modules.values()
    widths = [sum(len(module.factors(which)[0]) for which in blocks(live)) for module in modules]
    if all(width >= min(module.base.weight.shape) for width, module in zip(widths, modules, strict=True)):
        raise UserError(f"the adapter is as wide as the model's weights, which is no LoRA: {instead}")
    return max(widths)


def lora(adapter: Adapter, live: State, rank: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], float]:
    """(tensors by PEFT's names, the largest error of a module's delta). The blocks have the scale of merged weights."""
    error = 0.0
    tensors: dict[str, Tensor] = {}
    for name, module in adapter.modules.items():
        a, b = own_factors(module, live, adapter.scale)
        small = [part.to(dtype).contiguous() for part in refactored(a, b, rank)]
        error = max(error, off(small[1].double() @ small[0].double(), b @ a))
        for part, tensor in zip("AB", small, strict=True):
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = tensor.cpu()
    return tensors, error


def target_modules(adapter: Adapter) -> list[str]:
    """The last names of the adapted Linears."""
    return sorted({name.rsplit(".", 1)[-1] for name in adapter.modules})


def lora_config(base: str, rank: int, modules: list[str]) -> dict[str, Any]:
    """What PEFT reads in adapter_config.json; every other field has its default."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": modules,
    }


def lora_files(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a LoRA folder by name."""
    # With PEFT's one line of metadata: several would come in another order each time.
    return {
        WEIGHTS: save(dict(tensors), {"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }
