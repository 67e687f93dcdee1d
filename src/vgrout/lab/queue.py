"""`vgrout queue`: experiments that say beforehand what they ask and how their outcome will be judged.

queue.jsonl   one line per event, only ever appended to; `entries` folds it into what `queue list` shows. Every line has
              `event`, `job` (numbers from 1) and `time` (UTC):
                added        why, resolve, command (a list), folder (where it runs)
                handed       task: pueue's id of it
                started      process (of the runner), log
                ended        resolve again, beside what came out: code, seconds, last (lines of output)
                interrupted  the same, code null where nobody saw the end; by: a signal's name, or `lost`
                again        it waits once more
                cancelled    it will not run
logs/         output of each attempt, JOB-ATTEMPT.log
runner        locked while jobs run here. The job's process holds the lock as well, so that a runner that was killed is
              not followed by a second job beside one that is still ending

Covers: one job at a time on this machine, no job taken twice, an interrupted one is shown as such; no line is split.
Does not cover: a folder on a file system without locks; a job's own children that outlive it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from vgrout.faults import warn
from vgrout.lab.record import Log
from vgrout.lab.tables import number_table, print_wide
from vgrout.signals import Interrupted, held, listening, waiting
from vgrout.types import RunFailed, UserError

LOG, LOGS, RUNNER = "queue.jsonl", "logs", "runner"
PUEUE = "pueue"
PUEUE_S = 60.0  # seconds that pueue may take to answer
LAST_LINES, LAST_BYTES = 20, 4096  # of a job's output that its record keeps
PATIENCE_S = 1.0  # a reader that asks whether a runner is at work holds its lock for an instant
POLL_S = 0.05  # between looks at a job
NOT_STARTED = 127  # exit code of a command that could not be started, as a shell has it
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Entry:
    """A job of the queue. The fields below `state` are those of its latest attempt."""

    job: int
    why: str
    resolve: str
    command: tuple[str, ...]
    folder: str
    added: str
    state: str = "waiting"  # or handed over, running, finished, failed, interrupted, cancelled
    task: str = ""  # pueue's id
    attempts: int = 0
    log: str = ""
    code: int | None = None
    seconds: float | None = None
    last: tuple[str, ...] = ()
    by: str = ""  # what interrupted it

    @property
    def line(self) -> str:
        return shlex.join(self.command)


# ---- the record


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")


def _parsed(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of the record, and their bytes. Raises UserError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    size = data.rfind(b"\n") + 1
    rows = []
    for number, line in enumerate(data[:size].split(b"\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
            if not isinstance(rows[-1], dict):
                raise ValueError("no JSON object")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number} is no record of a queue: {error}") from None
    return rows, size


def _folded(path: Path, rows: Sequence[dict[str, Any]]) -> dict[int, Entry]:
    known: dict[int, Entry] = {}
    for number, row in enumerate(rows, 1):
        try:
            _fold(known, row)
        except (KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__} {error}"
            raise UserError(f"{path}:{number} is no record of a queue: {what}") from None
    return known


def _fold(known: dict[int, Entry], row: dict[str, Any]) -> None:
    """Take one event in. Raises KeyError, TypeError or ValueError for what is none."""
    job, event = int(row["job"]), row["event"]
    if event == "added":
        command = tuple(str(word) for word in row["command"])
        known[job] = Entry(job, row["why"], row["resolve"], command, row["folder"], row["time"])
        return
    if event == "handed":
        changes: dict[str, Any] = {"state": "handed over", "task": str(row["task"])}
    elif event == "started":
        fresh = {"code": None, "seconds": None, "last": (), "by": ""}
        changes = {"state": "running", "attempts": known[job].attempts + 1, "log": row["log"], **fresh}
    elif event in ("ended", "interrupted"):
        ended = {name: row[name] for name in ("code", "seconds")}
        changes = {"last": tuple(row["last"]), "by": row.get("by", ""), **ended}
        changes["state"] = "interrupted" if event == "interrupted" else "failed" if row["code"] else "finished"
    elif event == "again":
        changes = {"state": "waiting", "task": ""}
    elif event == "cancelled":
        changes = {"state": "cancelled"}
    else:
        raise ValueError(f"unknown event {event!r}")
    known[job] = replace(known[job], **changes)


@contextmanager
def _writing(queue: Path) -> Iterator[tuple[dict[int, Entry], Callable[..., None]]]:
    """The entries as they are, and a function that appends an event; no other process writes meanwhile."""
    path = queue / LOG
    try:
        lock = path.open("ab")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows, size = _parsed(path)
        log = Log(path, size)

        def append(event: str, job: int, **more: Any) -> None:
            with held():
                log.write({"event": event, "job": job, "time": _now(), **more})
                log.sync()
            if log.lost:
                raise RunFailed(f"{path} could not be written")

        try:
            yield _folded(path, rows), append
        finally:
            log.close()


def _open(queue: Path) -> None:
    """Make the folder of a queue. Raises UserError where it is something else."""
    try:
        if queue.is_dir() and not (queue / LOG).exists() and any(p.name not in (LOGS, RUNNER) for p in queue.iterdir()):
            raise UserError(f"{queue} holds something else than a queue: give another --queue")
        (queue / LOGS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make a queue in {queue}: {error.strerror}") from None


def entries(queue: Path) -> list[Entry]:
    """The jobs in the order in which they were added, each in its present state. Raises UserError."""
    if not (queue / LOG).is_file():
        raise UserError(f"no queue in {queue}: `vgrout queue add` starts one")
    known = _folded(queue / LOG, _parsed(queue / LOG)[0])
    running = [entry for entry in known.values() if entry.state == "running"]
    if running and not _at_work(queue):  # its runner was killed
        lost = [replace(e, state="interrupted", by="lost", last=_tail(queue / e.log)) for e in running]
        known |= {entry.job: entry for entry in lost}
    return list(known.values())


def _entry(known: dict[int, Entry], queue: Path, job: int) -> Entry:
    if job not in known:
        has = f"it has 1 to {len(known)}" if known else "it has none"
        raise UserError(f"{queue} has no job {job}: {has}")
    return known[job]


# ---- adding


def _said(text: str, flag: str, what: str) -> str:
    """One line of text. Raises UserError where it says nothing."""
    line = " ".join(text.split())
    if not any(c.isalpha() for c in line):
        raise UserError(f'{flag} "...": {what}')
    if not line.isprintable():
        raise UserError(f"{flag} has characters in it that cannot be shown")
    return line


def add(queue: Path, why: str, resolve: str, command: Sequence[str]) -> int:
    """Append a job that runs in this folder. Its number. Raises UserError where something is missing."""
    why = _said(why, "--why", "say what this job asks; a job without a question is not queued")
    resolve = _said(resolve, "--resolve", "say by which rule its outcome will be judged, before there is one")
    if why.casefold() == resolve.casefold():
        raise UserError(
            "--resolve repeats --why: one is the question, the other the rule that its outcome is judged by"
        )
    if not command:
        raise UserError(
            'give the command behind a --: vgrout queue add --why "..." --resolve "..." -- vgrout train ...'
        )
    if any("\0" in word for word in command):
        raise UserError("the command has a NUL character in it")
    try:
        "".join([*command, str(Path.cwd())]).encode()
    except UnicodeEncodeError:
        raise UserError("the command, or the name of this folder, is no text in UTF-8") from None
    if command[0] != "vgrout" and shutil.which(command[0]) is None:
        raise UserError(f"no program {command[0]!r} can be started from here")
    if tuple(command[:3]) == ("vgrout", "queue", "run"):
        raise UserError("a job cannot run a queue")
    _open(queue)
    with _writing(queue) as (known, append):
        job = max(known, default=0) + 1
        append("added", job, why=why, resolve=resolve, command=list(command), folder=str(Path.cwd()))
    return job


def change(queue: Path, job: int, event: str) -> None:
    """Let a job wait `again`, or have it `cancelled`. Raises UserError where its state does not allow it."""
    allowed = {"again": ("handed over", "finished", "failed", "interrupted", "cancelled")}
    allowed["cancelled"] = ("waiting", "handed over", "interrupted", "failed")
    entries(queue)  # that it is one
    with _writing(queue) as (known, append):
        entry = _entry(known, queue, job)
        gone = entry.state == "running" and not _at_work(queue)
        state = "interrupted" if gone else entry.state
        if state not in allowed[event]:
            what = "wait again" if event == "again" else "be cancelled"
            raise UserError(f"job {job} is {state}: it cannot {what}")
        if gone:
            append("interrupted", job, **_outcome(queue, entry, None, None), by="lost")
        append(event, job)


# ---- running


def _at_work(queue: Path) -> bool:
    """Whether a runner, or the job of one that was killed, holds the queue."""
    try:
        with (queue / RUNNER).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        raise UserError(f"cannot read {queue / RUNNER}: {error.strerror}") from None


@contextmanager
def _runner(queue: Path, wait: bool) -> Iterator[int]:
    """Hold the queue as its only runner: the lock's file descriptor, which a job's process inherits.

    Raises UserError where it is held, unless it is to `wait`.
    """
    try:
        file = (queue / RUNNER).open("a+b", buffering=0)
    except OSError as error:
        raise UserError(f"cannot write in {queue}: {error.strerror}") from None
    with file:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                break
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "another process"
                raise UserError(f"{queue} is in use by {holder}: it takes what is added to the queue") from None
        try:
            with contextlib.suppress(OSError):  # a full disk: then nobody can read who it is
                file.truncate(0)
                file.write(f"process {os.getpid()}\n".encode())
            yield file.fileno()
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # also where something that a job left behind has inherited it


def _tail(path: Path) -> tuple[str, ...]:
    """The last lines of a log as they may be shown."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ()
    shown = ("".join(c for c in Text.from_ansi(line).plain if c.isprintable()).rstrip() for line in lines)
    return tuple(line for line in shown if line)[-LAST_LINES:]


