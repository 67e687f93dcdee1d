"""routeV: each rollout's own gradient, scored along v, decides which block it may train. And its placebo."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from vgrout.arms.base import Arm, part
from vgrout.method.direction import Direction, calibrate, haar, v_grad
from vgrout.method.gate import POLICIES, Remembers, decide
from vgrout.method.loss import advantages
from vgrout.method.policy import Rows


class RouteV(Arm):
    name = "routeV"
    claim = "routes by the gradient's cosine with a direction from hand-written pairs"
    access = "L1"
    scores = True
    real = True

    def __init__(self, bench):
        super().__init__(bench)
        self.gate = POLICIES[self.cfg.policy](self.cfg)
        self.direction: Direction | None = None
        self.overlap, self.extracted = 1.0, 0

    def draw_v(self, hack: Float[Tensor, "C M R"], clean: Float[Tensor, "C M R"]) -> Float[Tensor, "M R"]:
        """The direction; a control replaces this and nothing else."""
        return v_grad(hack, clean)

    def extract(self) -> Direction:
        """v and its bands from the pairs, with the quarantine ablated."""
        policy = self.bench.policy
        hack, clean = (policy.c_gradients(rows, "deployed") for rows in (self.bench.hack, self.bench.clean))
        return calibrate(self.draw_v(hack, clean), hack, clean, real=self.real)

    def route(self, step, batch, oracle):
        if step % self.cfg.refresh_every == 0 or self.direction is None:
            fresh = self.extract()
            self.overlap = 1.0 if self.direction is None else fresh.overlap(self.direction)
            self.direction, self.extracted = fresh, step
        rows = Rows(batch.tokens, batch.completion, batch.length)
        g = self.bench.policy.c_gradients(rows, self.cfg.score_state)
        if self.cfg.score_loss == "grpo":
            g = g * advantages(self.shape(batch), batch.group, norm=self.cfg.advantage)[:, None, None]
        score, live = self.direction.score(g)
        if bool(live.any()):
            t_lo, t_hi = self.gate.thresholds(score[live], g[live], self.direction)
        else:
            t_lo = t_hi = float("inf")
        note = {
            "v_accuracy": self.direction.accuracy,
            "v_overlap": self.overlap,
            "v_age": step - self.extracted,
            "zero_gradients": int((~live).sum()),
        }
        return replace(decide(score, live, t_lo, t_hi), note=note)

    def state(self):
        """The direction and its age; the history of a gate policy that has one."""
        if self.direction is None:
            return {}
        past = self.gate.state() if isinstance(self.gate, Remembers) else {}
        return {
            **{f"direction.{key}": value for key, value in vars(self.direction).items()},
            **{f"gate.{key}": value for key, value in past.items()},
            "overlap": self.overlap,
            "extracted": self.extracted,
        }

    def restore(self, state):
        if not state:
            return
        self.direction = Direction(**part(state, "direction."))
        self.overlap, self.extracted = state["overlap"], state["extracted"]
        if isinstance(self.gate, Remembers):
            self.gate.restore(part(state, "gate."))


class Placebo(RouteV):
    name = "placebo"
    claim = "routeV with a Haar-random direction, one draw per run"
    access = "L0"
    real = False

    def draw_v(self, hack, clean):
        _, modules, rank = hack.shape
        return haar(modules, rank, self.cfg.chance_seed, list(self.bench.policy.adapter.widths.values()))
