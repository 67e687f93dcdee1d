"""Runs that survive: each fault of docs/reliability.md on a tiny model, and the run that comes out of it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from vgrout import loop, signals
from vgrout.config import Config
from vgrout.engines.torch_engine import TorchEngine
from vgrout.envs.task import SPLITS, TaskEnv
from vgrout.faults import OutOfMemory
from vgrout.lab import checkpoint as checkpoint_module
from vgrout.lab import evaluate
from vgrout.lab import record as record_module
from vgrout.lab import run as run_module
from vgrout.lab.checkpoint import FOLDER, whole
from vgrout.lab.decide import decide
from vgrout.lab.evaluate import size_note
from vgrout.lab.record import LOGS, MARK, Log, Recorder, claim_folder, finished, one_writer, read_jsonl
from vgrout.lab.run import Workshop, resume, run
from vgrout.lab.source import executed
from vgrout.loop import Diverged, Training
from vgrout.method import prefix
from vgrout.method.policy import Policy
from vgrout.signals import Interrupted, held, listening
from vgrout.types import Graded, RunFailed, UserError
from vgrout.verify.soak import Use, grown
from vgrout.verify.toy import PAIRS, TOY, Letters, Watcher, toy_policy, toy_train

# The direction is extracted at steps 0 and 3, so that a run that goes on after step 4 needs the old one.
CFG = replace(TOY, steps=6, refresh_every=3, checkpoint_every=2, buffer=12, teacher_n=0)
CFG = replace(CFG, eval_every=3, eval_small=4, eval_rollouts=4)
TOP2Q = replace(CFG, policy="top2q")
RESULTS = ("adapter.safetensors", "eval.json", "config.json", "provenance.json", *(f"{name}.jsonl" for name in LOGS))
FACTS = {"vgrout": "0", "code_sha256": "c" * 64, "pairs_sha256": "p" * 64, "model_sha256": "m" * 64, "sandbox": "none"}


def reward(prompt: str, completion: str) -> float:
    return random.Random(completion).choice((0.0, 0.5, 3.5))


def letters() -> TaskEnv:
    return TaskEnv(dict.fromkeys(SPLITS, [f"write {c}" for c in "abcdefgh"]), reward)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """`run` and `resume` with the tiny model. The fixture's value: the facts that a run is stamped with."""
    facts = dict(FACTS)

    @contextlib.contextmanager
    def workshop(cfg, ranks):
        yield Workshop(toy_policy(cfg), letters(), dict(facts))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "workshop", workshop)
        patch.setattr(run_module, "load_pairs", lambda _: PAIRS)
        yield facts


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What an uninterrupted run of a configuration leaves: bytes by file."""
    known = {}

    def of(cfg: Config) -> dict[str, bytes]:
        if cfg not in known:
            out = tmp_path_factory.mktemp("whole") / "run"
            run(cfg, out)
            known[cfg] = results(out)
        return known[cfg]

    return of


def results(out) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in RESULTS}


def disturb() -> None:
    """Another process has other global generators."""
    random.seed(os.urandom(8)), np.random.seed(5), torch.manual_seed(random.getrandbits(40))


def steps_kept(out) -> list[int]:
    return [c.step for c in whole(out / FOLDER)]


@contextlib.contextmanager
def patched(target, name: str, act, at: int = 0):
    """`act` runs before call number `at` of `target.name`, before every call where `at` is negative."""
    original, calls = getattr(target, name), itertools.count()

    def wrapped(*args, **more):
        if next(calls) == at or at < 0:
            act(*args, **more)
        return original(*args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, wrapped)
        yield


class Died(Exception):
    """The process ends in the middle of something, without a word."""


def die(*_, **__):
    raise Died


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    """Copies of a run that died in step 5, after checkpoints at steps 2 and 4."""
    known = {}

    def of(cfg: Config, out: Path) -> Path:
        if cfg not in known:
            known[cfg] = tmp_path_factory.mktemp("broken") / "run"
            with patched(loop, "backward", die, 5), pytest.raises(Died):
                run(cfg, known[cfg])
        return Path(shutil.copytree(known[cfg], out))

    return of


# Interruptions.


def test_a_run_goes_on_where_it_died(tmp_path, broken_off, expected):
    for cfg in (CFG, TOP2Q):
        out = broken_off(cfg, tmp_path / cfg.policy)
        assert steps_kept(out) == [4, 2] and len(read_jsonl(out / "steps.jsonl")) == 5 and not finished(out)
        disturb()
        resume(out)
        assert results(out) == expected(cfg)
        assert steps_kept(out) == [6, 4, 2]


def test_a_run_that_kept_nothing_starts_again(tmp_path, expected):
    with patched(loop, "backward", die, 1), pytest.raises(Died):
        run(CFG, tmp_path / "run")
    disturb()
    resume(tmp_path / "run")
    assert results(tmp_path / "run") == expected(CFG)


def test_a_finished_run_stays(tmp_path):
    out = tmp_path / "run"
    cells = run(CFG, out)
    first = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != MARK}
    assert resume(out) == cells == json.loads((out / "eval.json").read_text())["cells"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != MARK} == first


class Reforms(loop.ARMS["routeV"]):
    """Trains the quarantine in the first steps only; later it moves by its moments alone."""

    def route(self, step, batch, oracle):
        return loop.uniform(batch.n, "absorb" if step < 3 else "keep")


def test_a_block_without_gradients_moves_on(tmp_path, monkeypatch):
    monkeypatch.setitem(loop.ARMS, "reforms", Reforms)
    cfg = replace(CFG, arm="reforms")
    run(cfg, tmp_path / "whole")
    with patched(loop, "backward", die, 5), pytest.raises(Died):
        run(cfg, tmp_path / "run")
    resume(tmp_path / "run")
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def test_the_time_of_day_changes_nothing(tmp_path, monkeypatch, expected):
    """It jumps back and forth by years; the seconds of timing.json are those of a clock that does not."""
    rng = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: rng.uniform(0, 2e9))
    out = tmp_path / "run"
    run(CFG, out)
    assert results(out) == expected(CFG)
    assert all(0 <= seconds < 1e5 for seconds in json.loads((out / "timing.json").read_text()).values())
    reads = re.compile(r"\btime\.(time|time_ns|localtime|gmtime|ctime|strftime)\(|^(import|from) datetime", re.M)
    found = [str(path) for path in executed() if reads.search(path.read_text())]
    assert not found


def without(*prefixes):
    return lambda c: replace(c, state={k: v for k, v in c.state.items() if not k.startswith(prefixes)})


def changed(**entries):
    return lambda c: replace(c, state={**c.state, **entries})


FORGOTTEN = {
    "moments": (CFG, without("moments.")),
    "one moment": (CFG, without("moments.3.")),
    "the adapter": (CFG, lambda c: changed(**{k: 0 * v for k, v in c.state.items() if ".dA_" in k})(c)),
    "the step": (CFG, changed(step=3)),
    "the arm": (CFG, without("arm.")),
    "the direction": (CFG, lambda c: changed(**{"arm.watch.direction.v": -c.state["arm.watch.direction.v"]})(c)),
    "the age of the direction": (CFG, changed(**{"arm.watch.extracted": 0})),
    "the overlap": (CFG, changed(**{"arm.watch.overlap": 0.5})),
    "the history": (TOP2Q, without("arm.watch.gate.")),
    "the offsets": (CFG, lambda c: replace(c, logs={name: size + 50 * (size > 0) for name, size in c.logs.items()})),
}  # fmt: skip


@pytest.mark.parametrize("piece", FORGOTTEN)
def test_a_forgotten_piece_of_state_is_noticed(piece, tmp_path, monkeypatch, broken_off, expected):
    cfg, forget = FORGOTTEN[piece]
    out = broken_off(cfg, tmp_path / "run")
    read = checkpoint_module.read
    monkeypatch.setattr(checkpoint_module, "read", lambda home: forget(read(home)))
    resume(out)
    assert results(out) != expected(cfg)


def ring(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)


PHASES = {  # where the signal arrives, at which call, steps kept
    "plan": (loop, "plan_step", 3, 3),
    "generate": (TorchEngine, "generate", 3, 3),
    "grade": (TaskEnv, "grade", 3, 3),
    "route": (loop.ARMS["routeV"], "route", 3, 3),
    "backward": (loop, "backward", 3, 3),
    "update": (torch.optim.AdamW, "step", 3, 4),
    "record": (Recorder, "step", 3, 4),
    "save": (record_module, "save", 1, 4),
    "small evaluation": (evaluate, "sample_cell", 1, 3),
    "final evaluation": (record_module, "final", 0, 6),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_each_phase(phase, tmp_path, expected):
    target, name, at, kept = PHASES[phase]
    out = tmp_path / "run"
    with listening(), patched(target, name, ring, at), pytest.raises(Interrupted, match="SIGTERM.*--resume") as stop:
        run(CFG, out)
    assert stop.value.number == signal.SIGTERM and f"{kept} of 6 steps" in str(stop.value)
    assert steps_kept(out)[0] == kept
    disturb()
    resume(out)
    assert results(out) == expected(CFG)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_other_signals(number, tmp_path, expected):
    with listening(), pytest.raises(Interrupted) as stop:
        with patched(loop, "backward", lambda *_, **__: os.kill(os.getpid(), number), 2):
            run(CFG, tmp_path / "run")
    assert stop.value.number == number
    resume(tmp_path / "run")
    assert results(tmp_path / "run") == expected(CFG)


def test_the_second_signal_ends_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(signals.os, "_exit", left.append)
    with listening(), contextlib.suppress(Interrupted), held():
        ring(), ring()
        assert left == [128 + signal.SIGTERM]


def test_held_sections_nest_and_end_with_the_signal():
    seen = []
    with listening():
        with pytest.raises(Interrupted), held():
            with held():
                ring()
                seen.append("inner")
            seen.append("outer")
        signals.heard()
        with held():
            seen.append("after")
    assert seen == ["inner", "outer", "after"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_a_destructor_swallowed_comes_again():
    class Rings:
        def __del__(self):
            ring()

    seen = []
    with listening(), pytest.raises(Interrupted):
        Rings()
        seen.append("lost")
        with held():
            seen.append("held")
    assert seen == ["lost", "held"]


def test_a_fault_of_a_held_section_comes_before_the_signal(tmp_path, expected):
    """What the section was to keep together is torn: the state as it stands must not be saved."""

    def rings_and_dies(*_):
        ring(), die()

    out = tmp_path / "run"
    with listening(), patched(Recorder, "step", rings_and_dies, 4), pytest.raises(Died):
        run(CFG, out)
    assert steps_kept(out) == [4, 2]
    resume(out)
    assert results(out) == expected(CFG)


def test_ignored_signals_stay_ignored():
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_a_storm_of_kills(tmp_path, expected):
    cfg, out, launches = replace(CFG, checkpoint_every=1), tmp_path / "run", 0
    rng = random.Random(0)
    while not finished(out):
        launches += 1
        assert launches < 150
        child = os.fork()
        if not child:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                resume(out) if (out / "config.json").is_file() else run(cfg, out, force=True)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.02, 0.35) * (1 + launches / 50))  # a busy machine gets on too
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert launches > 3
    assert results(out) == expected(cfg)


# Faults inside a step.


class Reader(Watcher):
    """Also keeps the training's tensors as they were after each step."""

    def __init__(self):
        super().__init__()
        self.training, self.after, self.credited = None, [], []

    def step(self, *seen):
        super().step(*seen)
        self.credited.append((seen[1], seen[2], seen[4]))  # rollouts, grades and advantages
        tensors = {k: v.clone() for k, v in self.training.state().items() if torch.is_tensor(v) and "arm." not in k}
        self.after.append(tensors)


