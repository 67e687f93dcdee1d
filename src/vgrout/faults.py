"""Faults that a run survives: a word on stderr, and work that is done in smaller pieces where memory is short."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from vgrout.types import RunFailed

Result = TypeVar("Result")


class OutOfMemory(RunFailed):
    """Memory is too short to go on, in batches of any size."""


def warn(text: str) -> None:
    """One line on stderr, if there is still somebody to read it."""
    with contextlib.suppress(OSError):
        print(f"vgrout: {text}", file=sys.stderr, flush=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short: a GPU's, Python's, or that of torch's CPU allocator, which has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def fitting(size: int, what: str, work: Callable[[int], Result]) -> Result:
    """What `work` gives for `size` rollouts at a time, or for half as many, and so on, wherever memory is short.

    It starts anew with each size. Raises OutOfMemory, which says `what`, where a single one is too much.
    """
    while True:
        try:
            return work(size)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Only here is the failed attempt let go of: its error held on to all of its tensors.
        if size == 1:
            raise OutOfMemory(f"not enough memory for {what} with one rollout at a time")
        size //= 2
        warn(f"memory is short for {what}: trying it with {size} rollouts at a time")
