"""A short supervised fine-tuning of one block on the completions of hand-written pairs.

    L = mean over rows of the mean completion NLL; AdamW without decay; every step sees all rows
No random numbers. Neither the other block nor the gradients that training accumulates are touched.
"""

from __future__ import annotations

import math

import torch

from vgrout.method.policy import Policy, Rows
from vgrout.types import RunFailed


def sft(policy: Policy, rows: Rows, which: str, *, steps: int, lr: float, betas: tuple[float, float]) -> list[float]:
    """Train block `which`; the mean NLL in nats per token before each step. Raises RunFailed where it is not finite."""
    parameters = policy.adapter.parameters(which)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.0)
    n = len(rows.length)
    losses = []
    for _ in range(steps):
        loss, gradients = policy.nll_gradients(rows, torch.full((n,), 1 / n), which)
        losses.append(float(loss))
        if not math.isfinite(losses[-1]):
            raise RunFailed(f"the fine-tuning on the pairs diverged: loss {losses[-1]} after {len(losses) - 1} steps")
        before = [p.grad for p in parameters]
        for p, g in zip(parameters, gradients.values(), strict=True):
            p.grad = g
        optimizer.step()
        for p, g in zip(parameters, before, strict=True):
            p.grad = g
    return losses
