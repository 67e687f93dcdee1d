"""Training rollouts of a recorded run with their labels, for measurements after the fact. No training reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vgrout.config import Config
from vgrout.envs.problem_env import files_digest, read_splits
from vgrout.envs.worlds import WORLDS
from vgrout.lab.record import read_json, read_jsonl
from vgrout.pairs import load as load_pairs
from vgrout.types import Problem, UserError

MODE_TAG = "mode:"


@dataclass(frozen=True)
class Labelled:
    """Rollouts that the policy sampled in training, one entry each: step, the problem's loophole, what the oracle says
    and whether the gate flagged it."""

    id: Sequence[str]
    step: np.ndarray
    mode: np.ndarray
    hacked: np.ndarray
    solved: np.ndarray
    flagged: np.ndarray

    def take(self, rows: np.ndarray) -> Labelled:
        """The rows at an index or mask."""
        index = np.arange(len(self.id))[rows]
        arrays = (getattr(self, key)[index] for key in ("step", "mode", "hacked", "solved", "flagged"))
        return Labelled([self.id[i] for i in index], *arrays)


def problems_of(cfg: Config, split: str, provenance: Mapping[str, Any]) -> Sequence[Problem]:
    """The problems of a run's environment. Raises UserError where it has no tests, or its files are gone or others."""
    if not cfg.oracle:
        raise UserError(f"{cfg.env} has no oracle")
    if cfg.env in WORLDS:
        return WORLDS[cfg.env].problems(split)
    found = read_splits(cfg.env)[split]
    if files_digest(cfg.env) != provenance.get("task_sha256"):
        raise UserError(f"{cfg.env} holds other problems than those of the run")
    return found


def read_labelled(run: Path) -> Labelled:
    """Every policy rollout of a run's training. Raises UserError where `run` is none, or has no oracle."""
    cfg = Config.read(run / "config.json")
    verdicts = {row["id"]: row for row in read_jsonl(run / "verdicts.jsonl")}
    if not cfg.oracle or not verdicts:
        raise UserError(f"{run} has no verdicts: nothing tells its hacks")
    mode = {p.id: p.mode for p in problems_of(cfg, "train", read_json(run / "provenance.json"))}
    rows = [r for r in read_jsonl(run / "rollouts.jsonl") if r["phase"] == "train" and r["source"] == "policy"]
    rows = [r for r in rows if r["id"] in verdicts]  # the last one may be on its way
    if not rows:
        raise UserError(f"{run} has no rollout of training yet")
    return Labelled(
        [r["id"] for r in rows],
        np.array([r["step"] for r in rows]),
        np.array([mode[r["problem"]] for r in rows]),
        np.array([verdicts[r["id"]]["hacked"] for r in rows]),
        np.array([verdicts[r["id"]]["solved"] for r in rows]),
        np.array([r["flagged"] for r in rows]),
    )


def modes_in_pairs(selector: str) -> set[str]:
    """The loopholes that a set of pairs shows, by its tags."""
    tags = {tag for pair in load_pairs(selector) for tag in pair.tags}
    return {tag.removeprefix(MODE_TAG) for tag in tags if tag.startswith(MODE_TAG)}


def windows(steps: Iterable[int], width: int) -> list[tuple[int, int]]:
    """[first, last] of consecutive windows of `width` steps that cover `steps`; one for all where `width` is 0."""
    known = sorted(set(steps))
    if not width:
        return [(known[0], known[-1])]
    starts = sorted({step // width * width for step in known})
    return [(start, min(start + width - 1, known[-1])) for start in starts]
