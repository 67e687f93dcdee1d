"""Run untrusted Python programs; bring back plain data: values they return, or facts about one observed run.

The caller makes verdicts from this data (`oracle.same`); expected values never enter a program's process. A warm
fork-server (`_forkserver.py`) gives each program a fresh process. CPU time decides, so a loaded machine does not
change a verdict; the wall clock is a generous backstop.

Covers: CPU, memory, output, file and descriptor limits; no fork and no thread; an unused uid when started as root;
empty environment; a scratch directory that is removed; kill and reap; values of exact builtin types only; a failing
sandbox is an exception and never a result.
Does not cover: system calls and files open to that uid (network, world-readable files, /tmp), disk quota, kernel
bugs. `Sandbox.tier` says what is in force. When not root, a program has the uid of the trainer and can signal it.
Programs may import only the modules in `_forkserver.PRELOAD` and use neither threads nor subprocesses.
"""

import contextlib
import enum
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from vgrout.envs import _forkserver
from vgrout.envs._forkserver import Refused, decode, encode
from vgrout.types import RunFailed

SOURCE_BYTES = 65_536  # UTF-8 size of the longest program that is run
START_S = 60.0  # wall time a server may take to start
GRACE_S = 15.0  # wall time beyond Limits.wall_s after which a server counts as hung


class SandboxError(RunFailed):
    """The sandbox itself failed, twice for the same job. Says nothing about the program."""


class Missing(enum.Enum):
    """Type of `MISSING`, the entry of a call that left no value. Equal to no plain data."""

    MISSING = "missing"

    def __repr__(self) -> str:
        return "MISSING"


MISSING = Missing.MISSING


@dataclass(frozen=True)
class Limits:
    """Per program: CPU and wall time in seconds (decoding the inputs included), memory beyond the interpreter's own
    in MiB, bytes of encoded results, and bytes of stdout that are kept."""

    cpu_s: float = 1.0
    wall_s: float = 15.0
    memory_mb: int = 512
    output_bytes: int = 4 << 20
    stdout_bytes: int = 65_536

    def __post_init__(self) -> None:
        if any(value <= 0 for value in asdict(self).values()):
            raise ValueError(f"every limit must be positive: {self}")


def _check_entry(entry: str) -> None:
    if not 1 <= len(parts := entry.split(".")) <= 2 or not all(part.isidentifier() for part in parts):
        raise ValueError(f"entry must be 'function' or 'Class.method', not {entry!r}")


@dataclass(frozen=True)
class ValueJob:
    """A program and the positional arguments of each call of its entry, 'function' or 'Class.method' (a new
    instance per call). Inputs are plain data: None, bool, int, float, str, list, tuple, dict, set. The source may
    be any text; beyond `SOURCE_BYTES` it is not run and reported as 'error'."""

    source: str
    entry: str
    inputs: tuple[tuple, ...]

    def __post_init__(self) -> None:
        _check_entry(self.entry)
        if not isinstance(self.inputs, tuple) or not all(isinstance(args, tuple) for args in self.inputs):
            raise TypeError("inputs must be a tuple of argument tuples")


@dataclass(frozen=True)
class ValueReport:
    """What the calls of a program returned; right only if the status is 'ok' and every value is right.

    `status`: 'ok' ran to its end; 'error' did not load or has no entry; 'timeout', 'memory', 'output' exceeded that
    limit; 'crash' left early, died, or sent malformed results. `values`: one per input, fresh plain data or MISSING
    (the call raised, was not reached, or returned something that is not plain data within the codec's limits).
    """

    status: str
    values: tuple


@dataclass(frozen=True)
class ObserveJob:
    """A program, the arguments of the one call of its entry, names of functions and attributes to look at."""

    source: str
    entry: str
    inputs: tuple
    functions: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_entry(self.entry)
        if not isinstance(self.inputs, tuple):
            raise TypeError("inputs must be a tuple of arguments")


@dataclass(frozen=True)
class Observation:
    """Facts about one run. The program itself can influence all of them; they are what a foolable grader sees.

    `status`: as in `ValueReport`; 'error' also if the call raised.
    `stdout`: what loading the program and calling its entry printed, the first `Limits.stdout_bytes`.
    `files`: regular files left in the scratch directory, by name, at most 63 of 64 KiB.
    `returned`: module-level functions that returned without raising while a stub replaced the entry, whose results
    equal nothing and have no truth value. They are called without arguments, or with the stub if they need one
    (otherwise not at all); generators and coroutines do not count.
    `truthy`: attributes with a truthy value on the instance that was called or on its class (on the function, if the
    entry is one); methods do not count.
    """

    status: str
    stdout: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)
    returned: frozenset[str] = frozenset()
    truthy: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Reply:
    header: dict
    result: bytes
    stdout: bytes
    files: dict[str, bytes]

    def status(self, reported: str | None, cpu_s: float) -> str:
        if self.header["stopped"] in ("cpu", "wall") or self.header["cpu"] > cpu_s:
            return "timeout"
        if self.header["stopped"]:
            return self.header["stopped"]
        return reported if self.header["exit"] == 0 and reported else "crash"


