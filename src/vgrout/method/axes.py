"""Axes of a gradient: what pairs say of a tensor, and a gradient without it.

    d_p   = gradient of the NLL of pair p's hack side - that of its clean side        [n], n entries of the tensor
    mean  V = unit(mean_p d_p)                                                         [1, n]
    svd   V = top k right singular vectors of the rows d_p, each with the sign for which <d_p, V_j> > 0 for most pairs
    c     = V g                                                                        [k]
    g'    = g - V^T gate(c)      one_sided relu(c), no_gate c, reverse 2 c
c > 0: descending g makes hack sides likelier than clean ones. Rows of V are orthonormal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

Side = Literal["one_sided", "no_gate", "reverse"]
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "one_sided": torch.relu,
    "no_gate": lambda c: c,
    "reverse": lambda c: 2 * c,
}


def mean_axis(difference: Float[Tensor, n]) -> Float[Tensor, "1 n"]:
    """The unit vector of a mean pair difference; zeros where that is zero."""
    return normalize(difference, dim=0)[None]


def singular_axes(differences: Float[Tensor, "P n"], k: int) -> Float[Tensor, "k n"]:
    """The top k right singular vectors of pair differences, signed by the majority of the pairs.

    Where as many pairs stand on either side the mean difference decides. Fewer than k where P or n is smaller.
    """
    axes = torch.linalg.svd(differences, full_matrices=False).Vh[:k]
    shares = differences @ axes.T
    votes = shares.sign().sum(0)
    return axes * torch.where(torch.where(votes == 0, shares.sum(0), votes) < 0, -1.0, 1.0)[:, None]


def random_axes(k: int, n: int, generator: torch.Generator) -> Float[Tensor, "k n"]:
    """k orthonormal rows, uniform among all such frames; n of them where n is smaller."""
    q, r = torch.linalg.qr(torch.randn(n, min(k, n), generator=generator))
    return (q * r.diagonal().sign()).T


def without(g: Float[Tensor, n], axes: Float[Tensor, "k n"], side: Side) -> tuple[Float[Tensor, n], Float[Tensor, k]]:
    """The gradient less the gated part of its components along the axes, and those components."""
    c = axes @ g
    return g - axes.T @ GATES[side](c), c
