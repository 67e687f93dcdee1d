"""Many runs as processes of their own: which are left, in which order, where they run, how they get on.

Every run is the very command `vgrout train` in a process of its own, so a failed run never stops the others and any can
be repeated alone.
"""

from __future__ import annotations

import heapq
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from vgrout.arms import ARMS
from vgrout.config import Config
from vgrout.lab.evaluate import CELLS, NO_ORACLE, SMALL
from vgrout.lab.record import finished, last_record
from vgrout.signals import Interrupted, held

BASE = "base model"
ORDERS = 500  # orders of the runs that are compared
ROLLOUT_S, SCORE_S = 0.021, 0.013  # per rollout, one thread of the machine of docs/performance.md


@dataclass(frozen=True)
class Job:
    """One run of the experiment."""

    arm: str
    seed: int
    cfg: Config
    label: str = ""  # names the run where the arm alone would not
    after: str = ""  # the run whose counts this one follows

    @property
    def name(self) -> str:
        return f"{self.label or self.arm}-s{self.seed}"

    @property
    def minutes(self) -> float:
        """About how long it takes on the machine of docs/performance.md."""
        cfg = self.cfg
        rollouts = cfg.steps * cfg.prompts * cfg.group
        small = (cfg.steps - 1) // cfg.eval_every * len(SMALL) * cfg.eval_small if cfg.eval_every else 0
        last = (len(CELLS) + 2 * max(0, cfg.eval_scales - 1)) * cfg.eval_rollouts
        return ((rollouts + small + last) * ROLLOUT_S + rollouts * SCORE_S * ARMS[self.arm].scores) / 60


def in_order(jobs: Sequence[Job], workers: int) -> list[Job]:
    """The jobs in the order in which the last worker ends soonest, by their estimates, among some hundred orders: the
    long ones first, and shuffles. A free worker takes the next job that waits for no other, the base model's evaluation
    last."""

    longest = sorted(jobs, key=lambda job: -job.minutes)
    base = max((len(CELLS) * job.cfg.eval_rollouts * ROLLOUT_S / 60 for job in jobs), default=0.0)
    names = {job.name for job in jobs}

    def end(order: Sequence[Job]) -> float:
        todo, running, done, now = list(order), [], {"", *(j.after for j in order if j.after not in names)}, 0.0
        while todo or running:
            while len(running) < workers and (job := next((j for j in todo if j.after in done), None)):
                todo.remove(job)
                heapq.heappush(running, (now + job.minutes, job.name))
            if not todo and len(running) < workers:
                heapq.heappush(running, (now + base, BASE))
                return max(running)[0]
            now, name = heapq.heappop(running)
            done.add(name)
        return now

    dice = random.Random(0)
    return min([longest, *(dice.sample(longest, len(longest)) for _ in range(ORDERS))], key=end)


def _done(job: Job, out: Path) -> int:
    """Steps of a run that are in its log."""
    last = last_record(out / job.name / "steps.jsonl")
    return last["step"] + 1 if last else 0


def _note(job: Job, out: Path, first: int, started: float) -> tuple[int, str]:
    """Steps done, and a word on a run that went on after step `first` at the time `started`."""
    last = last_record(out / job.name / "steps.jsonl")
    done = last["step"] + 1 if last else 0
    if done <= first:
        return done, "starting"
    if done == job.cfg.steps:
        return done, "evaluating"
    left = (time.monotonic() - started) / (done - first) * (job.cfg.steps - done)
    zones = "/".join(f"{last[z] or 0:.2f}" for z in ("keep", "absorb", "route"))
    truth = f"hack {last['m_hack'] or 0:.2f} solve {last['m_solve'] or 0:.2f}" if "m_hack" in last else NO_ORACLE
    note = f"reward {last['reward'] or 0:.2f} {truth} zones {zones}"
    return done, f"{note} {left / 60:.0f} min left"


@runtime_checkable
class Pool(Protocol):
    """Where runs are executed, `workers` at a time; None: the pool itself lets wait what it has no room for."""

    workers: int | None

    def start(self, job: Job, out: Path) -> Any:
        """Start a run, or go on with it. What comes back stands for it."""

    def poll(self, started: Any) -> int | None:
        """The run's exit code; None before it has ended."""

    def stop(self, started: Sequence[Any], number: int) -> None:
        """Pass a signal on to runs, and wait until they have ended."""


