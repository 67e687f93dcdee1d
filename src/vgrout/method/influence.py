"""What each pair does to the direction: its margin, and what becomes of v and of the pair when it is left out.

    margin_i    = score(hack_i) - score(clean_i)     under v and the standardisation of all pairs
    cosine_i    = mean_m cos(v_m, v_m^(-i))          v^(-i): from all pairs but i
    left_out_i  = score(hack_i) - score(clean_i)     under v^(-i) and its standardisation
A pair with a small cosine decides v by itself; one with a negative `left_out` says something that the others do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vgrout.method.direction import calibrate, v_grad


@dataclass(frozen=True)
class Influence:
    """One value a pair each, in standardised score units but for the cosine."""

    margin: Float[Tensor, C]
    cosine: Float[Tensor, C]
    left_out: Float[Tensor, C]

    @property
    def accuracy(self) -> float:
        """Share of pairs whose hack side scores higher under v of all pairs: under a v that it helped to make."""
        return float((self.margin > 0).float().mean())

    @property
    def left_out_accuracy(self) -> float:
        """Share of pairs whose hack side scores higher under v of the others."""
        return float((self.left_out > 0).float().mean())


def influence(hack: Float[Tensor, "C M R"], clean: Float[Tensor, "C M R"]) -> Influence:
    """From the c-gradients of the pairs' sides. Raises ValueError for a single pair: without it there is no v."""
    if len(hack) < 2:
        raise ValueError("leaving one out takes two pairs")
    whole = calibrate(v_grad(hack, clean), hack, clean, real=True)
    cosine, left_out = [], []
    for i in range(len(hack)):
        rest = torch.arange(len(hack)) != i
        others = calibrate(v_grad(hack[rest], clean[rest]), hack[rest], clean[rest], real=True)
        (h, c), _ = others.score(torch.stack((hack[i], clean[i])))
        cosine.append(whole.overlap(others))
        left_out.append(float(h - c))
    return Influence(whole.hack - whole.clean, torch.tensor(cosine), torch.tensor(left_out))
