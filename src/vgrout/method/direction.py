"""v_grad: the direction in which hacks differ from honest solutions, and the score of a rollout along it.

    per pair   g = c-gradient [M, R] of the mean completion NLL
    v_m        = unit( mean_pairs( g_hack - g_clean ) )              per module m
    cos_im     = cos( g_im, v_m )
    z_im       = (cos_im - mean_m) / sd_m                            over all 2P pair cosines of module m
    score_i    = mean_m z_im
Source: METHOD.md sections 2 and 3. A placebo replaces v by Haar-random unit rows and keeps everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from vgrout.config import stream
from vgrout.types import RunFailed


class DirectionError(RunFailed):
    """A direction that cannot be used: non-finite gradients, or pairs whose bands are reversed."""


@dataclass(frozen=True)
class Direction:
    """Unit rows v, the pair statistics that standardise a cosine, and the pairs' own scores."""

    v: Float[Tensor, "M R"]
    mean: Float[Tensor, M]
    sd: Float[Tensor, M]
    hack: Float[Tensor, C]  # scores of the pairs' hack sides
    clean: Float[Tensor, C]
    real: bool  # extracted from the pairs (False: a control's draw)

    @property
    def accuracy(self) -> float:
        """Share of pairs whose hack side scores above its clean side."""
        return float((self.hack > self.clean).float().mean())

    def score(self, g: Float[Tensor, "N M R"]) -> tuple[Float[Tensor, N], Bool[Tensor, N]]:
        """Scores, and which rows have a gradient at all. Raises DirectionError on a non-finite gradient."""
        if not torch.isfinite(g).all():
            raise DirectionError("non-finite c-gradient: the policy's log-probabilities are broken")
        z = (cosines(g, self.v) - self.mean) / self.sd
        return z.mean(1), g.flatten(1).norm(dim=1) > 0

    def overlap(self, other: Direction) -> float:
        """Mean cosine with another direction over modules."""
        return float((self.v * other.v).sum(-1).mean())


def cosines(g: Float[Tensor, "N M R"], v: Float[Tensor, "M R"]) -> Float[Tensor, "N M"]:
    return (normalize(g, dim=-1) * v).sum(-1)


def v_grad(hack: Float[Tensor, "C M R"], clean: Float[Tensor, "C M R"]) -> Float[Tensor, "M R"]:
    return normalize((hack - clean).mean(0), dim=-1)


def haar(modules: int, rank: int, seed: int, widths: Sequence[int] = ()) -> Float[Tensor, "M R"]:
    """Unit rows, each uniform on the sphere of its module's `widths` first entries; of all entries without `widths`."""
    generator = torch.Generator().manual_seed(stream(seed, "haar"))
    v = torch.randn(modules, rank, generator=generator)
    for row, width in zip(v, widths, strict=False):
        row[width:] = 0
    return normalize(v, dim=-1)


def calibrate(
    v: Float[Tensor, "M R"], hack: Float[Tensor, "C M R"], clean: Float[Tensor, "C M R"], *, real: bool
) -> Direction:
    """Standardise v with the pairs: the same code for a real direction and for a placebo."""
    cos = cosines(torch.cat((hack, clean)), v)
    mean, sd = cos.mean(0), cos.std(0).clamp(min=1e-8)
    scores = ((cos - mean) / sd).mean(1)
    return Direction(v, mean, sd, scores[: len(hack)], scores[len(hack) :], real)
