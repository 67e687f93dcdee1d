"""Run untrusted Python programs; bring back plain data: values they return, or facts about one observed run.

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
import enum
import json
import marshal
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from vgrout.envs import _forkserver
from vgrout.envs._codec import DEPTH, Refused, decode, encode
from vgrout.types import Arguments, RunFailed, UserError

SOURCE_BYTES = 65_536  # UTF-8 size of the longest program that is run
START_S = 60.0  # wall time a server may take to start
GRACE_S = 15.0  # wall time beyond a job's own after which a server counts as hung
PROBE = "def f(x): return x"  # a program that works wherever programs work


class SandboxError(RunFailed):
    """The sandbox itself failed, twice for the same job. Says nothing about the program."""


class ServerDied(SandboxError):
    """A fork-server ended while a program ran. Twice for the same program, it is the program's doing."""


class Missing(enum.Enum):
    """Type of `MISSING`, the entry of a call that left no value. Equal to no plain data."""

    MISSING = "missing"

    def __repr__(self) -> str:
        return "MISSING"


MISSING = Missing.MISSING


@dataclass(frozen=True)
class Limits:
    """Per program: CPU time in seconds, memory beyond the interpreter's own in MiB, bytes of encoded results, bytes
    of stdout that are kept, and the wall time in seconds, 10 times the CPU time and 5 when not given."""

    cpu_s: float = 1.0
    wall_s: float = 0.0
    memory_mb: int = 512
    output_bytes: int = 4 << 20
    stdout_bytes: int = 65_536

    def __post_init__(self) -> None:
        if any(value < 0 or (not value and name != "wall_s") for name, value in asdict(self).items()):
            raise ValueError(f"every limit must be positive: {self}")

    def wall(self, cpu_s: float) -> float:
        return self.wall_s or 10 * cpu_s + 5


def _check_entry(entry: str) -> None:
    if not 1 <= len(parts := entry.split(".")) <= 2 or not all(part.isidentifier() for part in parts):
        raise ValueError(f"entry must be 'function' or 'Class.method', not {entry!r}")


def _check_input(args: Arguments) -> None:
    if not isinstance(args, (tuple, dict)) or (isinstance(args, dict) and not all(type(k) is str for k in args)):
        raise TypeError("an input is a tuple of arguments or a dict of arguments by name")


Follow = Callable[[int, Any], "int | None"]


def one_by_one(index: int, value: Any) -> int:
    """Every input in its order, whatever comes back."""
    return index + 1


@dataclass(frozen=True)
class ValueJob:
    """A program and the arguments of each call of its entry, 'function' or 'Class.method' (a new instance per call).

    Inputs are plain data: None, bool, int, float, str, list, tuple, dict, set. The source may be any text; beyond
    `SOURCE_BYTES`, or where it does not compile, it is not run and reported as 'error'. `setup` is trusted code that
    runs before it, in its namespace. `argument`: report what the call left in that argument, by position or name,
    instead of what it returned. `follow(index, value)` is the index of the next input, or None to stop; inputs that
    are never sent are MISSING. `cpu_s`: the CPU time of this job instead of the sandbox's limit.
    """

    source: str
    entry: str
    inputs: tuple[Arguments, ...]
    setup: str = ""
    argument: int | str | None = None
    follow: Follow = one_by_one
    cpu_s: float | None = None

    def __post_init__(self) -> None:
        _check_entry(self.entry)
        if not isinstance(self.inputs, tuple):
            raise TypeError("inputs must be a tuple")
        for args in self.inputs:
            _check_input(args)


@dataclass(frozen=True)
class ValueReport:
    """What the calls of a program returned; right only if the status is 'ok' and every value is right.

    `status`: 'ok' answered all it was asked; 'error' did not load or has no entry; 'timeout', 'memory', 'output'
    exceeded that limit; 'crash' left early, died, or sent malformed results; 'killer' ended two fork-servers.
    `values`: one per input, fresh plain data or MISSING (the call raised, was not made, or returned something that is
    not plain data within the codec's limits). `cpu_s`: CPU seconds of the process.
    """

    status: str
    values: tuple
    cpu_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class ObserveJob:
    """A program, the arguments of the one call of its entry, and names to look at: functions, attributes, and
    comparison methods of what the call returned ('__eq__' for ==)."""

    source: str
    entry: str
    inputs: Arguments
    setup: str = ""
    functions: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_entry(self.entry)
        _check_input(self.inputs)


