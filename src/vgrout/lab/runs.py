"""Runs to read, wherever they are: folders of runs, records of runs, and folders that hold some of either."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vgrout.arms import ARMS
from vgrout.config import Config
from vgrout.lab.archive import (
    RUN,
    VERDICT,
    faults,
    is_record,
    measured,
    read_record,
    read_rollouts,
    read_steps,
    with_verdicts,
)
from vgrout.lab.evaluate import HEADLINE
from vgrout.lab.given import access
from vgrout.lab.record import finished, read_jsonl, weights_sha256
from vgrout.types import UserError


@dataclass(frozen=True)
class Trained:
    """The policy's rollouts of a run's training that have a verdict, one entry each, in order. A score is NaN where the
    arm gave none."""

    step: np.ndarray
    deployed: np.ndarray  # sampled with the quarantine ablated
    hinted: np.ndarray
    flagged: np.ndarray
    score: np.ndarray
    hacked: np.ndarray


@dataclass(frozen=True)
class Run:
    """One run, finished or not. `cells` is its final evaluation, None before there is one; `evals` are the small ones
    on the way; `steps` its steps so far."""

    folder: Path
    label: str
    cfg: Config
    provenance: dict[str, Any]
    steps: list[dict]
    evals: list[dict]
    cells: dict[str, Any] | None
    scales: dict[str, list[dict]]  # shrinkage and restore curves, where the run made them
    measures: dict[str, dict]  # what was measured on its weights afterwards, by name
    seconds: dict[str, float]
    weights_sha256: str | None

    @property
    def name(self) -> str:
        return f"{self.label}-s{self.cfg.seed}"

    @property
    def seed(self) -> int:
        return self.cfg.seed

    @property
    def access(self) -> str:
        return access(self.cfg)

    @property
    def reads_oracle(self) -> bool:
        return ARMS[self.cfg.arm].reads_oracle

    @property
    def oracle(self) -> bool:
        """Whether its rollouts have verdicts."""
        return self.cells is not None and all("hack" in cell for cell in self.cells.values())

    def rollouts(self, phases: Sequence[str] = (), every: int = 1) -> list[dict]:
        """Rollouts, their verdicts' fields behind `verdict_`: of some phases or all, of each `every`-th step of
        training."""
        if is_record(self.folder):
            return read_rollouts(self.folder, phases, every=every)
        rows = (row for row in _logged(self.folder) if not phases or row["phase"] in phases)
        return [row for row in rows if row["phase"] != "train" or row["step"] % every == 0]

    def trained(self) -> Trained:
        return _trained(self.folder)

    def evaluated(self, cell: str) -> tuple[dict, ...]:
        """The rollouts of a cell of the final evaluation, in order."""
        return _evaluated(self.folder, f"eval:{cell}")


@cache
def _evaluated(folder: Path, phase: str) -> tuple[dict, ...]:
    rows = read_rollouts(folder, (phase,)) if is_record(folder) else _logged(folder)
    return tuple(row for row in rows if row["phase"] == phase)


NEEDED = ("step", "source", "state", "hinted", "flagged", "score", VERDICT + "hacked")


@cache
def _trained(folder: Path) -> Trained:
    rows = read_rollouts(folder, ("train",), NEEDED) if is_record(folder) else _logged(folder)
    own = [r for r in rows if r.get("phase", "train") == "train" and r["source"] == "policy"]
    own = [r for r in own if r.get(VERDICT + "hacked") is not None]
    return Trained(
        step=np.array([r["step"] for r in own], int),
        deployed=np.array([r["state"] == "deployed" for r in own], bool),
        hinted=np.array([r["hinted"] for r in own], bool),
        flagged=np.array([bool(r["flagged"]) for r in own], bool),
        score=np.array([np.nan if r["score"] is None else r["score"] for r in own], float),
        hacked=np.array([r[VERDICT + "hacked"] for r in own], bool),
    )


@lru_cache(maxsize=1)
def _logged(folder: Path) -> list[dict]:
    """The log of a run's folder; that of the last one is remembered, since several parts of it are asked for."""
    return with_verdicts(folder)


