"""One run from its configuration: build everything, train, evaluate, record."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from vgrout import __version__
from vgrout.adapters import ADAPTERS, attach
from vgrout.arms import ARMS
from vgrout.config import Config
from vgrout.envs.micro_env import MicroEnv, check_modes
from vgrout.envs.sandbox import Sandbox
from vgrout.envs.selftest import self_test
from vgrout.envs.task import load_task
from vgrout.lab.evaluate import World
from vgrout.lab.record import Recorder, check_folder, claim_folder
from vgrout.loop import train
from vgrout.method.policy import Policy
from vgrout.models.load import load_model, model_path, weights_digest
from vgrout.pairs import digest
from vgrout.pairs import load as load_pairs
from vgrout.types import UserError

MICRO = "micro"


@dataclass(frozen=True)
class Workshop:
    """What a run works with, and what it ran on as JSON-ready facts: no clock, no path."""

    policy: Policy
    env: World
    provenance: Mapping[str, Any]


def check(cfg: Config) -> None:
    """What can be wrong with the names in a configuration. Raises UserError. `workshop` finds the rest: it builds."""
    for what, name, known in (("arm", cfg.arm, ARMS), ("adapter", cfg.adapter, ADAPTERS)):
        if name not in known:
            raise UserError(f"unknown {what} {name!r}: choose one of {', '.join(known)}")
    if cfg.env == MICRO:
        check_modes(cfg.modes)
    else:
        check_task(cfg)
    load_pairs(cfg.pairs)
    model_path(cfg.model)


def check_task(cfg: Config) -> None:
    """What a task without an oracle cannot be asked for. Raises UserError."""
    if not cfg.env.endswith(".py"):
        raise UserError(f"unknown environment {cfg.env!r}: give {MICRO}, or a Python file")
    if ARMS[cfg.arm].reads_oracle:
        raise UserError(f"{cfg.arm} reads the oracle: {cfg.env} has no oracle")
    if not ARMS[cfg.arm].loophole:
        raise UserError(f"{cfg.arm} trains without loopholes: {cfg.env} has none to close")
    if cfg.modes:
        raise UserError(f"{cfg.env} has no modes: drop --modes")
    if cfg.teacher_n and cfg.teacher_off_step:
        raise UserError(f"{cfg.env} has no demonstrations: set --teacher-n 0")
    load_task(Path(cfg.env))


def make_policy(cfg: Config) -> Policy:
    return _policy(cfg)[0]


def _policy(cfg: Config) -> tuple[Policy, str]:
    """The policy, and the digest of the weights under its adapter."""
    model, tokenizer = load_model(cfg.model)
    weights = weights_digest(model)
    adapter = attach(model, cfg.adapter, cfg.rank, cfg.init_seed)
    return Policy(model, tokenizer, adapter, cfg.temperature, cfg.micro_batch), weights


@contextmanager
def workshop(cfg: Config) -> Iterator[Workshop]:
    """Everything that a run needs; the sandbox closes with it. Raises UserError where something does not load, and
    SandboxError where the sandbox fails its self-test."""
    check(cfg)
    torch.set_num_threads(cfg.threads)
    policy, weights = _policy(cfg)
    facts = {
        "vgrout": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "model_sha256": weights,
        "pairs_sha256": digest(load_pairs(cfg.pairs)),
    }
    if cfg.env != MICRO:
        file = Path(cfg.env)
        task = {"task_sha256": sha256(file.read_bytes()).hexdigest(), "sandbox": "none: the reward is the user's own"}
        yield Workshop(policy, load_task(file), facts | task)
        return
    with Sandbox(allow_weak=cfg.allow_weak_sandbox) as sandbox:
        self_test(sandbox)
        env = MicroEnv(sandbox, loophole=ARMS[cfg.arm].loophole, modes=cfg.modes)
        provenance = facts | {
            "sandbox": sandbox.tier,
            "weak_sandbox": sandbox.weak,
            "allow_weak_sandbox": cfg.allow_weak_sandbox,
        }
        yield Workshop(policy, env, provenance)


def header(provenance: Mapping[str, Any]) -> str:
    """What a run says of itself before it starts."""
    known = [what for what in ("model", "pairs", "task") if f"{what}_sha256" in provenance]
    hashes = ", ".join(f"{what} {provenance[f'{what}_sha256'][:12]}" for what in known)
    return f"vgrout {provenance['vgrout']}, {hashes}, sandbox {provenance['sandbox']}"


def sandbox_note(provenance: Mapping[str, Any]) -> str:
    """What a table must say of a weak sandbox; empty where it was none."""
    return f"WEAK SANDBOX ({provenance['sandbox']})." if provenance.get("weak_sandbox") else ""


def run(cfg: Config, out: Path, *, force: bool = False, console: Console | None = None) -> dict:
    """Train one arm and evaluate it into `out`. Returns the evaluation's cells."""
    check_folder(out, force=force)
    with workshop(cfg) as shop:
        claim_folder(out, force=force)  # only now: a model or a pool that does not load leaves no trace
        if console is not None:
            console.print(header(shop.provenance), markup=False, highlight=False, soft_wrap=True)
        recorder = Recorder(cfg, shop.policy, shop.env, out, shop.provenance)
        try:
            train(cfg, shop.policy, shop.env, load_pairs(cfg.pairs), recorder)
            return recorder.finish()
        finally:
            recorder.close()
