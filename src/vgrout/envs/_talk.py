"""The trainer's side of the socket to one program's process."""

from __future__ import annotations

import contextlib
import math
import select
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vgrout.envs import _forkserver
from vgrout.envs.jobs import MISSING, Job, Observation, Report, read_answer, read_facts


@dataclass(frozen=True)
class Reply:
    """How a program's process ended, and what it left."""

    stopped: str
    exit: int
    cpu_s: float
    stdout: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)


KILLER = Reply("killer", -9, 0.0)


def cpu_of(pid: int) -> float | None:
    """CPU seconds of another process, see clock_getcpuclockid(3); None where it is gone."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return None


class Talk:
    """The socket to one program's process: what it said so far, and what it is still to be told.

    The process speaks before the program does: `pid` is 0 until it is confined, `compiled` False until the text has
    compiled."""

    def __init__(self, limit: int, job: Job, inputs: Sequence[bytes], cpu_s: float) -> None:
        self.socket, self.theirs = socket.socketpair()
        self.socket.setblocking(False)
        self.limit, self.said = limit, 0
        self.pid, self.compiled = 0, False
        self.over = self.closed = False
        self.inbox, self.outbox = bytearray(), memoryview(b"")
        self.start = 0  # of the line that is not complete yet, within the inbox
        self.job, self.inputs, self.cpu_s = job, inputs, cpu_s
        self.values: list = [MISSING] * len(inputs)
        self.spent: list[float | None] = [math.inf] * len(inputs)  # CPU seconds when that value came
        self.status: str | None = None
        self.void = False
        self.call = 0
        self.index: int | None = 0 if inputs else None
        self.facts = b""
        self.due = [2, 1] if job.look else [0, 0]  # lines of facts still to come before the answers, and after them
        self.tell(inputs[0] if inputs else None)

    def started(self) -> None:
        """The process has its end of the socket."""
        self.theirs.close()
        self.write()

    def events(self) -> int:
        return (0 if self.closed else select.POLLIN) | (select.POLLOUT if self.outbox else 0)

    def tell(self, data: bytes | None) -> None:
        """Send an input; None: there is no other."""
        if data is None:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
            return
        self.outbox = memoryview(_forkserver.SIZE.pack(len(data)) + data)
        self.write()

    def write(self) -> None:
        try:
            while self.outbox:
                self.outbox = self.outbox[self.socket.send(self.outbox) :]
        except BlockingIOError:
            pass
        except OSError:  # the process is gone, or closed its end
            self.outbox = memoryview(b"")

    def read(self) -> None:
        """Take what is there now."""
        try:
            while not self.closed:
                data = self.socket.recv(1 << 18)
                self.closed = not data
                self.said += len(data)
                if self.said > self.limit:
                    self.over = self.closed = True
                    self.socket.shutdown(socket.SHUT_RDWR)
                    return
                self.inbox += data
                if self.compiled or self.began():
                    self.heard()
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True

    @property
    def unheard(self) -> bool:
        """Whether the process had ended when an answer of it was read: it had been waiting."""
        return None in self.spent

    def began(self) -> bool:
        """Whether the process has said all that it says before the program runs."""
        ready = _forkserver.READY
        if not self.pid and len(self.inbox) >= ready.size and self.inbox[0] == 0:
            _, self.pid = ready.unpack_from(self.inbox)
            del self.inbox[: ready.size]
        if self.pid and self.inbox[:1] == _forkserver.COMPILED:
            self.compiled = True
            del self.inbox[:1]
        return self.compiled

    def heard(self) -> None:
        """Take the complete lines from the inbox."""
        while (end := self.inbox.find(b"\n", self.start)) >= 0 and not self.void:
            line = bytes(self.inbox[:end])
            del self.inbox[: end + 1]
            self.start = 0
            after = self.status is not None
            if self.due[after]:
                self.due[after] -= 1
                self.facts += line + b"\n"
            else:
                self.answered(line)
        self.start = len(self.inbox)

    def answered(self, line: bytes) -> None:
        kind, value = read_answer(line, self.call)
        if self.status or kind == "void" or (kind == "value" and self.index is None):
            self.void = True
            self.tell(None)
        elif kind == "status":
            self.status = value
        else:
            # Whether an answer is in time does not depend on when the server notices that the time is over.
            self.spent[self.index] = spent = cpu_of(self.pid)
            self.values[self.index] = value
            late = spent is not None and spent > self.cpu_s
            self.index, self.call = None if late else self.job.follow(self.index, value), self.call + 1
            if self.index is not None and self.index >= len(self.inputs):
                self.index = None
            self.tell(None if self.index is None else self.inputs[self.index])

    def close(self) -> None:
        self.socket.close()
        self.theirs.close()

    def report(self, reply: Reply) -> Report:
        """What the program has shown. Only its CPU clock decides what was in time: at each answer, behind the last of
        which no code of the program runs until the next input comes, and at the end of the process."""
        if reply.stopped == KILLER.stopped:
            seen = Observation(reply.stopped) if self.job.look else None
            return Report(reply.stopped, (MISSING,) * len(self.values), compiled=self.compiled, seen=seen)
        times = [reply.cpu_s if spent is None else spent for spent in self.spent]
        values = [
            MISSING if self.void or spent > self.cpu_s else value
            for value, spent in zip(self.values, times, strict=True)
        ]
        answers = [spent for spent in times if spent < math.inf]
        status = self.ended(reply, max(answers, default=reply.cpu_s))
        seen = self.seen(reply, status, answers[0] if answers else reply.cpu_s) if self.job.look else None
        return Report(status, tuple(values), reply.cpu_s, self.compiled, seen)

    def ended(self, reply: Reply, answered_s: float) -> str:
        if answered_s > self.cpu_s:
            return "timeout"
        if self.status and not self.void and not self.over:
            return "crash" if self.status == "ok" and self.index is not None else self.status
        if reply.stopped or reply.cpu_s > self.cpu_s:
            return "timeout"
        return "no code" if not self.compiled else "output" if self.over else "crash"

    def seen(self, reply: Reply, status: str, first_s: float) -> Observation:
        """Facts that came after the CPU time are none, whatever else the server found by then."""
        if first_s > self.cpu_s or (reply.stopped == "cpu" and not self.call):
            return Observation(status)
        said, ended, (truthy, equal, returned) = read_facts(self.facts, self.job.look)
        if reply.cpu_s > self.cpu_s:
            returned = frozenset()
        ended = ended if self.facts else reply.exit
        if reply.stopped or not self.compiled or reply.exit < 0 or reply.exit != ended:
            ended = None
        return Observation(said or status, reply.stdout, reply.files, ended, returned, truthy, equal)
