"""`vgrout sweep`: arms x seeds x settings as runs of their own, here, on a Ray cluster, or as a list of commands.

Finished runs are skipped. A run that failed is tried again, unless its settings are at fault; one whose machine went
away goes on from its last checkpoint. sweep.json says of every run that was ever asked for in the folder how it ended,
and how often it was tried; of one that is still to come the exit code is null.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console

from vgrout.config import Config, mistyped
from vgrout.lab.checkpoint import replace_file
from vgrout.lab.decide import check_runs, make_jobs
from vgrout.lab.evaluate import HEADLINE
from vgrout.lab.jobs import Job, Local, Pool, command, run_jobs
from vgrout.lab.record import check_folder, claim_folder, finished, one_writer
from vgrout.lab.run import check
from vgrout.lab.tables import number_table, print_wide
from vgrout.types import UserError

Told = dict[str, dict[str, int | None]]  # exit code and number of tries by the run's name

RECORD = "sweep.json"
POOLS = ("local", "ray")
WRONG = 2  # exit code of a run whose settings are at fault: another try changes nothing
NAMED = ("arm", "seed", "yoke")  # settings that the sweep itself decides


def settings(given: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of the values in `NAME=VALUE,VALUE...`. Raises UserError."""
    hints, axes = get_type_hints(Config), []
    known = {field.name for field in fields(Config)} - {*NAMED}
    for text in given:
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in known:
            raise UserError(f"--over {text}: give NAME=VALUE,VALUE with the name of a setting, see vgrout train --help")
        read = [_value(value.strip()) for value in values.split(",")]
        for value in read:
            if wrong := mistyped(value, hints[name]):
                raise UserError(f"--over {name}: {value!r}: {wrong}")
        axes.append([(name, value) for value in read])
    names = [axis[0][0] for axis in axes]
    if len(set(names)) < len(names):
        raise UserError(f"--over names a setting twice: {', '.join(names)}")
    return [dict(chosen) for chosen in product(*axes)]


def _value(text: str) -> Any:
    """A number, true, false, null, or else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def called(changes: Mapping[str, Any]) -> str:
    """What the names of runs with these settings end in, before the seed."""
    return "".join(f"@{name}={re.sub(r'[^A-Za-z0-9_.+-]', '-', str(value))}" for name, value in changes.items())


def sweep_jobs(base: Config, arms: Sequence[str], seeds: Sequence[int], over: Sequence[str], out: Path) -> list[Job]:
    """Every run. One that follows another follows that of its own settings. Raises UserError."""
    jobs = []
    for changes in settings(over):
        end = called(changes)
        for job in make_jobs(replace(base, **changes), arms, seeds, out):
            after = f"{job.after.removesuffix(f'-s{job.seed}')}{end}-s{job.seed}" if job.after else ""
            cfg = replace(job.cfg, **changes, **({"yoke": str(out / after)} if after else {}))
            check(cfg)
            jobs.append(replace(job, cfg=cfg, label=f"{job.label or job.arm}{end}", after=after))
    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"runs would share a name: {', '.join(twice)}")
    return jobs


def commands(jobs: Sequence[Job], out: Path) -> list[str]:
    """A line of shell for each run that is not finished, in an order in which no run comes before one it follows."""
    return [shlex.join(command(job, out)) for job in sorted(jobs, key=lambda j: bool(j.after)) if not _done(job, out)]


def _done(job: Job, out: Path) -> bool:
    return finished(out / job.name)


def untried(jobs: Sequence[Job], out: Path) -> Told:
    """What is known of the runs before any is tried."""
    return {job.name: {"code": 0 if _done(job, out) else None, "tries": 0} for job in jobs}


def tried(
    jobs: Sequence[Job], out: Path, pool: Pool, retries: int, console: Console, keep: Callable[[Told], object]
) -> Told:
    """Run what is not finished, what fails up to `retries` times more. Exit code and number of tries by name, which
    `keep` gets before each round as well; the code is None while a try is left."""
    told = untried(jobs, out)
    left = [job for job in jobs if not _done(job, out)]
    for _ in range(1 + retries):
        if not left:
            break
        for job in left:
            told[job.name] = {"code": None, "tries": told[job.name]["tries"] + 1}
        keep(told)
        # Jobs that are finished stand for those that others follow.
        codes = run_jobs([job for job in jobs if _done(job, out) or job in left], out, pool, console)
        for job in left:
            told[job.name]["code"] = codes.get(job.name, 1)
        left = [job for job in left if told[job.name]["code"] not in (0, WRONG)]
    keep(told)
    return told


def recorded(out: Path) -> Told:
    """The runs of the folder's record; none where there is no record. Raises UserError."""
    try:
        told = json.loads((out / RECORD).read_text()).get("runs", {})
        return {name: {"code": run["code"], "tries": int(run["tries"])} for name, run in told.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"cannot read {out / RECORD}: write {{}} into it to go on without what it said") from None


