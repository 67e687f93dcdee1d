"""A run's folder: what it holds and who writes it.

config.json          the run's configuration: the run re-runs from it
provenance.json      what it ran on: hashes of code, pairs and model weights, versions, the sandbox's tier; and what had
                     changed where a run went on all the same
steps.jsonl          one record per step; fields named m_* are measured with the oracle and read by nobody
rollouts.jsonl       every rollout of training with reward, advantage, zone and score, and every one of the final
                     evaluation; `phase` tells them apart
verdicts.jsonl       the oracle's verdicts, apart: one for each line of rollouts.jsonl, under the same id; none for a
                     task without an oracle
evals.jsonl          rates of the small evaluations on validation problems; their rollouts are not kept
eval.json            the final evaluation on test problems; with it the run is finished
adapter.safetensors  both blocks and their inits
checkpoints/         states from which the run goes on, see lab/checkpoint.py
gate.safetensors     the gate of an arm that scores along a direction, see lab/gatefile.py
trace/               what the gate scored in every `trace_every`-th step, see lab/trace.py
skipped/             the batches of steps that moved nothing because a loss or gradient was not finite
measures/            what was measured on the weights after the run had finished, see lab/measures
timing.json          seconds so far
restored.json        in place of the weights where the folder was unpacked from a record, see lab/archive.py: their
                     hash
judge_requests.json  requests to a judge, retries, failures by kind, tokens and seconds of waiting so far
.vgrout              says that vgrout made the folder: only such a one is ever replaced. Whoever writes locks it
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import save as save_tensors
from torch import Tensor

from vgrout.arms import ARMS
from vgrout.config import Config
from vgrout.envs.grade import Verdict
from vgrout.envs.task import NoVerdict
from vgrout.faults import is_out_of_memory, warn
from vgrout.lab.checkpoint import FOLDER, PART, Checkpoint, replace_file, save, sync, write
from vgrout.lab.evaluate import CellResult, World, final, scaled, small, summaries
from vgrout.lab.gatefile import NAME as GATE
from vgrout.lab.gatefile import direction_of, gate_meta, save_gate
from vgrout.lab.measure import auroc, f_beta
from vgrout.lab.trace import FOLDER as TRACES
from vgrout.lab.trace import discard_from, init_digest, save_trace, scoring
from vgrout.loop import collate
from vgrout.method.policy import Policy
from vgrout.signals import held
from vgrout.types import Decision, Graded, Rollout, RunFailed, UserError

MARK = ".vgrout"  # a folder that holds it was made by `claim_folder`
MADE = "vgrout made this folder; --force replaces it\n"
LOGS = ("steps", "rollouts", "verdicts", "evals")
RESTORED = "restored.json"
FAILURES = 3  # checkpoints in a row that may fail


def check_folder(out: Path, *, force: bool) -> None:
    """Raises UserError when `out` cannot be read, or is in use, unless `force` and it is one of ours."""
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} is a file: give a folder")
        used = out.exists() and any(out.iterdir())
    except OSError as error:
        raise UserError(f"cannot read {out}: {error.strerror}") from None
    if used and not force:
        raise UserError(f"{out} is in use: give another --out, or --force to replace it")
    if used and not (out / MARK).is_file():
        raise UserError(f"{out} holds something else than what vgrout wrote: it is not replaced")


def claim_folder(out: Path, *, force: bool) -> None:
    """Make `out` a folder of ours that holds nothing else. Raises UserError where `check_folder` does, and where
    another process writes into it."""
    check_folder(out, force=force)
    try:
        if out.exists() and any(out.iterdir()):
            with one_writer(out):
                _clear(out)
        else:
            out.mkdir(parents=True, exist_ok=True)
            (out / MARK).write_text(MADE)
    except OSError as error:
        raise UserError(f"cannot make {out}: {error.strerror or error}") from None


def disown(out: Path) -> None:
    """Take back a claim: `out` is an empty folder again, unless anything was recorded in it."""
    log = out / "steps.jsonl"
    with contextlib.suppress(OSError, UserError):  # what stays is still ours, and --force replaces it
        if not log.exists() or not log.stat().st_size:
            with one_writer(out):
                _clear(out)
                (out / MARK).unlink()


def _clear(out: Path) -> None:
    """Remove what a folder of ours holds, but not its mark: after a crash on the way it can be cleared again.

    Files go first and in order of their names: then what is left is not taken for a finished run without its adapter,
    nor for an experiment without its plan. Raises OSError.
    """
    if out.is_symlink():
        raise OSError("it is a symbolic link")
    for path in sorted(out.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()


@contextmanager
def one_writer(out: Path) -> Iterator[None]:
    """Hold a folder of ours against other processes; the lock goes with the process.

    Raises UserError where `out` is none of ours, cannot be written, or is held: then it names the holder.
    """
    try:
        file = (out / MARK).open("r+b", buffering=0)
    except FileNotFoundError:
        raise UserError(f"{out} is not a folder that vgrout made") from None
    except OSError as error:
        raise UserError(f"cannot write in {out}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"{MADE}process {os.getpid()}\n".encode())
        except BlockingIOError:
            holder = file.read().decode(errors="replace").removeprefix(MADE).strip() or "another process"
            raise UserError(f"{out} is in use by {holder}") from None
        except OSError as error:
            raise UserError(f"cannot write in {out}: {error.strerror}") from None
        yield


def finished(out: Path, *, weights: bool = False) -> bool:
    """Whether a run left all its results: eval.json is the last that it writes. One that was unpacked from a record
    has no weights; where those are needed it is none."""
    left = ("adapter.safetensors",) if weights else ("adapter.safetensors", RESTORED)
    return (out / "eval.json").is_file() and any((out / name).is_file() for name in left)


def weights_sha256(out: Path) -> str:
    """The hash of a finished run's weights, which a record keeps in their place."""
    if (out / RESTORED).is_file():
        return json.loads((out / RESTORED).read_text())["weights_sha256"]
    return hashlib.sha256((out / "adapter.safetensors").read_bytes()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A file of one JSON object. Raises UserError where it is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object")
    return found


def read_jsonl(path: Path) -> list[dict]:
    """The whole lines of a log; a last one without its line break was cut off."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def last_record(path: Path) -> dict | None:
    """The last whole line of a log, which may still grow; None where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 8192))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1]) if lines else None
    except (OSError, ValueError):
        return None


