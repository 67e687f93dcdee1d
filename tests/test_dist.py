"""Two processes over gloo are one run: what they sample, score, route, learn and record is what one process does."""

from __future__ import annotations

import json
import math
import operator
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ranks import ended, started, toy
from vgrout.cli import main
from vgrout.config import preset
from vgrout.dist import ALONE, Group, RankLost, broken, place
from vgrout.lab.record import read_jsonl
from vgrout.lab.run import check, resume, run
from vgrout.types import RunFailed, UserError

WORKER = str(Path(__file__).with_name("ranks.py"))
UNEVEN = {"steps": 3, "prompts": 3, "group": 8, "teacher_n": 3, "max_new": 12, "micro_batch": 3, "sample_batch": 2}
PARTS = (1e-5, 1e-4)  # how near: on equal weights, and on weights that rounding has moved apart in earlier steps
JOBS: dict[str, dict] = {
    "none": {"arm": "none", "steps": 3},
    "routeV": {"arm": "routeV", "steps": 3, "prompts": 3},  # groups 0 and 2 here, group 1 there
    "coin_flip": {"arm": "coin_flip", "steps": 3, "prompts": 1},  # the second process has no group
    "oracle_route": {"arm": "oracle_route", "steps": 3, "prompts": 3},
    "first": {"arm": "absorb", "steps": 3, "seed": 7},  # adapters that differ before the processes join
    "erase": {"arm": "erase", "steps": 3, "prompts": 3},
    "steer": {"arm": "steer", "steps": 3, "prompts": 3},
    "judge_route": {"arm": "judge_route", "steps": 3, "prompts": 3},
    "sharded none": {"arm": "none", "steps": 3, "shard": True},
    "sharded routeV": {"arm": "routeV", **UNEVEN, "ends": 40, "shard": True},
    "sharded coin_flip": {"arm": "coin_flip", "steps": 3, "prompts": 1, "micro_batch": 2, "shard": True},
    "sharded oracle_route": {"arm": "oracle_route", **UNEVEN, "shard": True, "gradient_checkpointing": True},
    "sharded steer": {"arm": "steer", "steps": 3, "prompts": 3, "shard": True},
    "sharded seeded": {"arm": "seeded_absorb", "steps": 2, "prompts": 3, "sft_steps": 2, "shard": True},
}


def near(mine: torch.Tensor | None, theirs: torch.Tensor | None, part: float) -> bool:
    """Within a part of the largest entry."""
    if mine is None or theirs is None:
        return mine is theirs
    mine, theirs = mine.double(), theirs.double()
    return float((mine - theirs).abs().max()) <= part * max(float(theirs.abs().max()), 1e-12) if mine.numel() else True


def same_record(mine: dict, theirs: dict, part: float) -> bool:
    """Equal, numbers within `part`; how many rows a process takes at once is its own affair."""
    keys = (mine.keys() | theirs.keys()) - {"micro_batch"}
    return all(alike(mine[key], theirs[key], part) for key in keys)


