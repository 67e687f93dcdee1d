"""Erasure: the gradient of the deployed block without its component along what the pairs call hacking.

    V     per parameter tensor, from the pairs with the quarantine ablated, every `refresh_every` steps:
          a matrix loses one axis, its unit mean pair difference; a vector (a block of one vector per module) the top
          `erase_axes` right singular vectors of the pairs' differences [P, n]
    g'    = g - V^T gate(V g)     (method/axes.py)
All rollouts train the deployed block, nothing is ablated. Source: METHOD.md section 5; removing a direction from the
gradient follows gradient projection (Farajtabar et al. 2020). Deltas from canon: the axes come from pairs of texts and
not from another task, and the component against them can stay (one_sided).

Records, each over all tensors: `erase_gradient` = |V g| / |g| before the edit, `erase_removed` = |V^T gate| / |g|,
`erase_left` = |V g'| / |g'|; and of the *previous* step's update dtheta, along the V that edited it, `erase_update` =
|V dtheta| / |dtheta| and `erase_update_hackward`, the same for the components that make hacks likelier.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vgrout.arms.base import part
from vgrout.arms.edits import Edits, charged, norm, noted, share
from vgrout.config import stream
from vgrout.method.axes import mean_axis, random_axes, singular_axes, without
from vgrout.types import UserError


class Erase(Edits):
    name = "erase"
    claim = "takes the pairs' direction out of every gradient, ships as it is"
    signal, action = "pairs' gradients", "erase"
    access = "L1"
    ablates = False

    def __init__(self, bench):
        super().__init__(bench)
        if self.cfg.erase_axes > len(bench.hack.length):
            raise UserError(f"erase_axes = {self.cfg.erase_axes}: there are {len(bench.hack.length)} pairs")
        self.axes: dict[str, Tensor] = {}  # [k, n] of each parameter tensor by name
        self.drawn = -1  # the step of their extraction

    def differences(self, index: Tensor) -> dict[str, Tensor]:
        """Gradient of the mean NLL of some pairs' hack sides, less that of their clean sides, by parameter."""
        policy, weight = self.bench.policy, torch.full((len(index),), 1 / len(index))
        sides = (
            policy.nll_gradients(rows.take(index), weight, "deployed")[1]
            for rows in (self.bench.hack, self.bench.clean)
        )
        hack, clean = sides
        return {name: hack[name] - clean[name] for name in hack}

    def draw(self) -> tuple[dict[str, Tensor], int]:
        """The axes, and how many pair rows ran through the model for them; a control replaces this and nothing else."""
        pairs, axes = torch.arange(len(self.bench.hack.length)), {}
        named = dict(self.bench.policy.adapter.named("deployed"))
        vectors = [name for name, p in named.items() if p.ndim == 1]
        if len(vectors) < len(named):
            mean = self.differences(pairs)
            axes = {name: mean_axis(mean[name].flatten()) for name in named if name not in vectors}
        if vectors:
            alone = [self.differences(pair) for pair in pairs.split(1)]
            for name in vectors:
                axes[name] = singular_axes(torch.stack([d[name] for d in alone]), self.cfg.erase_axes)
        return axes, 2 * len(pairs) * (bool(vectors) + (len(vectors) < len(named)))

    def route(self, step, batch, oracle):
        said, rows = self.kept_by_optimizer(), 0
        if step - self.drawn >= self.cfg.refresh_every or not self.axes:
            (self.axes, rows), self.drawn = self.draw(), step
        decision = noted(super().route(step, batch, oracle), {**said, "v_age": step - self.drawn})
        return charged(decision, rows)

    def kept_by_optimizer(self) -> dict[str, float]:
        """What the previous step's update has along the axes that its gradient had lost."""
        moved = self.update()
        if moved is None:
            return {}
        along = {name: self.axes[name] @ d.flatten() for name, d in moved.items()}
        hackward = {name: torch.relu(-c) for name, c in along.items()}  # parameters go against their gradient
        return {
            "erase_update": share(norm(along), norm(moved)),
            "erase_update_hackward": share(norm(hackward), norm(moved)),
        }

    def edit(self, adapter):
        said = super().edit(adapter)
        before, removed, after, along, left = ({} for _ in range(5))
        for name, p in adapter.named("deployed"):
            if p.grad is not None:
                before[name] = p.grad.flatten().clone()
                after[name], along[name] = without(before[name], self.axes[name], self.cfg.erase_gate)
                removed[name], left[name] = before[name] - after[name], self.axes[name] @ after[name]
                p.grad.copy_(after[name].view_as(p))
        self.remember()
        if not before:
            return said
        return {
            **said,
            "erase_gradient": share(norm(along), norm(before)),
            "erase_removed": share(norm(removed), norm(before)),
            "erase_left": share(norm(left), norm(after)),
        }

    def state(self):
        return {**super().state(), **{f"axes.{name}": v for name, v in self.axes.items()}, "drawn": self.drawn}

    def restore(self, state):
        super().restore(state)
        there = self.bench.policy.device
        self.axes, self.drawn = part(state, "axes.", there), state["drawn"]


class EraseRandom(Erase):
    name = "erase_random"
    claim = "erase with random axes, one draw per run"
    signal = "random"
    access = "L0"

    def draw(self):
        """Neither these axes nor their signs depend on the pairs."""
        axes = {}
        for name, p in self.bench.policy.adapter.named("deployed"):
            generator = torch.Generator().manual_seed(stream(self.cfg.chance_seed, "erase", name))
            drawn = random_axes(self.cfg.erase_axes if p.ndim == 1 else 1, p.numel(), generator)
            axes[name] = drawn.to(p.device)
        return axes, 0
