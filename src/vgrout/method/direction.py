"""A direction in which hacks differ from honest solutions, and the score of a rollout along it.

    per pair   g = c-gradient [M, R] of the mean completion NLL
    v_grad     v_m = unit( mean_pairs( g_hack - g_clean ) )          per module m
    unit       v_m = unit( mean_pairs( unit(g_hack) - unit(g_clean) ) )  no pair counts more for a longer gradient
    orthogonal v_m = unit( v - <v, s> s )                            s = unit( mean_pairs g_clean ), the solve direction
    svd        v_m = top K right singular vectors of the pairs' differences [C, R], each with the sign of most pairs
    cos_im     = cos( g_im, v_m )                                    with K axes: see `cosines`
    z_im       = (cos_im - mean_m) / sd_m                            over all 2P pair cosines of module m
    score_i    = mean_m z_im
Source: METHOD.md sections 2 and 3. A placebo replaces v by Haar-random unit rows, or swaps the sides of half of the
pairs, and keeps everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from vgrout.config import stream
from vgrout.types import RunFailed, UserError

RESIDUAL = 1e-5  # a unit row that loses more than all but this to a projection has lost all of it


class DirectionError(RunFailed):
    """A direction that cannot be used: non-finite gradients, or pairs whose bands are reversed."""


@dataclass(frozen=True)
class Direction:
    """Unit rows v, or K orthonormal ones a module; the pair statistics that standardise a cosine; the pairs' scores.

    `pairs` are the features that it was calibrated on, hack sides first: with them another v can be put in its place.
    """

    v: Float[Tensor, "M *K R"]
    mean: Float[Tensor, M]
    sd: Float[Tensor, M]
    hack: Float[Tensor, C]  # scores of the pairs' hack sides
    clean: Float[Tensor, C]
    real: bool  # extracted from the pairs (False: a control's draw)
    pairs: Float[Tensor, "C2 M R"] | None = None

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
        """Mean cosine with another direction over modules, axis by axis where there are several."""
        return float((self.v * other.v).sum(-1).mean())


def cosines(g: Float[Tensor, "N M R"], v: Float[Tensor, "M *K R"]) -> Float[Tensor, "N M"]:
    """cos(g, v) in each module.

    With K axes: the cosine of g with its projection onto the cone of non-negative combinations of the axes, minus that
    of -g. A hack counts in full along whichever axis it lies. The score is odd and continuous in g, and for one axis it
    is the cosine; a weighted mean of K cosines would be the cosine with one fixed vector again, and the length of the
    projection onto the span, signed as a whole, jumps where the sign flips.
    """
    if v.ndim == 2:
        return (normalize(g, dim=-1) * v).sum(-1)
    along = torch.einsum("nmr,mkr->nmk", normalize(g, dim=-1), v)
    return along.clamp(min=0).norm(dim=-1) - along.clamp(max=0).norm(dim=-1)


def v_grad(hack: Float[Tensor, "C M R"], clean: Float[Tensor, "C M R"], axes: int = 1) -> Float[Tensor, "M R"]:
    return normalize((hack - clean).mean(0), dim=-1)


def v_unit(hack: Float[Tensor, "C M R"], clean: Float[Tensor, "C M R"], axes: int = 1) -> Float[Tensor, "M R"]:
    """v_grad of the rows scaled to length 1, which is how rollouts are scored: by their cosine."""
    return v_grad(normalize(hack, dim=-1), normalize(clean, dim=-1))


def orthogonal(hack: Float[Tensor, "C M R"], clean: Float[Tensor, "C M R"], axes: int = 1) -> Float[Tensor, "M R"]:
    """v_grad without its component along what the clean sides share. A module in which nothing is left is silent: 0."""
    v, solve = v_grad(hack, clean), normalize(clean.mean(0), dim=-1)
    rest = v - (v * solve).sum(-1, keepdim=True) * solve
    return torch.where(rest.norm(dim=-1, keepdim=True) > RESIDUAL, normalize(rest, dim=-1), torch.zeros_like(rest))


def svd(hack: Float[Tensor, "C M R"], clean: Float[Tensor, "C M R"], axes: int = 1) -> Float[Tensor, "M K R"]:
    """The axes along which the pairs differ most, uncentred. An axis points where more pairs point, each with one vote;
    on a tie where their sum does. Raises UserError where there are fewer than `axes`."""
    difference = (hack - clean).transpose(0, 1)  # [M, C, R]
    most = min(difference.shape[1:])
    if axes > most:
        raise UserError(f"direction_axes = {axes}: {len(hack)} pairs of rank {hack.shape[-1]} have at most {most}")
    v = torch.linalg.svd(difference, full_matrices=False).Vh[:, :axes]
    along = torch.einsum("mcr,mkr->mkc", difference, v)
    votes, total = along.sign().sum(-1), along.sum(-1)
    return v * torch.where(torch.where(votes == 0, total, votes) < 0, -1.0, 1.0)[..., None]


Extract = Callable[..., Tensor]  # (hack [C, M, R], clean [C, M, R], axes) -> v [M, *K, R]
DIRECTIONS: dict[str, Extract] = {"v_grad": v_grad, "unit": v_unit, "svd": svd, "orthogonal": orthogonal}


def haar(modules: int, rank: int, seed: int, widths: Sequence[int] = ()) -> Float[Tensor, "M R"]:
    """Unit rows, each uniform on the sphere of its module's `widths` first entries; of all entries without `widths`."""
    generator = torch.Generator().manual_seed(stream(seed, "haar"))
    v = torch.randn(modules, rank, generator=generator)
    for row, width in zip(v, widths, strict=False):
        row[width:] = 0
    return normalize(v, dim=-1)


