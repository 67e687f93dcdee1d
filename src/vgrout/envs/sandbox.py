"""Run untrusted Python programs; bring back plain data: values they return, and facts about their first call.

The caller makes verdicts from this data (`oracle.agrees`); expected values never enter a program's process. A warm
fork-server (`_forkserver.py`) gives each program a fresh process, which gives up what it does not need
(`_confine.py`). Inputs go to it one at a time, each after the answer to the one before. CPU time decides, so a loaded
machine does not change a verdict; the wall clock is a generous backstop.

Covers: CPU, memory, output, file and descriptor limits; no fork and no thread; no file outside a scratch directory
that is removed; no socket, signal, ptrace or other system call that plain computing does not need; an unused uid when
started as root; namespaces of the server's own where the kernel gives them; empty environment; kill and reap; values
of exact builtin types only; a failing sandbox is an exception and never a result.
Does not cover: kernel bugs that the allowed calls reach. `Sandbox.tier` says what is in force; without Landlock and
seccomp a sandbox does not start unless it is told to. Programs may import only the modules in `_forkserver.PRELOAD`
and use neither threads nor subprocesses.
"""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vgrout.envs import _forkserver
from vgrout.envs._codec import encode
from vgrout.envs._confine import fixed_addresses
from vgrout.envs._talk import KILLER, Reply, Talk
from vgrout.envs.jobs import LIMITS, MISSING, Job, Limits, Observation, Report, payload, too_long
from vgrout.types import RunFailed, UserError

START_S = 60.0  # wall time a server may take to start
GRACE_S = 15.0  # wall time beyond a job's own after which a server counts as hung
PROBE = "def f(x): return x"  # a program that works wherever programs work


class SandboxError(RunFailed):
    """The sandbox itself failed, twice for the same job. Says nothing about the program."""


class ServerDied(SandboxError):
    """A fork-server or a program's own process was killed. Twice for the same program, it is the program's doing."""