class Local:
    """Processes of this machine, one CPU thread each."""

    def __init__(self, workers: int) -> None:
        self.workers: int | None = workers

    def start(self, job: Job, out: Path) -> tuple[subprocess.Popen, IO[str]]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        log = (out / f"{job.name}.log").open("a")
        # A group of its own: a terminal's Ctrl-C comes from here, and once.
        return subprocess.Popen(command(job, out), stdout=log, stderr=log, env=environment, process_group=0), log

    def poll(self, started: tuple[subprocess.Popen, IO[str]]) -> int | None:
        process, log = started
        code = process.poll()
        if code is not None:
            log.close()
        return code

    def stop(self, started: Sequence[tuple[subprocess.Popen, IO[str]]], number: int) -> None:
        for process, _ in started:
            process.send_signal(number)
        for process, _ in started:
            process.wait()


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    pool: Pool,
    console: Console,
    idle: Callable[[], object] = lambda: None,
    done: Callable[[str], int] = lambda name: 0,
) -> dict[str, int]:
    """Run all jobs that are not finished in a pool, with live progress. Exit code of each by name. `idle` is called
    once, when the pool has nothing left to take; `done` with the name of each run that finished: it says whether what
    was to be done then failed.

    A signal goes on to the runs, which keep their state; then Interrupted is raised again.
    """
    codes = {"": 0} | {job.name: 0 for job in jobs if finished(out / job.name)}
    todo, live = [job for job in jobs if job.name not in codes], {}
    called = False
    todo = in_order(todo, pool.workers or len(todo) or 1)
    columns = (
        TextColumn("{task.description:>16}"),
        BarColumn(20),
        TextColumn("{task.completed}/{task.total}"),
    )
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as bars:
        tasks = {j.name: bars.add_task(j.name, total=j.cfg.steps, note="waiting") for j in todo}

        def room() -> bool:
            return pool.workers is None or len(live) < pool.workers

        try:
            while todo or live:
                while room() and (job := next((j for j in todo if codes.get(j.after, 1) == 0), None)):
                    todo.remove(job)
                    (out / f"{job.name}.json").write_text(job.cfg.to_json())
                    begun = _done(job, out), time.monotonic()
                    with held():  # no process without its entry
                        live[job.name] = (job, pool.start(job, out), begun)
                for job in [j for j in todo if codes.get(j.after, 0) != 0]:  # what it follows has failed
                    todo.remove(job)
                    codes[job.name] = 1
                    (out / f"{job.name}.log").write_text(f"not run: it follows {job.after}, which failed\n")
                    bars.update(tasks[job.name], note=f"not run: {job.after} failed")
                if not todo and room() and not called:
                    called = True
                    idle()
                time.sleep(1.0)
                for name, (job, started, begun) in list(live.items()):
                    steps, note = _note(job, out, *begun)
                    bars.update(tasks[name], completed=steps, note=note)
                    code = pool.poll(started)
                    if code is None:
                        continue
                    codes[name] = code
                    note = "done" if not codes[name] else f"failed with exit code {codes[name]}, see {name}.log"
                    bars.update(tasks[name], note=note)
                    del live[name]
                    if not codes[name]:
                        codes[name] = done(name)
        except BaseException as error:
            number = error.number if isinstance(error, Interrupted) else signal.SIGTERM
            pool.stop([started for _, started, _ in live.values()], number)
            raise
    del codes[""]
    return codes


def command(job: Job, out: Path) -> list[str]:
    """The command of a run: go on with what is there of it, or start it from the configuration that lies beside."""
    if (out / job.name / "config.json").is_file():
        how = ["--resume", str(out / job.name)]
    else:  # without a configuration the folder of an earlier attempt holds nothing yet: it is replaced
        how = ["--config", str(out / f"{job.name}.json"), "--out", str(out / job.name), "--force"]
    return [sys.executable, "-m", "vgrout", "train", *how]
