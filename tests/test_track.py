"""Trackers read what runs recorded: every number once and in order, no text, and nothing of it reaches the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from vgrout.cli import main
from vgrout.config import Config
from vgrout.lab import track, tracking
from vgrout.types import UserError

WANDB = '''
"""Stands in for wandb: its API as this project uses it, written to $FAKE_WANDB; steps never go back."""
import json, os, pathlib, time

def _write(row):
    with open(os.environ["FAKE_WANDB"], "a") as file:
        file.write(json.dumps(row) + "\\n")

class Run:
    def __init__(self, id):
        self.id, self.step, self.open = id, -1, True

    def log(self, data, step=None, commit=None):
        assert self.open
        if os.environ.get("FAKE_WANDB_FAILS") == f"log {step}":
            raise RuntimeError("the tracker is out of order")
        time.sleep(float(os.environ.get("FAKE_WANDB_SLOW", 0)))
        assert step > self.step, "wandb drops what goes back"
        self.step = step
        _write({"log": data, "step": step, "id": self.id})

    def finish(self, exit_code=None):
        self.open = False
        if os.environ.get("FAKE_WANDB_FAILS") == "finish":
            raise RuntimeError("the tracker is out of order")
        _write({"finish": self.id})

def init(entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None, group=None,
         job_type=None, mode=None, reinit=None, resume=None, save_code=None, allow_val_change=None, settings=None):
    print("wandb: what it prints on a terminal")
    if os.environ.get("FAKE_WANDB_FAILS") == "init":
        raise RuntimeError("the tracker is out of order")
    if os.environ.get("FAKE_WANDB_FAILS") == "death":
        os._exit(9)
    _write({"init": id, "project": project, "group": group, "name": name, "config": config, "resume": resume,
            "reinit": reinit})
    return Run(id)
'''


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A module with wandb's API; gives what it was told so far."""
    home = tmp_path / "modules" / "wandb"
    home.mkdir(parents=True)
    (home / "__init__.py").write_text(WANDB)
    monkeypatch.syspath_prepend(home.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(home.parent), *filter(None, [os.environ.get("PYTHONPATH")])]))
    log = tmp_path / "wandb.jsonl"
    monkeypatch.setenv("FAKE_WANDB", str(log))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    sys.modules.pop("wandb", None)


def record(step: int, **more) -> dict:
    return {"step": step, "lr": 0.1, "reward": step / 10, "t_lo": None, "skipped": "why: a text", "m_hack": 0.5} | more


def rate(mean: float) -> dict:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": 8, "clusters": 4}


def evaluation(mean: float) -> dict:
    rates = {"hack": rate(mean), "solve": rate(1 - mean)}
    return {"heldout_deploy": rates | {"modes": {"run_tests": {"hack": rate(mean)}}}}


