"""The decision experiment as a user runs it: two tiny arms, twice, and one that fails."""

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from vgrout.cli import DEFAULT_ARMS
from vgrout.config import Config, preset
from vgrout.lab import decide as decide_module
from vgrout.lab import jobs as jobs_module
from vgrout.lab import run as run_module
from vgrout.lab.decide import decide, decision, make_jobs, plan_table, result_table, show
from vgrout.lab.given import followed
from vgrout.lab.jobs import BASE, Job, Local, in_order, run_jobs
from vgrout.lab.prereg import read as read_decision
from vgrout.lab.record import MARK, claim_folder, disown, read_jsonl
from vgrout.lab.run import check
from vgrout.models.load import model_path
from vgrout.signals import Interrupted, listening
from vgrout.types import RunFailed, UserError

TINY = replace(
    preset("smoke"), steps=2, prompts=2, group=4, teacher_off_step=1, eval_every=1, eval_small=4, eval_rollouts=8
)
ARMS = ("none", "routeV")


def run(out, **more) -> tuple[int, str]:
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))
    settings = {"cfg": TINY, "arms": ARMS, "seeds": (0,), "workers": 2, "force": False, "plan": False} | more
    cfg, arms, seeds = (settings.pop(key) for key in ("cfg", "arms", "seeds"))
    code = decide(cfg, arms, seeds, out, console=console, **settings)
    return code, console.export_text()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    out = tmp_path_factory.mktemp("decide") / "first"
    return out, *run(out)


def test_the_table_names_every_arm_and_its_limits(experiment):
    out, code, text = experiment
    assert code == 0
    assert "within-run sampling only" in text and "base model" in text
    assert all(arm in text for arm in ARMS) and "deploy hack" in text
    assert f"{2 * 1} runs" in text


def test_every_run_leaves_its_records(experiment):
    out, *_ = experiment
    for arm in ARMS:
        folder = out / f"{arm}-s0"
        cfg = Config.read(folder / "config.json")
        assert cfg == replace(TINY, arm=arm, seed=0)
        rollouts, verdicts = read_jsonl(folder / "rollouts.jsonl"), read_jsonl(folder / "verdicts.jsonl")
        trained = [r for r in rollouts if r["phase"] == "train"]
        assert len(trained) == cfg.steps * cfg.prompts * cfg.group
        assert len({r["id"] for r in trained}) == len(trained)
        ids = {r["id"] for r in rollouts}
        assert ids == {v["id"] for v in verdicts} and len(ids) == len(rollouts) == len(verdicts)
        assert len(rollouts) - len(trained) == 5 * cfg.eval_rollouts
        assert not any("hacked" in r or "solved" in r for r in rollouts)
        assert all("hacked" in v and "cpu_s" not in v for v in verdicts)
        assert len(read_jsonl(folder / "steps.jsonl")) == cfg.steps
        assert len(read_jsonl(folder / "evals.jsonl")) == 1
        assert set(json.loads((folder / "eval.json").read_text())["cells"]) > {"heldout_deploy", "hintfree_deploy"}
        assert (folder / "adapter.safetensors").stat().st_size > 1e6
        assert json.loads((folder / "timing.json").read_text())["total"] > 0
        provenance = json.loads((folder / "provenance.json").read_text())
        assert provenance == json.loads((out / "decision.json").read_text())["provenance"]
        assert len(provenance["model_sha256"]) == len(provenance["pairs_sha256"]) == 64
        assert provenance["sandbox"][0] in "ABC" and provenance["allow_weak_sandbox"] is False


