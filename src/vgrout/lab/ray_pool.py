"""Runs on a Ray cluster: one task a run, which is the very command `vgrout train` in a process of its own.

Every machine sees the sweep's folder under the same path and has vgrout installed. Ray starts a task again on another
machine where its own went away; the run goes on from its last checkpoint.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vgrout.lab.jobs import Job, command
from vgrout.types import UserError

MOVES = 3  # times that a run may be started again since its machine went away
HELD = 60  # seconds that a run waits for the process of a lost machine to let go of its folder
PR_SET_PDEATHSIG = 1


def _with_parent() -> None:
    """The process is told to end when the task does that started it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def work(job: Job, out: Path) -> int:
    """Run a job here, to its end. Its exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": str(job.cfg.threads), "MKL_NUM_THREADS": str(job.cfg.threads)}
    deadline = time.monotonic() + HELD
    while True:
        with (out / f"{job.name}.log").open("a") as log:
            begun = log.tell()
            how = {"stdout": log, "stderr": log, "env": environment, "preexec_fn": _with_parent}
            process = subprocess.Popen(command(job, out), **how)
            try:
                code = process.wait()
            except BaseException:  # the task was cancelled: the run keeps its state
                process.terminate()
                process.wait()
                raise
        said = (out / f"{job.name}.log").read_text()[begun:]
        if code == 0 or "is in use by" not in said or time.monotonic() > deadline:
            return code
        time.sleep(2)


def _knock(address: str) -> None:
    """Raises OSError where an address of the form host:port does not answer, ValueError where its port is no number."""
    host, colon, port = address.rpartition(":")
    if colon and "://" not in address:
        socket.create_connection((host, int(port)), timeout=10).close()


class RayPool:
    """The runs of a Ray cluster; it lets wait what it has no room for."""

    workers: int | None = None

    def __init__(self, address: str) -> None:
        """Raises UserError where Ray is not installed, or no cluster answers at `address`."""
        try:
            import ray
        except ImportError:
            raise UserError("the pool ray needs Ray: pip install 'vgrout[ray]'") from None
        self.ray = ray
        if not ray.is_initialized():
            try:
                _knock(address)  # Ray itself would ask for minutes
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            except (OSError, ValueError, RuntimeError) as error:
                said = " ".join(str(error).split())[:160]
                raise UserError(f"no Ray cluster at {address}: {said}; `ray start --head` makes one") from None
        self.remote = ray.remote(work)

    def start(self, job: Job, out: Path) -> Any:
        return self.remote.options(num_cpus=job.cfg.threads, max_retries=MOVES, name=job.name).remote(job, out)

    def poll(self, started: Any) -> int | None:
        done, _ = self.ray.wait([started], timeout=0)
        if not done:
            return None
        try:
            return self.ray.get(started)
        except self.ray.exceptions.RayError:  # its machines went away once too often, or it was cancelled
            return 1

    def stop(self, started: Sequence[Any], number: int) -> None:
        for task in started:
            self.ray.cancel(task, force=False)
        self.ray.wait(list(started), num_returns=len(started), timeout=HELD) if started else None
