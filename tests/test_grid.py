"""What `--arms` can name: sets, variants and their settings; arms that cannot run here."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from vgrout.arms import ARMS, Arm, hooks
from vgrout.arms.monitored import ACTIONS, Monitored
from vgrout.arms.monitors import MONITORS
from vgrout.config import preset
from vgrout.envs.micro import LIVE
from vgrout.lab.decide import left_out, make_jobs, plan_table
from vgrout.lab.given import access
from vgrout.lab.grid import GRID, LEAKAGE, LEFT_OUT, MECHANISMS, ROWS, SEPARATION, SETS, TRAINED_ON, arms_table, named
from vgrout.lab.labels import modes_in_pairs
from vgrout.lab.run import check
from vgrout.types import UserError

MICRO = preset("micro")
LEVELS = {"L0", "L1", "L2", "L3", "L4", "env"}
OUT = Path("out")
JUDGED = {"judge_model": "played"}  # names a judge, and asks nobody


def test_sets_hold_every_arm_once():
    assert [v.label for v in ROWS] == list(ARMS) and all(v.label == v.arm and not v.changes for v in ROWS)
    labels = [v.label for v in SETS["all-variants"]]
    assert len(set(labels)) == len(labels) > len(ARMS)
    assert named(["routeV", "none_wide"])[1].arm == "none"
    with pytest.raises(UserError, match="unknown arm 'nope'"):
        named(["nope"])


@pytest.mark.parametrize("variant", (*GRID, *LEFT_OUT, *LEAKAGE, *SEPARATION), ids=lambda v: v.label)
def test_a_variant_changes_what_it_says(variant):
    base = replace(MICRO, seed=3)
    cfg, plain = asdict(variant.config(base, 3)), asdict(replace(base, arm=variant.arm))
    changed = {*variant.changes, *variant.times}
    changed |= {name for name, is_set in (("pairs", variant.section), ("placebo_seed", variant.draw)) if is_set}
    assert {k for k in cfg if cfg[k] != plain[k]} == changed != set()
    followed = {"yoke": "runs/routeV-s3"} if "yoke" in ARMS[variant.arm].needs else {}
    check(replace(variant.config(base, 3), **JUDGED, **followed))


def test_the_wide_twin_has_the_rank_of_both_blocks():
    assert named(["none_wide"])[0].config(replace(MICRO, rank=5), 0).rank == 10


def test_pairs_without_a_mechanism_lack_that_alone():
    """Every mechanism of the micro pairs is named, so that leaving one out leaves out one."""
    shown = modes_in_pairs("micro")
    assert shown == set(MECHANISMS) and set(TRAINED_ON) == shown & set(LIVE)
    for variant in LEFT_OUT:
        gone = variant.label.removeprefix("routeV_without_")
        assert modes_in_pairs(variant.config(MICRO, 0).pairs) == shown - {gone}


@pytest.mark.parametrize("name", ARMS)
def test_facts_of_arms(name):
    arm = ARMS[name]
    assert arm.name == name and arm.claim and arm.access in LEVELS
    assert arm.reads_oracle is (arm.access == "L4")
    assert set(hooks(arm)) or arm is Arm or not arm.loophole
    if issubclass(arm, Monitored):
        assert arm.signal in MONITORS and MONITORS[arm.signal].access == arm.access and arm.action in ACTIONS


def test_the_table_of_arms_has_them_all():
    console = Console(record=True, width=250, file=open("/dev/null", "w"))
    for table in arms_table(True):
        console.print(table)
    text = console.export_text()
    assert all(f"\n {name} " in text for name in (*ARMS, *(v.label for v in GRID)))
    for column in ("signal", "action", "access", "at deployment", "hooks", "paper"):
        assert column in text
    (row,) = [line for line in text.split("\n") if line.startswith(" oracle_screen ")]
    assert "*" in row and "labels" in row and "screen" in row and "L4" in row


def test_arms_without_a_judge_are_listed_not_run(tmp_path):
    unable = left_out(MICRO, ["all"], OUT)
    assert set(unable) == {name for name, arm in ARMS.items() if "judge" in arm.needs} != set()
    assert all("--judge-model" in why for why in unable.values())
    jobs = make_jobs(MICRO, ["all"], (0,), Path("out"), unable)
    assert {job.arm for job in jobs} == set(ARMS) - set(unable)
    assert (
        "not run: judge_route (judge_route asks a judge: name one as --judge-model"
        in plan_table(jobs, 2, unable).caption
    )
    assert left_out(MICRO, ["none", "judge_route"], OUT) == {}  # whoever names it wants it
    with pytest.raises(UserError, match="judge_route asks a judge: name one"):
        make_jobs(MICRO, ["none", "judge_route"], (0,), Path("out"))
    gone = replace(MICRO, judge_model="m", judge_url="http://127.0.0.1:9/v1", judge_key_env="", judge_timeout=2.0)
    assert all("127.0.0.1:9" in why for why in left_out(gone, ["all"], OUT).values()) and left_out(gone, ["all"], OUT)
    done = tmp_path / "judge_route-s0"
    done.mkdir()
    for name in ("eval.json", "adapter.safetensors"):
        (done / name).touch()
    assert set(left_out(gone, ["all"], tmp_path, (0,), goes_on=True)) == set(unable) - {"judge_route"}  # it is done
    for seeds, goes_on in (((0, 1), True), ((0,), False)):  # a seed is missing; the folder is replaced
        assert set(left_out(gone, ["all"], tmp_path, seeds, goes_on=goes_on)) == set(unable)


def test_a_set_leaves_out_what_the_settings_do_not_allow(tmp_path):
    """Without an oracle and without pairs of nulls; and what is wrong for all is said once."""
    task, pairs = tmp_path / "task.py", tmp_path / "pairs.md"
    task.write_text("PROMPTS = ['Write.', 'Read.', 'Count.']\ndef reward(prompt, completion): return 1.0\n")
    pairs.write_text(
        "Provenance: authored\n\n## own\n\n### one\n\n"
        + "".join(f"#### {f}\n\n`````text\n{f}\n`````\n\n" for f in ("Prompt", "Hack", "Clean"))
    )
    base = replace(MICRO, env=str(task), teacher_n=0, pairs=str(pairs))
    unable = left_out(base, ["all"], OUT)
    assert "has no oracle" in unable["oracle_route"] and "no section 'nulls'" in unable["placebo_style"]
    assert not {"none", "routeV", "placebo_matched", "erase"} & set(unable)
    with pytest.raises(UserError, match="no model|is no model"):
        left_out(replace(MICRO, model=str(tmp_path)), ["all"], OUT)


def test_yoked_arms_need_their_leader():
    jobs = {job.name: job for job in make_jobs(MICRO, ["all"], (0, 1), Path("out"), left_out(MICRO, ["all"], OUT))}
    assert jobs["placebo_matched-s1"].after == "routeV-s1" and jobs["placebo_matched-s1"].cfg.yoke == "out/routeV-s1"
    with pytest.raises(UserError, match="placebo_matched follows a routeV run"):
        make_jobs(MICRO, ["placebo_matched"], (0,), Path("out"))
    assert make_jobs(MICRO, ["coin_flip"], (0,), Path("out"))[0].after == ""


def test_an_init_from_the_pairs_is_told_text():
    assert access(replace(MICRO, arm="absorb")) == "L0"
    assert access(replace(MICRO, arm="absorb", init="signed_corda")) == "L1"
    assert access(replace(MICRO, arm="absorb", init="pissa")) == "L0"
    assert access(replace(MICRO, arm="oracle_route", init="corda")) == "L4"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"arm": "oracle_route", "label_modes": ("run_test",)}, "no mode 'run_test'"),
        ({"arm": "oracle_route", "label_modes": ("run_tests",), "modes": ("sentinel",)}, "not all of them"),
        ({"arm": "erase", "pairs": "micro#nulls"}, "holds no hack"),
        ({"arm": "absorb", "init": "corda", "pairs": "micro#nulls"}, "holds no hack"),
        ({"arm": "placebo_style"}, "needs pairs that all have the tag"),
    ],
)
def test_settings_that_would_do_nothing(changes, why):
    with pytest.raises(UserError, match=why):
        check(replace(MICRO, **changes))