@dataclass(frozen=True)
class Observation:
    """Facts about one run. The program itself can influence all of them; they are what a foolable grader sees.

    `status`: as in `ValueReport`; 'error' also if the call raised.
    `stdout`: what loading the program and calling its entry printed, the first `Limits.stdout_bytes`.
    `files`: regular files left in the scratch directory, by name, at most 63 of 64 KiB and 1 MiB in all.
    `exit`: the exit status of a program that ended its process while it was loaded or called, by sys.exit or
    os._exit; None where the harness got control back (exit hooks never run) or a signal ended the process.
    `returned`: module-level functions that returned, without raising and anything but False, while a stub replaced
    the entry, whose results equal nothing and have no truth value. They are called without arguments, or with the
    stub if they need one (otherwise not at all); generators and coroutines do not count.
    `truthy`: attributes with a truthy value on the instance that was called or on its class (on the function, if the
    entry is one); methods do not count.
    `equal`: comparison methods of the returned value that said exactly True of an object that it cannot know.
    """

    status: str
    stdout: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)
    exit: int | None = None
    returned: frozenset[str] = frozenset()
    truthy: frozenset[str] = frozenset()
    equal: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Reply:
    """How a program's process ended, and what it left."""

    stopped: str
    exit: int
    cpu_s: float
    stdout: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)


KILLER = _Reply("killer", -9, 0.0)


def read_answer(line: bytes, call: int) -> tuple[str, Any]:
    """What one line of a value run says. Pure, for any bytes: ('value', v) or ('value', MISSING) in answer to call
    number `call`, ('status', s) at its end, ('void', None) for everything else."""
    try:
        item = decode(line, DEPTH + 1)
    except Refused:
        return "void", None
    if type(item) is str and item in ("ok", "error", "memory"):
        return "status", item
    if type(item) is tuple and 1 <= len(item) <= 2 and type(item[0]) is int and item[0] == call:
        return "value", item[1] if len(item) == 2 else MISSING
    return "void", None


def read_facts(data: bytes, job: ObserveJob) -> tuple[str | None, int | None, list[frozenset[str]]]:
    """Status (None if never reported), exit status, and the truthy attributes, comparisons that held and returned
    functions. Pure, for any bytes: names that were not asked for are dropped, and so is what follows a malformed
    line."""
    names = [frozenset[str]()] * 3
    status = ended = None
    lines = data.split(b"\n", 3)[:-1]
    with contextlib.suppress(Refused):
        if lines:
            item = decode(lines[0])
            if type(item) is not tuple or len(item) != 2 or item[0] not in ("ok", "error", "memory", "crash"):
                return None, None, names
            status, ended = item
            ended = ended if type(ended) is int and 0 <= ended < 256 else None
        if len(lines) > 1:
            item = decode(lines[1])
            if type(item) is tuple and [type(part) for part in item] == [list, list]:
                names[0], names[1] = _asked(job.attributes, item[0]), _asked(job.methods, item[1])
        if len(lines) > 2 and type(item := decode(lines[2])) is list:
            names[2] = _asked(job.functions, item)
    return status, ended, names


def _asked(wanted: Sequence[str], got: list) -> frozenset[str]:
    return frozenset(wanted).intersection(name for name in got if type(name) is str)


class _Talk:
    """The socket to one program's process: what it said so far, and what it is still to be told."""

    def __init__(self, limit: int) -> None:
        self.socket, self.theirs = socket.socketpair()
        self.socket.setblocking(False)
        self.limit, self.said = limit, 0
        self.ready = self.over = self.closed = False
        self.inbox, self.outbox = bytearray(), memoryview(b"")

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
                if not self.ready and self.inbox:
                    self.ready = self.inbox[:1] == _forkserver.READY
                    if not self.ready:
                        continue
                    del self.inbox[:1]
                if self.ready:
                    self.heard()
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True

    def heard(self) -> None:
        """Whatever the inbox holds is new."""

    def close(self) -> None:
        self.socket.close()
        self.theirs.close()


