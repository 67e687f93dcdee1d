"""What an arm is: a class that overrides one or two of the hooks of an arm-blind loop.

    begin   once, before the first step         around  a context of sampling, and of the update
    render  edit the prompt                     shape   the reward that credit is given for
    route   keep / absorb / route each rollout  credit  advantages
    edit    gradients before the optimizer step
The defaults are `none`: structure-matched vanilla GRPO. An arm that carries anything from step to step also gives it
as `state` and takes it back in `restore`, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vgrout.adapters.base import Adapter
from vgrout.config import Config
from vgrout.method.gate import uniform
from vgrout.method.judge import Judge
from vgrout.method.linear_probe import LinearProbe
from vgrout.method.loss import advantages, counted_rows
from vgrout.method.policy import Policy, Rows
from vgrout.types import Batch, Decision, OracleBatch, Prompt, UserError


def part(state: Mapping[str, Any], prefix: str, device: torch.device | None = None) -> dict[str, Any]:
    """The entries of a flat state whose keys start with `prefix`, which they lose. With a `device`, all are tensors and
    go there."""
    mine = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return mine if device is None else {key: value.to(device) for key, value in mine.items()}


@dataclass(frozen=True)
class Given:
    """What some arms are handed beside model and pairs, made elsewhere. An arm says what it `needs` or `takes`."""

    yoke: Sequence[tuple[int, int]] | None = None  # rollouts (routed, absorbed) in each step of the run to follow
    probe: LinearProbe | None = None
    judge: Judge | None = None


EMPTY = Given()


@dataclass(frozen=True)
class Bench:
    """What an arm may use. There is no environment in it."""

    cfg: Config
    policy: Policy
    hack: Rows  # the pairs' hack sides, prompts included
    clean: Rows  # their clean sides, in the same order
    given: Given = EMPTY


HOOKS = ("begin", "around", "render", "shape", "route", "credit", "edit")


class Arm:
    """Vanilla GRPO on the deployed block."""

    name: ClassVar[str] = "none"
    claim: ClassVar[str] = "vanilla GRPO on the deployed block"
    paper: ClassVar[str] = ""  # where the method is from; empty for vGROUT's own and for plain controls
    signal: ClassVar[str] = "-"  # what tells its rollouts apart
    action: ClassVar[str] = "-"  # what it does to those
    access: ClassVar[str] = "L0"  # METHOD.md section 0: L0 none ... L4 live oracle
    reads_oracle: ClassVar[bool] = False
    scores: ClassVar[bool] = False  # runs every rollout through the model once more, which takes time
    ablates: ClassVar[bool] = True  # the quarantine is ablated at deployment
    loophole: ClassVar[bool] = True  # trains where the loopholes are open
    needs: ClassVar[tuple[str, ...]] = ()  # fields of `Given` without which there is no such arm
    takes: ClassVar[tuple[str, ...]] = ()  # those that it uses where they are given
    pairs_tag: ClassVar[str] = ""  # every pair must carry it; pairs with the tag of an arm are for that arm alone
    baseline: ClassVar[str] = ""  # rows whose mean reward is subtracted, where the configuration does not decide it

    def __init__(self, bench: Bench) -> None:
        self.bench, self.cfg = bench, bench.cfg
        for what in self.needs:
            if getattr(bench.given, what) is None:
                raise UserError(f"{self.name} was given no {what}")

    def begin(self) -> None:
        """Before the first step of a run; not when it goes on from a checkpoint."""

    def around(self, phase: Literal["sample", "update"]) -> AbstractContextManager[Any]:
        """Entered around the sampling of rollouts, and around the forward and backward passes of the update."""
        return nullcontext()

    def render(self, prompt: Prompt) -> Prompt:
        return prompt

    def shape(self, batch: Batch) -> Float[Tensor, N]:
        return batch.reward

    def route(self, step: int, batch: Batch, oracle: OracleBatch | None) -> Decision:
        return uniform(batch.n, "keep")

    def credit(self, batch: Batch, reward: Float[Tensor, N], decision: Decision) -> Float[Tensor, N]:
        counted = counted_rows(self.baseline or self.cfg.baseline, decision, batch.teacher)
        return advantages(
            reward - decision.penalty,
            batch.group,
            norm=self.cfg.advantage,
            counted=counted,
            present=decision.present,
        )

    def edit(self, adapter: Adapter) -> Mapping[str, float]:
        """Change the gradients in place. What it says goes into the step's record."""
        return {}

    def state(self) -> dict[str, Any]:
        """What later steps need of earlier ones: tensors, and plain values that JSON keeps exactly, by reference.

        An arm may replace its tensors in a step, and changes none of them in place.
        """
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
