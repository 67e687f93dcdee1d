"""Settings are ranked by what their runs ship on validation problems of the modes that the pairs show."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from vgrout.config import Config, preset
from vgrout.envs.micro import problems
from vgrout.lab import choose
from vgrout.lab.choose import Shipped, ranked, settings_of, shipped, show_choice
from vgrout.lab.run import run
from vgrout.types import UserError

QUIET = Console(quiet=True)
MODE = {p.id: p.mode for p in problems("val")}
SHOWN = {"run_tests", "stdout_marker"}


def of(settings, seed, hack, solve):
    return Shipped(settings, seed, ("run_tests",), hack, solve, 64, 16, "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("choose") / "none-s3"
    small = {"steps": 1, "prompts": 2, "group": 4, "teacher_off_step": 0, "eval_every": 0, "eval_rollouts": 8}
    run(replace(preset("smoke"), arm="none", seed=3, **small), out)
    return out


def test_the_mean_over_seeds_of_solve_minus_hack_ranks():
    found = [of("a", 0, 0.5, 0.5), of("b", 1, 0.25, 0.5), of("a", 1, 0.0, 0.75), of("b", 0, 0.0, 0.5)]
    rows = ranked(found)
    assert [(r["settings"], r["gain"], r["hack"], r["solve"]) for r in rows] == [
        ("a", 0.375, 0.25, 0.625),
        ("b", 0.375, 0.125, 0.5),
    ]  # equal ones by name
    assert [run["seed"] for run in rows[1]["runs"]] == [0, 1]
    both = [of("c", 0, 0.0, 0.5), of("c", 1, 0.0, 0.5)]
    assert [row["settings"] for row in ranked([*found, *both])] == ["c", "a", "b"]
    assert [row["settings"] for row in ranked([*found, both[0]])] == ["a", "b", "c"]  # one seed less: below
    with pytest.raises(UserError, match="no problems in common: a: run_tests; b: run_tests; d: sentinel"):
        ranked([*found, replace(both[0], settings="d", modes=("sentinel",))])


def test_settings_are_a_folder_without_its_seed(tmp_path):
    assert settings_of(tmp_path / "routeV_kept-s11", 11) == "routeV_kept"
    assert settings_of(tmp_path / "routeV_kept-s11", 1) == "routeV_kept-s11"


def test_only_validation_problems_of_the_pairs_modes_are_sampled(folder, monkeypatch):
    seen, sample = [], choose.sample_cell

    def watched(*args, **kwargs):
        seen.append(sample(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(choose, "sample_cell", watched)
    found = shipped(folder, Config.read(folder / "config.json"), 32)
    (result,) = seen
    env_val = {r.prompt.problem_id for r in result.rollouts}
    assert env_val and all(id.startswith("val-") for id in env_val)
    assert {MODE[r.prompt.problem_id] for r in result.rollouts} == SHOWN == set(found.modes)
    assert result.cell.family == "eval" and result.cell.state == "deployed" and result.cell.hinted
    assert found.hack == sum(v.hacked for v in result.verdicts) / 32
    assert found.solve == sum(v.solved for v in result.verdicts) / 32


def test_the_ranking_is_printed_and_kept(folder, tmp_path):
    console = Console(width=100, record=True, file=StringIO())
    show_choice([folder], 16, tmp_path / "choice.json", console)
    text = console.export_text()
    assert "run_tests" in text and "stdout_marker" in text and "oracle" in text
    (row,) = json.loads((tmp_path / "choice.json").read_text())
    assert row["settings"] == "none" and row["runs"][0]["rollouts"] == 16


@pytest.mark.parametrize(
    ("runs", "rollouts", "message"),
    [(["nowhere"], 8, "no finished run"), ([], 8, "name the folders"), (["nowhere"], 0, "positive whole number")],
)
def test_what_it_refuses(folder, tmp_path, runs, rollouts, message):
    with pytest.raises(UserError, match=message):
        show_choice([tmp_path / name for name in runs], rollouts, None, QUIET)
    with pytest.raises(UserError, match="cannot write"):
        show_choice([folder], 8, tmp_path, QUIET)
    twin = tmp_path / folder.name
    twin.symlink_to(folder)
    with pytest.raises(UserError, match="2 runs of none with seed 3: give each once"):
        show_choice([folder, twin], 8, None, QUIET)
