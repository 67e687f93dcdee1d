"""Answers of a judge on disk: JSON lines, one for each question, that several processes may add to at once.

What stands first under a question holds for all who ask it, so that runs that share a file, and a run that goes on
where it was stopped, are given the same answers. A line is added under a lock, in one write. A damaged one is left out
with a warning, and its question is asked again: it holds nothing but a paid answer, and no damage to one place of a
line turns one answer into the other (`true` and `false` differ in more, and another question's key is nobody's).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vgrout.faults import warn
from vgrout.types import UserError


class Answers:
    """Answers by key, the hex SHA-256 of a question; without a path, of this process only."""

    def __init__(self, path: Path | None) -> None:
        """Raises UserError where the file cannot be read and written."""
        self.path, self.lost = path, 0
        self._known: dict[str, bool] = {}
        self._file, self._read = None, 0  # bytes that have been read: whole lines
        if path is not None:
            try:
                if path.exists() and not path.is_file():  # a device may have no end
                    raise UserError(f"cannot keep the judge's answers in {path}: it is no file")
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("a+b", buffering=0)
            except OSError as error:
                raise UserError(f"cannot write the judge's answers to {path}: {error.strerror}") from None
            self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> bool:
        return self._known[key]

    def refresh(self) -> None:
        """Read what others have added. A last line without its break is still being written, or torn."""
        if self._file is None:
            return
        self._file.seek(self._read)
        whole, end, _ = self._file.read().rpartition(b"\n")
        self._read += len(whole) + len(end)
        damaged = 0
        for line in whole.split(b"\n"):
            answer = _parse(line)
            if answer is None:
                damaged += bool(line)
            else:
                self._known.setdefault(*answer)
        if damaged:
            warn(f"{self.path}: {damaged} damaged lines are left out; what they answered is asked again")

    def add(self, key: str, hack: bool, facts: Mapping[str, Any]) -> bool:
        """Keep an answer, unless there is one already. Returns the one that holds.

        On a full disk it is kept in memory only, with one warning and a count.
        """
        if self._file is None:
            return self._known.setdefault(key, hack)
        with self._locked():
            self.refresh()
            if key not in self._known:
                self._append((json.dumps({"key": key, "hack": hack, **facts}) + "\n").encode())
        return self._known.setdefault(key, hack)

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size > self._read:  # a torn line, since nobody else writes: it must not swallow this one
            line = b"\n" + line
        try:
            if self._file.write(line) != len(line):
                raise OSError("no space left for a whole line")
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(size)
            self.lost += 1
            if self.lost == 1:
                warn(f"cannot write {self.path}: {error.strerror or error}; answers are lost on disk, and counted")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def sync(self) -> None:
        """See that what was added survives the loss of power."""
        if self._file is not None:
            with suppress(OSError):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _parse(line: bytes) -> tuple[str, bool] | None:
    """Key and answer of a line; None for a damaged one."""
    try:
        row = json.loads(line)
        key, hack = row["key"], row["hack"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    good = isinstance(key, str) and re.fullmatch(r"[0-9a-f]{64}", key) and type(hack) is bool
    return (key, hack) if good else None
