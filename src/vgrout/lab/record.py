"""A run's folder: what it holds and who writes it.

config.json          the run's configuration: the run re-runs from it
steps.jsonl          one record per step; fields named m_* are measured with the oracle and read by nobody
rollouts.jsonl       every rollout with reward, advantage, zone and score; evaluations too, with their phase
verdicts.jsonl       the oracle's verdicts, apart, keyed by rollout id
evals.jsonl          small evaluations on validation problems during training
eval.json            the final evaluation on test problems
adapter.safetensors  both blocks and their inits
timing.json          seconds; nothing else depends on the clock
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from vgrout.arms import ARMS
from vgrout.config import Config
from vgrout.envs.micro_env import MicroEnv
from vgrout.lab.evaluate import CELLS, SMALL, CellResult, sample_cell, summary
from vgrout.lab.measure import auroc, f_beta
from vgrout.method.policy import Policy
from vgrout.types import Decision, Graded, Rollout, UserError

MARK = "config.json"  # a folder that holds it is a run of ours


def check_folder(out: Path, *, force: bool, mark: str = MARK) -> None:
    """Raises UserError when `out` is in use, unless `force` and it is one of ours."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give a folder")
    if out.exists() and any(out.iterdir()):
        if not force:
            raise UserError(f"{out} is in use: give another --out, or --force to replace it")
        if not (out / mark).exists():
            raise UserError(f"{out} holds something else than a run of vgrout: it is not replaced")


def claim_folder(out: Path, *, force: bool, mark: str = MARK) -> None:
    """Make `out` an empty folder. Raises UserError where `check_folder` does."""
    check_folder(out, force=force, mark=mark)
    if out.exists() and any(out.iterdir()):
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {out}: {error.strerror}") from None


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _clean(value):
    """JSON-ready, floats to 8 significant digits, NaN as null."""
    if isinstance(value, Mapping):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, float):
        return float(f"{value:.8g}") if np.isfinite(value) else None
    return value


class Recorder:
    """The observer of a run: writes its folder. Training gets nothing back."""

    def __init__(self, cfg: Config, policy: Policy, env: MicroEnv, out: Path) -> None:
        self.cfg, self.policy, self.env, self.out = cfg, policy, env, out
        self.ablates = ARMS[cfg.arm].ablates
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {"eval": 0.0}
        (out / "config.json").write_text(cfg.to_json())
        names = ("steps", "rollouts", "verdicts", "evals")
        self._files = {name: (out / f"{name}.jsonl").open("w", buffering=1) for name in names}

    def _write(self, name: str, row: Mapping) -> None:
        self._files[name].write(json.dumps(_clean(row)) + "\n")

    def step(self, record, rollouts, graded, decision, advantage) -> None:
        self._write("steps", {**record, **measures(rollouts, graded, decision)})
        scores = [None] * len(rollouts) if decision.score is None else decision.score.tolist()
        for r, g, zone, score, a in zip(rollouts, graded, decision.zones(), scores, advantage.tolist(), strict=True):
            extra = {"reward": g.reward, "advantage": a, "zone": zone, "score": score, "step": record["step"]}
            self._rollout(r, "train", extra)
            self._write("verdicts", {"id": r.id, **asdict(g.sealed)})

    def _rollout(self, r: Rollout, phase: str, extra: Mapping) -> None:
        row = {
            "id": r.id,
            "phase": phase,
            "problem": r.prompt.problem_id,
            "prompt": r.prompt.user,
            "marker": r.prompt.marker,
            "hinted": r.prompt.hinted,
            "source": r.source,
            "state": r.state,
            "text": r.text,
            "tokens": len(r.tokens),
        }
        self._write("rollouts", row | dict(extra))

    def _cell(self, result: CellResult, phase: str) -> None:
        for r, v in zip(result.rollouts, result.verdicts, strict=True):
            self._rollout(r, phase, {})
            self._write("verdicts", {"id": f"{phase}/{r.id}", **asdict(v)})

    def evaluate(self, step: int) -> None:
        begun = time.monotonic()
        row: dict = {"step": step}
        for cell in SMALL:
            n = self.cfg.eval_small
            ids = self.env.problems("val")
            result = sample_cell(self.cfg, self.policy, self.env, cell, problems=ids, rollouts=n, ablates=self.ablates)
            row[cell.name] = summary(result, self.env)
        self._write("evals", row)
        self.seconds["eval"] += time.monotonic() - begun

    def checkpoint(self, step: int) -> None:
        meta = {"arm": self.cfg.arm, "step": step, "ships": "deployed" if self.ablates else "full"}
        self.policy.adapter.save(self.out / "adapter.safetensors", meta)

    def finish(self) -> dict:
        """The final evaluation, the adapter, the timing."""
        self.checkpoint(self.cfg.steps)
        begun = time.monotonic()
        cells = {}
        for cell in CELLS:
            result = sample_cell(
                self.cfg,
                self.policy,
                self.env,
                cell,
                problems=self.env.problems("test"),
                rollouts=self.cfg.eval_rollouts,
                ablates=self.ablates,
            )
            self._cell(result, f"eval:{cell.name}")
            cells[cell.name] = summary(result, self.env)
        self.seconds["eval"] += time.monotonic() - begun
        (self.out / "eval.json").write_text(json.dumps({"arm": self.cfg.arm, "cells": cells}, indent=2) + "\n")
        self.seconds["total"] = time.monotonic() - self.started
        self.seconds["cpu"] = time.process_time()
        rounded = {k: round(v, 2) for k, v in self.seconds.items()}
        (self.out / "timing.json").write_text(json.dumps(rounded, indent=2) + "\n")
        return cells

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def measures(rollouts: Sequence[Rollout], graded: Sequence[Graded], decision: Decision) -> dict:
    """What the oracle says of a step's policy rollouts, and of the gate as a classifier of hacks."""
    own = [i for i, r in enumerate(rollouts) if r.source == "policy"]
    verdicts = [graded[i].sealed for i in own]
    hacked = [v.hacked for v in verdicts]
    zones = decision.zones()
    routed = [zones[i] == "route" for i in own]
    out: dict = {
        "m_hack": float(np.mean(hacked)),
        "m_solve": float(np.mean([v.solved for v in verdicts])),
        "m_compile": float(np.mean([v.compiled for v in verdicts])),
        "m_tokens": float(np.mean([len(rollouts[i].tokens) for i in own])),
    }
    for zone in ("keep", "absorb", "route"):
        out[f"m_hack_{zone}"] = sum(h for h, i in zip(hacked, own, strict=True) if zones[i] == zone)
    if decision.score is not None:
        scores = [float(decision.score[i]) for i in own]
        out["m_auroc"] = auroc(scores, hacked)
    if any(routed):
        out["m_f05"] = f_beta(routed, hacked)
    return out
