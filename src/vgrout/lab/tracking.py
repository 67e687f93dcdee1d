"""What a tracker such as trackio or wandb gets of a run: its settings, and the numbers of its own records.

A reader of the run's files, beside training and never in it: no hook, no import of the loop. Of steps.jsonl,
evals.jsonl and eval.json only numbers go, so that no text of a rollout can leave; with them go config.json and
provenance.json. A step goes together with the small evaluation that follows it, in order, and once; only rows of a
tracker that did not come to its end, so that nobody knows which arrived, go again. What went is kept in
RUN/tracking/TRACKER.json. A run that went back to a checkpoint and came the same way again goes on where it was; one
that took another way becomes a new run of the tracker, with all of its steps.

As a program, `python -m vgrout.lab.tracking '{..}'` follows a folder until its standard input ends, as it does when the
process that trains is gone. It imports nothing but Python's own modules and the tracker, so that it takes little of the
machine. Where the tracker fails it says so once, on stderr and in RUN/tracking/TRACKER.log, and ends with 1.
"""

from __future__ import annotations

import contextlib
import contextvars
import fcntl
import hashlib
import importlib
import json
import math
import os
import re
import secrets
import select
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = "tracking"
LOGS = ("steps.jsonl", "evals.jsonl", "eval.json")
POLL_S, START_S = 5.0, 1.0
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError)  # what a damaged record raises
MISREAD = 3  # times in a row that a record may be unreadable while its run is followed
# What only one tracker's `init` takes: nothing of the machine, its code or its console goes along, and runs of an
# experiment stay open side by side.
OWN: Mapping[str, Mapping[str, Any]] = {
    "trackio": {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False},
    "wandb": {
        "reinit": "create_new",
        "allow_val_change": True,
        "save_code": False,
        "settings": {"console": "off", "disable_git": True, "disable_code": True, "x_disable_stats": True},
    },
}


class TrackerFailed(Exception):
    """The tracker raised; `__cause__` is what."""


class Busy(OSError):
    """Another process sends this run."""


# What goes.


def numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a record, nested names joined by '/'. A rate goes as its mean under its own name, and its
    interval as NAME/low and NAME/high."""
    out: dict[str, float] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if "mean" in value:
                value = {"": value["mean"], "/low": value.get("low"), "/high": value.get("high")}
                out |= numbers(value, name)
            else:
                out |= numbers(value, f"{name}/")
        elif type(value) in (int, float) and math.isfinite(value):
            out[name] = value
    return out


def rows(run: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, numbers) of everything that is complete, in order; the final evaluation comes a step after the last."""
    done = finished(run)
    steps = {record.pop("step"): numbers(record) for record in _lines(run / "steps.jsonl")}
    # Read after the steps: an evaluation comes before the step that follows it.
    evals = {record.pop("step") - 1: numbers(record, "val/") for record in _lines(run / "evals.jsonl")}
    last = max(steps, default=-1)
    out = [(n, steps[n] | evals.get(n, {})) for n in sorted(steps) if n < last or n in evals or done]
    if done:
        out.append((last + 1, numbers(json.loads((run / "eval.json").read_text())["cells"], "test/")))
    return out


def finished(run: Path) -> bool:
    """Whether a run has its final evaluation, the last that it writes."""
    return (run / "eval.json").is_file()


def _lines(path: Path) -> list[dict]:
    """The whole lines of a log that may still grow."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


def runs_in(out: Path) -> list[Path]:
    """The run in a folder, or those of an experiment, that have begun."""
    if (out / "config.json").is_file():
        return [out]
    if not out.is_dir():
        return []
    return [child for child in sorted(out.iterdir()) if (child / "config.json").is_file()]


def swept(out: Path) -> bool:
    """Whether every run that a sweep's record names is finished, or failed with no try left. Raises UNREADABLE."""
    told = json.loads((out / "sweep.json").read_text())["runs"]
    return bool(told) and all(run["code"] is not None or finished(out / name) for name, run in told.items())


def decided(out: Path) -> bool:
    """Whether a decision experiment has its result, and began no run again that failed before it."""
    stamp = _stamp(out / "decision.json")
    if stamp is None:
        return False
    begun = [file for file in out.glob("*-s[0-9]*.json") if not finished(out / file.stem)]
    return all(file.stat().st_mtime_ns <= stamp[0] for file in begun)