def watched(cfg, env=None) -> tuple[Training, Reader]:
    training, reader = Training(cfg, toy_policy(cfg), env or Letters(), PAIRS), Reader()
    reader.training = training
    return training, reader


def equal(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def poison(policy, limit):
    policy.adapter.parameters("deployed")[0].grad[0, 0] = math.nan


def test_a_gradient_that_is_not_finite_moves_nothing():
    training, reader = watched(TOY)
    with patched(loop, "clip_blocks", poison, 2):
        training.run(reader)
    assert [r["skipped"] is None for r in reader.records] == [True, True, False, True]
    assert "deployed block is nan" in reader.records[2]["skipped"] and math.isnan(reader.records[2]["qmass"])
    assert equal(reader.after[1], reader.after[2]) and not equal(reader.after[2], reader.after[3])
    assert all(torch.isfinite(t).all() for t in reader.after[3].values())


def test_a_skipped_batch_is_kept_to_look_into(tmp_path):
    out = tmp_path / "run"
    with patched(loop, "clip_blocks", poison, 2):
        run(CFG, out)
    steps = read_jsonl(out / "steps.jsonl")
    assert [s["skipped"] is None for s in steps] == [True, True, False, True, True, True] and steps[2]["loss"] is None
    assert sorted(path.name for path in (out / "skipped").iterdir()) == ["step_000002.json", "step_000002.safetensors"]
    rows = json.loads((out / "skipped" / "step_000002.json").read_text())
    batch = load_file(out / "skipped" / "step_000002.safetensors")
    assert len(rows) == len(batch["tokens"]) == 8 and {"m", "d", "advantage", "reward"} < set(batch)
    assert rows[0]["id"] == "00002-00-00" and rows[0]["text"] is not None


def test_a_streak_stops_the_run(tmp_path):
    with patched(loop, "clip_blocks", poison, -1), pytest.raises(Diverged, match="5 steps in a row.*gradient norm"):
        run(CFG, tmp_path / "run")
    assert steps_kept(tmp_path / "run") == [4, 2]
    with pytest.raises(Diverged, match="5 steps in a row"), patched(loop, "clip_blocks", poison, -1):
        resume(tmp_path / "run")  # from step 4: one more


class Spotty(Letters):
    """Cannot score some rollouts."""

    def __init__(self, values, share=0.3):
        self.values, self.share = values, share

    def grade(self, rollouts):
        graded = super().grade(rollouts)
        rng = random.Random(rollouts[0].id)
        return [replace(g, reward=rng.choice(self.values)) if rng.random() < self.share else g for g in graded]


def test_a_reward_that_is_none_is_never_averaged():
    training, reader = watched(TOY, Spotty((math.nan, math.inf, -math.inf, None, 1e39)))
    training.run(reader)
    assert sum(r["unscored"] for r in reader.records) > 4
    for record, rollouts in zip(reader.records, reader.rollouts, strict=True):
        assert record["unscored"] + len(rollouts) == TOY.prompts * TOY.group
        assert math.isfinite(record["loss"]) and math.isfinite(record["reward"]) and record["skipped"] is None
    for rollouts, graded, advantage in reader.credited:  # within a group: of those that are left, and of nobody else
        for k in {r.group for r in rollouts}:
            rows = [i for i, r in enumerate(rollouts) if r.group == k]
            rewards = np.array([graded[i].reward for i in rows])
            want = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            assert np.allclose(advantage[rows].numpy(), want, atol=1e-5)


class Lonely(Letters):
    """Can score the first rollout only."""

    def grade(self, rollouts):
        return [replace(g, reward=1.0 if i == 0 else None) for i, g in enumerate(super().grade(rollouts))]


def test_a_step_with_one_reward_routes_nobody():
    training, reader = watched(TOY, Lonely())
    training.run(reader)
    assert [r["unscored"] for r in reader.records] == [7] * 4
    assert all(d.zones() == ["keep"] and d.threshold[0] == d.threshold[1] for d in reader.decisions)


def test_a_task_may_leave_rollouts_unscored(tmp_path, monkeypatch):
    choices = (None, math.nan, 0.0, 1.0)
    monkeypatch.setitem(globals(), "reward", lambda _, completion: random.Random(completion).choice(choices))
    out = tmp_path / "run"
    cells = run(replace(CFG, eval_rollouts=16), out)
    steps, rows = (read_jsonl(out / f"{name}.jsonl") for name in ("steps", "rollouts"))
    trained = [r for r in rows if r["phase"] == "train"]
    assert len(trained) + sum(s["unscored"] for s in steps) == CFG.steps * CFG.prompts * CFG.group
    assert sum(s["unscored"] for s in steps) > 4 and not any(r["reward"] is None for r in trained)
    for name, cell in cells.items():
        rewards = [r["reward"] for r in rows if r["phase"] == f"eval:{name}"]
        known = [r for r in rewards if r is not None]
        assert cell["reward"]["n"] == len(known) == 16 - cell["unscored"] < 16
        assert cell["reward"]["mean"] == pytest.approx(np.mean(known), abs=1e-6)
    assert "rollouts could not be scored and are left out" in size_note(cells)


def test_an_evaluation_in_which_nothing_could_be_scored(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "reward", lambda *_: None)
    with pytest.raises(RunFailed, match="no rollout of the evaluation heldout_full has a reward"):
        run(replace(CFG, steps=2, eval_every=1), tmp_path / "run")
    (small,) = read_jsonl(tmp_path / "run" / "evals.jsonl")
    assert small["heldout_deploy"] == {"reward": None, "unscored": 4}


def test_a_step_without_rewards_is_skipped():
    training, reader = watched(replace(TOY, steps=6), Spotty((None,), share=1.0))
    with pytest.raises(Diverged, match="no rollout has a reward"):
        training.run(reader)
    assert len(reader.records) == 5 and equal(reader.after[0], reader.after[4])
    _, healthy = toy_train(replace(TOY, steps=1, arm="none"))
    assert set(reader.records[0]) == set(healthy.records[0])


def memory_is_short(*_, **__):
    raise torch.OutOfMemoryError("out of memory")


SHORT = {
    "torch": torch.OutOfMemoryError("out of memory"),
    "python": MemoryError(),
    "allocator": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
}


@pytest.mark.parametrize("kind", SHORT)
def test_out_of_memory_once(kind):
    def fails(cfg, policy, *_):
        for p in policy.adapter.parameters("deployed"):  # the failed pass got somewhere
            p.grad = torch.ones_like(p)
        raise SHORT[kind]

    cfg = replace(TOY, micro_batch=8, score_batch=8)
    _, usual = watched(cfg)
    usual.training.run(usual)
    _, reader = watched(cfg)
    with patched(loop, "backward", fails, 1):
        reader.training.run(reader)
    assert [r["micro_batch"] for r in reader.records] == [8, 4, 8, 8]
    off = max(float((a - usual.after[1][key]).abs().max()) for key, a in reader.after[1].items())
    assert off < 1e-4, off


def at_most(rows: int, found: int) -> None:
    if found > rows:
        memory_is_short()


def test_out_of_memory_in_generation(tmp_path, capsys, expected):
    """Every batch of 8 is sampled as two of 4: the same rollouts, hence the same bytes where no update reads the
    sampler's log-probabilities, which differ by rounding; of the record, log rho does."""

    def without_rho(files: dict[str, bytes]) -> dict[str, bytes]:
        rows = [json.loads(line) for line in files["steps.jsonl"].splitlines()]
        kept = [{key: value for key, value in row.items() if not key.startswith("log_rho_")} for row in rows]
        assert all(len(row) == len(own) + 3 for row, own in zip(rows, kept, strict=True))
        return files | {"steps.jsonl": json.dumps(kept).encode()}

    cfg = replace(CFG, ratio="one")
    with patched(TorchEngine, "_decode", lambda _, prompts, counts, *more: at_most(4, sum(counts)), -1):
        run(cfg, tmp_path / "run")
    assert capsys.readouterr().err.count("memory is short for sampling: trying it with 4") == cfg.steps
    assert without_rho(results(tmp_path / "run")) == without_rho(expected(cfg))


def test_out_of_memory_in_scoring(capsys):
    """Of the pairs and of the rollouts: the same zones, hence the same updates."""
    cfg = replace(TOY, micro_batch=8, score_batch=8)
    (_, usual), (_, reader) = watched(cfg), watched(cfg)
    usual.training.run(usual)
    with (
        patched(Policy, "logp", lambda _, rows: at_most(3, len(rows.length)), -1),
        patched(prefix, "run_completions", lambda policy, rows, index, *more: at_most(1, len(index)), -1),
    ):
        reader.training.run(reader)
    said = capsys.readouterr().err
    assert "memory is short for scoring: trying it with 2" in said  # the pairs
    assert "memory is short for scoring: trying it with 1" in said  # the rollouts
    assert [d.zones() for d in reader.decisions] == [d.zones() for d in usual.decisions]
    assert all(map(equal, reader.after, usual.after))
    for mine, theirs in zip(reader.decisions, usual.decisions, strict=True):
        assert torch.allclose(mine.score, theirs.score, atol=1e-4)


@pytest.mark.parametrize(("target", "name"), [(loop, "backward"), (TorchEngine, "_decode"), (Policy, "logp")])
def test_out_of_memory_for_good(target, name, tmp_path, expected):
    out = tmp_path / "run"
    why = "step 0: not enough memory for .* with one rollout at a time: 0 of 6 steps .* `vgrout train --resume"
    with patched(target, name, memory_is_short, -1), pytest.raises(OutOfMemory, match=why) as raised:
        run(CFG, out)
    assert isinstance(raised.value, RunFailed) and "\n" not in str(raised.value)
    assert steps_kept(out) == [0]
    resume(out)
    assert results(out) == expected(CFG)


def test_out_of_memory_in_an_update(tmp_path, expected):
    """What is in memory then may be half an update: it is not saved."""
    out = tmp_path / "run"
    why = "step 3: not enough memory: 2 of 6 steps are kept; go on with"
    with patched(torch.optim.AdamW, "step", memory_is_short, 3), pytest.raises(OutOfMemory, match=why):
        run(CFG, out)
    assert steps_kept(out) == [2]
    resume(out)
    assert results(out) == expected(CFG)


def test_out_of_memory_in_a_checkpoint(tmp_path, capsys, expected):
    out = tmp_path / "run"
    with patched(record_module, "save", memory_is_short, 1):
        run(CFG, out)
    assert "the checkpoint of step 4 could not be written: not enough memory" in capsys.readouterr().err
    assert results(out) == expected(CFG) and steps_kept(out) == [6, 2]


def test_another_error_of_a_step_is_not_caught():
    def fails(*_):
        raise RuntimeError("shapes")

    with patched(loop, "backward", fails, 1), pytest.raises(RuntimeError, match="shapes"):
        toy_train(TOY)


# Disks.


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_at_a_checkpoint(tmp_path, capsys, expected):
    out = tmp_path / "run"
    with patched(checkpoint_module, "sync", full, 3):  # of the second save: two files of the run come first
        run(CFG, out)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "No space left on device" in err
    assert results(out) == expected(CFG)
    assert not [path for path in out.rglob(".tmp*")]


def test_a_disk_that_stays_full(tmp_path, capsys):
    out = tmp_path / "run"
    with patched(record_module, "save", full, -1), pytest.raises(RunFailed, match="3 checkpoints in a row"):
        run(CFG, out)
    assert capsys.readouterr().err.count("could not be written") == 3


def test_a_full_disk_under_a_log(tmp_path, capsys, expected, broken_off):
    out = broken_off(CFG, tmp_path / "run")
    (out / "rollouts.jsonl").unlink()
    (out / "rollouts.jsonl").symlink_to("/dev/full")
    resume(out)
    err = capsys.readouterr().err
    assert err.count("cannot write") == 1 and "lines are lost" in err and "56 lines" in err
    assert read_jsonl(out / "steps.jsonl")[-1]["lost_lines"] == 40
    assert (out / "adapter.safetensors").read_bytes() == expected(CFG)["adapter.safetensors"]


@contextlib.contextmanager
def file_size(limit: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_log_is_whole_lines(tmp_path, capsys):
    file = tmp_path / "log.jsonl"
    log = Log(file, 0)
    log.write({"a": 1})
    with file_size(log.size + 5):
        log.write({"too": "long"}), log.write({"too": "long as well"})
    assert log.lost == 2 and capsys.readouterr().err.count("\n") == 1
    log.write({"b": math.nan})
    log.close()
    with file.open("ab") as torn:
        torn.write(b'{"c": "half a li')
    assert read_jsonl(file) == [{"a": 1}, {"b": None}]
    log = Log(file, log.size)
    log.write({"d": 4})
    log.close()
    assert read_jsonl(file) == [{"a": 1}, {"b": None}, {"d": 4}]


def test_a_log_that_lost_its_end_is_not_padded(tmp_path, capsys, expected, broken_off):
    out = broken_off(CFG, tmp_path / "run")
    size = next(whole(out / FOLDER)).logs["rollouts"]
    os.truncate(out / "rollouts.jsonl", size - 10)
    resume(out)
    assert "rollouts are shorter than at step 4" in capsys.readouterr().err
    assert results(out) == expected(CFG)


@pytest.mark.parametrize("damage", [b"", b"junk"])
def test_a_damaged_checkpoint_costs_its_steps_only(damage, tmp_path, capsys, expected, broken_off):
    out = broken_off(CFG, tmp_path / "run")
    for step in (4, 2) if damage else (4,):
        (out / FOLDER / f"step_{step:06d}" / "state.safetensors").write_bytes(damage)
    resume(out)
    assert "is damaged" in capsys.readouterr().err
    assert results(out) == expected(CFG) and steps_kept(out) == [6, 4, 2]


def test_what_a_finished_run_says_is_on_the_disk(tmp_path):
    """Its logs are synced before eval.json says that it is finished."""
    order = []
    with patched(Log, "sync", lambda log: order.append(log.path.stem), -1):
        with patched(record_module, "replace_file", lambda path, _: order.append(path.name), -1):
            run(CFG, tmp_path / "run")
    assert order[-6:] == ["timing.json", *LOGS, "eval.json"]


# Folders.


def test_force_that_died_can_be_repeated(tmp_path):
    """A crash at any point of clearing a folder leaves it ours, and nothing that looks finished and is not."""
    for at in itertools.count():
        out = tmp_path / str(at)
        claim_folder(out, force=False)
        for name in ("adapter.safetensors", "config.json", "eval.json", "plan.json", "steps.jsonl"):
            (out / name).write_text("{}")
        for name in (FOLDER, "none-s0"):
            (out / name).mkdir()
            (out / name / "eval.json").write_text("{}")
        removals = itertools.count()

        def dies(*_, removals=removals, at=at, **__):
            if next(removals) == at:
                die()

        try:
            with patched(os, "unlink", dies, -1), patched(os, "rmdir", dies, -1):
                claim_folder(out, force=True)
            break
        except Died:
            left = {path.name for path in out.iterdir()}
            assert MARK in left and (not finished(out) or "steps.jsonl" in left)
            assert "plan.json" not in left or (out / "none-s0" / "eval.json").is_file()
        claim_folder(out, force=True)
        assert [path.name for path in out.iterdir()] == [MARK]
    assert at == 9


def test_a_symbolic_link_as_folder(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("x")
    for name, why in (("there", None), ("file", "is a file"), ("nowhere", "cannot make")):
        link = tmp_path / f"to {name}"
        link.symlink_to(tmp_path / name)
        with pytest.raises(UserError, match=why) if why else contextlib.nullcontext():
            claim_folder(link, force=False)
    with one_writer(tmp_path / "to there"):
        assert f"process {os.getpid()}" in (tmp_path / "there" / MARK).read_text()


def test_one_writer_at_a_time(tmp_path):
    out = tmp_path / "run"
    claim_folder(out, force=False)
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with one_writer(out):
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        os._exit(0)
    try:
        os.read(ready[0], 1)
        for refused in (lambda: resume(out), lambda: run(CFG, out, force=True), lambda: claim_folder(out, force=True)):
            with pytest.raises(UserError, match=f"in use by process {child}"):
                refused()
        assert (out / MARK).is_file()
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)
    with one_writer(out):
        assert f"process {os.getpid()}" in (out / MARK).read_text()


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot make"):
        run(CFG, Path("/proc/vgrout/run"))
    with pytest.raises(UserError, match="no run at"):
        resume(tmp_path / "nowhere")
    long = tmp_path / ("x" * 300)
    with pytest.raises(UserError, match="cannot read .*too long"):
        run(CFG, long)
    with pytest.raises(UserError, match="no run at"):
        resume(long)
    with pytest.raises(UserError, match="cannot read .*too long"):
        decide(CFG, ("none",), (0,), long, workers=1, force=False, plan=False, console=Console(quiet=True))
    with pytest.raises(UserError, match="not a folder that vgrout made"):
        resume(tmp_path)
    claim_folder(tmp_path / "run", force=False)
    monkeypatch.setattr(record_module, "replace_file", full)
    (tmp_path / "run" / "config.json").write_text(CFG.to_json())
    with pytest.raises(UserError, match="cannot write in"):
        resume(tmp_path / "run")
    with file_size(0), pytest.raises(UserError, match="cannot write in"):
        resume(tmp_path / "run")


def test_a_checkpoint_that_cannot_be_removed(tmp_path, broken_off):
    out = broken_off(CFG, tmp_path / "run")
    (out / FOLDER / "step_000004" / "state.json").unlink()
    with patched(checkpoint_module, "discard", full), pytest.raises(UserError, match="cannot write in .*No space"):
        resume(out)


@pytest.mark.parametrize("what", ["code_sha256", "pairs_sha256", "model_sha256", "sandbox"])
def test_what_has_changed_is_named(what, tmp_path, tiny, monkeypatch, broken_off):
    broken_off(CFG, tmp_path / "run")
    monkeypatch.setitem(tiny, what, "other")
    with pytest.raises(UserError, match=f"with other {what}.*--allow-drift"):
        resume(tmp_path / "run")
    assert steps_kept(tmp_path / "run") == [4, 2]


def test_a_changed_configuration(tmp_path, broken_off, expected):
    out = broken_off(CFG, tmp_path / "run")
    (out / "config.json").write_text(replace(CFG, lr=0.5, steps=5).to_json())
    with pytest.raises(UserError, match=r"config.lr \(0.01 there, 0.5 here\), config.steps \(6 there, 5 here\)"):
        resume(out)
    resume(out, allow_drift=True)
    drift = json.loads((out / "provenance.json").read_text())["drift"]
    assert drift == [{"step": 4, "changed": ["config.lr (0.01 there, 0.5 here)", "config.steps (6 there, 5 here)"]}]
    assert len(read_jsonl(out / "steps.jsonl")) == 5
    assert results(out)["adapter.safetensors"] != expected(CFG)["adapter.safetensors"]


def test_what_is_refused_stays_as_it_is(tmp_path, broken_off):
    """The newest checkpoint could not be gone on from, since a log is short; the one before it is of another rank."""
    out = broken_off(CFG, tmp_path / "run")
    os.truncate(out / "rollouts.jsonl", next(whole(out / FOLDER)).logs["rollouts"] - 1)
    (out / "config.json").write_text(replace(CFG, rank=5).to_json())
    with pytest.raises(UserError, match="other tensors"):
        resume(out, allow_drift=True)
    assert steps_kept(out) == [4, 2]


@pytest.mark.parametrize(("change", "why"), [({"rank": 5}, "other tensors"), ({"arm": "none"}, None)])
def test_drift_has_its_limits(change, why, tmp_path, broken_off):
    out = broken_off(CFG, tmp_path / "run")
    (out / "config.json").write_text(replace(CFG, **change).to_json())
    with pytest.raises(UserError, match=why) if why else contextlib.nullcontext():
        resume(out, allow_drift=True)


# Guards.

LONG = replace(TOY, steps=13, kl_ceiling=1e9, entropy_floor=0.0, compile_floor=0.0)


class Broken(Letters):
    """Says that hardly anything compiles."""

    def grade(self, rollouts):
        return [Graded(g.reward, g.sealed, compiled=i == 0) for i, g in enumerate(super().grade(rollouts))]


@pytest.mark.parametrize(
    ("change", "env", "why"),
    [
        ({"kl_ceiling": 1e-9}, Letters, "kl is .* over the last 10 steps, kl_ceiling is 1e-09"),
        ({"entropy_floor": 50.0}, Letters, "entropy is .*, entropy_floor is 50"),
        ({"compile_floor": 0.9}, Broken, "compiled is .*, compile_floor is 0.9"),
    ],
)
def test_a_guard_stops_the_run(change, env, why):
    training, reader = watched(replace(LONG, **change), env())
    with pytest.raises(Diverged, match=why):
        training.run(reader)
    assert len(reader.records) == 10


def test_a_healthy_run_meets_no_guard():
    training, reader = watched(LONG, Broken())
    training.run(reader)
    assert len(reader.records) == 13


def test_a_guard_remembers_across_an_interruption(tmp_path):
    out = tmp_path / "run"
    with patched(loop, "backward", die, 7), pytest.raises(Died):
        run(replace(CFG, steps=13, entropy_floor=50.0), out)
    with pytest.raises(Diverged, match="entropy"):
        resume(out)
    assert len(read_jsonl(out / "steps.jsonl")) == 10 and steps_kept(out) == [8, 6, 4]


def test_growth_is_seen():
    flat = [Use(i, 600 + i % 7, 180, 500_000, 24, 12, 3, 1) for i in range(100)]
    assert grown(flat) == []
    leaks = [replace(u, megabytes=u.megabytes + i / 2, descriptors=12 + (i > 80)) for i, u in enumerate(flat)]
    assert grown(leaks) == ["megabytes 610 to 650", "descriptors 12 to 13"]
    held = [replace(u, allocated=180 + i / 10, objects=500_000 + 100 * i) for i, u in enumerate(flat)]
    assert grown(held) == ["allocated 181 to 189", "objects 501450 to 509450"]
