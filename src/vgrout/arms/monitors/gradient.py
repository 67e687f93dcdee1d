"""The gradient score: each rollout's own c-gradient along a direction, cut into zones by a gate policy."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from vgrout.arms.base import part
from vgrout.arms.monitors.base import Monitor
from vgrout.method.direction import DIRECTIONS, Direction, calibrate, haar_like, half_swapped
from vgrout.method.gate import POLICIES, Remembers, decide, ranked
from vgrout.method.loss import advantages
from vgrout.method.policy import Rows
from vgrout.types import Decision, State


class GradientScore(Monitor):
    """Cosines with v, which is extracted from the hand-written pairs every `refresh_every` steps."""

    name = "gradient"
    access = "L1"
    scores = True
    of: ClassVar[str] = "c-gradients"  # what the features are
    differentiates: ClassVar[bool] = True  # they cost a backward pass
    real: ClassVar[bool] = True  # False: a control, whose bands may be reversed

    def __init__(self, bench):
        super().__init__(bench)
        self.gate = POLICIES[self.cfg.policy](self.cfg)
        self.direction: Direction | None = None
        self.overlap, self.extracted = 1.0, 0

    def features(self, rows: Rows, state: State) -> Float[Tensor, "N M R"]:
        """What is scored of each row; another kind of score replaces this and nothing else."""
        return self.bench.policy.c_gradients(rows, state)

    def draw_v(self, hack: Float[Tensor, "C M R"], clean: Float[Tensor, "C M R"]) -> Float[Tensor, "M *K R"]:
        """The direction; a control replaces this and nothing else."""
        return DIRECTIONS[self.cfg.direction](hack, clean, self.cfg.direction_axes)

    def extract(self) -> Direction:
        """v and its bands from the pairs, with the quarantine ablated."""
        hack, clean = (self.features(rows, "deployed") for rows in (self.bench.hack, self.bench.clean))
        return calibrate(self.draw_v(hack, clean), hack, clean, real=self.real)

    def read(self, step, batch, oracle):
        rows = batch.n
        if step - self.extracted >= self.cfg.refresh_every or self.direction is None:
            rows += len(self.bench.hack.length) + len(self.bench.clean.length)
            fresh = self.extract()
            self.overlap = 1.0 if self.direction is None else fresh.overlap(self.direction)
            self.direction, self.extracted = fresh, step
        g = self.features(Rows(batch.tokens, batch.completion, batch.length), self.cfg.score_state)
        if self.cfg.score_loss == "grpo":
            g = g * advantages(batch.reward, batch.group, norm=self.cfg.advantage)[:, None, None]
        score, live = self.direction.score(g)
        note = {
            "v_accuracy": self.direction.accuracy,
            "v_overlap": self.overlap,
            "v_age": step - self.extracted,
            "zero_gradients": int((~live).sum()),
            "extra_forward": rows,
            "extra_backward": rows * self.differentiates,
        }
        return replace(self.cut(step, score, live, g), note=note, features=g, direction=vars(self.direction))

    def cut(self, step: int, score: Float[Tensor, N], live: Tensor, g: Float[Tensor, "N M R"]) -> Decision:
        """Zones from scores. `live` marks the rows that have a gradient."""
        t_lo = t_hi = float("inf")
        if bool(live.any()):
            t_lo, t_hi = self.gate.thresholds(score[live], g[live], self.direction)
        return decide(score, live, t_lo, t_hi)

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


class HaarScore(GradientScore):
    """The same machinery with a Haar-random direction, one draw per run."""

    name = "haar"
    access = "L0"
    real = False

    def draw_v(self, hack, clean):
        widths = list(self.bench.policy.adapter.widths.values())
        return haar_like(super().draw_v(hack, clean), self.cfg.chance_seed, widths)


class MatchedHaarScore(HaarScore):
    """A Haar-random direction, in a run that is yoked to another: the highest scores are routed, as many as that run
    routed in the same step, the next ones absorbed, as many as it absorbed."""

    name = "haar_matched"
    needs = ("yoke",)

    def cut(self, step, score, live, g):
        return ranked(score, live, *self.bench.given.yoke[step])


class ShuffledScore(GradientScore):
    """v from the pairs with hack and clean side exchanged in a random half of them, the same half throughout a run.

    Its length, modules and tokens are those of the pairs, what it says of hacking is left to chance."""

    name = "shuffled"
    real = False

    def draw_v(self, hack, clean):
        return super().draw_v(*half_swapped(hack, clean, self.cfg.chance_seed))


class StyleScore(GradientScore):
    """v from pairs of two honest solutions: what a direction from pairs does that knows of no hack."""

    name = "style"
    real = False
