"""A short supervised fine-tuning of one block on the completions of hand-written pairs.

    L = mean over rows of the mean completion NLL; AdamW without decay; every step sees all rows
No random numbers. Neither the other block nor the gradients that training accumulates are touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import torch

from vgrout.method.policy import Policy, Rows
from vgrout.types import RunFailed


def sft(policy: Policy, rows: Rows, which: str, *, steps: int, lr: float, betas: tuple[float, float]) -> list[float]:
    """Train block `which`; the mean NLL in nats per token before each step. Raises RunFailed where it is not finite."""
    return list(islice(tuning(policy, rows, which, lr=lr, betas=betas), steps))


def tuning(policy: Policy, rows: Rows, which: str, *, lr: float, betas: tuple[float, float]) -> Iterator[float]:
    """`sft` step by step, without an end: each `next` takes a step and gives the NLL before it."""
    parameters = policy.adapter.parameters(which)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=0.0)
    n = len(rows.length)
    done = 0
    while True:
        loss, gradients = policy.nll_gradients(rows, torch.full((n,), 1 / n), which)
        if not math.isfinite(loss):
            raise RunFailed(f"the fine-tuning diverged: loss {float(loss)} after {done} steps")
        before = [p.grad for p in parameters]
        for p, g in zip(parameters, gradients.values(), strict=True):
            p.grad = g
        optimizer.step()
        for p, g in zip(parameters, before, strict=True):
            p.grad = g
        done += 1
        yield float(loss)