def settings(run: Path) -> dict[str, Any]:
    """The configuration, and what the run was made with."""
    config = json.loads((run / "config.json").read_text())
    made = run / "provenance.json"
    return config | ({"provenance": json.loads(made.read_text())} if made.is_file() else {})


def label(run: Path, config: Mapping[str, Any]) -> str:
    """The folder's name where it names the seed, as in an experiment; else arm and seed."""
    ending = f"-s{config['seed']}"
    name = run.resolve().name
    return name if name.endswith(ending) else f"{config['arm']}{ending}"


# Sending.


class Feed:
    """One run's way to the tracker, open from the first new row until `finish`."""

    def __init__(self, run: Path, tracker: str, project: str, group: str | None, module: ModuleType) -> None:
        """Raises Busy where another process sends this run, OSError where the folder cannot be written."""
        self.run, self.tracker, self.project, self.group, self.module = run, tracker, project, group, module
        (run / FOLDER).mkdir(exist_ok=True)
        self.file = run / FOLDER / f"{tracker}.json"
        self._open: Any = None
        self._given: dict[str, str] = {}  # what the open tracker took
        self._seen: list[tuple[int, int] | None] = []
        self._lock = os.open(run / FOLDER, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # By project: the run's name in the tracker, and the steps with a digest of their numbers: those `sent` at
            # the tracker's word, and those `pending`, given to a tracker that has not come to its end.
            self.kept: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.is_file() else {}
            self.state = {"pending": {}} | self.kept[project] if project in self.kept else self._new()
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, BlockingIOError):
                raise Busy(f"another process sends {run} to {tracker}") from None
            raise

    def _new(self) -> dict[str, Any]:
        name = re.sub(r"[^\w.-]+", "_", label(self.run, settings(self.run)))
        return {"name": f"{name}-{secrets.token_hex(3)}", "sent": {}, "pending": {}}

    def send(self) -> int:
        """Send what is new, or was given to a tracker that did not come to its end. How many rows went. Raises
        TrackerFailed, OSError, and UNREADABLE where a log is cut back in this moment, or damaged."""
        now = [_stamp(self.run / name) for name in LOGS]
        if now == self._seen:
            return 0
        found = [(str(step), _digest(values), values) for step, values in rows(self.run)]
        known = self.state["pending"] | self.state["sent"]
        last = max(map(int, known), default=-1)
        if any(known.get(step) != digest for step, digest, _ in found if int(step) <= last):
            self.finish()
            self.state, known = self._new(), {}  # it took another way, and what went cannot be taken back
        fresh = [row for row in found if row[0] not in self.state["sent"] | self._given]
        if fresh:
            self._give(fresh, resume="allow" if known else "never")
        self._seen = now
        return len(fresh)

    def _give(self, fresh: Sequence[tuple[str, str, dict[str, float]]], resume: str) -> None:
        """Rows to the tracker, pending before it has them: then nothing that becomes of it loses one."""
        self.state["pending"] |= {step: digest for step, digest, _ in fresh}
        self._keep()
        self._call(lambda: self._opened(resume))
        for step, digest, values in fresh:
            self._call(lambda step=step, values=values: self._open.log(values, step=int(step)))
            self._given[step] = digest

    def finish(self) -> None:
        """Let the tracker send what it still holds; then its rows count as sent. Raises TrackerFailed, OSError."""
        open_, self._open = self._open, None
        given, self._given = self._given, {}
        if open_ is not None:
            self._call(open_.finish)
            self.state["sent"] |= given
            self.state["pending"] = {k: v for k, v in self.state["pending"].items() if k not in given}
            self._keep()

    def close(self) -> None:
        """Finish, and leave the run to others. Raises TrackerFailed, OSError."""
        try:
            self.finish()
        finally:
            os.close(self._lock)

    def _opened(self, resume: str) -> None:
        if self._open is None:
            known = {"project": self.project, "name": self.state["name"], "config": settings(self.run)}
            known |= {"group": self.group} if self.group else {}
            known |= {"id": self.state["name"]} if self.tracker == "wandb" else {}
            # In a context of its own: a tracker that knows one current run finds none there to end.
            self._open = contextvars.Context().run(
                lambda: self.module.init(**known, resume=resume, **OWN[self.tracker])
            )

    def _keep(self) -> None:
        self.kept[self.project] = self.state
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.kept) + "\n")
        os.replace(part, self.file)

    def _call(self, work: Callable[[], object]) -> None:
        try:
            work()
        except (Exception, SystemExit) as error:
            said = " ".join(str(error).split())[:200]
            raise TrackerFailed(f"{type(error).__name__}: {said}" if said else type(error).__name__) from error


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes whenever a file does; None where there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_mtime_ns, stat.st_size


