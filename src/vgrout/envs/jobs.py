"""What the sandbox is asked, and what it answers: plain records, and pure readers of what a program's process says.

A program's process is believed nothing: whatever bytes come from it, the readers return plain data of the stated kind
or say that it is void.
"""

from __future__ import annotations

import contextlib
import enum
import marshal
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from vgrout.envs._codec import DEPTH, Refused, decode
from vgrout.types import Arguments, UserError

SOURCE_BYTES = 65_536  # UTF-8 size of the longest program that is run
MIN_CPU_S = 0.1  # the least CPU time that a job may be given: what the process needs for itself does not matter then


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


LIMITS = Limits()


Follow = Callable[[int, Any], "int | None"]


def one_by_one(index: int, value: Any) -> int:
    """Every input in its order, whatever comes back."""
    return index + 1


@dataclass(frozen=True)
class Look:
    """Names to look at: functions, attributes, and comparison methods of what the first call returned ('__eq__' for
    ==)."""

    functions: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A program and the arguments of each call of its entry, 'function' or 'Class.method' (a new instance per call).

    Inputs are plain data: None, bool, int, float, str, list, tuple, dict, set. The source may be any text; it is
    compiled where it runs, confined. `setup` is trusted code that runs before it, in its namespace. `argument`: report
    what the call left in that argument, by position or name, instead of what it returned. `follow(index, value)` is
    the index of the next input, or None to stop; inputs that are never sent are MISSING. `cpu_s`: CPU seconds of this
    job instead of the sandbox's limit, at least `MIN_CPU_S`. `look`: observe the first call (there must be one).
    """

    source: str
    entry: str
    inputs: tuple[Arguments, ...]
    setup: str = ""
    argument: int | str | None = None
    follow: Follow = one_by_one
    cpu_s: float | None = None
    look: Look | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(parts := self.entry.split(".")) <= 2 or not all(part.isidentifier() for part in parts):
            raise ValueError(f"entry must be 'function' or 'Class.method', not {self.entry!r}")
        if not isinstance(self.inputs, tuple):
            raise TypeError("inputs must be a tuple")
        if self.cpu_s is not None and not self.cpu_s >= MIN_CPU_S:
            raise ValueError(f"cpu_s must be at least {MIN_CPU_S:g}, not {self.cpu_s}")
        for args in self.inputs:
            by_name = isinstance(args, dict) and all(type(key) is str for key in args)
            if not isinstance(args, tuple) and not by_name:
                raise TypeError("an input is a tuple of arguments or a dict of arguments by name")
        if self.look and not self.inputs:
            raise ValueError("a job that looks needs an input: its first call is what is looked at")


@dataclass(frozen=True)
class Observation:
    """Facts about loading the program and its first call. The program itself can influence all of them; they are what
    a foolable grader sees. None are where the first answer did not come within the CPU time.

    `status`: as in `Report`; 'error' also if the call raised, 'crash' also if it asked to exit.
    `stdout`: what loading the program and the first call printed, the first `Limits.stdout_bytes`.
    `files`: regular files that the program's process left in the scratch directory when it ended, later calls and
    checking functions included, by name, at most 63 of 64 KiB and 1 MiB in all.
    `exit`: the exit status of a program that ended its process while it was loaded or first called, by sys.exit or
    os._exit; None where the harness got control back (exit hooks never run), where a signal ended the process, or
    where the process ended with another status than the program announced.
    `returned`: module-level functions that, after all calls, returned None, True or 1 while a stub replaced the entry,
    whose results equal nothing and have no truth value. They are called without arguments, or with the stub if they
    need one (otherwise not at all); generators and coroutines do not count.
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
class Report:
    """What the calls of a program returned; right only if the status is 'ok' and every value is right.

    `status`: 'ok' answered all it was asked; 'too long', 'no code' is not run: beyond `SOURCE_BYTES`, does not compile
    within the limits; 'error' did not load or has no entry; 'timeout', 'memory', 'output' exceeded that limit; 'crash'
    left early, died, or sent malformed results; 'killer' ended two fork-servers. How the process ends after the last
    call is no part of it.
    `values`: one per input, fresh plain data or MISSING (the call raised, was not made, was answered after the CPU time
    was over, or returned something that is not plain data within the codec's limits). `cpu_s`: CPU seconds of the
    process. `compiled`: whether the source did. `seen`: what was observed, if the job looks.
    """

    status: str
    values: tuple
    cpu_s: float = field(default=0.0, compare=False)
    compiled: bool = True
    seen: Observation | None = None


def too_long(source: str) -> bool:
    """Whether a program exceeds `SOURCE_BYTES`."""
    return len(source) > SOURCE_BYTES or len(source.encode("utf-8", "surrogatepass")) > SOURCE_BYTES


@lru_cache(maxsize=1024)
def compiled(trusted: str) -> bytes | None:
    """The marshalled code of a text that its owner vouches for, such as a problem's setup; None where it is too long or
    does not compile. Runs nothing, warns of nothing.

    A program is compiled in its own process only: 700 bytes of hostile text can take gigabytes."""
    if too_long(trusted):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return marshal.dumps(compile(trusted, "<solution>", "exec", dont_inherit=True))
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            return None


def payload(job: Job) -> bytes:
    """What the program's process is told before the inputs come."""
    setup = compiled(job.setup) if job.setup else b""
    if setup is None:
        raise UserError("a problem's setup code does not compile")
    look = asdict(job.look) if job.look else None
    return marshal.dumps(
        {"source": job.source, "setup": setup, "entry": job.entry, "argument": job.argument, "look": look}
    )


def read_answer(line: bytes, call: int) -> tuple[str, Any]:
    """What one line of answers says. Pure, for any bytes: ('value', v) or ('value', MISSING) in answer to call number
    `call`, ('status', s) at the end, ('void', None) for everything else."""
    try:
        item = decode(line, DEPTH + 1)
    except Refused:
        return "void", None
    if type(item) is str and item in ("ok", "error", "memory"):
        return "status", item
    if type(item) is tuple and 1 <= len(item) <= 2 and type(item[0]) is int and item[0] == call:
        return "value", item[1] if len(item) == 2 else MISSING
    return "void", None


def read_facts(data: bytes, look: Look) -> tuple[str | None, int | None, list[frozenset[str]]]:
    """Status (None if never reported), announced exit status, and the truthy attributes, comparisons that held and
    returned functions. Pure, for any bytes: names that were not asked for are dropped, and so is what follows a
    malformed line."""
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
                names[0], names[1] = _asked(look.attributes, item[0]), _asked(look.methods, item[1])
        if len(lines) > 2 and type(item := decode(lines[2])) is list:
            names[2] = _asked(look.functions, item)
    return status, ended, names


def _asked(wanted: Sequence[str], got: list) -> frozenset[str]:
    return frozenset(wanted).intersection(name for name in got if type(name) is str)