class _Server:
    """One fork-server process; started when first needed and again after `stop`."""

    def __init__(self, limits: Limits, without: tuple[str, ...]):
        self.limits, self.without = limits, without
        self.layers: dict = {}
        self.process: subprocess.Popen | None = None
        self.socket: socket.socket | None = None
        self.directory: str | None = None

    def start(self) -> None:
        if not sys.platform.startswith("linux"):
            raise SandboxError("the sandbox needs Linux")
        environment = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "TZ": "UTC0"}
        if "LD_LIBRARY_PATH" in os.environ:  # some interpreters do not start without it
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        try:
            self.directory = tempfile.mkdtemp(prefix="vgrout-sandbox-")
            os.chmod(self.directory, 0o711)
            config = json.dumps({**asdict(self.limits), "directory": self.directory, "without": self.without})
            # -S -s -P isolate like -I does, but let the fixed hash seed through.
            command = [sys.executable, "-S", "-s", "-P", _forkserver.__file__, config]
            self.socket, other = socket.socketpair()
            self.socket.settimeout(START_S)
            with other, fixed_addresses():
                self.process = subprocess.Popen(
                    command, stdin=other, stdout=subprocess.PIPE, env=environment, cwd="/", start_new_session=True
                )
                self.process.stdout.close()  # nothing is printed there
            self.layers = self._frame()
            self._probe()
        except (OSError, SandboxError) as error:
            self.stop()
            raise SandboxError(f"the fork-server did not start: {error}") from error

    def _probe(self) -> None:
        job = Job(PROBE, "f", ((1,),))
        talk = Talk(self.limits.output_bytes, job, [marshal.dumps((1,))], 10.0)
        try:
            self.send(payload(job), talk, 60.0)
            if not converse({self: _Task(0, talk, time.monotonic() + START_S)}):
                raise SandboxError("the start-up program did not end")
            reply = self.receive()
            talk.read()
            self.check(talk, reply)
            if talk.report(reply).values != (1,):
                raise SandboxError("the start-up program failed")
        finally:
            talk.close()

    def send(self, told: bytes, talk: Talk, wall_s: float) -> None:
        try:
            fd = os.memfd_create("job")
            try:
                view = memoryview(told)
                while view:
                    view = view[os.write(fd, view) :]
                request = _forkserver.REQUEST.pack(talk.job.look is not None, talk.cpu_s, wall_s)
                socket.send_fds(self.socket, [request], [fd, talk.theirs.fileno()])
            finally:
                os.close(fd)
        except (ConnectionError, TimeoutError) as error:
            raise ServerDied(f"could not reach the fork-server: {error}") from error
        except OSError as error:
            raise SandboxError(f"could not reach the fork-server: {error}") from error
        talk.started()

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            if not (count := self.socket.recv_into(view)):
                raise ServerDied("the fork-server died")
            view = view[count:]
        return bytes(data)

    def _frame(self) -> Any:
        """What the server wrote as JSON, behind its size; an empty list where that is 0."""
        size = int.from_bytes(self._read(4), "big")
        return json.loads(self._read(size)) if size else []

    def receive(self) -> Reply:
        """How the program ended."""
        try:
            files = {name: self._read(size) for name, size in self._frame()}
            reply = self._read(_forkserver.REPLY.size)
            stopped, status, cpu_s, printed = _forkserver.REPLY.unpack(reply)
            stdout = self._read(printed)
        except ConnectionError as error:
            raise ServerDied(f"the fork-server died: {error}") from error
        except OSError as error:
            raise SandboxError(f"no answer from the fork-server: {error}") from error
        return Reply(_forkserver.STOPPED[stopped], status, cpu_s, stdout, files)

    @staticmethod
    def check(talk: Talk, reply: Reply) -> None:
        """Raises SandboxError where the process was not confined, through no fault of the program, of which nothing is
        looked at before; or where it was killed from outside: no program can do that to itself within its CPU time."""
        if not talk.pid and reply.stopped != "cpu":
            reason = bytes(talk.inbox).decode("ascii", "replace") or f"exit {reply.exit} {reply.stopped}"
            raise SandboxError(f"a program's process could not be set up: {reason}")
        if not reply.stopped and reply.exit == -signal.SIGKILL and reply.cpu_s <= talk.cpu_s:
            raise ServerDied("a program's process was killed from outside")

    def stop(self, wait_s: float = 0.0) -> None:
        """End the process, by force after `wait_s` seconds, and remove its directory. May be called at any time."""
        if self.socket is not None:
            self.socket.close()
        if self.process is not None:
            try:
                self.process.wait(wait_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.directory is not None:
            with contextlib.suppress(FileNotFoundError):
                _forkserver.remove_tree(self.directory)
        self.process = self.socket = self.directory = None


@dataclass
class _Task:
    """A job in hand: who runs it, since when, and the talk with its program."""

    index: int
    talk: Talk
    deadline: float


def converse(busy: dict[_Server, _Task]) -> set[_Server]:
    """Talk with the programs until some end, or the next deadline; the servers whose program has ended."""
    ended: set[_Server] = set()
    while busy and not ended:
        poller = select.poll()
        talks = {task.talk.socket.fileno(): task.talk for task in busy.values()}
        servers = {server.socket.fileno(): server for server in busy}
        for fd, talk in talks.items():
            if talk.events():
                poller.register(fd, talk.events())
        for fd in servers:
            poller.register(fd, select.POLLIN)
        left = min(task.deadline for task in busy.values()) - time.monotonic()
        events = poller.poll(max(0.0, 1000 * left))
        if not events:
            break
        for fd, event in events:
            if fd in servers:
                ended.add(servers[fd])
            else:
                if event & select.POLLOUT:
                    talks[fd].write()
                if event & ~select.POLLOUT:
                    talks[fd].read()
    return ended


def _not_run(job: Job) -> Report:
    seen = Observation("too long") if job.look else None
    return Report("too long", (MISSING,) * len(job.inputs), compiled=False, seen=seen)


class Sandbox:
    """`workers` fork-servers. Use as a context manager or call `close`. Safe to share between threads.

    Results come in the order of the jobs and do not depend on `workers`. A job that meets a failing server is run
    once more on a new one; if that server fails too, or one cannot start, `SandboxError` is raised, unless it was
    both times the death of the server while other programs still run: then the program is a 'killer'. Errors in jobs
    are TypeError or ValueError (`Refused` for inputs that are not plain data).

    Raises UserError where the kernel has no Landlock or seccomp, unless `allow_weak`. `without` names layers of
    `_confine.LAYERS` to leave out, for tests that show what each of them is for.
    """

    def __init__(
        self, limits: Limits = LIMITS, workers: int = 1, *, allow_weak: bool = False, without: tuple[str, ...] = ()
    ):
        if workers < 1:
            raise ValueError("workers must be at least 1")
        self.limits = limits
        self._lock = threading.Lock()
        self._closed = False
        self._encoded: OrderedDict[int, tuple[tuple, list[bytes]]] = OrderedDict()
        self._servers = [_Server(limits, without) for _ in range(workers)]
        try:
            for server in self._servers:
                server.start()
            if self.weak and not allow_weak:
                raise UserError(
                    f"this machine gives programs too little isolation ({self.tier}): untrusted code needs Landlock "
                    "(Linux 5.13) and seccomp on x86-64; --allow-weak-sandbox runs it all the same and records that"
                )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def weak(self) -> bool:
        """Whether a layer that a hostile program has to meet is missing."""
        layers = self._servers[0].layers
        return not (layers["landlock"] and layers["seccomp"] and layers["rlimits"])

    @property
    def tier(self) -> str:
        """The isolation in force, for the run header: A with namespaces, B without, C weak."""
        layers = self._servers[0].layers
        letter = "C, weak" if self.weak else "A" if layers["namespaces"] else "B"
        parts = [f"{'' if on else 'no '}{name}" for name, on in layers.items()]
        return f"{letter}: {', '.join(parts)}"

    @property
    def pid(self) -> int | None:
        """Process id of the first fork-server; None if it is not running."""
        process = self._servers[0].process
        return process.pid if process else None

    def kill(self) -> None:
        """End the first server as if it had crashed; the next job finds out."""
        self._servers[0].process.kill()

    def close(self) -> None:
        """End all servers. May be called twice."""
        with self._lock:
            self._closed = True
            for server in self._servers:
                server.stop(wait_s=5.0)

    def run(self, jobs: Sequence[Job]) -> list[Report]:
        """One report per job."""
        done = self._run_all([(job, job.cpu_s or self.limits.cpu_s) for job in jobs])
        return [talk.report(reply) if talk else _not_run(job) for job, (talk, reply) in zip(jobs, done, strict=True)]

    def _inputs(self, inputs: tuple) -> list[bytes]:
        """What is sent for each input; jobs of one problem share it."""
        key = id(inputs)
        if key not in self._encoded:
            for args in inputs:
                encode(args)  # refuses what is not plain data
            self._encoded[key] = inputs, [marshal.dumps(args) for args in inputs]
            while len(self._encoded) > 256:
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(key)
        return self._encoded[key][1]

    def _run_all(self, jobs: Sequence[tuple[Job, float]]) -> list:
        """(talk, reply) of each (job, CPU seconds); (None, None) where the source is too long to be run."""
        with self._lock:
            if self._closed:
                raise SandboxError("the sandbox is closed")
            done: list = [(None, None)] * len(jobs)
            todo = deque(index for index, (job, _) in enumerate(jobs) if not too_long(job.source))
            busy: dict[_Server, _Task] = {}
            failed: dict[int, SandboxError] = {}
            slow: set[int] = set()

            def give(server: _Server) -> None:
                index = todo.popleft()
                job, cpu_s = jobs[index]
                wall_s, told = self.limits.wall(cpu_s), payload(job)
                talk = Talk(self.limits.output_bytes, job, self._inputs(job.inputs), cpu_s)
                busy[server] = _Task(index, talk, float("inf"))
                if server.process is None:
                    server.start()
                server.send(told, talk, wall_s)
                busy[server].deadline = time.monotonic() + wall_s + GRACE_S

            def finish(server: _Server, task: _Task) -> None:
                server.socket.settimeout(GRACE_S)
                reply = server.receive()
                task.talk.read()
                server.check(task.talk, reply)
                if reply.stopped == "wall" and task.talk.unheard:
                    raise SandboxError("a program's wall time was over while it waited for its caller")
                task.talk.close()
                del busy[server]
                # On a loaded machine a program may not have had its CPU time when its wall time was over.
                if reply.stopped == "wall" and task.index not in slow and os.getloadavg()[0] > (os.cpu_count() or 1):
                    slow.add(task.index)
                    todo.appendleft(task.index)
                else:
                    done[task.index] = task.talk, reply

            def give_up(server: _Server, task: _Task, error: SandboxError) -> None:
                task.talk.close()
                del busy[server]
                server.stop()
                before = failed.setdefault(task.index, error)
                if before is error:
                    todo.appendleft(task.index)
                elif isinstance(before, ServerDied) and isinstance(error, ServerDied):
                    server.start()  # a program that works still does, or this raises
                    done[task.index] = task.talk, KILLER
                else:
                    raise SandboxError(f"job {task.index} failed twice: {error}") from error

            try:
                while todo or busy:
                    for server in self._servers:
                        if todo and server not in busy:
                            try:
                                give(server)
                            except SandboxError as error:
                                give_up(server, busy[server], error)
                    ready = converse(busy)
                    for server, task in list(busy.items()):
                        try:
                            if server in ready:
                                finish(server, task)
                            elif time.monotonic() >= task.deadline:
                                raise SandboxError("the fork-server hangs")
                        except SandboxError as error:
                            give_up(server, task, error)
            except BaseException:
                for server, task in busy.items():  # their answers would be taken for those of later jobs
                    task.talk.close()
                    server.stop()
                raise
            return done
