"""Tests, intervals and effects over training seeds. The unit is the seed: rollouts and problems of one run share it.

Two arms are compared by their paired differences, one per seed (seeds share LoRA init, data order and sampling).
docs/statistics.md explains each of these in a paragraph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from scipy import stats
from scipy.optimize import isotonic_regression

Side = Literal["less", "greater", "two-sided"]
Values = Sequence[float] | np.ndarray  # of one dimension
Hits = Float[np.ndarray, "S P _"]  # 0 or 1 by seed, problem and sample; NaN where there is no sample

LEAST = 5  # seeds below which numbers are descriptive only
LEVEL = 0.95  # of intervals
DRAWS = 2000  # of a bootstrap
SLACK = 1e-9  # between rates that are equal


def sign_flip(differences: Values, side: Side) -> float:
    """Exact p of the mean: the share of the 2^n choices of signs whose mean is as extreme. Assumes that differences
    are as likely up as down where there is no effect."""
    if not np.isfinite(np.asarray(differences, float)).all():
        raise ValueError("a difference is not a finite number")
    every = {"permutation_type": "samples", "n_resamples": np.inf, "vectorized": True}
    return float(stats.permutation_test((np.asarray(differences, float),), np.mean, alternative=side, **every).pvalue)


def smallest_p(seeds: int, side: Side) -> float:
    """The least p that so many seeds can give."""
    return min(1.0, (2.0 if side == "two-sided" else 1.0) / 2**seeds)


def not_worse(differences: Values, margin: float) -> float:
    """p of non-inferiority: that the mean lies above -margin, for an outcome of which more is better."""
    return sign_flip(np.asarray(differences, float) + margin, "greater")


def equivalent(differences: Values, margin: float) -> float:
    """p of equivalence by two one-sided tests: that the mean lies between -margin and margin."""
    return max(not_worse(differences, margin), not_worse(-np.asarray(differences, float), margin))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for the size of their family (Holm 1979), in the order given."""
    ordered = sorted(p, key=lambda name: p[name])
    adjusted, last = {}, 0.0
    for i, name in enumerate(ordered):
        last = adjusted[name] = max(last, min(1.0, (len(ordered) - i) * p[name]))
    return {name: adjusted[name] for name in p}


def in_sequence(p: Sequence[float], alpha: float) -> list[bool]:
    """Which of the claims hold that are tested in this order, each at alpha, up to the first that fails."""
    held = np.logical_and.accumulate([value <= alpha for value in p])
    return [bool(h) for h in held]


def hodges_lehmann(differences: Values) -> float:
    """The median of the means of all pairs of differences, each with itself too."""
    d = np.asarray(differences, float)
    i, j = np.triu_indices(len(d))
    return float(np.median((d[i] + d[j]) / 2))


def cliffs_delta(a: Values, b: Values) -> float:
    """P(a > b) - P(a < b) over all pairs, -1 to 1."""
    u = stats.mannwhitneyu(a, b, method="asymptotic").statistic if len({*a, *b}) > 1 else len(a) * len(b) / 2
    return float(2 * u / (len(a) * len(b)) - 1)


def stacked(tables: Sequence[Float[np.ndarray, "P _"]]) -> Hits:
    """The tables of several seeds as one, which takes as many samples as the largest."""
    most = max(table.shape[1] for table in tables)
    return np.stack([np.pad(t, ((0, 0), (0, most - t.shape[1])), constant_values=np.nan) for t in tables])


def rates(hits: Hits) -> Float[np.ndarray, S]:
    """The rate of each seed: the mean over problems of the mean over samples."""
    return np.nanmean(hits, axis=2).mean(axis=1)


