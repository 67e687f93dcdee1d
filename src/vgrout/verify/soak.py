"""A long run that must not grow: memory, descriptors, threads and temporary files, step by step.

python -m vgrout.verify.soak [--steps 1000] [--start micro] [--arm routeV] [--out DIR] [--curve-to FILE]
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from unittest.mock import patch

import tyro
from rich.console import Console
from rich.table import Table

from vgrout.config import preset
from vgrout.lab.record import Recorder
from vgrout.lab.run import run

ROWS = 11  # of the printed curve
HEADS = ("step", "MB", "MB allocated", "objects", "MB of children", "descriptors", "threads", "temporary files")
GROWTH = 0.01  # that still counts as flat
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Use:
    """What the process and its children hold after a step."""

    step: int
    megabytes: float  # resident, of this process
    allocated: float  # megabytes that glibc's malloc has given out and not had back, of this process
    objects: int  # that Python's collector tracks
    children: float  # resident megabytes of its children
    descriptors: int
    threads: int
    temporary: int  # files and folders in the temporary folder, which is this run's own


def _resident(pid: str) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 1e6


class _Malloc(ctypes.Structure):
    """glibc's struct mallinfo2: bytes and counts over all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


_libc = ctypes.CDLL(None)


def _allocated() -> float:
    _libc.mallinfo2.restype = _Malloc
    held = _libc.mallinfo2()
    return (held.uordblks + held.hblkhd) / 1e6


def use(step: int) -> Use:
    """Of now. Linux with glibc >= 2.33 only."""
    children = [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    return Use(
        step=step,
        megabytes=_resident("self"),
        allocated=_allocated(),
        objects=len(gc.get_objects()),
        children=sum(map(_resident, children)),
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        temporary=sum(1 for _ in Path(tempfile.gettempdir()).rglob("*")),
    )


def grown(curve: Sequence[Use]) -> list[str]:
    """What the last tenth of a curve holds more of than its second tenth, by the median."""
    tenth = max(1, len(curve) // 10)
    out = []
    for name in (field.name for field in fields(Use) if field.name != "step"):
        early, late = (median(getattr(u, name) for u in part) for part in (curve[tenth : 2 * tenth], curve[-tenth:]))
        if late > (1 + GROWTH) * early:
            out.append(f"{name} {early:.0f} to {late:.0f}")
    return out


def soak(
    steps: int = 1000, start: str = "micro", arm: str = "routeV", out: Path | None = None, curve_to: Path | None = None
) -> int:
    """Train, and print what the process holds. Returns 1 when something grew.

    Args:
        steps: Steps of training.
        start: Preset of the settings.
        arm: Intervention.
        out: Keep the run here; a temporary folder otherwise.
        curve_to: Also write what was held after every step to this file, one JSON object a line.
    """
    curve: list[Use] = []
    record = Recorder.step

    def watched(self: Recorder, *seen) -> None:
        record(self, *seen)
        curve.append(use(len(curve) + 1))
        if curve_to is not None:
            with curve_to.open("a") as file:
                file.write(json.dumps(asdict(curve[-1])) + "\n")

    with tempfile.TemporaryDirectory() as folder, patch.object(Recorder, "step", watched):
        own = Path(folder) / "tmp"
        own.mkdir()
        for path in (own.parent, own):  # programs in the sandbox run under another user
            path.chmod(0o711)
        tempfile.tempdir = str(own)
        run(replace(preset(start), arm=arm, steps=steps), out or Path(folder) / "run")
    table = Table(*HEADS)
    for i in sorted({round(k * (len(curve) - 1) / (ROWS - 1)) for k in range(ROWS)}):
        table.add_row(*(f"{value:.0f}" for value in vars(curve[i]).values()))
    console = Console()
    console.print(table)
    wrong = grown(curve)
    console.print(f"grew from the second tenth to the last: {', '.join(wrong) or 'nothing'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(tyro.cli(soak))
