"""A linear probe as a monitor: fitted elsewhere, on labels of other mechanisms (`method/linear_probe.py`)."""

from __future__ import annotations

from dataclasses import replace

import torch

from vgrout.arms.monitors.base import Monitor
from vgrout.method.gate import decide
from vgrout.method.policy import Rows


class Probe(Monitor):
    """`route` above the probe's upper cut, `absorb` between its cuts: both were fixed when it was fitted."""

    name = "probe"
    access = "L3"
    scores = True
    needs = ("probe",)

    def __init__(self, bench):
        super().__init__(bench)
        bench.given.probe.fits(bench.policy)

    def read(self, step, batch, oracle):
        probe = self.bench.given.probe
        rows = Rows(batch.tokens, batch.completion, batch.length)
        score = probe.read(self.bench.policy, rows)
        decision = decide(score, torch.ones(batch.n, dtype=torch.bool), *probe.cuts)
        return replace(decision, note={"extra_forward": batch.n, "extra_backward": 0})
