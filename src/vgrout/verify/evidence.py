"""What a check returns, and the arithmetic that checks share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """Whether a claim holds, and the numbers that say so, in one line."""

    ok: bool
    text: str


def gap(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute value of `b`."""
    return float((a - b).detach().abs().max() / b.abs().max().clamp(min=1e-30))


def worst(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest `gap` over tensors of the same names."""
    if a.keys() != b.keys():
        raise ValueError(f"different tensors: {sorted(a.keys() ^ b.keys())[:3]}")
    return max(gap(a[key], b[key]) for key in b)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in b)