def write(run: Path, steps: list[dict], evals: list[dict] = (), final: dict | None = None, **settings) -> Path:
    """A run's folder, as the recorder leaves it while it trains, or at its end."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(asdict(Config(**settings))))
    (run / "provenance.json").write_text(json.dumps({"code_sha256": "c0de"}))
    for name, rows in (("steps", steps), ("evals", evals)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "rollouts.jsonl").write_text(json.dumps({"id": "0", "text": "SECRET", "prompt": "SECRET"}) + "\n")
    if final:
        (run / "eval.json").write_text(json.dumps({"arm": "none", "cells": final}))
    return run


def send(out: Path) -> dict[str, int]:
    sender = tracking.Sender(out, "wandb", "p")
    try:
        return sender.send()
    finally:
        sender.close()


def logged(told: list[dict], id: str | None = None) -> list[int]:
    return [row["step"] for row in told if "log" in row and id in (None, row["id"])]


def test_numbers_of_a_finished_run(tmp_path, wandb):
    steps = [record(k) for k in range(4)]
    write(tmp_path / "run", steps, [{"step": 2, **evaluation(0.25)}], evaluation(0.5), arm="none", seed=3)
    assert list(send(tmp_path / "run").values()) == [5]
    told = wandb()
    first = told[0]
    assert first["name"] == first["init"] and first["name"].startswith("none-s3-")
    assert (first["project"], first["group"], first["resume"]) == ("p", None, "never")
    assert first["config"]["lr"] == Config().lr and first["config"]["provenance"] == {"code_sha256": "c0de"}
    assert told[-1] == {"finish": first["init"]} and logged(told) == [0, 1, 2, 3, 4]
    rows = [row["log"] for row in told if "log" in row]
    assert rows[0] == {"lr": 0.1, "reward": 0.0, "m_hack": 0.5}
    assert rows[1] == {
        **{"lr": 0.1, "reward": 0.1, "m_hack": 0.5},
        **{"val/heldout_deploy/hack": 0.25, "val/heldout_deploy/hack/low": 0.15, "val/heldout_deploy/hack/high": 0.35},
        **{"val/heldout_deploy/solve": 0.75, "val/heldout_deploy/solve/low": 0.65},
        **{"val/heldout_deploy/solve/high": 0.85, "val/heldout_deploy/modes/run_tests/hack": 0.25},
        **{"val/heldout_deploy/modes/run_tests/hack/low": 0.15},
        **{"val/heldout_deploy/modes/run_tests/hack/high": 0.35},
    }
    assert rows[4]["test/heldout_deploy/hack"] == 0.5


def test_no_text_ever_goes(tmp_path, wandb):
    """Of the logs only numbers go, however a text gets into them."""
    steps = [record(0, text="SECRET", nested={"prompt": "SECRET", "deep": [{"text": "SECRET"}]}, flag=True)]
    final = {"cell": {"hack": rate(0.5), "texts": ["SECRET"], "worst": "SECRET"}}
    write(tmp_path / "run", steps, [{"step": 1, "cell": {"text": "SECRET", "hack": rate(0)}}], final)
    send(tmp_path / "run")
    told = wandb()
    assert "SECRET" not in json.dumps(told) and len(logged(told)) == 2
    assert all(type(value) in (int, float) for row in told if "log" in row for value in row["log"].values())


def test_a_step_waits_for_its_evaluation(tmp_path, wandb):
    """The newest step stays until it is known what goes with it; nothing goes twice, nothing back."""
    run = tmp_path / "run"
    sender = tracking.Sender(write(run, [record(0), record(1)]), "wandb", "p")
    sender.send()
    assert logged(wandb()) == [0]
    write(run, [record(0), record(1)], [{"step": 2, **evaluation(0.1)}])
    sender.send()
    assert logged(wandb()) == [0, 1] and "val/heldout_deploy/hack" in wandb()[-1]["log"]
    with (run / "steps.jsonl").open("a") as file:
        file.write(json.dumps(record(2)) + "\n" + '{"step": 3, "rew')
    sender.send()
    assert logged(wandb()) == [0, 1]
    sender.close()
    write(run, [record(k) for k in range(4)], [{"step": 2, **evaluation(0.1)}], evaluation(0.2))
    send(run)
    assert logged(wandb()) == [0, 1, 2, 3, 4]
    assert send(run) != {} and logged(wandb()) == [0, 1, 2, 3, 4]
    assert [row["resume"] for row in wandb() if "init" in row] == ["never", "allow"]
    assert len({row["init"] for row in wandb() if "init" in row}) == 1


def test_back_to_a_checkpoint(tmp_path, wandb):
    """The same way again sends nothing again; another way is a new run of the tracker, whole."""
    run = write(tmp_path / "run", [record(k) for k in range(6)])
    send(run)
    write(run, [record(k) for k in range(3)])
    send(run)
    write(run, [record(k) for k in range(8)])
    send(run)
    assert logged(wandb()) == [0, 1, 2, 3, 4, 5, 6]
    write(run, [record(k, lr=0.1 if k < 3 else 0.2) for k in range(5)])
    send(run)
    first, second = dict.fromkeys(row["init"] for row in wandb() if "init" in row)
    assert logged(wandb(), first) == [0, 1, 2, 3, 4, 5, 6] and logged(wandb(), second) == [0, 1, 2, 3]


def test_an_experiment_is_a_group(tmp_path, wandb):
    out = tmp_path / "three arms"
    for arm, seed in (("none", 0), ("none", 1), ("routeV", 0)):
        write(out / f"{arm}-s{seed}", [record(0), record(1)], arm=arm, seed=seed)
    (out / "logs").mkdir()
    sender = tracking.Sender(out, "wandb", "p")
    sender.send()  # none is finished: all of them stay open side by side
    begun = [row for row in wandb() if "init" in row]
    assert [row["name"].rsplit("-", 1)[0] for row in begun] == ["none-s0", "none-s1", "routeV-s0"]
    assert {row["group"] for row in begun} == {"three arms"} and {row["reinit"] for row in begun} == {"create_new"}
    assert not any("finish" in row for row in wandb())
    sender.close()
    assert sum("finish" in row for row in wandb()) == 3


def test_one_process_sends_a_run(tmp_path, wandb):
    run = write(tmp_path / "run", [record(0), record(1)])
    sender = tracking.Sender(run, "wandb", "p")
    sender.send()
    with pytest.raises(tracking.Busy):
        send(run)
    sender.close()
    send(run)
    assert logged(wandb()) == [0]


def test_a_failure_keeps_what_went(tmp_path, wandb, monkeypatch):
    run = write(tmp_path / "run", [record(k) for k in range(5)])
    monkeypatch.setenv("FAKE_WANDB_FAILS", "log 2")
    with pytest.raises(tracking.TrackerFailed, match="out of order"):
        send(run)
    monkeypatch.delenv("FAKE_WANDB_FAILS")
    send(run)
    assert logged(wandb()) == [0, 1, 2, 3]


def test_rows_that_the_tracker_lost_go_again(tmp_path, wandb, monkeypatch):
    """A row is sent once the tracker's `finish` has returned; a run that takes another way since is a new one."""
    run = write(tmp_path / "run", [record(k) for k in range(3)])
    sender = tracking.Sender(run, "wandb", "p")
    sender.send()
    write(run, [record(k) for k in range(4)])
    monkeypatch.setenv("FAKE_WANDB_FAILS", "finish")
    assert list(sender.send().values()) == [1] and list(sender.send().values()) == [0]
    with pytest.raises(tracking.TrackerFailed, match="out of order"):
        sender.close()
    monkeypatch.delenv("FAKE_WANDB_FAILS")
    assert list(send(run).values()) == [3] and list(send(run).values()) == [0]
    begun = [row for row in wandb() if "init" in row]
    assert [row["resume"] for row in begun] == ["never", "allow"] and len({row["init"] for row in begun}) == 1
    assert logged(wandb()) == [0, 1, 2, 0, 1, 2]


