"""Sweeps: names and settings of runs, retries, commands; the runs themselves are stubs."""

from __future__ import annotations

import json
import shlex
import threading
import time
from dataclasses import replace

import pytest
from rich.console import Console

from vgrout.config import Config, preset
from vgrout.lab import jobs as jobs_module
from vgrout.lab.record import read_jsonl
from vgrout.lab.sweep import RECORD, settings, sweep, sweep_jobs
from vgrout.types import UserError

TINY = replace(preset("smoke"), steps=2, prompts=2, group=4)
# Takes `train --config FILE --out FOLDER --force`. Fails with exit code CODE as often as FOLDER.fails says.
STUB = """#!/bin/sh
out="$7"; [ "$4" = --config ] || exit 3
echo "$5" >> "$out.tries"
left=$(cat "$out.fails" 2>/dev/null || echo 0)
if [ "$left" -gt 0 ]; then echo $((left - 1)) > "$out.fails"; exit $(cat "$out.code"); fi
mkdir -p "$out"; cp "$5" "$out/config.json"; echo > "$out/adapter.safetensors"
echo '{"cells": {"heldout_deploy": {"hack": {"mean": 0.25}, "solve": {"mean": 0.5}}}}' > "$out/eval.json"
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    file = tmp_path / "stub"
    file.write_text(STUB)
    file.chmod(0o755)
    monkeypatch.setattr(jobs_module.sys, "executable", str(file))
    return tmp_path / "sweep"


def run(out, *over, arms=("none",), seeds=(0,), **more):
    console = Console(record=True, width=200, file=open("/dev/null", "w"))
    return sweep(TINY, arms, seeds, over, out, console, **more), console.export_text()


def told(out):
    return json.loads((out / RECORD).read_text())["runs"]


def test_every_combination_of_settings():
    assert settings([]) == [{}]
    assert settings(["lr=1e-3,0.002", "adapter=delta_s", "erase-axes=2"]) == [
        {"lr": 0.001, "adapter": "delta_s", "erase_axes": 2},
        {"lr": 0.002, "adapter": "delta_s", "erase_axes": 2},
    ]


@pytest.mark.parametrize(
    ("over", "why"),
    [
        (["lr"], "--over lr: give NAME=VALUE"),
        (["rate=1"], "with the name of a setting"),
        (["seed=1"], "with the name of a setting"),
        (["arm=none"], "with the name of a setting"),
        (["rank=1.5"], "--over rank: 1.5: give a whole number"),
        (["adapter=lora"], "unknown adapter 'lora'"),
        (["lr=1e-3", "lr=2e-3"], "names a setting twice: lr, lr"),
        (["lr=-1"], "lr = -1"),
        (["lr=0.001,1e-3"], "share a name: none@lr=0.001-s0"),
    ],
)
def test_what_is_no_sweep(over, why, tmp_path):
    with pytest.raises(UserError, match=why) as error:
        sweep_jobs(TINY, ("none",), (0,), over, tmp_path)
    assert "\n" not in str(error.value)


def test_runs_have_their_settings_and_follow_those_of_the_same(tmp_path):
    jobs = sweep_jobs(TINY, ("routeV", "coin_flip"), (0, 1), ("lr=0.001,0.01",), tmp_path)
    assert len(jobs) == 8 and len({job.name for job in jobs}) == 8
    (job,) = [job for job in jobs if job.name == "coin_flip@lr=0.01-s1"]
    assert job.cfg.lr == 0.01 and job.cfg.seed == 1 and job.after == "routeV@lr=0.01-s1"
    assert job.cfg.yoke == str(tmp_path / job.after)
    assert sweep_jobs(TINY, ("coin_flip",), (0,), (), tmp_path)[0].after == ""


def test_finished_runs_are_skipped(stub):
    code, text = run(stub, "lr=0.001,0.01")
    assert code == 0 and text.count("finished") == 2 and "25" in text and "50" in text
    assert told(stub) == {f"none@lr={lr}-s0": {"code": 0, "tries": 1} for lr in ("0.001", "0.01")}
    code, text = run(stub, "lr=0.001,0.01,0.1")
    assert code == 0 and text.count("was finished") == 2
    assert [len((stub / f"none@lr={lr}-s0.tries").read_text().split()) for lr in ("0.001", "0.01", "0.1")] == [1, 1, 1]
    assert Config.read(stub / "none@lr=0.1-s0" / "config.json").lr == 0.1


@pytest.mark.parametrize(("fails", "code", "tries"), [(1, 1, 2), (2, 1, 3), (3, 1, 3), (1, 2, 1), (1, 137, 2)])
def test_failures_are_tried_again_unless_settings_are_at_fault(stub, fails, code, tries):
    stub.mkdir()
    (stub / ".vgrout").write_text("")
    (stub / RECORD).write_text("{}")
    (stub / "none-s0.fails").write_text(str(fails))
    (stub / "none-s0.code").write_text(str(code))
    said, text = run(stub, retries=2)
    good = fails < tries and code != 2
    assert said == (0 if good else 1)
    assert told(stub)["none-s0"] == {"code": 0 if good else code, "tries": tries}
    table = text[text.index("tries") :]  # behind the progress of each try
    assert ("finished" in table) is good and ("see none-s0.log" in table) is not good


def test_the_record_keeps_the_runs_of_every_call(stub):
    run(stub)
    run(stub, "lr=0.001")
    assert told(stub) == {name: {"code": 0, "tries": 1} for name in ("none-s0", "none@lr=0.001-s0")}
    run(stub)
    assert told(stub) == {name: {"code": 0, "tries": 1} for name in ("none-s0", "none@lr=0.001-s0")}
    (stub / "none-s1.fails").write_text("3")
    (stub / "none-s1.code").write_text("1")
    assert run(stub, seeds=(1,))[0] == 1 and told(stub)["none-s1"] == {"code": 1, "tries": 2}
    assert run(stub, seeds=(1,))[0] == 0 and told(stub)["none-s1"] == {"code": 0, "tries": 4}
    assert len((stub / "none-s1.tries").read_text().split()) == 4 and len(told(stub)) == 3


def test_a_run_has_no_exit_code_while_a_try_is_left(stub, monkeypatch):
    seen = []

    def jobs(chosen, out, *_):
        seen.append(told(out))
        return {job.name: {"none-s0": 1, "none-s1": 2}[job.name] for job in chosen}

    monkeypatch.setattr("vgrout.lab.sweep.run_jobs", jobs)
    run(stub, seeds=(0, 1))
    first, second = {"code": None, "tries": 1}, {"code": None, "tries": 2}
    assert seen == [{"none-s0": first, "none-s1": first}, {"none-s0": second, "none-s1": {"code": 2, "tries": 1}}]
    assert told(stub) == {"none-s0": {"code": 1, "tries": 2}, "none-s1": {"code": 2, "tries": 1}}


def test_a_damaged_record_is_one_line(stub):
    run(stub)
    for text in ("{", "[]", '{"runs": {"none-s0": 1}}'):
        (stub / RECORD).write_text(text)
        with pytest.raises(UserError, match="cannot read .*sweep.json: write {} into it") as error:
            run(stub)
        assert "\n" not in str(error.value) and (stub / RECORD).read_text() == text
    (stub / RECORD).write_text("{}")
    assert run(stub)[0] == 0


def test_commands_for_another_scheduler(stub, capsys):
    run(stub, "lr=0.001,0.01", arms=("coin_flip", "routeV"), only_print=True)
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 4 and not list(stub.glob("*/config.json"))
    assert len(told(stub)) == 4 and {run["code"] for run in told(stub).values()} == {None}
    names = [line[line.index("--out") + 1].rsplit("/", 1)[1] for line in lines]
    assert sorted(names[:2]) == ["routeV@lr=0.001-s0", "routeV@lr=0.01-s0"]  # before those that follow them
    for line, name in zip(lines, names, strict=True):
        assert line[1:5] == ["-m", "vgrout", "train", "--config"]
        assert Config.read(stub / f"{name}.json").arm == name.split("@")[0] and line[5].startswith("/")


def test_folders_and_pools(stub, tmp_path):
    with pytest.raises(UserError, match="unknown pool 'slurm'"):
        run(stub, pool="slurm")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="is in use"):
        run(tmp_path / "mine")
    run(stub)
    (stub / "none-s0" / "config.json").write_text(replace(TINY, arm="none", lr=9.0).to_json())
    with pytest.raises(UserError, match="none-s0 has other lr"):
        run(stub)


@pytest.fixture
def cluster(monkeypatch):
    """Two machines of a Ray cluster, as far as Ray knows, with room for one run each."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield made
    finally:
        import ray

        ray.shutdown()
        made.shutdown()


