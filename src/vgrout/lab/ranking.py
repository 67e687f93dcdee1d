"""How well scores rank hacks above the rest, for many scores at once, and how often chance ranks them as well."""

from __future__ import annotations

import numpy as np

BETA2 = 0.25  # F_0.5: precision counts more
MEASURES = ("auroc", "ap", "f05")
CHUNK = 250  # scores ranked at once


def ranking(score: np.ndarray, label: np.ndarray) -> dict[str, np.ndarray]:
    """AUROC, average precision and the best F_0.5 over all cuts, each [D], of scores [D, N] against labels [N].

    Equal scores are one step of every curve: half a win in the AUROC, one precision for all of them. The best cut knows
    the labels, for every score alike. Raises ValueError where a class is missing.
    """
    label = np.asarray(label, bool)
    if label.all() or not label.any():
        raise ValueError("one class of labels is missing")
    parts = [_ranking(score[i : i + CHUNK], label) for i in range(0, len(score), CHUNK)]
    return {key: np.concatenate([part[key] for part in parts]) for key in MEASURES}


def _ranking(score: np.ndarray, label: np.ndarray) -> dict[str, np.ndarray]:
    n, pos = len(label), int(label.sum())
    order = np.argsort(-score, axis=1, kind="stable")
    y = label[order]
    ordered = np.take_along_axis(score, order, 1)
    place = np.broadcast_to(np.arange(n), score.shape)
    new = np.ones(score.shape, bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = np.maximum.accumulate(np.where(new, place, 0), axis=1)  # of the equal scores around a place
    ends = np.ones(score.shape, bool)
    ends[:, :-1] = new[:, 1:]
    last = np.minimum.accumulate(np.where(ends, place, n)[:, ::-1], axis=1)[:, ::-1]
    hits = np.cumsum(y, axis=1)
    through = np.take_along_axis(hits, last, 1)
    before = np.take_along_axis(hits - y, first, 1)
    precision = through / (last + 1)
    wins = np.where(y, 0, (before + through) / 2).sum(1)
    return {
        "auroc": wins / (pos * (n - pos)),
        "ap": np.where(y, precision, 0).sum(1) / pos,
        "f05": ((1 + BETA2) * through / (last + 1 + BETA2 * pos)).max(1),
    }


def chance(value: float, draws: np.ndarray) -> float:
    """Permutation p of a value among draws of the null: (1 + draws at least as large) / (1 + draws)."""
    return float((1 + (draws >= value).sum()) / (1 + len(draws)))