def test_another_way_after_a_lost_tracker_is_a_new_run(tmp_path, wandb, monkeypatch):
    run = write(tmp_path / "run", [record(k) for k in range(4)])
    monkeypatch.setenv("FAKE_WANDB_FAILS", "finish")
    with pytest.raises(tracking.TrackerFailed):
        send(run)
    monkeypatch.delenv("FAKE_WANDB_FAILS")
    write(run, [record(k, lr=0.2) for k in range(3)])
    send(run)
    first, second = dict.fromkeys(row["init"] for row in wandb() if "init" in row)
    assert logged(wandb(), first) == [0, 1, 2] and logged(wandb(), second) == [0, 1]


def test_what_an_earlier_version_sent_stays_sent(tmp_path, wandb):
    """A record without pending rows is read."""
    run = write(tmp_path / "run", [record(k) for k in range(3)])
    send(run)
    file = run / "tracking" / "wandb.json"
    kept = json.loads(file.read_text())
    del kept["p"]["pending"]
    file.write_text(json.dumps(kept))
    write(run, [record(k) for k in range(4)])
    assert list(send(run).values()) == [1] and logged(wandb()) == [0, 1, 2]


def test_a_sweep_is_over_when_no_try_is_left(tmp_path):
    out = tmp_path / "sweep"
    write(out / "none-s0", [record(0)], final=evaluation(0.5))
    write(out / "none-s1", [record(0)])
    sender = tracking.Sender(out, "wandb", "p")

    def over(**codes) -> bool:
        runs = {name.replace("_", "-"): {"code": code, "tries": 1} for name, code in codes.items()}
        (out / "sweep.json").write_text(json.dumps({"runs": runs}))
        return sender.complete()

    assert not over() and not over(none_s0=None, none_s1=None) and not over(none_s0=0, none_s2=None)
    assert over(none_s0=None) and over(none_s0=0, none_s1=1) and over(none_s0=0, none_s2=2)


