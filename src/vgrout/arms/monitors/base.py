"""What a monitor is: it reads a step's rollouts and says, as a routing decision, which of them look like hacks.

    route    it looks like one          absorb   neither this nor that          keep   it does not
What follows from that is the action of the arm that the monitor serves (`arms/monitored.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vgrout.arms.base import Bench
from vgrout.types import Batch, Decision, OracleBatch


class Monitor:
    """One per run. It may carry state from step to step, which it gives and takes as an arm does."""

    name: ClassVar[str]
    access: ClassVar[str] = "L0"  # METHOD.md section 0
    reads_oracle: ClassVar[bool] = False
    scores: ClassVar[bool] = False  # runs every rollout through the model once more
    probed: ClassVar[bool] = False  # takes a linear probe

    def __init__(self, bench: Bench) -> None:
        self.bench, self.cfg = bench, bench.cfg

    def read(self, step: int, batch: Batch, oracle: OracleBatch | None) -> Decision:
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
