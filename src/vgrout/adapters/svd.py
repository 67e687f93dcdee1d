"""The reduced SVD of a weight, computed once per weight and process."""

from __future__ import annotations

from hashlib import sha256

import torch
from jaxtyping import Float
from torch import Tensor

Parts = tuple[Float[Tensor, "o K"], Float[Tensor, "K"], Float[Tensor, "K i"]]

# By a hash of the weight's content, in memory only: an adapter's buffers are these very tensors, so that what is kept
# is no copy while a model is in use.
_KNOWN: dict[str, Parts] = {}


@torch.no_grad()
def svd(weight: Float[Tensor, "o i"]) -> Parts:
    """U, S, Vh with weight = U diag(S) Vh, S falling; on the CPU, in float32 at least. Callers share them, so they must
    not change."""
    exact = weight.detach().cpu().to(torch.promote_types(weight.dtype, torch.float32)).contiguous()
    shape = f"{exact.dtype} {tuple(exact.shape)}\n"
    key = sha256(shape.encode() + exact.numpy().tobytes()).hexdigest()
    if key not in _KNOWN:
        _KNOWN[key] = tuple(part.contiguous() for part in torch.linalg.svd(exact, full_matrices=False))
    return _KNOWN[key]