def test_an_experiment_is_over_with_its_decision(tmp_path):
    """A run that failed is no reason to wait on, but one that was begun again since is."""
    out = tmp_path / "experiment"
    for seed in (0, 1):
        write(out / f"none-s{seed}", [record(0)], final=None if seed else evaluation(0.5))
        (out / f"none-s{seed}.json").write_text("{}")
    sender = tracking.Sender(out, "wandb", "p")
    assert not sender.complete()
    (out / "decision.json").write_text(json.dumps({"not_finished": ["none-s1"]}))
    later = (out / "decision.json").stat().st_mtime + 10
    assert sender.complete()
    os.utime(out / "none-s0.json", (later, later))
    assert sender.complete()
    os.utime(out / "none-s1.json", (later, later))
    assert not sender.complete()


@pytest.fixture
def vgrout(monkeypatch, capsys):
    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vgrout", *args])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return run


def test_command(tmp_path, wandb, vgrout, monkeypatch):
    run = write(tmp_path / "run", [record(k) for k in range(3)], final=evaluation(0.5))
    code, out, err = vgrout("track", str(run), "--tracker", "wandb", "--project", "mine", "--follow")
    assert (code, err) == (0, "") and "4 new rows" in out and logged(wandb()) == [0, 1, 2, 3]
    assert wandb()[0]["project"] == "mine"
    assert "0 new rows" in vgrout("track", str(run), "--tracker", "wandb", "--project", "mine")[1]
    monkeypatch.setenv("FAKE_WANDB_FAILS", "init")
    code, _, err = vgrout("track", str(run), "--tracker", "wandb", "--project", "other")
    assert code == 1 and err.count("\n") == 1 and "out of order" in err
    monkeypatch.setenv("FAKE_WANDB_FAILS", "finish")
    code, _, err = vgrout("track", str(run), "--tracker", "wandb", "--project", "third")
    assert code == 1 and err.count("\n") == 1 and "the same command sends the rest" in err
    monkeypatch.delenv("FAKE_WANDB_FAILS")
    assert "4 new rows" in vgrout("track", str(run), "--tracker", "wandb", "--project", "third")[1]


def test_a_finished_sweep_is_not_waited_for(tmp_path, wandb, vgrout):
    write(tmp_path / "sweep" / "none-s0", [record(0)], final=evaluation(0.5))
    write(tmp_path / "sweep" / "none-s1", [record(0), record(1)])
    runs = {f"none-s{seed}": {"code": seed, "tries": 1 + seed} for seed in (0, 1)}
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"runs": runs}))
    code, _, err = vgrout("track", str(tmp_path / "sweep"), "--tracker", "wandb", "--follow")
    assert (code, err) == (0, "") and logged(wandb()) == [0, 1, 0]
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    code, _, err = vgrout("track", str(tmp_path / "sweep"), "--tracker", "wandb", "--follow")
    assert (code, err.count("\n")) == (2, 1) and "JSONDecodeError" in err


def test_mistakes(tmp_path, wandb, vgrout, monkeypatch):
    run = write(tmp_path / "run", [record(0)])
    (run / "steps.jsonl").write_text("{\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(track, "find_spec", lambda name: None if name == "trackio" else find_spec(name))
    cases = {
        ("track",): "give folders",
        ("track", "nowhere", "--tracker", "wandb"): "no run in nowhere",
        ("track", str(tmp_path / "modules"), "--tracker", "wandb"): "no run in",
        ("track", str(run), "--tracker", "wandb"): "JSONDecodeError",
        ("track", str(run)): "pip install 'vgrout[track]'",
        ("train", "--out", "new", "--track", "trackio"): "pip install 'vgrout[track]'",
        ("decide", "--out", "new", "--track", "trackio"): "pip install 'vgrout[track]'",
        ("sweep", "--out", "new", "--track", "trackio"): "pip install 'vgrout[track]'",
        ("sweep", "--out", "new", "--track", "wandb", "--print"): "drop --track",
    }
    for args, words in cases.items():
        code, _, err = vgrout(*args)
        assert (code, err.count("\n")) == (2, 1) and words in err, (args, err)
    assert not (tmp_path / "new").exists() and not wandb()


def test_a_folder_of_its_name_is_no_tracker(tmp_path, monkeypatch):
    monkeypatch.setitem(track.INSTALL, "tracker_nobody_has", "pip install it")
    (tmp_path / "tracker_nobody_has").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="not installed: pip install it"):
        track.check_tracker("tracker_nobody_has")


def follow(out: Path, body, goes_on: bool = False) -> None:
    with track.beside("wandb", out, "p", goes_on=goes_on):
        body()