def _outcome(queue: Path, entry: Entry, code: int | None, seconds: float | None) -> dict[str, Any]:
    """What came out, beside the rule that it is judged by."""
    last = list(_tail(queue / entry.log)) if entry.log else []
    return {"resolve": entry.resolve, "code": code, "seconds": seconds, "last": last}


def _with_runner() -> None:
    """The process is told to end when its runner is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _argv(command: Sequence[str]) -> list[str]:
    """`vgrout` is this very installation."""
    return [sys.executable, "-m", "vgrout", *command[1:]] if command[0] == "vgrout" else list(command)


def _work(queue: Path, entry: Entry, lock: int) -> tuple[int, str]:
    """Run a job to its end. Exit code, and the name of the signal that the runner got meanwhile, at which the job gets
    what Ctrl-C in a terminal would send it. The caller holds signals back."""
    try:
        with (queue / entry.log).open("ab", buffering=0) as log:
            log.write(f"$ cd {shlex.quote(entry.folder)} && {entry.line}\n".encode(errors="backslashreplace"))
            # A group of its own: a terminal's Ctrl-C comes from here, and once.
            how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "process_group": 0}
            how |= {"cwd": entry.folder, "pass_fds": (lock,), "preexec_fn": _with_runner}
            try:
                process = subprocess.Popen(_argv(entry.command), **how)
            except OSError as error:
                log.write(f"could not be started: {error}\n".encode())
                return NOT_STARTED, ""
    except OSError as error:
        warn(f"job {entry.job} was not started: {queue / entry.log} cannot be written: {error.strerror}")
        return NOT_STARTED, ""
    by = ""
    while process.poll() is None or by and _group_lives(process.pid):
        if not by and (number := waiting()):
            by = signal.Signals(number).name
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
        time.sleep(POLL_S)
    code = process.returncode
    return (code if code >= 0 else 128 - code), by


def _group_lives(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
        return True
    except (ProcessLookupError, PermissionError):
        return False


def _next(queue: Path, only: int | None) -> Entry | None:
    """Take the next job that waits, or the only one that is asked for."""
    with _writing(queue) as (known, append):
        due = [e for e in known.values() if e.state == "waiting" and only is None]
        if only is not None and _entry(known, queue, only).state in ("waiting", "handed over"):
            due = [known[only]]
        if not due:
            return None
        entry = due[0]
        entry = replace(entry, log=f"{LOGS}/{entry.job:04d}-{entry.attempts + 1}.log")
        with contextlib.suppress(OSError):  # what cannot be written shows when the log is opened
            (queue / LOGS).mkdir(exist_ok=True)
        append("started", entry.job, process=os.getpid(), log=entry.log)
        return entry


def _close_lost(queue: Path) -> None:
    """Write down which jobs were running when their runner was killed. The caller holds the queue."""
    with _writing(queue) as (known, append):
        for entry in known.values():
            if entry.state == "running":
                append("interrupted", entry.job, **_outcome(queue, entry, None, None), by="lost")


def run_here(queue: Path, console: Console, only: int | None = None) -> int:
    """Run what waits, one job after another, what is added meanwhile too; or `only` one job, as soon as the queue is
    free. Returns 1 when one failed. Raises Interrupted with the job's outcome written."""
    failed = False
    with _runner(queue, wait=only is not None) as lock:
        _close_lost(queue)
        while (code := _one(queue, console, lock, only)) is not None:
            failed |= code != 0
            if only is not None:
                break
        else:
            if only is not None:
                _say(console, f"job {only} neither waits nor was handed over: nothing to run")
    return 1 if failed else 0


