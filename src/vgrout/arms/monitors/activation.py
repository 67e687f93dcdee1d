"""The activation score: routeV's machinery over what the bottleneck reads instead of its gradient."""

from __future__ import annotations

from vgrout.arms.monitors.gradient import GradientScore


class ActivationScore(GradientScore):
    """Cosines of the mean bottleneck activation A x of the completion [N, M, R] with v, which is extracted from the
    pairs' activations. Forward passes only."""

    name = "activation"
    of = "activations"
    differentiates = False

    def features(self, rows, state):
        return self.bench.policy.activations(rows, state)