def alike(a, b, part: float) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=part, abs_tol=part) or (math.isnan(a) and math.isnan(b))
    return a == b


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder of what both processes saw of all jobs."""
    out = tmp_path_factory.mktemp("ranks")
    for code, _, said in ended(started([WORKER, str(out), json.dumps(list(JOBS.items()))])):
        assert code == 0, said
    return out


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_equal_one(name, two):
    one = toy({**JOBS[name], "shard": False}, ALONE)
    both = [torch.load(two / f"{name}-{rank}.pt", weights_only=False) for rank in (0, 1)]
    for found in both:
        assert len(found["seen"]) == len(one["seen"]) == JOBS[name]["steps"]
        for step, (mine, theirs) in enumerate(zip(found["seen"], one["seen"], strict=True)):
            part = PARTS[step > 0]
            assert [row[:3] for row in mine["text"]] == [row[:3] for row in theirs["text"]]
            assert mine["reward"] == theirs["reward"] and mine["zones"] == theirs["zones"]
            drawn = [[row[3] for row in side["text"] if row[3] is not None] for side in (mine, theirs)]
            drawn = [torch.tensor([x for row in side for x in row]) for side in drawn]
            assert near(*drawn, part), "log-probabilities of the sampler"
            for what in ("score", "features", "advantage"):
                assert near(mine[what], theirs[what], part), what
            assert (mine["threshold"] is None) == (theirs["threshold"] is None)
            cuts = zip(mine["threshold"] or (), theirs["threshold"] or (), strict=True)
            assert all(alike(a, b, part) for a, b in cuts)
            assert mine["grads"].keys() == theirs["grads"].keys() and mine["grads"]
            largest = max(float(g.abs().max()) for g in theirs["grads"].values())
            gaps = (float((g - theirs["grads"][key]).abs().max()) for key, g in mine["grads"].items())
            assert max(gaps) <= part * largest
        assert same_record(found["records"][0], one["records"][0], PARTS[0])
        assert all(same_record(*rows, PARTS[1]) for rows in zip(found["records"], one["records"], strict=True))
        assert all(near(tensor, one["weights"][key], PARTS[1]) for key, tensor in found["weights"].items())
    assert all(torch.equal(tensor, both[1]["weights"][key]) for key, tensor in both[0]["weights"].items())
    assert any(g.any() for g in one["seen"][-1]["grads"].values())
    held = [found["held"] for found in both]
    assert held == [1, 1] if "sharded" not in name else max(held) < 0.6 and sum(held) == pytest.approx(1)


def test_zones_and_lengths_were_uneven(two):
    """What lockstep has to bear: other numbers of rows in each zone, and completions of other lengths."""
    seen = torch.load(two / "sharded routeV-0.pt", weights_only=False)["seen"]
    counts, longest = ([], []), ([], [])
    for step in seen:
        for rank in (0, 1):
            own = [int(row[0].split("-")[1]) % 2 == rank for row in step["text"]]
            zones = [zone for zone, mine in zip(step["zones"], own, strict=True) if mine]
            counts[rank].append([zones.count(zone) for zone in ("keep", "absorb", "route")])
            drawn = [row[2] for row, mine in zip(step["text"], own, strict=True) if mine and row[3] is not None]
            longest[rank].append(max(map(len, drawn)))
    assert all(map(operator.ne, *counts)) and any(map(operator.ne, *longest)), longest
    assert any(sum(n > 0 for n in zones) > 1 for zones in counts[0])


def test_a_process_that_fails_ends_the_others(tmp_path):
    jobs = json.dumps([["fails", {"arm": "none", "steps": 3, "fails": True}]])
    (code, _, first), (other, _, second) = ended(started([WORKER, str(tmp_path), jobs]))
    assert code == other == 1 and not list(tmp_path.iterdir())
    assert "RunFailed: the grader fell over" in second
    assert "RankLost: another process of the run has ended" in first


TASK = """
import os, signal
PROMPTS = ["write a", "write b", "write c"]
DOOM = {doom!r}

def reward(prompt, completion):
    if os.environ.get("RANK") == "1" and os.path.exists(DOOM):
        with open(DOOM, "a+") as file:
            file.write("x")
        if os.path.getsize(DOOM) > 6:  # in the second step
            os.remove(DOOM)
            os.kill(os.getpid(), signal.SIGKILL)
    return completion.count(prompt[-1]) - 0.1 * len(completion)
