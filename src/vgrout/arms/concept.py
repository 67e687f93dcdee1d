"""What arms share that have a direction in the residual stream.

    d_l = mean_pairs( h_l(hack) - h_l(clean) )     [H], for each decoder layer l at 60 to 75 % of the depth
The layers and h are those of method/residual.py. h is the present model's, quarantine ablated; d is extracted anew
every `refresh_every` steps, before the step's rollouts are sampled.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vgrout.arms.base import Arm
from vgrout.method.direction import DirectionError
from vgrout.method.gate import uniform
from vgrout.method.residual import Pool, band, decoder_layers, residuals


class Concept(Arm):
    """A subclass says with `difference` what d is, and uses it after the step's `around("sample")`."""

    access = "L1"
    signal = "residual"

    def __init__(self, bench):
        super().__init__(bench)
        self.layers = band(len(decoder_layers(bench.policy.model)))
        self.d: Tensor | None = None  # [K, H]
        self.age = 0  # steps since it was extracted
        self.accuracy, self.overlap = 0.0, 1.0
        self.passes = 0  # rows that this step ran through the model for this arm

    @property
    def pool(self) -> Pool:
        """Which tokens of the pairs d is extracted from."""
        return "resp_mean"

    def difference(self, hack: Float[Tensor, "C K H"], clean: Float[Tensor, "C K H"]) -> Float[Tensor, "K H"]:
        return (hack - clean).mean(0)

    def around(self, phase):
        if phase == "sample":
            self.passes = 0
            self._refresh()
        return nullcontext()

    def _refresh(self) -> None:
        if self.d is not None and self.age + 1 < self.cfg.refresh_every:
            self.age += 1
            return
        policy, sides = self.bench.policy, (self.bench.hack, self.bench.clean)
        hack, clean = (residuals(policy, rows, self.pool, state="deployed", layers=self.layers) for rows in sides)
        self.passes += len(hack) + len(clean)
        fresh = self.difference(hack, clean)
        norm = fresh.norm(dim=-1)
        if not bool(torch.isfinite(norm).all() and (norm > 0).all()):
            raise DirectionError("the pairs' hack and clean sides have the same residuals, or ones that are not finite")
        self.overlap = 1.0 if self.d is None else float(cosine_similarity(fresh, self.d, dim=-1).mean())
        along = ((hack - clean) * fresh).sum((1, 2))
        self.accuracy = float((along > 0).float().mean())
        self.d, self.age = fresh, 0

    def route(self, step, batch, oracle):
        note = {
            "v_accuracy": self.accuracy,
            "v_overlap": self.overlap,
            "v_age": self.age,
            "extra_forward": self.passes,
            "extra_backward": 0,
        }
        return replace(uniform(batch.n, "keep"), note=note | self.said())

    def said(self) -> dict[str, float]:
        """What else the step's record says."""
        return {}

    def state(self):
        if self.d is None:
            return {}
        return {"d": self.d, "age": self.age, "accuracy": self.accuracy, "overlap": self.overlap}

    def restore(self, state):
        if state:
            self.d, self.age = state["d"], state["age"]
            self.accuracy, self.overlap = state["accuracy"], state["overlap"]