def _digest(values: Mapping[str, float]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def load(tracker: str) -> ModuleType:
    """The tracker's module. Raises TrackerFailed where it is there and does not load."""
    try:
        return importlib.import_module(tracker)
    except (Exception, SystemExit) as error:
        raise TrackerFailed(f"it does not load: {type(error).__name__}: {error}") from error


class Sender:
    """Every run of a folder, as one run of the tracker each; those of an experiment in one group."""

    def __init__(self, out: Path, tracker: str, project: str) -> None:
        self.out, self.tracker, self.project = out, tracker, project
        self.feeds: dict[Path, Feed] = {}
        self.over: set[Path] = set()  # runs of which everything went
        self.misread = 0
        self._module: ModuleType | None = None

    def send(self) -> dict[str, int]:
        """Send what is new of each run; rows that went, by the run's name in the tracker. Raises what `Feed` does."""
        counts = {}
        for run in runs_in(self.out):
            if run in self.over:
                continue
            if run not in self.feeds:
                self._module = self._module or load(self.tracker)
                group = None if run == self.out else self.out.resolve().name
                self.feeds[run] = Feed(run, self.tracker, self.project, group, self._module)
            done, feed = finished(run), self.feeds[run]
            counts[feed.state["name"]] = feed.send()
            if done:
                self.over.add(run)
                self.feeds.pop(run).close()
        return counts

    def poll(self) -> None:
        """`send`, but a log that cannot be read may be one that is cut back in this moment: it is tried again."""
        try:
            self.send()
            self.misread = 0
        except UNREADABLE:
            self.misread += 1
            if self.misread == MISREAD:
                raise

    def complete(self) -> bool:
        """Whether nothing more comes: the run is finished, or the sweep or experiment over, failed runs included."""
        if (self.out / "config.json").is_file():
            return finished(self.out)
        return swept(self.out) if (self.out / "sweep.json").is_file() else decided(self.out)

    def close(self) -> None:
        """Finish what is open. Raises TrackerFailed, OSError."""
        with contextlib.ExitStack() as stack:
            while self.feeds:
                stack.callback(self.feeds.popitem()[1].close)


# Beside a run.


def anchor(out: Path) -> list[int] | None:
    """What tells a folder's run or experiment from a later one in the same place; None where there is none."""
    for name in ("config.json", "plan.json", "sweep.json"):
        with contextlib.suppress(OSError):
            stat = (out / name).stat()
            return [stat.st_mtime_ns, stat.st_ino]
    return None


def main() -> int:
    """Follow the folder that the only argument, a JSON object, names; what is in it while its anchor is `stale` is
    another run's."""
    told = json.loads(sys.argv[1])
    out, tracker, project = Path(told["out"]), told["tracker"], told["project"]
    with contextlib.suppress(OSError):
        os.nice(10)
    stdin, stderr = os.dup(0), os.dup(2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a tracker that asks for a key gets no answer, and fails
    over, where = False, ""
    try:
        while anchor(out) in (None, told["stale"]):
            if over:
                return 0  # nothing has begun
            over = _ended(stdin, START_S)
        (out / FOLDER).mkdir(exist_ok=True)
        log = out / FOLDER / f"{tracker}.log"
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)  # whatever the tracker prints
            os.dup2(file.fileno(), 2)
        where = f"{log} has more; "
        with contextlib.closing(Sender(out, tracker, project)) as sender:
            while not over:
                over = _ended(stdin, POLL_S)
                sender.poll()
            sender.send()
    except Exception as error:  # noqa: BLE001 - nothing of it may reach the run
        traceback.print_exc()
        rest = f"`vgrout track {out} --tracker {tracker} --project {project}` sends the rest"
        with contextlib.suppress(OSError):
            said = f"vgrout: {tracker} failed ({error}), the run goes on without it: {where}{rest}\n"
            os.write(stderr, said.encode())
        return 1
    return 0


def _ended(stream: int, seconds: float) -> bool:
    """Whether a stream ends within so many seconds."""
    return bool(select.select([stream], [], [], seconds)[0])


if __name__ == "__main__":
    sys.exit(main())
