"""`vgrout track`, and `--track` of commands that train: the tracker's reader in this process, or in one beside it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from vgrout.faults import warn
from vgrout.lab.tracking import POLL_S, UNREADABLE, Busy, Sender, TrackerFailed, anchor, runs_in
from vgrout.signals import Interrupted
from vgrout.types import RunFailed, UserError

INSTALL = {"trackio": "pip install 'vgrout[track]'", "wandb": "pip install wandb"}
LEFT_S, STOPPED_S = 30.0, 10.0  # that a tracker gets for its last rows once the command is done, or was stopped


def check_tracker(tracker: str) -> None:
    """Raises UserError where the tracker is not installed. A folder of its name, as wandb makes, is no module."""
    spec = find_spec(tracker)
    if spec is None or spec.origin is None:
        raise UserError(f"the tracker {tracker} is not installed: {INSTALL[tracker]}")


def track(outs: Sequence[Path], tracker: str, project: str, console: Console, *, live: bool = False) -> None:
    """Send what each run or experiment has, and with `live` what comes until it is finished.

    Raises UserError where there is no run, or it is damaged, or another process sends it; RunFailed where the tracker
    fails.
    """
    check_tracker(tracker)
    for out in outs:
        if not live and not runs_in(out):
            raise UserError(f"no run in {out}")
    try:
        _track(outs, tracker, project, console, live)
    except TrackerFailed as error:
        raise RunFailed(f"{tracker} failed: {error}; the same command sends the rest") from error
    except Busy as error:
        raise UserError(str(error)) from None
    except (OSError, *UNREADABLE) as error:
        raise UserError(f"cannot send {', '.join(map(str, outs))}: {type(error).__name__}: {error}") from error


def _track(outs: Sequence[Path], tracker: str, project: str, console: Console, live: bool) -> None:
    with contextlib.ExitStack() as stack:
        senders = [stack.enter_context(contextlib.closing(Sender(out, tracker, project))) for out in outs]
        for sender in senders:
            for name, sent in sender.send().items():
                console.print(f"{name}: {sent} new rows", markup=False, highlight=False)
        done = False
        while live and not done:
            done = all(sender.complete() for sender in senders)
            for sender in senders:
                sender.poll()
            time.sleep(0 if done else POLL_S)


@contextlib.contextmanager
def beside(tracker: str | None, out: Path, project: str, *, goes_on: bool) -> Iterator[None]:
    """Track what happens in `out` by a process of its own while the body runs; nothing where `tracker` is None.

    `goes_on`: what is in `out` now is part of it. Raises UserError where the tracker is not installed, before anything
    starts. Nothing else that becomes of the tracker changes what the body does, or its exit code.
    """
    if tracker is None:
        yield
        return
    check_tracker(tracker)
    told = {"out": str(out), "tracker": tracker, "project": project, "stale": None if goes_on else anchor(out)}
    command = [sys.executable, "-m", "vgrout.lab.tracking", json.dumps(told)]
    try:  # a group of its own: a terminal's Ctrl-C is not for it
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0)
    except OSError as error:
        warn(f"{tracker} could not be started: {error.strerror}; the run goes on without it")
        yield
        return
    patience = STOPPED_S
    try:
        yield
        patience = LEFT_S
    finally:
        _leave(
            process, tracker, f"`vgrout track {out} --tracker {tracker} --project {project}` sends the rest", patience
        )


def _leave(process: subprocess.Popen, tracker: str, rest: str, patience: float) -> None:
    """Let the process send what is left, for so many seconds. It says itself what the tracker raised."""
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        code = process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        warn(f"{tracker} took longer than {patience:.0f} s and was stopped: {rest}")
        return
    except Interrupted:
        process.kill()
        raise
    if code not in (0, 1):
        said = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        warn(f"{tracker} ended with {said}: {rest}")