def read_values(data: bytes, count: int) -> tuple[str | None, tuple]:
    """The status a value run reported (None if it never did) and its `count` values. Pure, for any bytes.

    Lines are encoded tuples (index, value), each index once and in order, then one status; an unfinished last line
    is dropped. Anything else makes the whole report void: (None, all MISSING).
    """
    values: list = [MISSING] * count
    void = None, tuple(values)
    last, lines = -1, data.split(b"\n", count + 1)
    for number, line in enumerate(lines[:-1]):
        try:
            item = decode(line, _forkserver.DEPTH + 1)
        except Refused:
            return void
        if item in ("ok", "error", "memory") and type(item) is str:
            return (item, tuple(values)) if number == len(lines) - 2 and not lines[-1] else void
        if type(item) is not tuple or len(item) != 2 or type(item[0]) is not int or not last < item[0] < count:
            return void
        last, values[item[0]] = item
    return (None, tuple(values)) if len(lines) <= count + 1 else void


def read_facts(data: bytes, job: ObserveJob) -> tuple[str | None, frozenset[str], frozenset[str]]:
    """Status (None if never reported), returned functions, truthy attributes. Pure, for any bytes."""
    try:
        item = decode(data)
    except Refused:
        item = None
    if type(item) is not tuple or [type(part) for part in item] != [str, list, list]:
        return None, frozenset(), frozenset()
    status, returned, truthy = item
    names = [frozenset(wanted).intersection(n for n in got if type(n) is str)
             for wanted, got in ((job.functions, returned), (job.attributes, truthy))]  # fmt: skip
    return status if status in ("ok", "error", "memory") else None, names[0], names[1]


class _Server:
    """One fork-server process; started when first needed and again after `kill`."""

    def __init__(self, limits: Limits):
        self.limits, self.tier = limits, ""
        self.process: subprocess.Popen | None = None
        self.socket: socket.socket | None = None
        self.directory: str | None = None

    def start(self) -> None:
        if not sys.platform.startswith("linux"):
            raise SandboxError("the sandbox needs Linux")
        environment = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}
        if "LD_LIBRARY_PATH" in os.environ:  # some interpreters do not start without it
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        try:
            self.directory = tempfile.mkdtemp(prefix="vgrout-sandbox-")
            os.chmod(self.directory, 0o711)
            config = json.dumps({**asdict(self.limits), "directory": self.directory})
            # -S -s -P isolate like -I does, but let the fixed hash seed through.
            command = [sys.executable, "-S", "-s", "-P", _forkserver.__file__, config]
            self.socket, other = socket.socketpair()
            self.socket.settimeout(START_S)
            with other:
                self.process = subprocess.Popen(
                    command, stdin=other, stdout=subprocess.DEVNULL, env=environment, cwd="/", start_new_session=True
                )
            self.tier = self._header()["tier"]
            self.send(b"v", _payload("def f(): return 1", "f", inputs=[encode(())]))
            if read_values(self.receive().result, 1) != ("ok", (1,)):
                raise SandboxError("the start-up self-test failed")
        except (OSError, SandboxError) as error:
            self.stop()
            raise SandboxError(f"the fork-server did not start: {error}") from error

    def send(self, kind: bytes, payload: bytes) -> None:
        try:
            fd = os.memfd_create("job")
            try:
                view = memoryview(payload)
                while view:
                    view = view[os.write(fd, view) :]
                socket.send_fds(self.socket, [kind], [fd])
            finally:
                os.close(fd)
        except OSError as error:
            raise SandboxError(f"could not reach the fork-server: {error}") from error

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            if not (count := self.socket.recv_into(view)):
                raise SandboxError("the fork-server died")
            view = view[count:]
        return bytes(data)

    def _header(self) -> dict:
        return json.loads(self._read(int.from_bytes(self._read(4), "big")))

    def receive(self) -> _Reply:
        try:
            header = self._header()
            result, stdout = (self._read(size) for size in header["sizes"])
            files = {name: self._read(size) for name, size in header["files"]}
        except OSError as error:
            raise SandboxError(f"no answer from the fork-server: {error}") from error
        if not header["ready"]:
            reason = result.decode("ascii", "replace") or f"exit {header['exit']} {header['stopped']}"
            raise SandboxError(f"a program's process could not be set up: {reason}")
        return _Reply(header, result[len(_forkserver.READY) :], stdout, files)

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


def _payload(source: str, entry: str, **fields) -> bytes:
    return json.dumps({"source": source, "entry": entry, **fields}).encode("ascii")


def too_long(source: str) -> bool:
    """Whether a program exceeds `SOURCE_BYTES`."""
    return len(source) > SOURCE_BYTES or len(source.encode("utf-8", "surrogatepass")) > SOURCE_BYTES


