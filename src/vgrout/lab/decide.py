"""The decision experiment: arms x seeds as processes side by side, one evaluation, one table.

The same command on a folder with unfinished runs goes on with those.
decision.json holds no clock, host or path: the same command on the same machine gives the same bytes. Seconds are in
timing.json.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from vgrout.arms import ARMS
from vgrout.config import Config
from vgrout.faults import warn
from vgrout.lab.archive import MEASURES, database, measured, pack, read_record, unpack
from vgrout.lab.checkpoint import NEWEST, differences, replace_file
from vgrout.lab.evaluate import CELLS, HEADLINE, NO_ORACLE, final, size_note, summaries
from vgrout.lab.given import LEADER, absent, access, requests
from vgrout.lab.grid import SETS, named
from vgrout.lab.jobs import BASE, Job, Local, run_jobs
from vgrout.lab.prereg import Decision as Preregistered
from vgrout.lab.record import check_folder, claim_folder, finished, one_writer, read_jsonl, weights_sha256
from vgrout.lab.run import MICRO, check, header, pairs_facts, pairs_note, sandbox_note, workshop
from vgrout.lab.source import tests_digest
from vgrout.lab.tables import number_table, print_wide
from vgrout.signals import Interrupted
from vgrout.types import RunFailed, UserError

TESTS = "tests_sha256"  # of the code of the tests, stored with the decision
PLAN, DECISION, BASE_FILE = "plan.json", "decision.toml", "base.json"
ADAPTER_MB, CHECKPOINT_MB, ROLLOUT_MB = 2.0, 4.0, 0.0007


def left_out(
    base: Config, arms: Sequence[str], out: Path, seeds: Sequence[int] = (), *, goes_on: bool = False
) -> dict[str, str]:
    """Of the arms that only a set names: those that cannot run here, and why. Raises UserError where none can.

    An arm of which every seed has finished in an experiment that goes on needs nothing any more.
    """
    chosen, spoken = named(arms), {v.label for v in named(name for name in arms if name not in SETS)}
    why: dict[str, str] = {}
    for variant in chosen:
        if variant.label in spoken:
            continue
        try:
            job = Job(variant.arm, 0, variant.config(base, 0), variant.label)
            job = _yoked(job, out) if any(v.label == LEADER for v in chosen) else job
            check(job.cfg)
            done = goes_on and all(finished(out / f"{variant.label}-s{seed}") for seed in seeds)
            reason = "" if done else absent(job.cfg)
        except UserError as error:
            reason = str(error)
        if reason:
            why[variant.label] = reason
    if chosen and len(why) == len(chosen):
        raise UserError(next(iter(why.values())))
    return why


def make_jobs(
    base: Config, arms: Sequence[str], seeds: Sequence[int], out: Path, without: Collection[str] = ()
) -> list[Job]:
    """Arms x seeds, in `out`. Arms that follow a routeV run follow that of their seed. Raises UserError for anything
    unknown or doubled."""
    chosen = [variant for variant in named(arms) if variant.label not in without]
    labels = [variant.label for variant in chosen]
    for what, given in (("arm", labels), ("seed", seeds)):
        if not given:
            raise UserError(f"no {what} given")
        if len(set(given)) < len(given):
            raise UserError(f"a {what} is named twice: {', '.join(map(str, given))}")
    jobs = [Job(v.arm, seed, v.config(base, seed), v.label) for seed in seeds for v in chosen]
    jobs = [_yoked(job, out) for job in jobs] if LEADER in labels else jobs
    for job in jobs:
        check(job.cfg)
    return jobs


def _yoked(job: Job, out: Path) -> Job:
    """The job, bound to the routeV run of its seed where it follows one."""
    if "yoke" not in (*ARMS[job.arm].needs, *ARMS[job.arm].takes):
        return job
    leader = f"{LEADER}-s{job.seed}"
    return replace(job, cfg=replace(job.cfg, yoke=str(out / leader)), after=leader)


def plan_table(jobs: Sequence[Job], workers: int, unable: Mapping[str, str] | None = None) -> Table:
    """Runs, minutes and disk of the experiment before it starts; and which arms are `unable` to run, and why."""
    table = Table(title=f"{len(jobs)} runs, {workers} at a time", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    widest = max(len(job.name) for job in jobs)
    for column in ("run", "access", "oracle", "steps", "rollouts", "about minutes", "about MB"):
        table.add_column(
            column, min_width=widest if column == "run" else len(column), justify="left" if column == "run" else "right"
        )
    minutes = megabytes = 0.0
    for job in jobs:
        arm, cfg, own = ARMS[job.arm], job.cfg, job.minutes
        rollouts, last = cfg.steps * cfg.prompts * cfg.group, len(CELLS) * cfg.eval_rollouts
        kept = NEWEST + (cfg.steps // cfg.checkpoint_keep if cfg.checkpoint_keep else 0)
        size = ADAPTER_MB + kept * CHECKPOINT_MB + (rollouts + last) * ROLLOUT_MB
        minutes, megabytes = minutes + own, megabytes + size
        table.add_row(
            job.name,
            access(cfg),
            "reads" if arm.reads_oracle else "-",
            str(job.cfg.steps),
            str(rollouts),
            f"{own:.0f}",
            f"{size:.0f}",
        )
    notes = [f"about {minutes / workers:.0f} minutes and {megabytes:.0f} MB in all"]
    notes += [f"not run: {arm} ({why})" for arm, why in (unable or {}).items()]
    table.caption = "\n".join(notes)
    return table


def _mean(values) -> float | None:
    known = [v for v in values if v is not None]
    return round(float(np.mean(known)), 6) if known else None


COSTS = ("tokens", "extra_forward", "extra_backward", "judged")  # of the steps: tokens, rows through the model, texts


def summarise(job: Job, folder: Path) -> dict:
    """What a finished run contributes to the table."""
    cells = json.loads((folder / "eval.json").read_text())["cells"]
    steps = read_jsonl(folder / "steps.jsonl")
    arm = ARMS[job.arm]
    late = steps[-max(1, len(steps) // 5) :]
    return {
        "arm": job.arm,
        "label": job.label or job.arm,
        "seed": job.seed,
        "access": access(job.cfg),
        "reads_oracle": arm.reads_oracle,
        "cells": cells,
        "auroc": _mean(s.get("m_auroc") for s in steps),
        "f05": _mean(s.get("m_f05") for s in steps),
        "qmass": _mean(s["qmass"] for s in steps),
        "zones": {z: _mean(s[z] for s in steps) for z in ("keep", "absorb", "route")},
        "train_hack_late": _mean(s.get("m_hack") for s in late),
        "train_solve_late": _mean(s.get("m_solve") for s in late),
        "cost": {what: sum(s.get(what) or 0 for s in steps) for what in COSTS},
        "weights_sha256": weights_sha256(folder),
    }


def decision(
    jobs: Sequence[Job], out: Path, base: Config, base_cells: dict | None, provenance: Mapping[str, Any]
) -> dict:
    """The content of decision.json."""
    rows, missing = [], [] if base_cells else [BASE]
    for job in jobs:
        folder = out / job.name
        if finished(folder):
            rows.append(summarise(job, folder))
        else:
            missing.append(job.name)
    drifted = [job.name for job in jobs if finished(out / job.name) and _drifted(job, out, base, provenance)]
    shared = {k: v for k, v in asdict(base).items() if k not in ("arm", "seed")}
    return {
        "config": shared,
        "provenance": dict(provenance),
        "headline": HEADLINE,
        "base": base_cells,
        "runs": rows,
        "not_finished": missing,
        **({"drifted": drifted} if drifted else {}),
    }


def _drifted(job: Job, out: Path, base: Config, provenance: Mapping[str, Any]) -> bool:
    """Whether a run was made with something else than the experiment, or that changed while it was made. Its pairs are
    its own where its settings name others."""
    own = json.loads((out / job.name / "provenance.json").read_text())
    told = {**provenance, **(pairs_facts(job.cfg) if job.cfg.pairs != base.pairs else {})}
    return "drift" in own or any(own.get(key) != value for key, value in told.items())


COLUMNS = ("arm", "seed", "access", "full hack", "full solve", "deploy hack", "deploy solve", "hint-free solve")
MEASURED = ("gate AUROC (measured)", "qmass", "seconds", "extra passes")


def _reward(cell: dict) -> str:
    low, mean, high = (f"{cell['reward'][key]:.2f}" for key in ("low", "mean", "high"))
    return f"{mean} [{low}, {high}]"


def _percent(cell: dict) -> str:
    return f"{100 * cell['mean']:.0f} [{100 * cell['low']:.0f}, {100 * cell['high']:.0f}]"


def _rates(cells: dict) -> list[str]:
    if "hack" not in cells[HEADLINE]:
        return [*(_reward(cells[c]) for c in ("heldout_full", "heldout_deploy")), *[NO_ORACLE] * 5]
    both = [_percent(cells[c][k]) for c in ("heldout_full", "heldout_deploy") for k in ("hack", "solve")]
    return [*both, _percent(cells["hintfree_deploy"]["solve"])]


def passes(cost: Mapping[str, int]) -> str:
    """Rows that ran through the model beyond vanilla GRPO, in thousands: forward, and backward where it differs."""
    forward, backward = (cost[f"extra_{way}"] for way in ("forward", "backward"))
    if not forward and not backward:
        return "-"
    return f"{forward / 1000:.1f}k" + ("" if forward == backward else f" / {backward / 1000:.1f}k")


def _judged(result: dict) -> bool:
    """Whether any run had texts judged: the table says then how many requests that took."""
    return any(run["cost"].get("judged") for run in result["runs"])


def _requests(counts: Mapping[str, int] | None) -> str:
    """Requests to a judge, and how many of them brought no answer."""
    if not counts:
        return "-"
    return f"{counts['calls']}" + (f" ({counts['failures']} failed)" if counts["failures"] else "")


def result_rows(result: dict, timing: Mapping[str, Any]) -> tuple[list[list[str]], str]:
    """The table's rows, and the notes that belong under it. `timing` is timing.json: seconds and requests by run."""
    rows = []
    seconds, requests = timing.get("runs", {}), timing.get("judge", {})
    judged = _judged(result)
    if result["base"]:
        rows.append([BASE, "-", "-", *_rates(result["base"]["cells"]), "-", "-", "-", "-", *["-"] * judged])
    for run in result["runs"]:
        name = f"{run['label']}-s{run['seed']}"
        rows.append(
            [
                run["label"] + (" *" if run["reads_oracle"] else ""),
                str(run["seed"]),
                run["access"],
                *_rates(run["cells"]),
                "-" if run["auroc"] is None else f"{run['auroc']:.2f}",
                f"{run['qmass']:.2f}",
                f"{seconds[name]:.0f}" if name in seconds else "-",
                passes(run["cost"]),
                *[_requests(requests.get(name))] * judged,
            ]
        )
    shown = [run["cells"] for run in (*result["runs"], *filter(None, [result["base"]]))]
    provenance = result.get("provenance", {})
    notes = [sandbox_note(provenance), pairs_note(provenance), "* reads the oracle: a ceiling, not a method."]
    notes += dict.fromkeys(map(size_note, shown))
    if any(run["cost"]["extra_forward"] for run in result["runs"]):
        notes.append("Extra passes: rollouts and pairs through the model, forward and backward, beyond vanilla GRPO.")
    if len({run["seed"] for run in result["runs"]}) == 1:
        notes.append("One seed: intervals are within-run sampling only and say nothing about other seeds.")
    if "decision_sha256" in result:
        notes.append(f"Preregistered, SHA-256 {result['decision_sha256'][:12]}; `vgrout lab claims` has its tests.")
    if changes := result.get("deviations"):
        notes.append(f"Deviates from what was written down: {'; '.join(changes)}.")
    if drifted := result.get("drifted"):
        notes.append(f"Made with other code or data: {', '.join(drifted)}.")
    notes += [f"Not run: {arm} ({why})." for arm, why in result.get("not_run", {}).items()]
    if result["not_finished"]:
        notes.append(f"Not finished: {', '.join(result['not_finished'])}.")
    return rows, " ".join(filter(None, notes))


