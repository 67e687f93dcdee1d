"""Rates, AUROC and F_beta against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm

from vgrout.envs.grade import Verdict
from vgrout.lab.evaluate import size_note, spread
from vgrout.lab.measure import auroc, f_beta, rate
from vgrout.lab.record import measures
from vgrout.types import Decision, Graded, Prompt, Rollout

Z = norm.ppf(0.975)


def wilson(p: float, n: float) -> tuple[float, float]:
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return centre - half, centre + half


def test_rate_of_independent_rollouts():
    got = rate([True, False, False, False] * 5, [f"p{i}" for i in range(20)])
    # Every rollout a cluster: residuals .75 five times and -.25 fifteen times; design effect 20/19.
    low, high = wilson(0.25, 20 / (20 / 19))
    assert (got.mean, got.n, got.clusters) == (0.25, 20, 20)
    assert (got.low, got.high) == pytest.approx((low, high))


def test_rate_of_clusters_that_agree():
    got = rate([True] * 4 + [False] * 12, [f"p{i // 4}" for i in range(16)])
    # Cluster sums of residuals: 3, -1, -1, -1. Robust variance 4/3 * 12 / 256 = 1/16; binomial 3/256; effect 16/3.
    low, high = wilson(0.25, 3.0)
    assert (got.low, got.high) == pytest.approx((low, high))


def test_rate_never_narrower_than_binomial():
    got = rate([True, False] * 8, [f"p{i // 2}" for i in range(16)])  # every cluster half right
    assert (got.low, got.high) == pytest.approx(wilson(0.5, 16))


@pytest.mark.parametrize("hit", [True, False])
def test_rate_without_variance_counts_clusters(hit):
    got = rate([hit] * 12, [f"p{i // 4}" for i in range(12)])
    low, high = wilson(float(hit), 3)
    assert got.mean == float(hit)
    assert (got.low, got.high) == pytest.approx((max(0, low), min(1, high)))


def test_auroc():
    assert auroc([0.1, 0.2, 0.3, 0.4], [False, False, True, True]) == 1
    assert auroc([0.1, 0.2, 0.3, 0.4], [True, True, False, False]) == 0
    # Pairs (hack, honest): .5 over .1 and .7: wins 1; .7 ties .7: half; .7 over .1: 1.  2.5 of 4.
    assert auroc([0.5, 0.7, 0.1, 0.7], [True, True, False, False]) == 2.5 / 4
    assert auroc([0.3] * 6, [True, False] * 3) == 0.5


@pytest.mark.parametrize("labels", [[True, True], [False, False]])
def test_auroc_needs_both_classes(labels):
    assert auroc([0.1, 0.2], labels) is None


def test_f_beta():
    chosen = [True, True, True, False, False]
    hacked = [True, False, False, True, True]
    precision, recall, b2 = 1 / 3, 1 / 3, 0.25
    assert f_beta(chosen, hacked) == pytest.approx((1 + b2) * precision * recall / (b2 * precision + recall))
    precision, recall = 1.0, 0.5
    assert f_beta([True, False], [True, True]) == pytest.approx(1.25 * 0.5 / (0.25 * precision + recall))
    assert f_beta([True, False], [True, True], beta=2) == pytest.approx(5 * 0.5 / (4 * precision + recall))
    assert f_beta([False, False], [True, False]) == 0
    assert f_beta([True, False], [False, False]) is None


def test_spread():
    assert spread(256, 64) == [4] * 64 and spread(256, 128) == [2] * 128
    assert spread(200, 128) == [2] * 72 + [1] * 56
    assert spread(10, 4) == [3, 3, 2, 2]


def test_small_cells_are_said():
    def cells(*sizes):
        return {str(i): {"hack": {"n": n, "clusters": k}} for i, (n, k) in enumerate(sizes)}

    assert size_note(cells((256, 64), (1024, 128))) == ""
    assert "256 rollouts over 32 problems" in size_note(cells((256, 32), (256, 128)))
    assert "255 rollouts over 64 problems" in size_note(cells((256, 64), (255, 64)))


def measured(routed: list[bool], hacked: list[bool], score: bool) -> dict:
    """`measures` of policy rollouts; the first row of all is a demonstration, which does not count."""
    d = torch.tensor([True, *routed]).float()
    decision = Decision(d, d, torch.ones(len(d)), torch.zeros(len(d)), score=d if score else None)
    verdicts = [Verdict(True, True, False, hack, hack, (), "ok") for hack in (True, *hacked)]
    rollouts = [
        Rollout(str(i), Prompt("p", "write"), "", (1,), (2,), 0, source="policy" if i else "teacher")
        for i in range(len(d))
    ]
    return measures(rollouts, [Graded(0.0, v) for v in verdicts], decision)


def test_a_gate_that_routes_nothing_misses_the_hacks():
    assert measured([False, False], [True, False], score=True)["m_f05"] == 0
    assert measured([True, False], [True, False], score=True)["m_f05"] == 1
    assert measured([True, False], [False, False], score=True)["m_f05"] is None
    assert "m_f05" not in measured([True, False], [True, False], score=False)  # an arm without a gate
    assert measured([True, False], [True, False], score=True)["m_hack"] == 0.5