def test_beside_a_run(tmp_path, wandb, capfd):
    """What is in the folder before is another run's; what the run writes goes, at the latest at its end."""
    out = write(tmp_path / "run", [record(k) for k in range(9)], final=evaluation(0.9))

    def trains():
        shutil.rmtree(out)
        write(out, [record(k) for k in range(3)], final=evaluation(0.5))

    follow(out, trains)
    assert logged(wandb()) == [0, 1, 2, 3] and wandb()[-2]["log"]["test/heldout_deploy/hack"] == 0.5
    assert capfd.readouterr() == ("", "")
    assert "what it prints" in (out / "tracking" / "wandb.log").read_text()
    follow(out, lambda: None, goes_on=True)
    assert logged(wandb()) == [0, 1, 2, 3]
    follow(tmp_path / "never", lambda: None)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("how", "said"), [("init", "out of order"), ("log 1", "out of order"), ("death", "exit code 9")]
)
def test_a_failing_tracker_beside_a_run(tmp_path, wandb, monkeypatch, capfd, how, said):
    """One line on stderr, more in a file, and the body never learns of it."""
    monkeypatch.setenv("FAKE_WANDB_FAILS", how)
    out, done = tmp_path / "run", []
    follow(out, lambda: done.append(write(out, [record(k) for k in range(4)], final=evaluation(0.5))))
    err = capfd.readouterr().err
    assert done and err.count("\n") == 1 and said in err and f"vgrout track {out} --tracker wandb" in err
    if how != "death":
        assert "RuntimeError" in (out / "tracking" / "wandb.log").read_text()


def test_a_slow_tracker_is_left(tmp_path, wandb, monkeypatch, capfd):
    monkeypatch.setenv("FAKE_WANDB_SLOW", "60")
    monkeypatch.setattr(track, "LEFT_S", 3.0)
    begun = time.monotonic()
    follow(tmp_path / "run", lambda: write(tmp_path / "run", [record(k) for k in range(4)], final=evaluation(0.5)))
    assert time.monotonic() - begun < 30
    assert "took longer than 3 s" in capfd.readouterr().err
    monkeypatch.delenv("FAKE_WANDB_SLOW")
    assert list(send(tmp_path / "run").values()) == [5] and logged(wandb()) == [0, 1, 2, 3, 4]


def test_a_tracker_killed_before_its_end_lost_nothing(tmp_path, wandb):
    """It took every row, and was killed before it said that they are through: they go again."""
    run = write(tmp_path / "run", [record(k) for k in range(3)], final=evaluation(0.5))
    code = (
        "import os, sys; from pathlib import Path; from vgrout.lab import tracking; import wandb\n"
        "wandb.Run.finish = lambda self: os.kill(os.getpid(), 9)\n"
        "tracking.Sender(Path(sys.argv[1]), 'wandb', 'p').send()\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(run)], stdout=subprocess.DEVNULL).returncode == -9
    assert logged(wandb()) == [0, 1, 2, 3]
    assert list(send(run).values()) == [4] and logged(wandb()) == [0, 1, 2, 3] * 2
    assert list(send(run).values()) == [0]


def test_an_error_of_the_run_stays_its_own(tmp_path, wandb):
    def fails():
        raise UserError("the run's own")

    with pytest.raises(UserError, match="the run's own"):
        follow(tmp_path / "run", fails)


def test_ends_with_the_process_that_trains(tmp_path, wandb):
    """Killed without a word, it leaves nobody behind, and what it recorded went."""
    out = tmp_path / "run"
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom vgrout.lab import track\n"
        "with track.beside('wandb', Path(sys.argv[1]), 'p', goes_on=False):\n"
        "    os.rename(sys.argv[1] + '.ready', sys.argv[1])\n    print('trains', flush=True)\n    time.sleep(600)\n"
    )
    write(tmp_path / "run.ready", [record(k) for k in range(4)])
    process = subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "trains\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while logged(wandb()) != [0, 1, 2] or "finish" not in wandb()[-1]:
        assert time.monotonic() < deadline, wandb()
        time.sleep(0.2)


