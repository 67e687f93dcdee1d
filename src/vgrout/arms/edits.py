"""What arms share that edit the deployed block's gradients before the optimizer reads them, and costs of an arm.

AdamW divides by a running root mean square, entry by entry, and remembers: its update is not in the direction of the
gradient that it was given. So such an arm also measures the update itself, one step late: the change of the parameters
between an edit and the next step's decision is the update of the step in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from vgrout.arms.base import Arm, part
from vgrout.types import Decision


def charged(decision: Decision, rows: int) -> Decision:
    """The decision, with `rows` pair rows more on its bill that ran through the model forward and backward."""
    note = dict(decision.note)
    for what in ("extra_forward", "extra_backward"):
        note[what] = note.get(what, 0) + rows
    return replace(decision, note=note)


def noted(decision: Decision, said: Mapping[str, float]) -> Decision:
    return replace(decision, note={**decision.note, **said})


def norm(tensors: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all entries together."""
    return float(torch.stack([t.double().norm() for t in tensors.values()]).norm())


def share(of: float, whole: float) -> float:
    """of / whole, and 0 where there is nothing."""
    return of / whole if whole else 0.0


class Edits(Arm):
    """A subclass edits in `edit`, and calls `remember` there. `update` is the change of the parameters since."""

    before: Mapping[str, Tensor] | None = None  # the deployed block's parameters at the latest edit, by name

    def remember(self) -> None:
        self.before = {name: p.detach().clone() for name, p in self.bench.policy.adapter.named("deployed")}

    def update(self) -> dict[str, Tensor] | None:
        """The previous step's update by parameter, once; None where that step edited nothing."""
        before, self.before = self.before, None
        if before is None:
            return None
        return {name: p.detach() - before[name] for name, p in self.bench.policy.adapter.named("deployed")}

    def state(self):
        return {f"before.{name}": tensor for name, tensor in (self.before or {}).items()}

    def restore(self, state):
        self.before = part(state, "before.", self.bench.policy.device) or None
