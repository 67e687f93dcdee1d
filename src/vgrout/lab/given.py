"""What some arms are handed beside model and pairs: the counts of another run, a probe, a judge."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from vgrout.adapters.inits import INITS
from vgrout.arms import ARMS, Given
from vgrout.config import Config
from vgrout.envs.modes import GT_ONLY
from vgrout.envs.problem_env import read_splits
from vgrout.envs.worlds import WORLDS
from vgrout.faults import warn
from vgrout.lab.checkpoint import replace_file
from vgrout.lab.record import read_jsonl
from vgrout.method.judge import Judge, judge_config, reachable
from vgrout.method.linear_probe import LinearProbe, load_probe
from vgrout.types import UserError

LEADER = "routeV"  # the arm that yoked arms follow
REQUESTS = "judge_requests.json"  # in a run's folder


def access(cfg: Config) -> str:
    """What a run was told (METHOD.md section 0): its arm's level, at least L1 where the adapter's init reads pairs."""
    level = ARMS[cfg.arm].access
    return "L1" if level == "L0" and cfg.init in INITS and INITS[cfg.init].calibrated else level


def check_given(cfg: Config) -> None:
    """What a configuration says of these things that its arm cannot use, or leaves out. Raises UserError."""
    arm = ARMS[cfg.arm]
    if cfg.yoke and "yoke" not in (*arm.needs, *arm.takes):
        raise UserError(f"{cfg.arm} follows no other run: drop --yoke")
    if not cfg.yoke and "yoke" in arm.needs:
        raise UserError(f"{cfg.arm} follows a routeV run: give its folder as --yoke, or name routeV among the arms")
    if "judge" in arm.needs and not cfg.judge_model:
        raise UserError(f"{cfg.arm} asks a judge: name one as --judge-model, see docs/judge.md")
    probe_of(cfg)


def absent(cfg: Config) -> str:
    """Why this machine cannot run the arm now; '' where it can. Asks a judge that has to be reachable."""
    if "judge" not in ARMS[cfg.arm].needs:
        return ""
    return reachable(judge_config(cfg)) if cfg.judge_model else "no --judge-model is named"


def probe_of(cfg: Config, model_sha256: str | None = None) -> LinearProbe | None:
    """The probe of an arm that needs one. Raises UserError where it may not be used: see `LinearProbe.check`."""
    if "probe" not in ARMS[cfg.arm].needs:
        return None
    probe = load_probe(cfg.probe)
    probe.check(live_modes(cfg), model_sha256)
    return probe


def live_modes(cfg: Config) -> tuple[str, ...]:
    """The loopholes that a run trains in."""
    if cfg.modes or not cfg.oracle:
        return cfg.modes
    train = WORLDS[cfg.env].problems("train") if cfg.env in WORLDS else read_splits(cfg.env)["train"]
    return tuple(sorted({p.mode for p in train} - {GT_ONLY}))


def followed(cfg: Config) -> list[tuple[int, int]] | None:
    """Rollouts that the run of `yoke` routed and absorbed in each step; None where there is none to follow.

    Raises UserError where that run is not there, not done, of another size or seed, or of another arm than routeV: the
    counts of one that was told more would tell this one too.
    """
    if not cfg.yoke:
        return None
    folder = Path(cfg.yoke)
    leader = Config.read(folder / "config.json")
    if leader.arm != LEADER:
        raise UserError(f"{folder} is a run of {leader.arm}: {cfg.arm} follows runs of {LEADER} alone")
    for name in ("steps", "prompts", "group", "seed"):
        if getattr(leader, name) != getattr(cfg, name):
            raise UserError(f"{folder} has {name} = {getattr(leader, name)}, this run has {getattr(cfg, name)}")
    steps = read_jsonl(folder / "steps.jsonl")[: cfg.steps]
    if len(steps) < cfg.steps:
        raise UserError(f"{folder} has done {len(steps)} of {cfg.steps} steps: a run can follow it when it has all")
    n = cfg.prompts * cfg.group
    return [tuple(round((s[zone] or 0) * (n - s["unscored"])) for zone in ("route", "absorb")) for s in steps]


def make_given(cfg: Config, model_sha256: str) -> tuple[Given, dict[str, Any]]:
    """What the arm of `cfg` gets, and facts about it for the run's record. Its judge keeps no answers yet.

    Raises UserError.
    """
    yoke, probe = followed(cfg), probe_of(cfg, model_sha256)
    judge = Judge(replace(judge_config(cfg), cache=None)) if "judge" in ARMS[cfg.arm].needs else None
    facts = {
        **({"yoke_sha256": sha256(json.dumps(yoke).encode()).hexdigest()} if yoke else {}),
        **({"probe_sha256": probe.digest()} if probe else {}),
        **(judge.facts if judge else {}),
    }
    return Given(yoke, probe, judge), facts


@contextmanager
def keeping(given: Given, cfg: Config, out: Path) -> Iterator[Given]:
    """`given` with a judge that keeps its answers, in the run's folder unless the configuration names another."""
    if given.judge is None:
        yield given
        return
    judge = Judge(judge_config(cfg, out), given.judge.endpoint)
    try:
        yield replace(given, judge=judge)
    finally:
        judge.close()
        _count(out / REQUESTS, judge)


def requests(folder: Path) -> dict[str, Any]:
    """What a run asked its judge so far; empty where it asked none, or the record is damaged: it is no result."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return {**json.loads((folder / REQUESTS).read_text())}
    return {}


def _count(file: Path, judge: Judge) -> None:
    """Add what this process asked to what the run's earlier ones did. A process that was killed is not in it."""
    earlier = requests(file.parent)
    counts = {key: round(value + earlier.get(key, 0), 2) for key, value in asdict(judge.counts).items()}
    faults = dict(sorted((judge.faults + Counter(earlier.get("faults", {}))).items()))
    try:
        replace_file(file, json.dumps({**counts, "faults": faults}, indent=2) + "\n")
    except OSError as error:
        warn(f"{file} could not be written: {error.strerror}")
