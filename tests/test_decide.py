"""The decision experiment as a user runs it: two tiny arms, twice, and one that fails."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from vgrout.config import Config, preset
from vgrout.lab.decide import Job, decide, make_jobs, result_table, run_jobs, show
from vgrout.lab.record import claim_folder, read_jsonl
from vgrout.types import UserError

TINY = replace(
    preset("smoke"), steps=2, prompts=2, group=4, teacher_off_step=1, eval_every=1, eval_small=4, eval_rollouts=8
)
ARMS = ("none", "routeV")


def run(out, **more) -> tuple[int, str]:
    console = Console(record=True, width=200, quiet=False, file=open("/dev/null", "w"))
    settings = {"workers": 2, "force": False, "plan": False} | more
    code = decide(TINY, ARMS, (0,), out, console=console, **settings)
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
        assert {r["id"] for r in trained} <= {v["id"] for v in verdicts}
        assert len(rollouts) == len(verdicts)
        assert not any("hacked" in r or "solved" in r for r in rollouts)
        assert len(read_jsonl(folder / "steps.jsonl")) == cfg.steps
        assert len(read_jsonl(folder / "evals.jsonl")) == 1
        assert set(json.loads((folder / "eval.json").read_text())["cells"]) > {"heldout_deploy", "hintfree_deploy"}
        assert (folder / "adapter.safetensors").stat().st_size > 1e6
        assert json.loads((folder / "timing.json").read_text())["total"] > 0


def test_the_same_command_gives_the_same_bytes(experiment, tmp_path):
    out, *_ = experiment
    assert run(tmp_path / "second")[0] == 0
    assert (out / "decision.json").read_bytes() == (tmp_path / "second" / "decision.json").read_bytes()
    text = (out / "decision.json").read_text()
    assert str(out) not in text and "seconds" not in text


def test_a_folder_in_use_is_left_alone(experiment):
    out, *_ = experiment
    before = (out / "decision.json").read_bytes()
    with pytest.raises(UserError, match="in use"):
        run(out)
    assert (out / "decision.json").read_bytes() == before
    with pytest.raises(UserError, match="something else"):
        (out / "none-s0" / "config.json").rename(out / "none-s0" / "moved.json")
        claim_folder(out / "none-s0", force=True)
    assert (out / "none-s0" / "moved.json").exists()


def test_a_plan_writes_nothing(tmp_path):
    code, text = run(tmp_path / "plan", plan=True)
    assert code == 0 and "about minutes" in text and not (tmp_path / "plan").exists()


def test_a_failed_arm_does_not_stop_the_others(tmp_path):
    good = replace(TINY, arm="absorb", teacher_n=0, eval_every=0)
    jobs = [Job("none", 0, replace(good, arm="none", model=str(tmp_path / "gone"))), Job("absorb", 0, good)]
    codes = run_jobs(jobs, tmp_path, 1, Console(quiet=True))
    assert codes == {"none-s0": 2, "absorb-s0": 0}
    assert "is no model" in (tmp_path / "none-s0.log").read_text()
    assert (tmp_path / "absorb-s0" / "eval.json").exists() and not (tmp_path / "none-s0").exists()


def test_bad_plans_are_refused():
    for arms, seeds, why in (
        (("nope",), (0,), "unknown arm"),
        ((), (0,), "no arm"),
        (("none", "none"), (0,), "twice"),
        (("none",), (1, 1), "twice"),
    ):
        with pytest.raises(UserError, match=why):
            make_jobs(TINY, arms, seeds)


def test_an_unfinished_run_is_said_in_the_table(experiment):
    out, *_ = experiment
    result = json.loads((out / "decision.json").read_text()) | {"not_finished": ["placebo-s0"]}
    assert "Not finished: placebo-s0" in str(result_table(result, {}).caption)


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