"""


def test_a_run_goes_on_after_a_kill(tmp_path):
    """The first process keeps the last whole step and says so in one line; what goes on is the run of one process."""
    doom, task, out = tmp_path / "doom", tmp_path / "task.py", tmp_path / "run"
    task.write_text(TASK.format(doom=str(doom)))
    doom.write_text("")
    sizes = {"steps": 3, "prompts": 3, "group": 4, "max_new": 10, "teacher_n": 0, "eval_every": 2, "eval_small": 3}
    small = {"eval_rollouts": 3, "eval_scales": 0, "checkpoint_every": 0}
    cfg = replace(preset("smoke"), env=str(task), arm="routeV", **sizes, **small)
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in {**sizes, **small}.items()]
    train = ["-m", "vgrout", "train", "--preset", "smoke", "--env", str(task), "--arm", "routeV", *flags]
    (code, _, first), (other, _, second) = ended(started([*train, "--out", str(out)]))
    assert (code, other) == (1, -9) and not doom.exists() and "vgrout:" not in second
    (line,) = [line for line in first.splitlines() if line.startswith("vgrout:")]
    assert line.startswith("vgrout: RankLost: step 1: another process of the run has ended")
    assert line.endswith(f"1 of 3 steps are kept; go on with `vgrout train --resume {out}`")
    assert "Traceback" not in first + second

    for code, said, why in ended(started(["-m", "vgrout", "train", "--resume", str(out)])):
        assert code == 0, said + why
    run(cfg, tmp_path / "one")
    for name in ("steps", "rollouts", "evals"):
        mine, theirs = (read_jsonl(folder / f"{name}.jsonl") for folder in (out, tmp_path / "one"))
        assert len(mine) == len(theirs) > 0
        assert all(same_record(*rows, 1e-3) for rows in zip(mine, theirs, strict=True)), name
    weights = [load_file(folder / "adapter.safetensors") for folder in (out, tmp_path / "one")]
    assert weights[0].keys() == weights[1].keys() and any(t.any() for t in weights[0].values())
    # Adam divides by the size of a gradient, so that rounding moves entries whose gradient is near zero.
    assert all(float((t - weights[1][key]).norm()) <= 1e-3 * float(t.norm()) for key, t in weights[0].items())
    cells = [json.loads((folder / "eval.json").read_text())["cells"] for folder in (out, tmp_path / "one")]
    assert cells[0].keys() == cells[1].keys()
    assert all(alike(cells[0][key]["reward"]["mean"], cells[1][key]["reward"]["mean"], 1e-5) for key in cells[0])
    assert json.loads((out / "provenance.json").read_text())["processes"] == 2
    with pytest.raises(UserError, match=r"processes \(2 there, null here\)"):
        (out / "eval.json").unlink()
        resume(out)


def test_only_training_has_several_processes(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["vgrout", "decide"])
    for rank, said in (("0", "only `vgrout train` goes with torchrun"), ("1", "")):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as left:
            main()
        err = capsys.readouterr().err
        assert left.value.code == 2 and said in err and err.count("\n") == (rank == "0")


def test_sharding_needs_several_processes():
    assert os.environ.get("WORLD_SIZE", "1") == "1"
    with pytest.raises(UserError, match="start several processes"):
        check(replace(preset("smoke"), shard=True))
    check(replace(preset("smoke"), shard=True), trains=False)  # what was trained in parts is evaluated whole


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 3)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Group().device("cuda") == "cuda:1" and Group().device("cpu") == "cpu"
    with pytest.raises(UserError, match="give cuda"):
        Group().device("cuda:0")


def test_work_is_split_by_key():
    third = Group.__new__(Group)
    third.rank, third.world = 2, 3
    assert third.owners(["a", "a", "b", "c", "b", "d"]).tolist() == [0, 0, 1, 2, 1, 0]
    assert ALONE.owners("abc").tolist() == [0, 0, 0]


def test_what_a_run_says_of_itself_is_no_lost_process(monkeypatch):
    said = RunFailed("the reward raised TimeoutError: Read timed out, connection reset by peer")
    assert not broken(said) and broken(RankLost("gone")) and broken(RuntimeError("Connection closed by peer"))
    assert not broken(ValueError("timed out"))
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE"):
        place()