def _one(queue: Path, console: Console, lock: int, only: int | None) -> int | None:
    """Take a job, run it and write down what came out, which no signal splits. Its exit code; None where there is no
    job to take."""
    with held():
        entry = _next(queue, only)
        if entry is None:
            return None
        _tell(console, f"job {entry.job}: {entry.why}\n  $ {entry.line}\n  output in {queue / entry.log}")
        begun = time.monotonic()
        code, by = _work(queue, entry, lock)
        seconds = round(time.monotonic() - begun, 2)
        try:
            with _writing(queue) as (_, append):
                more = {"by": by} if by else {}
                append("interrupted" if by else "ended", entry.job, **_outcome(queue, entry, code, seconds), **more)
        except (UserError, RunFailed) as error:
            raise RunFailed(
                f"job {entry.job} ended with exit code {code} after {_span(seconds)}, but {error}"
            ) from None
        if by:
            raise Interrupted(signal.Signals[by].value, f"job {entry.job} was interrupted by {by}")
        _tell(console, f"  exit code {code} after {_span(seconds)}; to judge: {entry.resolve}")
        return code


def hand_over(queue: Path, console: Console, pueue: str) -> int:
    """Add every job that waits to pueue, in order. What pueue starts is `queue run --local --job`, so records, outcome
    and the rule of one job at a time are those of this queue whatever pueue's own settings. Raises RunFailed."""
    handed = 0
    while True:
        with _writing(queue) as (known, append), held():
            entry = next((e for e in known.values() if e.state == "waiting"), None)
            if entry is None:
                break
            append("handed", entry.job, task=_add_to_pueue(pueue, queue, entry))
            handed += 1
    _say(console, f"{handed} jobs handed over to pueue" if handed != 1 else "1 job handed over to pueue")
    return 0