class _ValueTalk(_Talk):
    """Asks for one value after another."""

    def __init__(self, limit: int, job: ValueJob, inputs: Sequence[bytes]) -> None:
        super().__init__(limit)
        self.job, self.inputs = job, inputs
        self.values: list = [MISSING] * len(inputs)
        self.status: str | None = None
        self.void = False
        self.call = 0
        self.index: int | None = 0 if inputs else None
        self.start = 0  # of the line that is not complete yet, within the inbox
        self.tell(inputs[0] if inputs else None)

    def heard(self) -> None:
        while (end := self.inbox.find(b"\n", self.start)) >= 0 and not self.void:
            line = bytes(self.inbox[:end])
            del self.inbox[: end + 1]
            self.start = 0
            kind, value = read_answer(line, self.call)
            if self.status or kind == "void" or (kind == "value" and self.index is None):
                self.void = True
                self.tell(None)
            elif kind == "status":
                self.status = value
            else:
                self.values[self.index] = value
                self.index, self.call = self.job.follow(self.index, value), self.call + 1
                if self.index is not None and self.index >= len(self.inputs):
                    self.index = None
                self.tell(None if self.index is None else self.inputs[self.index])
        self.start = len(self.inbox)

    def report(self, reply: _Reply, cpu_s: float) -> ValueReport:
        if self.void:
            self.values = [MISSING] * len(self.inputs)
        said = None if self.void or reply.exit != 0 or (self.status == "ok" and self.index is not None) else self.status
        status = _status(reply, self, cpu_s, said)
        return ValueReport(status, tuple(self.values), reply.cpu_s)


def _status(reply: _Reply, talk: _Talk, cpu_s: float, said: str | None) -> str:
    if reply.stopped in ("cpu", "wall") or reply.cpu_s > cpu_s:
        return "timeout"
    return reply.stopped or ("output" if talk.over else said or "crash")


def too_long(source: str) -> bool:
    """Whether a program exceeds `SOURCE_BYTES`."""
    return len(source) > SOURCE_BYTES or len(source.encode("utf-8", "surrogatepass")) > SOURCE_BYTES


def compiled(source: str) -> bytes | None:
    """The marshalled code of a program; None where the text is too long or does not compile.

    Runs nothing, warns of nothing."""
    return None if too_long(source) else _compiled(source)


@lru_cache(maxsize=4096)
def _compiled(source: str) -> bytes | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return marshal.dumps(compile(source, "<solution>", "exec", dont_inherit=True))
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            return None


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
            with other:
                self.process = subprocess.Popen(
                    command, stdin=other, stdout=subprocess.DEVNULL, env=environment, cwd="/", start_new_session=True
                )
            self.layers = self._header()
            self._probe()
        except (OSError, SandboxError) as error:
            self.stop()
            raise SandboxError(f"the fork-server did not start: {error}") from error

    def _probe(self) -> None:
        job = ValueJob(PROBE, "f", ((1,),))
        talk = _ValueTalk(self.limits.output_bytes, job, [marshal.dumps((1,))])
        try:
            self.send(b"v", value_payload(job), talk, 10.0, 60.0)
            if not converse({self: _Task(0, talk, time.monotonic() + START_S)}):
                raise SandboxError("the start-up program did not end")
            reply = self.receive()
            talk.read()
            self.check(talk, reply)
            if talk.report(reply, 10.0).values != (1,):
                raise SandboxError("the start-up program failed")
        finally:
            talk.close()

    def send(self, kind: bytes, payload: bytes, talk: _Talk, cpu_s: float, wall_s: float) -> None:
        try:
            fd = os.memfd_create("job")
            try:
                view = memoryview(payload)
                while view:
                    view = view[os.write(fd, view) :]
                request = _forkserver.REQUEST.pack(kind, cpu_s, wall_s)
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

    def _header(self) -> dict:
        return json.loads(self._read(int.from_bytes(self._read(4), "big")))

    def receive(self) -> _Reply:
        """How the program ended."""
        try:
            header = self._header()
            stdout = self._read(header["stdout"])
            files = {name: self._read(size) for name, size in header["files"]}
        except ConnectionError as error:
            raise ServerDied(f"the fork-server died: {error}") from error
        except OSError as error:
            raise SandboxError(f"no answer from the fork-server: {error}") from error
        return _Reply(header["stopped"], header["exit"], header["cpu"], stdout, files)

    @staticmethod
    def check(talk: _Talk, reply: _Reply) -> None:
        """Raises SandboxError where the process never came to the point of running the program."""
        if not talk.ready and not (reply.stopped == "wall" or reply.cpu_s > 1):
            reason = bytes(talk.inbox).decode("ascii", "replace") or f"exit {reply.exit} {reply.stopped}"
            raise SandboxError(f"a program's process could not be set up: {reason}")

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


