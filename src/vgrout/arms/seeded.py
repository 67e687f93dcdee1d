"""Seeded quarantine: before training the quarantine learns the pairs' hack sides, then it absorbs, or a gate routes.

    begin   SFT of the quarantine on the hack sides, `sft_steps` steps, the deployed block cut
    twins   the same, and every tensor of the displacement replaced by another of the same norm:
            random   a direction uniform on the sphere: any displacement of that size
            clean    that of the same fine-tuning on the clean sides: any content of that form
An ablated model is as it was. The question is whether a block that already does a thing attracts the learning of it.
`clean` isolates the content best: prompts, procedure and norms are those of the hack seed, only what is taught differs;
a random displacement of equal norm hardly changes what the model says, and controls for the parameters alone.
Own construction, after gradient routing's absorption (Cloud et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vgrout.arms.base import Arm
from vgrout.arms.controls import Absorb
from vgrout.arms.edits import charged
from vgrout.arms.monitored import RouteV
from vgrout.config import stream
from vgrout.method.policy import Rows
from vgrout.method.sft import sft


class Seeded(Arm):
    """To be mixed into an arm that runs the quarantine."""

    def learn(self, rows: Rows) -> list[Tensor]:
        """Fine-tune the quarantine on some rows, and what this moved it by, tensor by tensor."""
        cfg, policy = self.cfg, self.bench.policy
        before = [p.detach().clone() for p in policy.adapter.parameters("quarantine")]
        sft(policy, rows, "quarantine", steps=cfg.sft_steps, lr=cfg.sft_lr, betas=(cfg.beta1, cfg.beta2))
        pairs = zip(policy.adapter.parameters("quarantine"), before, strict=True)
        return [p.detach() - b for p, b in pairs]

    def place(self, displacement: list[Tensor]) -> None:
        """Move the quarantine by a displacement."""
        with torch.no_grad():
            for p, d in zip(self.bench.policy.adapter.parameters("quarantine"), displacement, strict=True):
                p += d

    def begin(self):
        super().begin()
        self.seed()

    def seed(self) -> None:
        self.learn(self.bench.hack)

    def rows_seen(self) -> int:
        """Pair rows that each step of `begin` ran through the model."""
        return len(self.bench.hack.length)

    def route(self, step, batch, oracle):
        decision = super().route(step, batch, oracle)
        return charged(decision, 0 if step else self.cfg.sft_steps * self.rows_seen())


class Twin(Seeded):
    """A seed with other content and, tensor by tensor, the hack seed's norm."""

    def other(self, like: list[Tensor]) -> list[Tensor]:
        """The displacement that replaces the hack seed's; its norms do not matter."""
        raise NotImplementedError

    def seed(self):
        hack = self.learn(self.bench.hack)
        self.place([-d for d in hack])
        pairs = zip(self.other(hack), hack, strict=True)
        self.place([d * (h.norm() / d.norm().clamp(min=torch.finfo(d.dtype).tiny)) for d, h in pairs])


class SeededAbsorb(Seeded, Absorb):
    name = "seeded_absorb"
    claim = "absorb, with a quarantine that learnt the pairs' hack sides beforehand"
    access = "L1"


class SeededAbsorbRandom(Twin, Absorb):
    name = "seeded_absorb_random"
    claim = "seeded_absorb with a random displacement of the same norms"
    access = "L1"

    def other(self, like):
        generator = torch.Generator().manual_seed(stream(self.cfg.chance_seed, "seeded"))
        return [torch.randn(d.shape, generator=generator).to(d.device) for d in like]


class SeededAbsorbClean(Twin, Absorb):
    name = "seeded_absorb_clean"
    claim = "seeded_absorb with the pairs' clean sides, at the same norms"
    access = "L1"

    def other(self, like):
        learnt = self.learn(self.bench.clean)
        self.place([-d for d in learnt])
        return learnt

    def rows_seen(self):
        return super().rows_seen() + len(self.bench.clean.length)


class SeededRouteV(Seeded, RouteV):
    name = "seeded_routeV"
    claim = "routeV, with a quarantine that learnt the pairs' hack sides beforehand"
