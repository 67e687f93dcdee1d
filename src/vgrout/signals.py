"""Signals as an exception that never splits what belongs together.

    with listening():      SIGTERM, SIGINT and SIGHUP raise Interrupted where they arrive
        with held():       but inside this section at its end
The second signal ends the process at once. Where nobody listens, `held` does nothing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal arrived. No Exception: nobody may take it for a fault of his own. `number` is the signal's."""

    def __init__(self, number: int, said: str = "") -> None:
        super().__init__(said or f"interrupted by {signal.Signals(number).name}")
        self.number = number


class _Bell:
    held = 0  # open `held` sections
    rung = 0  # the signal that came first, 0 for none
    due = False  # Interrupted has still to be raised


def _ring(number: int, frame: object) -> None:
    if _Bell.rung:
        os._exit(128 + number)
    _Bell.rung, _Bell.due = number, True
    _raise_due()


def _raise_due() -> None:
    # `due` stays set: an exception that is raised while a destructor runs is lost, and is raised again later.
    if _Bell.due and not _Bell.held:
        raise Interrupted(_Bell.rung)


@contextmanager
def held() -> Iterator[None]:
    """A section that a signal does not interrupt: Interrupted is raised at its end. Sections nest.

    One that fails raises its own fault and waits with Interrupted: what it was to keep together is not whole, and must
    not be taken for that by who saves the state on a signal.
    """
    _Bell.held += 1
    try:
        yield
    except BaseException:
        _Bell.held -= 1
        raise
    _Bell.held -= 1
    _raise_due()


def waiting() -> int:
    """The signal that came in a section that is held, and is raised at its end; 0: none."""
    return _Bell.rung if _Bell.due else 0


def heard() -> None:
    """Interrupted has been caught: what follows may end in peace. A second signal still ends the process at once."""
    _Bell.due = False


@contextmanager
def listening() -> Iterator[None]:
    """Raise Interrupted when a signal arrives, but for those that are ignored (nohup). Main thread only."""
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _ring) for number in heeded}
    _Bell.rung, _Bell.due = 0, False
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _Bell.rung, _Bell.due = 0, False