def test_the_reader_imports_nothing_heavy():
    code = "import sys, vgrout.lab.tracking; print({'torch', 'numpy', 'rich'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_flags(tmp_path, wandb, vgrout, monkeypatch):
    """`--track` of train, of a resumed run, an experiment and a sweep: each starts the reader around its own work."""
    run, out, swept = tmp_path / "run", tmp_path / "experiment", tmp_path / "sweep"

    def trains(*_, **__):
        write(run, [record(k) for k in range(3)], arm="none")

    def resumes(*_, **__):
        write(run, [record(k) for k in range(5)], final=evaluation(0.5), arm="none")

    def decides(*_, **__):
        for seed in (0, 1):
            write(out / f"none-s{seed}", [record(0)], final=evaluation(0.5), arm="none", seed=seed)
        (out / "plan.json").write_text("{}")
        return 0

    def sweeps(*_, **__):
        write(swept / "none-s0", [record(0)], final=evaluation(0.5), arm="none")
        (swept / "sweep.json").write_text("{}")
        return 0

    does = {"run.run": trains, "run.resume": resumes, "decide.decide": decides, "sweep.sweep": sweeps}
    for name, work in does.items():
        monkeypatch.setattr(f"vgrout.lab.{name}", work)
    assert vgrout("train", "--out", str(run), "--track", "wandb")[0] == 0
    assert logged(wandb()) == [0, 1]
    assert vgrout("train", "--resume", str(run), "--track", "wandb", "--track-project", "vgrout")[0] == 0
    assert logged(wandb()) == [0, 1, 2, 3, 4, 5] and len({row["init"] for row in wandb() if "init" in row}) == 1
    assert vgrout("decide", "--out", str(out), "--track", "wandb")[0] == 0
    begun = [row for row in wandb() if "init" in row][2:]
    assert {row["group"] for row in begun} == {"experiment"} and len(begun) == 2
    assert logged(wandb())[6:] == [0, 1, 0, 1]
    assert vgrout("sweep", "--out", str(swept), "--track", "wandb", "--track-project", "mine")[0] == 0
    begun = [row for row in wandb() if "init" in row][4:]
    assert [(row["group"], row["project"]) for row in begun] == [("sweep", "mine")] and logged(wandb())[10:] == [0, 1]


@pytest.mark.slow
def test_a_real_run_is_the_same_beside_a_tracker(tmp_path, wandb):
    """`vgrout train --track` ends with 0 and the same bytes as without."""
    sizes = {"steps": 2, "prompts": 2, "group": 4, "max-new": 24, "eval-every": 1, "eval-small": 4, "eval-rollouts": 8}
    command = [sys.executable, "-m", "vgrout", "train", "--preset", "smoke", "--arm", "none"]
    command += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    for name, more in {"plain": [], "tracked": ["--track", "wandb"]}.items():
        done = subprocess.run([*command, "--out", str(tmp_path / name), *more], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
    for name in ("steps.jsonl", "rollouts.jsonl", "verdicts.jsonl", "eval.json", "adapter.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "tracked" / name).read_bytes(), name
    assert logged(wandb()) == [0, 1, 2]
    rows = [row["log"] for row in wandb() if "log" in row]
    assert {"loss", "m_hack", "val/heldout_deploy/hack"} <= set(rows[0]) and "test/heldout_deploy/solve" in rows[2]


def test_trackio(tmp_path, monkeypatch):
    """The real one, on this machine alone: what went is what its own database gives back."""
    pytest.importorskip("trackio", reason="needs the extra track")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    out = tmp_path / "exp"
    for seed in (0, 1):
        write(
            out / f"none-s{seed}",
            [record(k) for k in range(4)],
            [{"step": 2, **evaluation(0.25)}],
            evaluation(0.5),
            arm="none",
            seed=seed,
        )
    code = (
        "import sys, json; from pathlib import Path; from vgrout.lab.tracking import Sender\n"
        "s = Sender(Path(sys.argv[1]), 'trackio', 'p'); s.send(); s.close()\n"
        "s = Sender(Path(sys.argv[1]), 'trackio', 'p'); s.send(); s.close()\n"
        "from trackio.sqlite_storage import SQLiteStorage as S\n"
        "print('RESULT', json.dumps({r: S.get_logs('p', r) for r in S.get_runs('p')}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    stored = json.loads(done.stdout.split("RESULT ")[1])
    assert sorted(name.rsplit("-", 1)[0] for name in stored) == ["none-s0", "none-s1"]
    for rows in stored.values():
        assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
        assert rows[1]["val/heldout_deploy/hack"] == 0.25 and rows[4]["test/heldout_deploy/hack"] == 0.5