@pytest.mark.slow
def test_a_run_moves_when_its_machine_goes_away(tmp_path, cluster):
    """Two runs on two machines; one machine ends on the way, and its run goes on where there is room."""
    out, second = tmp_path / "sweep", cluster.add_node(num_cpus=1)
    small = replace(TINY, steps=8, teacher_off_step=1, eval_every=0, eval_rollouts=4, checkpoint_every=1)

    def strike():
        while len([log for log in out.glob("*/steps.jsonl") if log.read_text().count("\n") > 1]) < 2:
            time.sleep(0.1)
        cluster.remove_node(second)

    threading.Thread(target=strike, daemon=True).start()
    console = Console(record=True, width=200, file=open("/dev/null", "w"))
    assert sweep(small, ("none",), (0, 1), (), out, console, pool="ray", address=cluster.address) == 0
    assert told(out) == {f"none-s{seed}": {"code": 0, "tries": 1} for seed in (0, 1)}  # a lost machine is no failure
    starts = sorted((out / f"none-s{seed}.log").read_text().count("sandbox") for seed in (0, 1))
    assert starts == [1, 2] and sum("going on after step" in log.read_text() for log in out.glob("*.log")) == 1
    for seed in (0, 1):
        assert [row["step"] for row in read_jsonl(out / f"none-s{seed}" / "steps.jsonl")] == list(range(8))


@pytest.mark.slow
def test_no_cluster_is_one_line(tmp_path):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with pytest.raises(UserError, match="no Ray cluster at 127.0.0.1:1") as error:
        run(tmp_path / "sweep", pool="ray", address="127.0.0.1:1")
    assert "\n" not in str(error.value)