def _payload(job: ValueJob | ObserveJob, **more: object) -> bytes:
    code, setup = compiled(job.source), compiled(job.setup) if job.setup else b""
    if setup is None:
        raise UserError("a problem's setup code does not compile")
    return marshal.dumps({"code": code, "setup": setup, "entry": job.entry, **more})


def value_payload(job: ValueJob) -> bytes:
    return _payload(job, argument=job.argument)


def observe_payload(job: ObserveJob) -> bytes:
    encode(job.inputs)
    names = {"functions": job.functions, "attributes": job.attributes, "methods": job.methods}
    return _payload(job, input=job.inputs, **names)


@dataclass
class _Task:
    """A job in hand: who runs it, since when, and the talk with its program."""

    index: int
    talk: _Talk
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
        self, limits: Limits = Limits(), workers: int = 1, *, allow_weak: bool = False, without: tuple[str, ...] = ()
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

    def values(self, jobs: Sequence[ValueJob]) -> list[ValueReport]:
        """One report per job."""

        def begin(job: ValueJob) -> tuple[bytes, _Talk]:
            return value_payload(job), _ValueTalk(self.limits.output_bytes, job, self._inputs(job.inputs))

        reports = []
        for job, done in zip(jobs, self._run(b"v", jobs, begin), strict=True):
            if done is None:
                reports.append(ValueReport("error", (MISSING,) * len(job.inputs)))
            else:
                talk, reply = done
                reports.append(talk.report(reply, job.cpu_s or self.limits.cpu_s))
        return reports

    def observe(self, jobs: Sequence[ObserveJob]) -> list[Observation]:
        """One observation per job."""

        def begin(job: ObserveJob) -> tuple[bytes, _Talk]:
            return observe_payload(job), _Talk(self.limits.output_bytes)

        seen = []
        for job, done in zip(jobs, self._run(b"o", jobs, begin), strict=True):
            if done is None:
                seen.append(Observation("error"))
                continue
            talk, reply = done
            said, ended, (truthy, equal, returned) = read_facts(bytes(talk.inbox), job)
            if said is None and not reply.stopped and 0 <= reply.exit:
                ended = reply.exit
            status = _status(reply, talk, self.limits.cpu_s, said)
            seen.append(Observation(status, reply.stdout, reply.files, ended, returned, truthy, equal))
        return seen

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

    def _run(self, kind: bytes, jobs: Sequence, begin: Callable[..., tuple[bytes, Any]]) -> list:
        """(talk, reply) of each job; None where the source is no program."""
        with self._lock:
            if self._closed:
                raise SandboxError("the sandbox is closed")
            done: list = [None] * len(jobs)
            todo = deque(index for index, job in enumerate(jobs) if compiled(job.source) is not None)
            busy: dict[_Server, _Task] = {}
            failed: dict[int, SandboxError] = {}
            slow: set[int] = set()

            def budget(index: int) -> tuple[float, float]:
                cpu_s = getattr(jobs[index], "cpu_s", None) or self.limits.cpu_s
                return cpu_s, self.limits.wall(cpu_s)

            def give(server: _Server) -> None:
                index = todo.popleft()
                payload, talk = begin(jobs[index])
                busy[server] = _Task(index, talk, float("inf"))
                if server.process is None:
                    server.start()
                server.send(kind, payload, talk, *budget(index))
                busy[server].deadline = time.monotonic() + budget(index)[1] + GRACE_S

            def finish(server: _Server, task: _Task) -> None:
                server.socket.settimeout(GRACE_S)
                reply = server.receive()
                task.talk.read()
                server.check(task.talk, reply)
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
