"""Several processes of one run, one per GPU: each holds the whole state of the training and does its part of the work.

What talks to the other processes is called by all of them with the same arguments, and gives the same result in all of
them; only the work inside is split. So a step, an arm and a record are in every process what they are in a single one,
and code above knows nothing of processes. Work is split by prompt: rows of one prompt share passes.

    gather   what every process gives, in the order of processes     first    what the first one gives
    spread   work on a list of things, each done by one process      sum_     tensors, added up in place
    agree    work that may fail in any process, so that all end      level    equally many passes, see below

Lockstep. Where the base model is sharded (`method/shard.py`) each pass through a layer collects its weights from all
processes, so that all must run equally many passes, forward and backward, in one order. Three things see to that:
`level` gives a process without work a spare micro-batch, whose results its caller drops; `more` goes on with decoding
until no process has a row left; `fitting` does not try smaller batches, which one process would do alone.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as c10d
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from vgrout.faults import fitting, is_out_of_memory
from vgrout.types import RunFailed, UserError

T = TypeVar("T")
R = TypeVar("R")

BROKEN = re.compile("closed by peer|reset by peer|broken pipe|timed out|gloo|nccl", re.IGNORECASE)


class RankLost(RunFailed):
    """Another process of the run has ended or does not answer. `said`: somebody else says why."""

    def __init__(self, text: str, said: bool = False) -> None:
        super().__init__(text)
        self.said = said


def place() -> tuple[int, int]:
    """Which process of how many this one is, as torchrun and accelerate say it in the environment."""
    try:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        raise UserError("RANK and WORLD_SIZE in the environment are no whole numbers: start with torchrun") from None


def broken(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    if isinstance(error, RunFailed):  # it says itself what failed, perhaps in the same words
        return isinstance(error, RankLost)
    return isinstance(error, c10d.DistError) or (isinstance(error, RuntimeError) and bool(BROKEN.search(str(error))))


class Ranks:
    """The processes of a run. This one is alone."""

    rank, world = 0, 1
    sharded = False  # the base model's weights are spread over the processes

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this process. Raises UserError where a configuration names the same GPU for all."""
        return name

    def gather(self, value: T) -> list[T]:
        """What each process gives."""
        return [value]

    def first(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, which alone does it."""
        return work()

    def agree(self, work: Callable[[], T]) -> T:
        """What `work` gives here, unless it raises UserError or RunFailed in any process: then all end. No process
        talks to another in it."""
        return work()

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors over processes, in place: the same bits in all of them."""

    def copy_(self, tensors: Sequence[Tensor]) -> None:
        """Make tensors what they are in the first process."""

    def more(self, mine: bool) -> bool:
        """Whether there is more to decode here; in lockstep: in any process."""
        return mine

    def level(self, parts: Sequence[T], spare: T) -> Iterator[tuple[T, bool]]:
        """Each part and True; in lockstep then `spare` and False until all processes have had equally many."""
        yield from ((part, True) for part in parts)

    def fitting(self, size: int, what: str, work: Callable[[int], R]) -> R:
        """`faults.fitting`; in lockstep the whole size or nothing."""
        return work(size) if self.sharded else fitting(size, what, work)

    def owners(self, keys: Sequence[Hashable]) -> Tensor:
        """[N]: the process of each thing. Things of one key have the same; distinct keys take turns."""
        number: dict[Hashable, int] = {}
        return torch.tensor([number.setdefault(key, len(number)) % self.world for key in keys], dtype=torch.long)

    def spread(self, work: Callable[[list[T]], Sequence[R]], things: Sequence[T], keys: Sequence[Hashable]) -> list[R]:
        """One result for each thing, where `work` gives them for a list of things."""
        owner = self.owners(keys).tolist()
        own = [thing for thing, at in zip(things, owner, strict=True) if at == self.rank]
        found = [iter(part) for part in self.gather(list(work(own)) if own else [])]
        return [next(found[at]) for at in owner]

    def check(self, facts: Callable[[], tuple]) -> None:
        """Raises RunFailed where processes that should have the same state do not."""


ALONE = Ranks()


class Group(Ranks):
    """One of several processes, after torch's process group was made."""

    def __init__(self) -> None:
        self.rank, self.world = c10d.get_rank(), c10d.get_world_size()
        self.local = int(os.environ.get("LOCAL_RANK", self.rank))

    def device(self, name: str) -> str:
        if name == "cuda":
            return f"cuda:{self.local}"
        if name.startswith("cuda:"):
            raise UserError(f"device = {name}: with several processes each has a GPU of its own: give cuda")
        return name

    def gather(self, value):
        out: list[Any] = [None] * self.world
        with self._talking():
            c10d.all_gather_object(out, value)
        return out

    def first(self, work):
        box: list[Any] = [_settled(work) if self.leads else None]
        with self._talking():
            c10d.broadcast_object_list(box, src=0)
        value, error = box[0]
        if error is not None:
            raise error if self.leads else RankLost(str(error), said=True)
        return value

    def agree(self, work):
        value, error = _settled(work)
        errors = self.gather(error)
        failed = [k for k, found in enumerate(errors) if found is not None]
        if not failed:
            return value
        if not self.leads:
            raise RankLost(f"process {failed[0]}: {errors[failed[0]]}", said=True)
        if error is not None:
            raise error
        kind = UserError if isinstance(errors[failed[0]], UserError) else RunFailed
        raise kind(f"process {failed[0]}: {errors[failed[0]]}")

    def sum_(self, tensors):
        if not tensors:
            return
        flat = torch.cat([t.detach().flatten() for t in tensors])
        with self._talking():
            c10d.all_reduce(flat)
        self._back(flat, tensors)

    def copy_(self, tensors):
        flat = torch.cat([t.detach().flatten() for t in tensors])
        with self._talking():
            c10d.broadcast(flat, src=0)
        self._back(flat, tensors)

    @staticmethod
    @torch.no_grad()
    def _back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
        for t, new in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(new.view_as(t))

    def _most(self, count: int) -> int:
        out = torch.tensor([count])
        with self._talking():
            c10d.all_reduce(out, c10d.ReduceOp.MAX)
        return int(out)

    def more(self, mine):
        return bool(self._most(int(mine))) if self.sharded else mine

    def level(self, parts, spare):
        missing = self._most(len(parts)) - len(parts) if self.sharded else 0  # asked before the first pass
        yield from super().level(parts, spare)
        yield from [(spare, False)] * missing

    def check(self, facts):
        every = self.gather(facts())
        if any(other != every[0] for other in every):
            raise RunFailed(f"the processes have drifted apart: {every}; are their machines and versions the same?")

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Raises RankLost where another process does not answer."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise RankLost("another process of the run has ended or does not answer") from error


def _settled(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except (UserError, RunFailed) as error:
        return None, error


class _Once:
    joined = False  # this process was one of several


def leave(code: int) -> NoReturn:
    """End the process. One of several does it at once, with its output written: threads of torch's process groups may
    abort it while the interpreter takes itself apart, and whoever started it would take that for a failure."""
    if _Once.joined:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun, or `accelerate launch`, has started as one run; ALONE where it has not.

    Raises UserError where the environment does not say where they meet, RunFailed where they do not.
    """
    rank, world = place()
    if world == 1:
        yield ALONE
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is {world}, but {', '.join(missing)} is not set: start with torchrun")
    local, cuda = int(os.environ.get("LOCAL_RANK", rank)), torch.cuda.is_available()
    if cuda and local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    try:
        # What goes between processes but gradients and weights lies on the CPU: gloo notices at once when one ends.
        c10d.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=default_pg_timeout)
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise RunFailed(f"process {rank} of {world} does not reach the others: {said}") from error
    group = Group()
    _Once.joined = True
    try:
        yield group
        group.gather(None)  # a failure of the first process while it writes results is one of all
    except BaseException:
        if not cuda:  # left open its threads may abort the process; but NCCL would wait here for who is gone
            c10d.destroy_process_group()
        raise
    c10d.destroy_process_group()