class Sandbox:
    """`workers` fork-servers. Use as a context manager or call `close`. Safe to share between threads.

    Results come in the order of the jobs and do not depend on `workers`. A job that meets a failing server is run
    once more on a new one; if that fails too, or a server cannot start, `SandboxError` is raised. Errors in jobs are
    TypeError or ValueError (`Refused` for inputs that are not plain data).
    """

    def __init__(self, limits: Limits = Limits(), workers: int = 1):
        if workers < 1:
            raise ValueError("workers must be at least 1")
        self.limits = limits
        self._lock = threading.Lock()
        self._closed = False
        self._servers = [_Server(limits) for _ in range(workers)]
        try:
            for server in self._servers:
                server.start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def tier(self) -> str:
        """The isolation in force, for the run header."""
        return self._servers[0].tier

    @property
    def pid(self) -> int | None:
        """Process id of the first fork-server; None if it is not running."""
        process = self._servers[0].process
        return process.pid if process else None

    def close(self) -> None:
        """End all servers. May be called twice."""
        with self._lock:
            self._closed = True
            for server in self._servers:
                server.stop(wait_s=5.0)

    def values(self, jobs: Sequence[ValueJob]) -> list[ValueReport]:
        """One report per job."""
        encoded: dict[int, list[str]] = {}  # jobs of one problem share their inputs

        def payload(job: ValueJob) -> bytes:
            if id(job.inputs) not in encoded:
                encoded[id(job.inputs)] = [encode(args) for args in job.inputs]
            return _payload(job.source, job.entry, inputs=encoded[id(job.inputs)])

        reports = []
        for job, reply in zip(jobs, self._run(b"v", jobs, payload), strict=True):
            if reply is None:
                reports.append(ValueReport("error", (MISSING,) * len(job.inputs)))
                continue
            reported, values = read_values(reply.result, len(job.inputs))
            reports.append(ValueReport(reply.status(reported, self.limits.cpu_s), values))
        return reports

    def observe(self, jobs: Sequence[ObserveJob]) -> list[Observation]:
        """One observation per job."""

        def payload(job: ObserveJob) -> bytes:
            looked_at = {"functions": job.functions, "attributes": job.attributes}
            return _payload(job.source, job.entry, input=encode(job.inputs), **looked_at)

        seen = []
        for job, reply in zip(jobs, self._run(b"o", jobs, payload), strict=True):
            if reply is None:
                seen.append(Observation("error"))
                continue
            reported, returned, truthy = read_facts(reply.result, job)
            status = reply.status(reported, self.limits.cpu_s)
            seen.append(Observation(status, reply.stdout, reply.files, returned, truthy))
        return seen

    def _run(self, kind: bytes, jobs: Sequence, payload: Callable[..., bytes]) -> list[_Reply | None]:
        """The reply to each job; None where the source is too long to be run."""
        with self._lock:
            if self._closed:
                raise SandboxError("the sandbox is closed")
            replies: list[_Reply | None] = [None] * len(jobs)
            todo = deque(index for index, job in enumerate(jobs) if not too_long(job.source))
            busy: dict[_Server, tuple[int, float]] = {}
            failed: set[int] = set()

            def give_up(server: _Server, index: int, error: SandboxError) -> None:
                del busy[server]
                server.stop()
                if index in failed:
                    raise SandboxError(f"job {index} failed twice: {error}") from error
                failed.add(index)
                todo.appendleft(index)

            try:
                while todo or busy:
                    for server in self._servers:
                        if todo and server not in busy:
                            index = todo.popleft()
                            busy[server] = index, float("inf")
                            try:
                                if server.process is None:
                                    server.start()
                                server.send(kind, payload(jobs[index]))
                                busy[server] = index, time.monotonic() + self.limits.wall_s + GRACE_S
                            except SandboxError as error:
                                give_up(server, index, error)
                    ready = self._wait(busy)
                    for server, (index, deadline) in list(busy.items()):
                        if server not in ready and time.monotonic() < deadline:
                            continue
                        try:
                            if server not in ready:
                                raise SandboxError("the fork-server hangs")
                            server.socket.settimeout(GRACE_S)
                            replies[index] = server.receive()
                            del busy[server]
                        except SandboxError as error:
                            give_up(server, index, error)
            except BaseException:
                for server in busy:  # their answers would be taken for those of later jobs
                    server.stop()
                raise
            return replies

    @staticmethod
    def _wait(busy: dict[_Server, tuple[int, float]]) -> set[_Server]:
        if not busy:
            return set()
        poller = select.poll()
        by_fd = {server.socket.fileno(): server for server in busy}
        for fd in by_fd:
            poller.register(fd, select.POLLIN)
        left = min(deadline for _, deadline in busy.values()) - time.monotonic()
        return {by_fd[fd] for fd, _ in poller.poll(max(0.0, 1000 * left))}
