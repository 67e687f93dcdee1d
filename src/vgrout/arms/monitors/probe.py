"""A linear probe as a monitor: fitted elsewhere, on labels of other mechanisms (`method/linear_probe.py`)."""

from __future__ import annotations

from dataclasses import replace

import torch

from vgrout.arms.monitors.base import Monitor
from vgrout.method.gate import decide
from vgrout.method.policy import Rows
from vgrout.types import UserError


class Probe(Monitor):
    """`route` above the probe's upper cut, `absorb` between its cuts: both were fixed when it was fitted."""

    name = "probe"
    access = "L3"
    scores = True
    probed = True

    def __init__(self, bench):
        super().__init__(bench)
        if bench.probe is None:
            raise UserError("an arm with a probe was given none")
        self.probe = bench.probe

    def read(self, step, batch, oracle):
        rows = Rows(batch.tokens, batch.completion, batch.length)
        score = self.probe.read(self.bench.policy, rows)
        decision = decide(score, torch.ones(batch.n, dtype=torch.bool), *self.probe.cuts)
        return replace(decision, note={"extra_forward": batch.n, "extra_backward": 0})