def bootstrap(arm: Hits, control: Float[np.ndarray, "_ _ _"] | None = None, seed: int = 0) -> tuple[float, float]:
    """A 95 % interval of the mean rate over seeds, or of the difference of two arms, by the hierarchical bootstrap:
    seeds, problems within a seed, samples within a problem. Arms share the drawn seeds and problems, and may differ in
    their samples."""
    rng = np.random.default_rng(seed)
    seeds, problems, _ = arm.shape
    if control is not None and control.shape[:2] != arm.shape[:2]:
        raise ValueError("arms have different seeds or problems")
    parts = [((~np.isnan(hits)).sum(2), np.nanmean(hits, axis=2)) for hits in (arm, control) if hits is not None]
    means = []
    for _ in range(DRAWS):
        s, p = rng.integers(seeds, size=(seeds, 1)), rng.integers(problems, size=(seeds, problems))
        # n hits and misses, drawn n times with replacement, are a binomial draw.
        drawn = [(rng.binomial(count[s, p], share[s, p]) / count[s, p]).mean() for count, share in parts]
        means.append(drawn[0] - sum(drawn[1:]))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def survival(times: Values, seen: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """Kaplan-Meier: times, and the share of runs without the event up to and with each. Times of runs that ended
    without it (`seen` false) are censored there."""
    censored = stats.CensoredData.right_censored(np.asarray(times, float), ~np.asarray(seen, bool))
    curve = stats.ecdf(censored).sf
    return curve.quantiles, curve.probabilities


def restricted_mean(times: Values, seen: Sequence[bool], horizon: float) -> float:
    """Mean time to the event up to a horizon: the area under the Kaplan-Meier curve."""
    at, share = survival(times, seen)
    inside = at < horizon
    edges = np.concatenate(([0.0], at[inside], [horizon]))
    heights = np.concatenate(([1.0], share[inside]))
    return float((np.diff(edges) * heights).sum())


def leakage(shares: Sequence[float], hack: Sequence[float], observed: float) -> tuple[float, float]:
    """Which shares of hacks allowed to train would explain an observed hack rate: the least and the largest, on the
    isotonic fit of measured rates with straight lines between them; the ends of the scale where it is out of range."""
    x, place, counts = np.unique(np.asarray(shares, float), return_inverse=True, return_counts=True)
    means = np.bincount(place, weights=np.asarray(hack, float)) / counts
    y = isotonic_regression(means, weights=counts).x
    if observed < y[0] - SLACK or observed > y[-1] + SLACK:
        end = float(x[0] if observed < y[0] else x[-1])
        return end, end
    below, above = np.flatnonzero(y <= observed + SLACK)[-1], np.flatnonzero(y >= observed - SLACK)[0]
    if above <= below:  # on a point, or on a flat part
        return float(x[above]), float(x[below])
    at = float(np.interp(observed, y[[below, above]], x[[below, above]]))
    return at, at


def below_line(point: tuple[float, float], line: Sequence[tuple[float, float]]) -> float:
    """How far a point (solve, hack) lies off what a line reaches, in their unit. The line reaches its points, those
    down to a model that does nothing, and all that is no better: no more solving, no less hacking. Positive outside of
    that region: the distance to it; negative inside: the distance to its edge."""
    solve, hack = point
    path = np.asarray([(0.0, 0.0), *line], float)
    share = np.linspace(0, 1, 201)[:, None]
    dense = np.concatenate([a + share * (b - a) for a, b in zip(path, path[1:], strict=False)] or [path])
    behind = np.maximum(solve - dense[:, 0], 0), np.maximum(dense[:, 1] - hack, 0)
    outside = float(np.hypot(*behind).min())
    if outside > SLACK:
        return outside
    # Inside, the edge is as far as one has to move right and down until no point of the line is as good.
    edge = [(s, min(dense[dense[:, 0] >= s - SLACK, 1])) for s in np.unique(dense[:, 0])]
    right = max((s for s, h in edge if h <= hack + SLACK), default=solve) - solve
    down = hack - min((h for s, h in edge if s >= solve - SLACK), default=hack)
    return -float(max(0.0, min(right, down)))
