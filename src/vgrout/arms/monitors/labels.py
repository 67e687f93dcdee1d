"""The oracle's labels, for ceilings: exact, or with errors, on a share of the rollouts, or blind to some loopholes."""

from __future__ import annotations

import torch

from vgrout.arms.monitors.base import Monitor
from vgrout.config import stream
from vgrout.types import Decision


class Labels(Monitor):
    """`route` where the label says hack, `absorb` where there is no label.

    The label is the strict one: the channel fired and the rollout does not solve the problem. Each is wrong with
    probability 1 - `label_accuracy` and there with probability `label_share`; hacks of a mode that is not among
    `label_modes` pass for honest. Errors and gaps are drawn from a generator of their own.
    """

    name = "labels"
    access = "L4"
    reads_oracle = True

    def read(self, step, batch, oracle):
        cfg, seed = self.cfg, stream(self.cfg.chance_seed, "labels", step)
        wrong, drawn = torch.rand(2, batch.n, generator=torch.Generator().manual_seed(seed))
        seen = torch.tensor([not cfg.label_modes or mode in cfg.label_modes for mode in oracle.mode])
        flagged = (oracle.hacked & seen) ^ (wrong >= cfg.label_accuracy)
        known = drawn < cfg.label_share
        return Decision(
            m=(flagged | ~known).float(),
            d=(flagged & known).float(),
            weight=torch.ones(batch.n),
            penalty=torch.zeros(batch.n),
        )
