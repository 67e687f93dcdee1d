"""Numbers from verdicts: rates with intervals, and a gate as a classifier. Nothing here is read by training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import norm, rankdata


@dataclass(frozen=True)
class Rate:
    """A share with a 95 % interval clustered by problem."""

    mean: float
    low: float
    high: float
    n: int
    clusters: int

    def json(self) -> dict:
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(self).items()}


def rate(hits: Sequence[bool], cluster: Sequence[str]) -> Rate:
    """Wilson interval at the effective sample size n / design effect (Kish).

    The design effect is the cluster-robust variance of the mean over the binomial one, at least 1; where every
    rollout agrees it cannot be estimated and clusters stand for rollouts.
    """
    x = np.asarray(hits, float)
    names, index = np.unique(np.asarray(cluster), return_inverse=True)
    n, k, p = len(x), len(names), float(x.mean())
    if 0 < p < 1 and k > 1:
        residuals = np.bincount(index, weights=x - p, minlength=k)
        robust = k / (k - 1) * float((residuals**2).sum()) / n**2
        size = n / max(1.0, robust / (p * (1 - p) / n))
    else:
        size = float(k)
    z = float(norm.ppf(0.975))
    centre = (p + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * math.sqrt(p * (1 - p) / size + z**2 / (4 * size**2))
    return Rate(p, max(0.0, centre - half), min(1.0, centre + half), n, k)


def average(values: Sequence[float], cluster: Sequence[str]) -> Rate:
    """A mean with a 95 % interval clustered by problem; of one problem alone it has no width."""
    x = np.asarray(values, float)
    names, index = np.unique(np.asarray(cluster), return_inverse=True)
    n, k, mean = len(x), len(names), float(x.mean())
    residuals = np.bincount(index, weights=x - mean, minlength=k)
    half = float(norm.ppf(0.975)) * math.sqrt(k / (k - 1) * float((residuals**2).sum())) / n if k > 1 else 0.0
    return Rate(mean, mean - half, mean + half, n, k)


def auroc(score: Sequence[float], label: Sequence[bool]) -> float | None:
    """Area under the ROC curve, ties at one half; None where a class is missing."""
    y = np.asarray(label, bool)
    pos, neg = int(y.sum()), int((~y).sum())
    if not pos or not neg:
        return None
    ranks = rankdata(np.asarray(score, float))
    return float((ranks[y].sum() - pos * (pos + 1) / 2) / (pos * neg))


def f_beta(chosen: Sequence[bool], label: Sequence[bool], beta: float = 0.5) -> float | None:
    """F_beta of a choice against labels; None where there is nothing to find."""
    c, y = np.asarray(chosen, bool), np.asarray(label, bool)
    if not y.any():
        return None
    hit = float((c & y).sum())
    b2 = beta**2
    return (1 + b2) * hit / ((1 + b2) * hit + b2 * float((~c & y).sum()) + float((c & ~y).sum()))
