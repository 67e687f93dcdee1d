"""One run from its configuration: build everything, train, evaluate, record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vgrout.adapters import attach
from vgrout.arms import ARMS
from vgrout.config import Config
from vgrout.envs.micro_env import MicroEnv, check_modes
from vgrout.envs.sandbox import Sandbox
from vgrout.lab.record import Recorder, check_folder, claim_folder
from vgrout.loop import train
from vgrout.method.policy import Policy
from vgrout.models.load import load_model, model_path
from vgrout.pairs import load as load_pairs
from vgrout.types import UserError


def check(cfg: Config) -> None:
    """Everything that can be wrong with a configuration, before anything is written. Raises UserError."""
    if cfg.arm not in ARMS:
        raise UserError(f"unknown arm {cfg.arm!r}: choose one of {', '.join(ARMS)}")
    check_modes(cfg.modes)
    load_pairs(cfg.pairs)
    model_path(cfg.model)


def make_policy(cfg: Config) -> Policy:
    model, tokenizer = load_model(cfg.model)
    adapter = attach(model, cfg.adapter, cfg.rank, cfg.init_seed)
    return Policy(model, tokenizer, adapter, cfg.temperature, cfg.micro_batch)


@contextmanager
def workshop(cfg: Config) -> Iterator[tuple[Policy, MicroEnv]]:
    """Policy and environment of a run; the sandbox closes with it."""
    torch.set_num_threads(cfg.threads)
    policy = make_policy(cfg)
    with Sandbox() as sandbox:
        yield policy, MicroEnv(sandbox, loophole=ARMS[cfg.arm].loophole, modes=cfg.modes)


def run(cfg: Config, out: Path, *, force: bool = False) -> dict:
    """Train one arm and evaluate it into `out`. Returns the evaluation's cells."""
    check(cfg)
    check_folder(out, force=force)
    with workshop(cfg) as (policy, env):
        claim_folder(out, force=force)  # only now: a model or a pool that does not load leaves no trace
        recorder = Recorder(cfg, policy, env, out)
        try:
            train(cfg, policy, env, load_pairs(cfg.pairs), recorder)
            return recorder.finish()
        finally:
            recorder.close()