def _add_to_pueue(pueue: str, queue: Path, entry: Entry) -> str:
    """Pueue's id of the new task. Raises RunFailed."""
    inner = [sys.executable, "-m", "vgrout", "queue", "run", "--local", "--job", str(entry.job)]
    inner += ["--queue", str(queue.absolute())]
    label = f"vgrout {entry.job}: {entry.why}"
    # Pueue joins its words and hands them to a shell: one quoted word arrives as it is.
    words = [pueue, "add", "--print-task-id", "--working-directory", entry.folder, "--label", label]
    words += ["--", shlex.join(inner)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=PUEUE_S)
        why = "" if done.returncode == 0 else (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        task = done.stdout.strip()
        if not why and not task.isdigit():
            why = f"it answered {task[:80]!r} where the id of a task was asked for"
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    if why:
        raise RunFailed(
            f"pueue did not take job {entry.job}: {why}. Is its daemon there (pueued)? --local runs it here"
        )
    return task


def run(queue: Path, console: Console, *, local: bool = False, job: int | None = None) -> int:
    """Run what waits: through pueue where that is installed, unless it is to be `local`. Raises UserError."""
    known = {entry.job: entry for entry in entries(queue)}
    if job is not None:
        _entry(known, queue, job)
    pueue = None if local or job is not None else shutil.which(PUEUE)
    with listening():
        return run_here(queue, console, job) if pueue is None else hand_over(queue, console, pueue)


# ---- showing


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _tell(console: Console, text: str) -> None:
    """Say it, if somebody still listens: jobs go on without the terminal that they were started from."""
    with contextlib.suppress(OSError, SystemExit):  # rich ends the process where a pipe has no reader
        _say(console, text)


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def _state(entry: Entry) -> str:
    if entry.state == "handed over":
        return f"handed to pueue ({entry.task})"
    return f"failed ({entry.code})" if entry.state == "failed" else entry.state


def _short(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def show_list(queue: Path, console: Console) -> None:
    """Every job in a line. Raises UserError where there is no queue."""
    rows = [[str(e.job), _state(e), _short(e.why), _short(e.line), _span(e.seconds)] for e in entries(queue)]
    caption = "`vgrout queue show JOB`: how its outcome is to be judged, and what came out"
    print_wide(number_table(str(queue), caption, ("job", "state", "why", "command", "took"), rows, 4), console)


def show_one(queue: Path, job: int, console: Console) -> None:
    """All that is known of a job: the question, the rule and below it the outcome. Raises UserError."""
    entry = _entry({e.job: e for e in entries(queue)}, queue, job)
    told = [("why", entry.why), ("command", entry.line), ("in", entry.folder), ("added", entry.added)]
    told += [("state", _state(entry) + (f" by {entry.by}" if entry.by not in ("", "lost") else ""))]
    told += [("resolve", entry.resolve)]
    if entry.attempts:
        told += [("exit code", "nobody saw one" if entry.code is None else str(entry.code))] * (
            entry.state != "running"
        )
        told += [("took", _span(entry.seconds)), ("output", str(queue / entry.log))]
    _say(console, f"job {entry.job}")
    for name, text in told:
        _say(console, f"  {name:<10} {text}")
    for line in entry.last:
        _say(console, f"  | {line}")
    if entry.state == "interrupted":
        _say(console, f"It was interrupted: `vgrout queue again {job}` lets it wait once more.")