def record(told: Told, earlier: Told, out: Path) -> None:
    """Keep what is known of the runs, with the tries of earlier calls and the runs that only those had."""
    now = {
        name: {"code": run["code"], "tries": run["tries"] + earlier.get(name, {"tries": 0})["tries"]}
        for name, run in told.items()
    }
    replace_file(out / RECORD, json.dumps({"runs": {**earlier, **now}}, indent=1) + "\n")


def table(jobs: Sequence[Job], out: Path, told: Told):
    """How every run ended, and what it ships."""
    rows = []
    for job in jobs:
        code, tries = told[job.name]["code"], told[job.name]["tries"]
        state = "finished" if _done(job, out) else f"failed with exit code {code}, see {job.name}.log"
        rows.append(
            [job.name, state if tries or not _done(job, out) else "was finished", str(tries), *_ships(job, out)]
        )
    caption = "% of rollouts on held-out problems and markers, as shipped. `vgrout report` shows more."
    return number_table("sweep", caption, ("run", "state", "tries", "hack", "solve", "reward"), rows, 2)


def _ships(job: Job, out: Path) -> list[str]:
    if not _done(job, out):
        return ["-"] * 3
    cell = json.loads((out / job.name / "eval.json").read_text())["cells"][HEADLINE]
    rates = [f"{100 * cell[what]['mean']:.0f}" if what in cell else "-" for what in ("hack", "solve")]
    return [*rates, f"{cell['reward']['mean']:.2f}" if cell.get("reward") else "-"]


def sweep(
    base: Config,
    arms: Sequence[str],
    seeds: Sequence[int],
    over: Sequence[str],
    out: Path,
    console: Console,
    *,
    pool: str = "local",
    workers: int = 2,
    address: str = "auto",
    retries: int = 1,
    only_print: bool = False,
) -> int:
    """Run the sweep, or what is left of it. Returns 0 when every run has finished, 1 otherwise. Raises UserError."""
    if pool not in POOLS:
        raise UserError(f"unknown pool {pool!r}: choose one of {', '.join(POOLS)}")
    if workers < 1 or retries < 0:
        raise UserError("workers is a positive whole number, retries no negative one")
    jobs = sweep_jobs(base, arms, seeds, over, out.absolute())
    out = out.absolute()  # a machine of a cluster has a working folder of its own
    if not (out / RECORD).is_file():
        check_folder(out, force=False)
        claim_folder(out, force=False)
        replace_file(out / RECORD, json.dumps({"runs": {}}) + "\n")
    with one_writer(out):
        check_runs(jobs, out)
        earlier = recorded(out)
        if only_print:
            record(untried(jobs, out), earlier, out)
            for job in jobs:
                if not _done(job, out):
                    replace_file(out / f"{job.name}.json", job.cfg.to_json())
            for line in commands(jobs, out):
                print(line)
            return 0
        told = tried(jobs, out, _pool(pool, workers, address), retries, console, lambda now: record(now, earlier, out))
    print_wide(table(jobs, out, told), console)
    return 0 if all(_done(job, out) for job in jobs) else 1


def _pool(name: str, workers: int, address: str) -> Pool:
    if name == "local":
        return Local(workers)
    from vgrout.lab.ray_pool import RayPool

    return RayPool(address)