def _clean(value):
    """JSON-ready, floats to 8 significant digits, NaN as null."""
    if isinstance(value, Mapping):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, float):
        return float(f"{value:.8g}") if np.isfinite(value) else None
    return value


class Log:
    """JSON lines, each whole or not there. On a full disk lines are lost, with one warning and a count."""

    def __init__(self, path: Path, size: int) -> None:
        """Go on after `size` bytes; what is behind them goes. Raises OSError."""
        self.path, self.size, self.lost = path, size, 0
        self._file = path.open("ab", buffering=0)
        self._cut()

    def write(self, row: Mapping) -> None:
        line = (json.dumps(_clean(row)) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError("no space left for a whole line")
            self.size += len(line)
        except OSError as error:
            self._cut()
            self.lost += 1
            if self.lost == 1:
                warn(f"cannot write {self.path}: {error.strerror or error}; lines are lost, and counted")

    def _cut(self) -> None:
        with contextlib.suppress(OSError):  # what is no regular file has no length
            self._file.truncate(self.size)

    def sync(self) -> None:
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Recorder:
    """The observer of a run: writes its folder. Training gets nothing back.

    `state` gives what a checkpoint is to hold; without it there are none. `start` is the checkpoint that the run goes
    on from. `stamp` is what a run must share with a checkpoint to go on from it.
    """

    def __init__(
        self,
        cfg: Config,
        policy: Policy,
        env: World,
        out: Path,
        provenance: Mapping[str, Any],
        *,
        state: Callable[[], Mapping[str, Any]] | None = None,
        stamp: Mapping[str, Any] | None = None,
        start: Checkpoint | None = None,
    ) -> None:
        self.cfg, self.policy, self.env, self.out = cfg, policy, env, out
        self.state, self.stamp, self.provenance = state, stamp or {}, provenance
        self.ablates = ARMS[cfg.arm].ablates
        self.started, self.cpu = time.monotonic(), 0.0
        self.seconds: dict[str, float] = {"eval": 0.0, "total": 0.0, "cpu": 0.0}
        if start is not None:
            with contextlib.suppress(OSError, ValueError):  # seconds are no result
                self.seconds |= json.loads((out / "timing.json").read_text())
        self.saved = None if start is None else start.step  # the step of the newest checkpoint
        self.failures = 0
        replace_file(out / "config.json", cfg.to_json())
        replace_file(out / "provenance.json", json.dumps(provenance, indent=2) + "\n")
        self._logs = {name: Log(out / f"{name}.jsonl", 0 if start is None else start.logs[name]) for name in LOGS}
        discard_from(out / TRACES, 0 if start is None else start.step)
        self.sizes = self._sizes()  # of the logs, when the last whole step was recorded

    def _sizes(self) -> dict[str, int]:
        return {name: log.size for name, log in self._logs.items()}

    def step(self, record, rollouts, graded, decision, advantage) -> None:
        drawn = any(r.source == "policy" for r in rollouts)
        measured = measures(rollouts, graded, decision) if self.env.oracle and drawn else {}
        lost = sum(log.lost for log in self._logs.values())
        self._logs["steps"].write({**record, **measured} | ({"lost_lines": lost} if lost else {}))
        scores = [None] * len(rollouts) if decision.score is None else decision.score.tolist()
        said = zip(decision.zones(), decision.flagged.tolist(), scores, advantage.tolist(), strict=True)
        for r, g, (zone, flagged, score, a) in zip(rollouts, graded, said, strict=True):
            extra = {"reward": g.reward, "advantage": a, "zone": zone, "flagged": flagged, "score": score}
            extra["step"] = record["step"]
            self._rollout(r, "train", extra, g.sealed)
        if self.cfg.trace_every and record["step"] % self.cfg.trace_every == 0:
            self._trace(record["step"], rollouts, decision)
        if record["skipped"] and rollouts:
            self._dump(record["step"], rollouts, graded, decision, advantage)
        self.sizes = self._sizes()

    def _trace(self, step: int, rollouts: Sequence[Rollout], decision: Decision) -> None:
        adapter = self.policy.adapter
        facts = {"arm": self.cfg.arm, **scoring(self.cfg)}
        facts |= {"modules": list(adapter.modules), "init_sha256": init_digest(adapter)}
        try:
            save_trace(self.out / TRACES, step, [r.id for r in rollouts], decision, facts)
        except OSError as error:
            warn(f"cannot write the trace of step {step}: {error.strerror or error}")

    def _gate(self) -> None:
        """The gate as a file, where the arm has a direction. Raises OSError."""
        direction = None if self.state is None else direction_of(self.state())
        if direction is not None:
            adapter, last = self.policy.adapter, last_record(self.out / "steps.jsonl")
            meta = gate_meta(self.cfg, self.provenance, init_digest(adapter), list(adapter.modules), last)
            save_gate(self.out / GATE, direction, meta)

    def _dump(self, step: int, rollouts, graded, decision: Decision, advantage) -> None:
        """The batch of a step whose loss or gradient was not finite, to look into."""
        batch = collate(rollouts, [g.reward for g in graded], self.policy.tokenizer.pad_token_id)
        masks = {name: getattr(decision, name) for name in ("m", "d", "weight", "penalty")}
        batched = {key: value for key, value in vars(batch).items() if isinstance(value, Tensor)}
        tensors = {**batched, **masks, "advantage": advantage}
        rows = [{**asdict(r), "reward": g.reward} for r, g in zip(rollouts, graded, strict=True)]
        name = self.out / "skipped" / f"step_{step:06d}"
        try:
            name.parent.mkdir(exist_ok=True)
            write(name.with_suffix(".safetensors"), save_tensors({key: t.clone() for key, t in tensors.items()}))
            write(name.with_suffix(".json"), json.dumps(rows, indent=1).encode())
        except OSError as error:
            warn(f"cannot write {name}: {error.strerror}")

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
        self._logs["rollouts"].write(row | dict(extra))
        if self.env.oracle:
            known = asdict(sealed)
            known.pop("cpu_s", None)  # a measured time, the one thing about a verdict that does not repeat
            self._logs["verdicts"].write({"id": r.id, **known})

    def _cell(self, result: CellResult, phase: str) -> None:
        for r, reward, v in zip(result.rollouts, result.rewards, result.verdicts, strict=True):
            self._rollout(r, phase, {"reward": reward}, v)

    def evaluate(self, step: int) -> None:
        begun = time.monotonic()
        cells = small(self.cfg, self.policy, self.env, ablates=self.ablates)
        self._logs["evals"].write({"step": step, **cells})
        self.seconds["eval"] += time.monotonic() - begun

    def checkpoint(self, step: int) -> None:
        """Keep the training's state, unless that of `step` is kept already. Where disk or memory does not allow it
        training goes on.

        Raises RunFailed when checkpoints in a row could not be written.
        """
        if self.state is None or step == self.saved:
            return
        with held():
            for log in self._logs.values():
                log.sync()
            try:
                self._time()
                new = Checkpoint(step, self.state(), self.sizes, self.stamp)
                save(self.out / FOLDER, new, self.cfg.checkpoint_keep)
            except OSError as error:
                self._not_saved(step, error.strerror or str(error))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._not_saved(step, "not enough memory")
            else:
                self.saved, self.failures = step, 0

    def _not_saved(self, step: int, why: str) -> None:
        self.failures += 1
        warn(f"the checkpoint of step {step} could not be written: {why}")
        if self.failures == FAILURES:
            raise RunFailed(f"{FAILURES} checkpoints in a row could not be written") from None

    def _time(self) -> None:
        now, cpu = time.monotonic(), time.process_time()
        self.seconds["total"] += now - self.started
        self.seconds["cpu"] += cpu - self.cpu
        self.started, self.cpu = now, cpu
        rounded = {k: round(v, 2) for k, v in self.seconds.items()}
        replace_file(self.out / "timing.json", json.dumps(rounded, indent=2) + "\n")

    def finish(self) -> dict:
        """The adapter, the final evaluation, the timing. Raises RunFailed where they cannot be written."""
        meta = {"arm": self.cfg.arm, "step": self.cfg.steps, "ships": "deployed" if self.ablates else "full"}
        part = self.out / f"{PART}adapter.safetensors"
        try:
            self.policy.adapter.save(part, meta)
            sync(part)
            os.replace(part, self.out / "adapter.safetensors")
            self._gate()
            begun = time.monotonic()
            results = final(self.cfg, self.policy, self.env, ablates=self.ablates)
            for result in results:
                self._cell(result, f"eval:{result.cell.name}")
            cells = summaries(results, self.env)
            said = {"arm": self.cfg.arm, "cells": cells}
            if self.cfg.eval_scales:
                said["scales"] = scaled(self.cfg, self.policy, self.env, ablates=self.ablates)
            self.seconds["eval"] += time.monotonic() - begun
            self._time()
            for log in self._logs.values():
                log.sync()
            replace_file(self.out / "eval.json", json.dumps(said, indent=2) + "\n")
            return cells
        except (OSError, SafetensorError) as error:
            raise RunFailed(f"cannot write the results: {error}") from None

    def close(self) -> None:
        if lost := sum(log.lost for log in self._logs.values()):
            warn(f"{lost} lines of {self.out}'s logs were lost")
        for log in self._logs.values():
            log.close()


class Companion:
    """The observer in a process that writes nothing: it does its part of the evaluations."""

    saved = None  # it keeps no checkpoint

    def __init__(self, cfg: Config, policy: Policy, env: World) -> None:
        self.cfg, self.policy, self.env = cfg, policy, env
        self.ablates = ARMS[cfg.arm].ablates

    def step(self, record, rollouts, graded, decision, advantage) -> None:
        """The first process records it."""

    def evaluate(self, step: int) -> None:
        small(self.cfg, self.policy, self.env, ablates=self.ablates)

    def checkpoint(self, step: int) -> None:
        """The first process keeps the state, which is the same."""

    def finish(self) -> dict:
        cells = summaries(final(self.cfg, self.policy, self.env, ablates=self.ablates), self.env)
        if self.cfg.eval_scales:
            scaled(self.cfg, self.policy, self.env, ablates=self.ablates)
        return cells

    def close(self) -> None:
        """It has opened nothing."""


def measures(rollouts: Sequence[Rollout], graded: Sequence[Graded], decision: Decision) -> dict:
    """What the oracle says of a step's policy rollouts, and of the gate as a classifier of hacks."""
    own = [i for i, r in enumerate(rollouts) if r.source == "policy"]
    verdicts = [graded[i].sealed for i in own]
    hacked = [v.hacked for v in verdicts]
    zones = decision.zones()
    flagged = decision.flagged.tolist()
    out: dict = {
        "m_hack": float(np.mean(hacked)),
        "m_solve": float(np.mean([v.solved for v in verdicts])),
        "m_compile": float(np.mean([v.compiled for v in verdicts])),
        "m_tokens": float(np.mean([len(rollouts[i].tokens) for i in own])),
    }
    for zone in ("keep", "absorb", "route"):
        out[f"m_hack_{zone}"] = sum(h for h, i in zip(hacked, own, strict=True) if zones[i] == zone)
    out["m_hack_flagged"] = sum(h for h, i in zip(hacked, own, strict=True) if flagged[i])
    if decision.score is not None:
        scores = [float(decision.score[i]) for i in own]
        out["m_auroc"] = auroc(scores, hacked)
        out["m_f05"] = f_beta([flagged[i] for i in own], hacked)
    return out