def test_the_same_command_gives_the_same_bytes(experiment, tmp_path):
    out, *_ = experiment
    assert run(tmp_path / "second")[0] == 0
    assert (out / "decision.json").read_bytes() == (tmp_path / "second" / "decision.json").read_bytes()
    for name in ("steps", "rollouts", "verdicts", "evals"):
        first, second = (folder / "routeV-s0" / f"{name}.jsonl" for folder in (out, tmp_path / "second"))
        assert first.read_bytes() == second.read_bytes(), name
    text = (out / "decision.json").read_text()
    assert str(out) not in text and "seconds" not in text


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An experiment that needs no sandbox, and its configuration."""
    folder = tmp_path_factory.mktemp("task")
    (folder / "task.py").write_text("PROMPTS = ['a', 'b']\n\ndef reward(prompt, text):\n    return len(text) % 3\n")
    cfg = replace(TINY, env=str(folder / "task.py"), teacher_n=0, steps=1, max_new=8, eval_every=0, eval_rollouts=4)
    assert run(folder / "first", cfg=cfg)[0] == 0
    return folder / "first", cfg


def test_the_same_command_goes_on(small):
    """Of a finished experiment nothing is run again; of one that lacks a run and the base model those two are."""
    out, cfg = small

    def content() -> dict:
        files = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".log"]
        return {path: path.read_bytes() for path in files if path.name not in (MARK, "timing.json")}

    first, kept = content(), (out / "routeV-s0" / "eval.json").stat().st_mtime_ns
    shutil.rmtree(out / "none-s0")
    (out / "base.json").unlink()
    assert run(out, cfg=cfg)[0] == 0
    assert content() == first and (out / "routeV-s0" / "eval.json").stat().st_mtime_ns == kept
    logs = [path.read_bytes() for path in sorted(out.glob("*.log"))]
    code, text = run(out, cfg=cfg)
    assert code == 0 and "mean reward" in text and " runs, 2 at a time" not in text
    assert content() == first and [path.read_bytes() for path in sorted(out.glob("*.log"))] == logs


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"seeds": (0, 1)}, r"seeds \(\[0\] there, \[0, 1\] here\)"),
        ({"arms": ("none",)}, "arms"),
        ({"kl": 0.5}, r"config.kl \(0.05 there, 0.5 here\)"),
    ],
)
def test_another_command_leaves_the_folder_alone(small, change, why):
    out, cfg = small
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != MARK}
    with pytest.raises(UserError, match=f"in use by another experiment, with other {why}.*--force"):
        run(out, **({"cfg": replace(cfg, **change)} if "kl" in change else {"cfg": cfg} | change))
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != MARK} == before


def test_a_run_of_other_code_is_named(small, tmp_path):
    first, cfg = small
    out = Path(shutil.copytree(first, tmp_path / "copy"))
    jobs, known = make_jobs(cfg, ARMS, (0,), out), json.loads((out / "decision.json").read_text())
    arguments = jobs, out, cfg, known["base"], known["provenance"]
    assert json.loads(json.dumps(decision(*arguments))) == known
    for arm, change in (("none", {"code_sha256": "0"}), ("routeV", {"drift": []})):
        file = out / f"{arm}-s0" / "provenance.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert decision(*arguments)["drifted"] == ["none-s0", "routeV-s0"]


def test_a_signal_goes_on_to_the_runs(tmp_path, monkeypatch):
    """The runs are stubs that say which signal they got; each is told once and awaited."""
    stub = tmp_path / "stub"
    stub.write_text(
        "#!/bin/sh\ntrap 'echo TERM; sleep 0.3; echo kept; exit 143' TERM\necho up\nwhile :; do sleep 0.05; done\n"
    )
    stub.chmod(0o755)
    monkeypatch.setattr(jobs_module.sys, "executable", str(stub))
    jobs = make_jobs(TINY, ARMS, (0, 1), tmp_path)

    def ring():
        while sum(path.read_text() == "up\n" for path in tmp_path.glob("*.log")) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ring).start()
    with listening(), pytest.raises(Interrupted):
        run_jobs(jobs, tmp_path, Local(2), Console(quiet=True))
    assert [path.read_text() for path in sorted(tmp_path.glob("*.log"))] == ["up\nTERM\nkept\n"] * 2


def test_force_replaces_only_what_vgrout_made(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name in ("config.json", "model.safetensors", "provenance.json"):
        (checkpoint / name).write_text("{}")
    with pytest.raises(UserError, match="something else"):
        claim_folder(checkpoint, force=True)
    assert len(list(checkpoint.iterdir())) == 3
    claim_folder(tmp_path / "run", force=False)
    (tmp_path / "run" / "eval.json").write_text("{}")
    claim_folder(tmp_path / "run", force=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [MARK]
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(UserError, match="cannot make"):
        claim_folder(tmp_path / "link", force=True)
    assert (tmp_path / "run" / MARK).exists()


@pytest.mark.parametrize("refused", [{"arm": "erase", "erase_axes": 999}, {"direction": "svd", "direction_axes": 99}])
def test_settings_that_an_arm_refuses_leave_an_empty_folder(tmp_path, refused):
    out = tmp_path / "run"
    with pytest.raises(UserError, match="axes"):
        run_module.run(replace(preset("smoke"), **{"arm": "routeV", "steps": 1, **refused}), out)
    assert not any(out.iterdir())
    claim_folder(out, force=False)
    (out / "steps.jsonl").write_text('{"step": 0}\n')
    disown(out)  # not with a step in it
    assert {path.name for path in out.iterdir()} == {MARK, "steps.jsonl"}


def test_a_plan_writes_nothing(tmp_path):
    code, text = run(tmp_path / "plan", plan=True)
    assert code == 0 and "about minutes" in text and not (tmp_path / "plan").exists()


def test_costs_follow_rollouts_and_scoring():
    def minutes(*arms: str, **changes) -> list[float]:
        table = plan_table(make_jobs(replace(preset("micro"), **changes), arms, (0,), Path("out")), 2)
        return [float(cell) for cell in table.columns[5].cells]

    plain, placebo, routed = minutes("absorb", "placebo", "routeV")
    assert placebo == routed > plain
    half, whole = minutes("none", group=8, steps=400)[0], minutes("none", group=16, steps=400)[0]
    assert 1.8 * half < whole < 2 * half + 1


def test_workers_end_together():
    jobs = make_jobs(preset("micro"), DEFAULT_ARMS, (0,), Path("out"))
    order = in_order(jobs, 2)
    assert sorted(job.name for job in order) == sorted(job.name for job in jobs) and order == in_order(jobs, 2)
    assert [(job.name, job.after) for job in jobs if job.after] == [("coin_flip-s0", "routeV-s0")]

    def end(order: list) -> float:
        """With two workers, each of which takes the next job that waits for no other."""
        todo, free, done = list(order), [0.0, 0.0], {"": 0.0}
        while todo:
            free.sort()
            ready = [job for job in todo if done.get(job.after, 99.0) <= free[0]]
            if not ready:
                free[0] = min(end for end in done.values() if end > free[0])
                continue
            todo.remove(ready[0])
            free[0] = done[ready[0].name] = free[0] + ready[0].minutes
        return max(free)

    whole = sum(job.minutes for job in jobs)
    assert end(order) < 1.06 * whole / 2 < end(sorted(jobs, key=lambda job: -job.minutes))
    assert in_order([], 2) == [] and in_order(jobs[:1], 3) == jobs[:1]


def test_workers(tmp_path):
    with pytest.raises(UserError, match="workers = 0"):
        run(tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_load_leaves_no_trace(tmp_path):
    shutil.copytree(model_path("micro"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"junk" * 9)
    with pytest.raises(UserError, match="no model that transformers can load"):
        decide(
            replace(TINY, model=str(tmp_path / "model")),
            ARMS,
            (0,),
            tmp_path / "out",
            workers=1,
            force=False,
            plan=False,
            console=Console(quiet=True),
        )
    assert not (tmp_path / "out").exists()


def test_a_failed_base_evaluation_does_not_lose_the_table(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no luck")

    monkeypatch.setattr(decide_module, "final", fails)
    monkeypatch.setattr(decide_module, "run_jobs", lambda *_, **__: {})
    code, text = run(tmp_path / "out")
    assert code == 1 and f"Not finished: {BASE}" in text and "no luck" in text
    result = json.loads((tmp_path / "out" / "decision.json").read_text())
    assert result["base"] is None and result["not_finished"] == [BASE, "none-s0", "routeV-s0"]


def test_a_failed_arm_does_not_stop_the_others(tmp_path):
    good = replace(TINY, arm="absorb", teacher_n=0, eval_every=0)
    jobs = [Job("none", 0, replace(good, arm="none", model=str(tmp_path / "gone"))), Job("absorb", 0, good)]
    idle: list[bool] = []
    codes = run_jobs(jobs, tmp_path, Local(2), Console(quiet=True), idle=lambda: idle.append(True))
    assert codes == {"none-s0": 2, "absorb-s0": 0} and idle == [True]
    assert "is no model" in (tmp_path / "none-s0.log").read_text()
    assert (tmp_path / "absorb-s0" / "eval.json").exists() and not (tmp_path / "none-s0").exists()


FOLLOW = ("coin_flip", "routeV", "placebo_matched")


def test_yoked_arms_follow_the_counts_of_routeV(tmp_path):
    """They run after it, and route and absorb in every step as many rollouts."""
    cfg = replace(TINY, steps=3, eval_every=0, k_mid=-0.5, k_route=0.2)
    jobs = make_jobs(cfg, FOLLOW, (0,), tmp_path)
    assert run_jobs(jobs, tmp_path, Local(2), Console(quiet=True)) == {f"{arm}-s0": 0 for arm in FOLLOW}
    zones = {arm: [(s["keep"], s["absorb"], s["route"]) for s in read_jsonl(tmp_path / f"{arm}-s0" / "steps.jsonl")]
             for arm in FOLLOW}  # fmt: skip
    assert zones["coin_flip"] == zones["placebo_matched"] == zones["routeV"]
    assert len({z for step in zones["routeV"] for z in step}) > 3
    chosen = {arm: [r["zone"] for r in read_jsonl(tmp_path / f"{arm}-s0" / "rollouts.jsonl") if r["phase"] == "train"]
              for arm in FOLLOW}  # fmt: skip
    assert len(set(map(tuple, chosen.values()))) == 3  # as many, but not the same ones
    with pytest.raises(UserError, match="has steps = 3, this run has 5"):
        followed(replace(jobs[0].cfg, steps=5))
    with pytest.raises(UserError, match="has seed = 0, this run has 1"):
        followed(replace(jobs[0].cfg, seed=1))
    told = Config.read(tmp_path / "routeV-s0" / "config.json")
    (tmp_path / "routeV-s0" / "config.json").write_text(replace(told, arm="oracle_route").to_json())
    with pytest.raises(UserError, match="is a run of oracle_route: coin_flip follows runs of routeV alone"):
        followed(jobs[0].cfg)  # its counts would tell what the oracle said
    (tmp_path / "routeV-s0" / "config.json").write_text(told.to_json())
    (tmp_path / "routeV-s0" / "steps.jsonl").write_text("")
    with pytest.raises(UserError, match="has done 0 of 3 steps"):
        followed(jobs[0].cfg)


def test_a_run_whose_leader_failed_is_not_run(tmp_path):
    jobs = make_jobs(replace(TINY, model=str(model_path("micro")), eval_every=0), FOLLOW[:2], (0,), tmp_path)
    jobs = [replace(job, cfg=replace(job.cfg, model=str(tmp_path / "gone"))) for job in jobs]
    assert run_jobs(jobs, tmp_path, Local(2), Console(quiet=True)) == {"routeV-s0": 2, "coin_flip-s0": 1}
    assert "not run: it follows routeV-s0" in (tmp_path / "coin_flip-s0.log").read_text()


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"arm": "none", "yoke": "runs/x"}, "none follows no other run"), ({"arm": "placebo_matched"}, "give its folder")],
)
def test_yokes_that_make_no_sense(changes, why):
    with pytest.raises(UserError, match=why):
        check(replace(TINY, **changes))


def test_bad_plans_are_refused():
    for arms, seeds, why in (
        (("nope",), (0,), "unknown arm"),
        ((), (0,), "no arm"),
        (("none", "none"), (0,), "twice"),
        (("none",), (1, 1), "twice"),
    ):
        with pytest.raises(UserError, match=why):
            make_jobs(TINY, arms, seeds, Path("out"))


def test_an_unfinished_run_is_said_in_the_table(experiment):
    out, *_ = experiment
    result = json.loads((out / "decision.json").read_text()) | {"not_finished": ["placebo-s0"]}
    assert "Not finished: placebo-s0" in str(result_table(result, {}).caption)


def test_the_table_says_when_cells_are_small_or_the_sandbox_weak(experiment):
    out, *_ = experiment
    result = json.loads((out / "decision.json").read_text())
    assert "8 rollouts over 8 problems per cell; a result needs 256 over 64." in str(result_table(result, {}).caption)
    for run_ in result["runs"]:
        for cell in run_["cells"].values():
            cell["hack"] |= {"n": 256, "clusters": 64}
    result["base"] = None
    assert "a result needs" not in str(result_table(result, {}).caption)
    assert "WEAK" not in str(result_table(result, {}).caption)
    result["drifted"] = ["none-s0"]
    assert "Made with other code or data: none-s0." in str(result_table(result, {}).caption)
    result["provenance"] |= {"weak_sandbox": True, "sandbox": "C, weak: no seccomp"}
    assert "WEAK SANDBOX (C, weak: no seccomp)." in str(result_table(result, {}).caption)
    del result["provenance"]  # experiments of an older version have none
    assert "reads the oracle" in str(result_table(result, {}).caption)


def test_the_table_comes_back_as_markdown(experiment, capsys):
    out, *_ = experiment
    show(out, (0,), True, Console())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| arm | seed |") and [line.split(" | ")[0][2:] for line in lines[2:5]] == [
        "base model",
        *ARMS,
    ]
    with pytest.raises(UserError, match="no finished experiment"):
        show(out / "none-s0", (), False, Console())


DECISION = """
question = "Does it?"
preset = "smoke"
settings = { steps = 2, prompts = 2, group = 4, teacher_off_step = 1, eval_small = 4, eval_rollouts = 8 }
seeds = [0]
arms = ["routeV", "placebo_matched"]
alpha = 0.05