def haar_axes(modules: int, axes: int, rank: int, seed: int, widths: Sequence[int] = ()) -> Float[Tensor, "M K R"]:
    """Orthonormal rows, uniform among all such K-tuples: Q of a Gaussian matrix, with R's diagonal positive. `widths`
    as in `haar`."""
    generator = torch.Generator().manual_seed(stream(seed, "haar"))
    drawn = torch.randn(modules, rank, axes, generator=generator)
    for module, width in zip(drawn, widths, strict=False):
        module[width:] = 0
    q, r = torch.linalg.qr(drawn)
    return (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]).transpose(1, 2).contiguous()


def haar_like(v: Float[Tensor, "M *K R"], seed: int, widths: Sequence[int] = ()) -> Float[Tensor, "M *K R"]:
    """A Haar-random direction of the shape of `v`. `widths` as in `haar`."""
    return haar(*v.shape, seed, widths) if v.ndim == 2 else haar_axes(*v.shape, seed, widths)


def half_swapped(
    hack: Float[Tensor, "C M R"], clean: Float[Tensor, "C M R"], seed: int
) -> tuple[Float[Tensor, "C M R"], Float[Tensor, "C M R"]]:
    """The sides of the pairs, exchanged in a random half of them (the smaller one, where their number is odd)."""
    generator = torch.Generator().manual_seed(stream(seed, "half swapped"))
    swap = torch.zeros(len(hack), dtype=torch.bool)
    swap[torch.randperm(len(hack), generator=generator)[: len(hack) // 2]] = True
    swap = swap[:, None, None]
    return torch.where(swap, clean, hack), torch.where(swap, hack, clean)


def calibrate(
    v: Float[Tensor, "M *K R"], hack: Float[Tensor, "C M R"], clean: Float[Tensor, "C M R"], *, real: bool
) -> Direction:
    """Standardise v with the pairs: the same code for a real direction and for a placebo."""
    pairs = torch.cat((hack, clean))
    cos = cosines(pairs, v)
    mean, sd = cos.mean(0), cos.std(0).clamp(min=1e-8)
    scores = ((cos - mean) / sd).mean(1)
    return Direction(v, mean, sd, scores[: len(hack)], scores[len(hack) :], real, pairs)
