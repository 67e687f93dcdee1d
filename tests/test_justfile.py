"""The justfile, through the real `just`: every recipe says what it asks, every arm has one, commands parse."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vgrout import cli
from vgrout.arms import ARMS
from vgrout.config import preset
from vgrout.lab.queue import entries
from vgrout.lab.record import finished
from vgrout.lab.sweep import sweep_jobs

FOLDER = Path(__file__).parents[1]
JUST = shutil.which("just", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
REQUIRED = os.environ.get("VGROUT_BROWSER") == "required"  # where the tests' own tools must be there
pytestmark = pytest.mark.skipif(
    JUST is None and not REQUIRED, reason="needs just: pip install rust-just, which the extra dev has"
)
OTHERS = ("help", "smoke", "smoke-all", "smoke-solvemix", "download-model", "queue-decision")


def just(*args, cwd=None, vgrout="vgrout"):
    assert JUST, "just is required here: pip install rust-just, which the extra dev has"
    env = os.environ | {"VGROUT": vgrout}
    env.pop("OUT", None)
    where = ["--justfile", str(FOLDER / "justfile"), "--working-directory", str(cwd or FOLDER)]
    return subprocess.run([JUST, *where, *args], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def recipes():
    done = just("--dump", "--dump-format", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["recipes"]


def commands(recipe, found):
    """The command lines that a recipe would run, with a name for each argument that it needs."""
    needs = ["some-name" for p in found["parameters"] if p["default"] is None and p["kind"] == "singular"]
    done = just("--dry-run", recipe, *needs)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stderr.replace("\\\n", " ").splitlines() if line.strip()]


def test_every_arm_has_a_recipe_and_every_recipe_says_what_it_asks(recipes):
    assert set(recipes) == {*OTHERS, *ARMS}
    listed = just("--list", "--unsorted").stdout.splitlines()[1:]
    assert len(listed) == len(recipes)
    asked = []
    for line in listed:
        found = re.fullmatch(r" {4}([\w-]+).* # H: (.{15,})", line)
        assert found, line
        asked.append(found[2])
    assert len(set(asked)) == len(asked)  # no two ask the same


def test_the_parser_accepts_every_command(recipes):
    shapes = set()  # commands of arms differ in the arm's name alone: one of each shape is parsed
    for recipe, found in recipes.items():
        for program, *args in commands(recipe, found) if recipe != "help" else ():
            assert program == "vgrout", (recipe, program)
            if recipe in ARMS:
                arms = args[args.index("--arms") + 1 : args.index("--seeds")]
                follows = ["routeV"] if "yoke" in ARMS[recipe].needs else []
                judged = ["--judge-model", "some-name"] if "judge" in ARMS[recipe].needs else []
                assert arms == [*follows, recipe, *judged], recipe
                base = replace(preset("micro"), judge_model="some-name" if judged else "")
                sweep_jobs(base, [*follows, recipe], (0,), (), FOLDER / "runs" / "arms")  # its settings are right
            shape = tuple("ARM" if word == recipe else word for word in args)
            if shape not in shapes:
                cli.check_command(args)
            shapes.add(shape)
    assert 8 <= len(shapes) <= 16


def test_a_model_goes_where_its_name_is_looked_up(recipes):
    assert commands("download-model", recipes["download-model"]) == [["vgrout", "model", "download", "Qwen/Qwen3-4B"]]


def test_a_slip_in_a_command_is_noticed():
    for args in (["sweep", "--arms", "rooteV", "--out", "x"], ["sweep", "--arm", "routeV"]):
        with pytest.raises(cli.UserError):
            cli.check_command(args)
    with pytest.raises(SystemExit):
        cli.check_command(["sweep", "--arms", "routeV", "--sedes", "0"])


def test_the_mix_shows_as_many_solutions_as_hacks_in_every_step(recipes, monkeypatch):
    ((_, *args),) = commands("smoke-solvemix", recipes["smoke-solvemix"])
    seen = {}

    def keep(cfg, out, **how):
        seen["cfg"] = cfg

    monkeypatch.setattr("vgrout.lab.run.run", keep)
    monkeypatch.setattr(sys, "argv", ["vgrout", *args])
    with pytest.raises(SystemExit):
        cli.main()
    cfg = seen["cfg"]
    assert cfg.teacher_n == 2 and cfg.teacher_off_step == cfg.steps and cfg.group - 2 * cfg.teacher_n == 2


def test_queue_decision_fills_a_queue(recipes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = commands("queue-decision", recipes["queue-decision"])
    for _, *args in lines:
        monkeypatch.setattr(sys, "argv", ["vgrout", *args])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code, capsys.readouterr().err
    queued = entries(tmp_path / "runs" / "queue")
    arms = [entry.command[entry.command.index("--arms") + 1] for entry in queued]
    folders = {entry.command[entry.command.index("--out") + 1] for entry in queued}
    assert folders == {"runs/queue-decision"}  # decide has runs/decision for itself
    assert arms == ["routeV", "placebo", "none", "absorb"] and {entry.state for entry in queued} == {"waiting"}
    assert len({entry.why for entry in queued}) == len({entry.resolve for entry in queued}) == 4


def test_a_recipe_really_runs(tmp_path):
    tiny = "--preset smoke --steps 1 --prompts 1 --group 4 --eval-every 0 --eval-rollouts 2 --eval-scales 0".split()
    done = just("none", "3", *tiny, cwd=tmp_path, vgrout=f"{sys.executable} -m vgrout")
    assert done.returncode == 0, done.stdout + done.stderr
    assert finished(tmp_path / "runs" / "arms" / "none-s3") and "none-s3" in done.stdout
