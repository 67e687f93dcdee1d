"""Shrunk blocks: the points of the frontier are what they say."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from vgrout.config import preset
from vgrout.lab.frontier import frontier, show_frontier, shrunk
from vgrout.lab.run import make_policy, run
from vgrout.types import UserError
from vgrout.verify.toy import rig

TINY = replace(
    preset("smoke"),
    arm="none",
    steps=3,
    prompts=2,
    group=4,
    teacher_off_step=1,
    eval_every=0,
    eval_rollouts=8,
    checkpoint_every=1,
)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("frontier") / "run"
    run(TINY, out)
    return out


def test_scaled_weights_lie_between_base_and_block():
    adapter = rig().adapter
    for name, module in adapter.modules.items():
        with adapter.scaled(deployed=0.25, quarantine=0.5), adapter.merged("full"):
            mixed = adapter.switch.flow.weights[name]
        want = module.base.weight + 0.25 * module.delta("deployed") + 0.5 * module.delta("quarantine")
        assert torch.allclose(mixed, want, atol=1e-6)
        with adapter.scaled(deployed=0.0), adapter.merged("deployed"):
            assert torch.equal(adapter.switch.flow.weights[name], module.base.weight)
    assert set(adapter.scale.values()) == {1.0}


def test_points_are_scales_and_then_checkpoints(folder):
    policy = make_policy(TINY)
    last, seen = None, []
    for kind, scale, step in shrunk(policy.adapter, folder, (0.0, 1.0)):
        seen.append((kind, scale, step, policy.adapter.scale["deployed"]))
        last = {name: tensor.clone() for name, tensor in policy.adapter.tensors().items()}
    assert seen == [("scaled", 0.0, None, 0.0), ("scaled", 1.0, None, 1.0)] + [
        ("checkpoint", 1.0, step, 1.0) for step in (1, 2, 3)
    ]
    policy.adapter.load(folder / "adapter.safetensors")
    assert all(torch.equal(last[name], tensor) for name, tensor in policy.adapter.tensors().items())


def test_ends_of_the_frontier(folder, tmp_path):
    """No block is the base model, a whole block and the last checkpoint are what the run shipped."""
    result = frontier(folder, (0.0, 1.0), None, QUIET)
    none, whole, *steps = (point["cell"] for point in result["points"])
    shipped = json.loads((folder / "eval.json").read_text())["cells"]["heldout_deploy"]
    assert whole == steps[-1] == shipped and len(steps) == 3
    bare = replace(TINY, steps=1, lr=1e-12, eval_rollouts=8)
    assert none == run(bare, tmp_path / "bare")["heldout_deploy"]


def test_an_arm_that_ships_both_blocks_shrinks_both(folder):
    adapter = make_policy(TINY).adapter
    scales = [dict(adapter.scale) for _ in shrunk(adapter, folder, (0.5,), ablates=False)]
    assert scales[0] == {"deployed": 0.5, "quarantine": 0.5} and set(scales[-1].values()) == {1.0}


def test_what_it_refuses(folder, tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        frontier(tmp_path, (1.0,), None, QUIET)
    for scales in ((), (1.5,), (-0.1,)):
        with pytest.raises(UserError, match="numbers from 0 to 1"):
            frontier(folder, scales, None, QUIET)
    with pytest.raises(UserError, match="give a file"):
        show_frontier(folder, (1.0,), None, tmp_path, QUIET)