def result_head(result: dict) -> tuple[str, tuple[str, ...]]:
    """The table's title and columns."""
    measured = (*MEASURED, *["judge calls"] * _judged(result))
    if not result["config"].get("env", MICRO).endswith(".py"):
        title = "held-out problems, held-out markers; % of rollouts [95 % interval]"
        return title, (*COLUMNS, *measured)
    head = (*COLUMNS[:3], "full reward", "deploy reward", *COLUMNS[3:], *measured)
    return "test prompts; mean reward [95 % interval]", head


def result_table(result: dict, timing: Mapping[str, Any]) -> Table:
    """Every arm on held-out problems and held-out markers: full and deployed, with 95 % intervals."""
    rows, notes = result_rows(result, timing)
    title, head = result_head(result)
    return number_table(title, notes, head, rows, 1)


def show(out: Path, seeds: Sequence[int], markdown: bool, console: Console) -> None:
    """Print the table of an experiment again. Raises UserError where `out` holds none."""
    file = out / "decision.json"
    if not file.is_file():
        raise UserError(f"no finished experiment in {out}: it has no decision.json")
    try:
        result = json.loads(file.read_text())
        timing = json.loads((out / "timing.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the experiment in {out}: {error}") from None
    if seeds:
        result["runs"] = [run for run in result["runs"] if run["seed"] in seeds]
    if not markdown:
        print_wide(result_table(result, timing), console)
        return
    rows, notes = result_rows(result, timing)
    _, head = result_head(result)
    lines = [head, ["---"] * len(head), *rows]
    print("\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{notes}".replace("* reads", "\\* reads"))


def decide(
    base: Config,
    arms: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    workers: int,
    force: bool,
    plan: bool,
    console: Console,
    prereg: Preregistered | None = None,
    records: Path | None = None,
) -> int:
    """Run the experiment, or what is left of it. Returns 0 when every run and the base model's evaluation finished, 1
    otherwise.

    The hash of a preregistered decision is stored before the first run. Each run's record goes to `records` as it
    ends, and a run whose record is there is not made again. Raises UserError where `out` is in use or holds another
    experiment, and Interrupted where somebody listens to signals.
    """
    if workers < 1:
        raise UserError(f"workers = {workers}: give a positive whole number")
    goes_on = not force and os.path.isfile(out / PLAN)  # False, too, where it cannot be looked up
    unable = left_out(base, arms, out, seeds, goes_on=goes_on)
    jobs = make_jobs(base, arms, seeds, out, unable)
    if plan:
        print_wide(plan_table(jobs, workers, unable), console)
        return 0
    if not goes_on:
        check_folder(out, force=force)
    with workshop(base) as shop:  # what does not load is said before anything is written
        provenance = shop.provenance
    whole = experiment(base, arms, seeds, provenance)
    if prereg:
        whole |= {"decision_sha256": prereg.sha256, "deviations": prereg.deviations(base)}
        for change in whole["deviations"]:
            console.print(f"deviates from the decision: {change}", style="yellow", markup=False, soft_wrap=True)
    if records:
        database().close()  # what is missing is said before anything runs
        here, there = out.resolve(), records.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise UserError(f"{records} and {out} lie in each other: give another --records")
    if not goes_on:
        claim_folder(out, force=force)
    with one_writer(out):
        if goes_on:
            check_same(out, whole)
        else:
            if prereg:
                replace_file(out / DECISION, prereg.text)
            stored = whole | ({TESTS: tests_digest()} if prereg else {})
            replace_file(out / PLAN, json.dumps(stored, indent=2) + "\n")
        check_runs(jobs, out)
        if records:
            take_records(jobs, out, records, whole, prereg)
        console.print(header(provenance), markup=False, highlight=False, soft_wrap=True)
        if left := [job for job in jobs if not finished(out / job.name)]:
            print_wide(plan_table(left, workers, unable), console)
        try:
            return _decide(base, jobs, unable, out, workers, provenance, console, records)
        except Interrupted as stop:
            done = sum(finished(out / job.name) for job in jobs)
            said = f"{stop}: {done} of {len(jobs)} runs are finished; the same command goes on"
            raise Interrupted(stop.number, said) from None


def experiment(base: Config, arms: Sequence[str], seeds: Sequence[int], provenance: Mapping[str, Any]) -> dict:
    """What two commands on one folder must share."""
    settings = {f"config.{key}": value for key, value in asdict(base).items() if key not in ("arm", "seed")}
    return {"arms": list(arms), "seeds": list(seeds), **settings, **provenance}


def check_same(out: Path, here: Mapping[str, Any], instead: str = "another --out, or --force to replace it") -> None:
    """Raises UserError where `out` holds another experiment than `here`."""
    try:
        there = {**json.loads((out / PLAN).read_text())}
        there.pop(TESTS, None)  # tests may be mended: whoever reads the results is told
        changed = differences(there, here)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {out / PLAN}: {error}") from None
    if changed:
        other = f"{out} is in use by another experiment, with other {', '.join(changed)}"
        raise UserError(f"{other}: give {instead}")


def check_runs(jobs: Sequence[Job], out: Path) -> None:
    """Raises UserError where a run was made with other settings than its label has now."""
    for job in jobs:
        file = out / job.name / "config.json"
        if file.is_file():
            told = asdict(Config.read(file))
            if other := differences(told, {**asdict(job.cfg), "yoke": told["yoke"], "threads": told["threads"]}):
                raise UserError(f"{file.parent} has other {', '.join(other)}: remove it, or give another --out")


def _measured_since(run: Path, record: Path) -> bool:
    """Whether a run was measured after its record had been written."""
    kept = read_record(record).get(MEASURES, {})
    return any(kept.get(name) != result for name, result in measured(run).items())


def take_records(
    jobs: Sequence[Job], out: Path, records: Path, whole: Mapping[str, Any], prereg: Preregistered | None
) -> None:
    """Unpack the records of runs that `out` does not have, and keep those of runs that it has. Raises UserError where
    `records` holds something else than records of this experiment, or one is damaged."""
    try:
        if (records / PLAN).is_file():
            check_same(records, whole, "another --records")
        elif records.exists() and any(records.iterdir()):
            raise UserError(f"{records} holds something else than records of an experiment: give another --records")
        else:
            records.mkdir(parents=True, exist_ok=True)
            if prereg:
                replace_file(records / DECISION, prereg.text)
            replace_file(records / PLAN, (out / PLAN).read_text())
        for there, here in ((records, out), (out, records)):
            if (there / BASE_FILE).is_file() and not (here / BASE_FILE).is_file():
                replace_file(here / BASE_FILE, (there / BASE_FILE).read_text())
    except OSError as error:
        raise UserError(f"cannot use {records}: {error.strerror}") from None
    for job in jobs:
        run, record = out / job.name, records / job.name
        if finished(run) and (not record.exists() or _measured_since(run, record)):
            pack(run, record)
        elif record.exists() and not finished(run):
            told = read_record(record)["config"]
            if other := differences(told, {**asdict(job.cfg), "yoke": told.get("yoke")}):
                raise UserError(f"{record} is of a run with other {', '.join(other)}: give other --records")
            if run.exists():
                raise UserError(f"{run} was begun, and its record is there: remove the folder to go on from the record")
            unpack(record, run)


def _decide(
    base: Config,
    jobs: Sequence[Job],
    unable: Mapping[str, str],
    out: Path,
    workers: int,
    provenance: Mapping[str, Any],
    console: Console,
    records: Path | None,
) -> int:
    begun = time.monotonic()

    def record(name: str) -> int:
        """Keep a run's record; where that fails the other runs go on, and the same command tries again."""
        try:
            if records:
                pack(out / name, records / name)
        except (UserError, RunFailed) as error:
            warn(str(error))
            return 1
        return 0

    codes = run_jobs(jobs, out, Local(workers), console, lambda: base_evaluation(base, out, console, records), record)
    base_cells = base_evaluation(base, out, console, records)  # read again, or made where no worker was idle
    result = decision(jobs, out, base, base_cells, provenance) | ({"not_run": dict(unable)} if unable else {})
    planned = json.loads((out / PLAN).read_text())
    result |= {key: planned[key] for key in ("decision_sha256", "deviations") if key in planned}
    (out / "decision.json").write_text(json.dumps(result, indent=1) + "\n")
    files = {job.name: out / job.name / "timing.json" for job in jobs if finished(out / job.name)}
    seconds = {name: json.loads(file.read_text())["total"] for name, file in files.items() if file.exists()}
    earlier = json.loads((out / "timing.json").read_text())["wall"] if (out / "timing.json").is_file() else 0.0
    timing = {"wall": round(earlier + time.monotonic() - begun, 1), "runs": seconds}
    if asked := {job.name: said for job in jobs if (said := requests(out / job.name))}:
        timing["judge"] = asked
    replace_file(out / "timing.json", json.dumps(timing, indent=2) + "\n")
    print_wide(result_table(result, timing), console)
    if base_cells is None:
        codes["base"] = 1
    for name, code in sorted(codes.items()):
        if code:
            log = (out / f"{name}.log").read_text().strip().splitlines()
            said = log[-1] if log else "no output"
            console.print(f"{name} failed with exit code {code}: {said}", style="red", markup=False, soft_wrap=True)
    console.print(f"{out / 'decision.json'}")
    return 1 if any(codes.values()) else 0


def base_evaluation(base: Config, out: Path, console: Console, records: Path | None) -> dict | None:
    """The untrained model in every cell of the final evaluation, once; None, and a log, where that fails."""
    if (out / BASE_FILE).is_file():
        return json.loads((out / BASE_FILE).read_text())
    try:
        console.print(f"evaluating the {BASE}")
        with workshop(base) as shop:
            cells = summaries(final(base, shop.policy, shop.env, ablates=True), shop.env)
    except Exception:  # noqa: BLE001 - whatever it is, the runs have finished and their table comes first
        (out / "base.log").write_text(traceback.format_exc())
        return None
    for folder in filter(None, (out, records)):
        replace_file(folder / BASE_FILE, json.dumps({"cells": cells}, indent=2) + "\n")
    return {"cells": cells}