def read_run(folder: Path) -> Run:
    """Raises UserError where `folder` is neither a run nor a record, or is damaged."""
    try:
        run = _record(folder) if (folder / RUN).is_file() else _run(folder)
        _check(run)
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError, *faults()) as error:
        raise UserError(f"{folder} is damaged: {type(error).__name__}: {error}") from None
    return run


def _check(run: Run) -> None:
    """Raises what the wrong shape of a log raises: a page about many runs leaves the damaged ones out."""
    known = ARMS[run.cfg.arm]
    if not all(isinstance(p, dict) for p in (run.provenance, run.seconds, run.scales, *run.measures.values())):
        raise TypeError("a part of it is no JSON object")
    for step in run.steps:
        step["step"] + 1, step.get("m_hack")
    run.trained()
    if run.cells is None:
        return
    for name in ("heldout_full", HEADLINE):
        rates = run.cells[name]
        if run.oracle:
            shown = rates["hack"]["n"], len(run.evaluated(name.removeprefix("eval:")))
            if shown[0] != shown[1]:
                raise ValueError(f"{shown[1]} of {shown[0]} rollouts of {name} are there, for {known.name}")
    for row in run.evaluated(HEADLINE) if run.oracle else ():
        row["problem"], row["prompt"], row["text"], row["source"], row["reward"], row["id"]
        if not isinstance(row[VERDICT + "hacked"], bool):
            raise ValueError(f"rollout {row['id']} has no verdict")


def _label(folder: Path, cfg: Config) -> str:
    """What the run is called: its folder's name where that names the seed, or its arm."""
    ending = f"-s{cfg.seed}"
    return folder.name.removesuffix(ending) if folder.name.endswith(ending) else cfg.arm


def _run(folder: Path) -> Run:
    cfg = Config.read(folder / "config.json", grown=True)
    done = finished(folder)
    last = json.loads((folder / "eval.json").read_text()) if done else {}
    seconds = folder / "timing.json"
    return Run(
        folder=folder,
        label=_label(folder, cfg),
        cfg=cfg,
        provenance=json.loads((folder / "provenance.json").read_text()),
        steps=read_jsonl(folder / "steps.jsonl"),
        evals=read_jsonl(folder / "evals.jsonl"),
        cells=last["cells"] if done else None,
        scales=last.get("scales", {}),
        measures=measured(folder),
        seconds=json.loads(seconds.read_text()) if seconds.is_file() else {},
        weights_sha256=weights_sha256(folder) if done else None,
    )


def _record(folder: Path) -> Run:
    said = read_record(folder)
    cfg = Config.parse(said["config"], folder / RUN, grown=True)
    return Run(
        folder=folder,
        label=_label(folder, cfg),
        cfg=cfg,
        provenance=said["provenance"],
        steps=read_steps(folder),
        evals=said["evals"],
        cells=said["eval"]["cells"],
        scales=said["eval"].get("scales", {}),
        measures=said.get("measures", {}),
        seconds=said["timing"],
        weights_sha256=said["weights_sha256"],
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, or a record."""
    return (folder / "config.json").is_file() or (folder / RUN).is_file()


def _inside(path: Path) -> Iterator[Path]:
    if is_run(path):
        yield path
    elif path.is_dir():
        yield from (child for child in sorted(path.iterdir()) if child.is_dir() and is_run(child))


def find(paths: Sequence[Path]) -> tuple[list[Run], dict[Path, str]]:
    """The runs at or in `paths`, by label and seed, and why others could not be read. Raises UserError where there is
    none at all, or two runs have one name."""
    runs, unread = [], {}
    for folder in dict.fromkeys(child for path in paths for child in _inside(path)):
        try:
            runs.append(read_run(folder))
        except UserError as error:
            unread[folder] = str(error)
    if not runs:
        raise UserError(next(iter(unread.values()), f"no run in {', '.join(map(str, paths)) or 'nothing'}"))
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"more than one run is called {', '.join(twice)}: give each once")
    return sorted(runs, key=lambda run: (run.label, run.seed)), unread
