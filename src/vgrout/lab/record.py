"""A run's folder: what it holds and who writes it.

config.json          the run's configuration: the run re-runs from it
provenance.json      what it ran on: hashes of pairs and model weights, versions, the sandbox's tier
steps.jsonl          one record per step; fields named m_* are measured with the oracle and read by nobody
rollouts.jsonl       every rollout of training with reward, advantage, zone and score, and every one of the final
                     evaluation; `phase` tells them apart
verdicts.jsonl       the oracle's verdicts, apart: one for each line of rollouts.jsonl, under the same id; none for a
                     task without an oracle
evals.jsonl          rates of the small evaluations on validation problems; their rollouts are not kept
eval.json            the final evaluation on test problems
adapter.safetensors  both blocks and their inits
timing.json          seconds; nothing else depends on the clock
.vgrout              says that vgrout made the folder: only such a one is ever replaced
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vgrout.arms import ARMS
from vgrout.config import Config
from vgrout.envs.grade import Verdict
from vgrout.envs.task import NoVerdict
from vgrout.lab.evaluate import SMALL, CellResult, World, cells_of, final, sample_cell, summaries, summary
from vgrout.lab.measure import auroc, f_beta
from vgrout.method.policy import Policy
from vgrout.types import Decision, Graded, Rollout, UserError

MARK = ".vgrout"  # a folder that holds it was made by `claim_folder`


def check_folder(out: Path, *, force: bool) -> None:
    """Raises UserError when `out` is in use, unless `force` and it is one of ours."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give a folder")
    if out.exists() and any(out.iterdir()):
        if not force:
            raise UserError(f"{out} is in use: give another --out, or --force to replace it")
        if not (out / MARK).is_file():
            raise UserError(f"{out} holds something else than what vgrout wrote: it is not replaced")


def claim_folder(out: Path, *, force: bool) -> None:
    """Make `out` a folder of ours that holds nothing else. Raises UserError where `check_folder` does."""
    check_folder(out, force=force)
    try:
        if out.exists() and any(out.iterdir()):
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).write_text("vgrout made this folder; --force replaces it\n")
    except OSError as error:
        raise UserError(f"cannot make {out}: {error.strerror or error}") from None


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

    def __init__(self, cfg: Config, policy: Policy, env: World, out: Path, provenance: Mapping[str, Any]) -> None:
        self.cfg, self.policy, self.env, self.out = cfg, policy, env, out
        self.ablates = ARMS[cfg.arm].ablates
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {"eval": 0.0}
        (out / "config.json").write_text(cfg.to_json())
        (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        names = ("steps", "rollouts", "verdicts", "evals")
        self._files = {name: (out / f"{name}.jsonl").open("w", buffering=1) for name in names}

    def _write(self, name: str, row: Mapping) -> None:
        self._files[name].write(json.dumps(_clean(row)) + "\n")

    def step(self, record, rollouts, graded, decision, advantage) -> None:
        measured = measures(rollouts, graded, decision) if self.env.oracle else {}
        self._write("steps", {**record, **measured})
        scores = [None] * len(rollouts) if decision.score is None else decision.score.tolist()
        for r, g, zone, score, a in zip(rollouts, graded, decision.zones(), scores, advantage.tolist(), strict=True):
            extra = {"reward": g.reward, "advantage": a, "zone": zone, "score": score, "step": record["step"]}
            self._rollout(r, "train", extra, g.sealed)

    def _rollout(self, r: Rollout, phase: str, extra: Mapping, sealed: Verdict | NoVerdict) -> None:
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
        if self.env.oracle:
            known = asdict(sealed)
            known.pop("cpu_s", None)  # a measured time, the one thing about a verdict that does not repeat
            self._write("verdicts", {"id": r.id, **known})

    def _cell(self, result: CellResult, phase: str) -> None:
        for r, reward, v in zip(result.rollouts, result.rewards, result.verdicts, strict=True):
            self._rollout(r, phase, {"reward": reward}, v)

    def evaluate(self, step: int) -> None:
        begun = time.monotonic()
        row: dict = {"step": step}
        for cell in cells_of(self.env, SMALL):
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
        results = final(self.cfg, self.policy, self.env, ablates=self.ablates)
        for result in results:
            self._cell(result, f"eval:{result.cell.name}")
        cells = summaries(results, self.env)
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
        out["m_f05"] = f_beta(routed, hacked)
    return out