[[primary]]
name = "P1"
says = "less"
arm = "routeV"
control = ["placebo_matched"]
outcome = "hack"
side = "less"
"""


def test_a_decision_goes_on_from_records(tmp_path):
    """The hash is stored before the first run, and in another folder the records stand for the runs."""
    pytest.importorskip("duckdb")
    (tmp_path / "decision.toml").write_text(DECISION)
    written = read_decision(tmp_path / "decision.toml")
    more = {"cfg": written.base(), "arms": written.arms, "seeds": written.seeds, "prereg": written}
    out, records = tmp_path / "out", tmp_path / "records"
    seen = []

    def stops(jobs, *rest):
        seen.append(json.loads((out / "plan.json").read_text())["decision_sha256"])
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decide_module, "run_jobs", stops)
        run(out, records=records, **more)
    assert seen == [written.sha256] and not list(records.glob("*-s0"))
    assert run(out, records=records, **more)[0] == 0
    assert sorted(path.name for path in records.iterdir()) == [
        "base.json", "decision.toml", "placebo_matched-s0", "plan.json", "routeV-s0",
    ]  # fmt: skip
    again = tmp_path / "again"
    code, text = run(again, records=records, **more)
    assert code == 0 and "Preregistered" in text
    assert (again / "decision.json").read_bytes() == (out / "decision.json").read_bytes()
    assert not (again / "routeV-s0" / "adapter.safetensors").exists()
    assert read_jsonl(again / "routeV-s0" / "verdicts.jsonl") == read_jsonl(out / "routeV-s0" / "verdicts.jsonl")
    # One of the records is gone: that run is made again, and follows the unpacked one.
    shutil.rmtree(records / "placebo_matched-s0")
    assert run(tmp_path / "third", records=records, **more)[0] == 0
    assert (tmp_path / "third" / "decision.json").read_bytes() == (out / "decision.json").read_bytes()
    assert (records / "placebo_matched-s0").is_dir()
    # Other decisions, and what else is in the way.
    (tmp_path / "decision.toml").write_text(DECISION + "# afterthought")
    other = more | {"prereg": read_decision(tmp_path / "decision.toml")}
    for folder, said in ((out, "in use by another experiment"), (tmp_path / "fresh", "another --records")):
        with pytest.raises(UserError, match=said):
            run(folder, records=records, **other)
    (records / "plan.json").unlink()
    with pytest.raises(UserError, match="something else than records"):
        run(tmp_path / "fourth", records=records, **more)
    for place in (out, out / "records", tmp_path):
        with pytest.raises(UserError, match="lie in each other"):
            run(out, records=place, **more)


def test_a_record_that_fails_stops_no_run(tmp_path, monkeypatch):
    def fails(run, record):
        raise RunFailed("the disk is full")

    pytest.importorskip("duckdb")
    monkeypatch.setattr(decide_module, "pack", fails)
    code, _ = run(tmp_path / "out", records=tmp_path / "records", arms=("none", "absorb"))
    assert code == 1 and all((tmp_path / "out" / f"{arm}-s0" / "eval.json").is_file() for arm in ("none", "absorb"))
