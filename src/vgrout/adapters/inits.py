"""Inits of lora2r's A0, B0 that come from the weight and the pairs' inputs instead of chance.

Axis j of a weight W [o, i] is a pair (a_j [i], b_j [o]); W is the sum of b_j a_j^T over all axes, largest first.

    pissa                  SVD of W = U S Vh:    b_j = u_j s_j,  a_j = v_j
    corda                  SVD of W C = U S Vh:  b_j = u_j s_j,  a_j = v_j C^-1
                           C [i, i]: mean of x x^T over the tokens of the pairs' rows
    signed_corda           corda, and the quarantine's first axis is a = d, b = W d
                           d: unit mean input difference hack - clean over completion tokens
    signed_corda_reversed  signed_corda with the blocks exchanged: its control

The deployed block gets the even axes 0, 2, ..., the quarantine the odd ones; of a seeded block the last axis makes room
for d. Every axis is balanced, |a_j| = |b_j|.

The twin exchanges the blocks and reverses no sign: (-a, -b) is the same axis, and (-a, b) gives the same block to first
order with dB_j reversed, which the optimizer cannot tell apart.

Deltas from canon: PiSSA (Meng et al. 2024) and CorDA (Yang et al. 2024) leave the residual W - B0 A0 in the frozen
weight; lora2r subtracts the init's product, which is the same. CorDA adapts to a task by its largest axes (its
instruction-previewed mode); so do we, with the pairs as the task. C gets 1 % of its mean diagonal on the diagonal,
once, where CorDA raises that until the inverse is exact. CorDA's |a_j| and |b_j| depend on the unit of x; balanced ones
do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vgrout.adapters.svd import svd
from vgrout.types import UserError

DAMPING = 0.01  # share of the mean diagonal


@dataclass(frozen=True)
class Moments:
    """What a module's inputs x are on the pairs' rows, in float64."""

    second: Float[Tensor, "i i"]  # mean of x x^T over all tokens, prompts included
    difference: Float[Tensor, "i"]  # mean over pairs of the mean over completion tokens, hack - clean


Axes = tuple[Float[Tensor, "K i"], Float[Tensor, "o K"]]


def balanced(a: Float[Tensor, "K i"], b: Float[Tensor, "o K"]) -> Axes:
    """The same products b_j a_j^T with |a_j| = |b_j|."""
    na, nb = a.norm(dim=1), b.norm(dim=0)
    size = (na * nb).sqrt()
    return a * (size / na)[:, None], b * (size / nb)


def pissa(weight: Float[Tensor, "o i"], moments: Moments | None) -> Axes:
    u, s, vh = svd(weight)
    return vh, u * s


def corda(weight: Float[Tensor, "o i"], moments: Moments) -> Axes:
    c = moments.second
    c = c + DAMPING * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
    u, s, vh = torch.linalg.svd(weight.to(c) @ c, full_matrices=False)
    return torch.linalg.solve(c, vh, left=False), u * s


def seed(weight: Float[Tensor, "o i"], moments: Moments) -> Axes:
    """The axis of the pairs' mean input difference. Raises UserError where it, or its image, is zero."""
    d = moments.difference
    d = d / d.norm()
    image = weight.to(d) @ d
    if not (torch.isfinite(d).all() and bool(image.any())):
        raise UserError("the pairs' sides have the same mean input, or one that the weight maps to zero")
    return d[None], image[:, None]


def two_blocks(name: str, weight: Float[Tensor, "o i"], rank: int, moments: Moments | None) -> Axes:
    """A0 [2R, i] and B0 [o, 2R] of an init in INITS, the deployed block's half first.

    Raises UserError where there are fewer than 2R axes, or the pairs give no difference.
    """
    weight, most = weight.cpu(), min(weight.shape) // 2
    if rank > most:
        raise UserError(f"rank = {rank}: init {name} needs two axes for each, and leaves room for {most}")
    init = INITS[name]
    a, b = init.axes(weight, moments)
    halves = [balanced(a[k : 2 * rank : 2], b[:, k : 2 * rank : 2]) for k in (0, 1)]
    if init.seeded is not None:
        (a1, b1), (a2, b2) = balanced(*seed(weight, moments)), halves[1]
        halves[1] = torch.cat((a1, a2[:-1])), torch.cat((b1, b2[:, :-1]), dim=1)
    if init.seeded == "deployed":
        halves.reverse()
    a0, b0 = torch.cat([a for a, _ in halves]), torch.cat([b for _, b in halves], dim=1)
    if not (torch.isfinite(a0).all() and torch.isfinite(b0).all()):
        raise UserError(f"rank = {rank}: init {name} finds fewer than {2 * rank} axes that are not zero")
    return a0, b0


@dataclass(frozen=True)
class Init:
    axes: Callable[[Tensor, Moments], Axes]
    calibrated: bool = False  # needs the inputs' moments
    seeded: str | None = None  # the block that gets the pairs' axis


INITS: dict[str, Init] = {
    "pissa": Init(pissa),
    "corda": Init(corda, calibrated=True),
    "signed_corda": Init(corda, calibrated=True, seeded="quarantine"),
    "signed_corda_reversed": Init(corda, calibrated=True, seeded="deployed"),
}
