"""A generic language model as a monitor (`method/judge.py`)."""

from __future__ import annotations

import torch

from vgrout.arms.monitors.base import Monitor
from vgrout.types import Decision


class Opinion(Monitor):
    """`route` what the judge calls a hack, `keep` the rest. It reads prompts and completions as text, demonstrations
    included, and no reward."""

    name = "judge"
    access = "L2"
    needs = ("judge",)

    def read(self, step, batch, oracle):
        judge = self.bench.given.judge
        flagged = torch.tensor(self.bench.policy.ranks.first(lambda: judge.flags(batch.texts))).float()
        return Decision(
            m=flagged,
            d=flagged,
            weight=torch.ones(batch.n),
            penalty=torch.zeros(batch.n),
            note={"judged": len(set(batch.texts))},
        )
