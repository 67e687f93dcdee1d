"""A configuration that cannot run is refused when it is made or read, in one line that names the field."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from vgrout.config import PRESETS, Config
from vgrout.types import UserError

BAD = {
    "steps": [0, 2.0, True, "3", None],
    "seed": [1.5, None, False],
    "seed_init": [0.5, "0"],
    "warmup": [0],
    "buffer": [0],
    "eval_small": [0],
    "eval_rollouts": [0, -1],
    "eval_every": [-1],
    "teacher_n": [-1, 4],
    "teacher_off_step": [-1],
    "kl": [-0.1, float("nan"), float("inf"), True],
    "weight_decay": [-1e-3],
    "clip_ratio": [-0.2],
    "beta1": [1.0, -0.1],
    "beta2": [1],
    "lr": [0.0, float("nan"), "1e-3"],
    "temperature": [0],
    "unhackable_frac": [1.1, -0.1],
    "q": [2],
    "t_lo": [0.6],
    "k_mid": [1.1],
    "coin_route": [0.95],
    "ratio": ["two", None],
    "policy": ["pair"],
    "direction": ["pca"],
    "direction_axes": [0],
    "half_life": [0.0],
    "p_route": [1.0],
    "p_absorb": [0.9, 0.0],
    "trace_every": [-1],
    "baseline": [1],
    "model": [None, 3],
    "modes": ["run_tests", (1,)],
    "allow_weak_sandbox": [1, "yes"],
    "deploy_gen_frac": [0.3],
    "checkpoint_every": [-1, 2.5],
    "checkpoint_keep": [-1, None],
    "entropy_floor": [-0.1],
    "kl_ceiling": [0, float("inf")],
    "compile_floor": [1.1],
    "adv_strength": [-1.0],
    "adv_form": ["product"],
    "adv_position": ["last"],
    "steer_strength": [0, float("nan")],
    "judge_url": ["localhost:8000", "https://user:word@host/v1", "https://host/v1?key=1", None],
    "judge_key_env": ["sk-something", "lower_case"],
    "judge_concurrency": [0],
    "judge_retries": [-1],
    "judge_timeout": [0],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_field_is_named(tmp_path, name, value):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(asdict(Config()) | {name: value}))
    with pytest.raises(UserError, match=f"config.json: .*{name}"):
        Config.read(file)


@pytest.mark.parametrize(
    "good",
    [
        {"eval_every": 0, "teacher_n": 0, "kl": 0, "beta1": 0, "weight_decay": 0},
        {"t_lo": 0.5, "t_hi": 0.5, "k_mid": -1.0, "k_route": -1.0},
        {"deploy_gen_frac": 0.1667, "group": 6},
        {"placebo_seed": 3, "seed_data": None, "lr": 1, "modes": ("run_tests",)},
    ],
)
def test_bounds_are_not_too_narrow(good):
    replace(Config(), **good)


def test_possible_shares_are_named():
    with pytest.raises(UserError, match=r"group's 8 .* 0\.25 and 0\.375"):
        Config(deploy_gen_frac=0.3)


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_written_is_read(tmp_path, name):
    cfg = replace(PRESETS[name], modes=("run_tests",), seed_data=4, allow_weak_sandbox=True)
    (tmp_path / "config.json").write_text(cfg.to_json())
    assert Config.read(tmp_path / "config.json") == cfg


def test_files_that_are_no_configuration(tmp_path):
    file, whole = tmp_path / "config.json", asdict(Config())
    for text, why in (
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
        (json.dumps(whole | {"stepz": 1}), "unknown fields stepz"),
        (json.dumps({k: v for k, v in whole.items() if k not in ("kl", "lr")}), "missing fields kl, lr"),
        (json.dumps(whole | {"steps": [3]}), "config.json: steps"),
        (json.dumps(whole | {"modes": {}}), "config.json: modes"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=why):
            Config.read(file)
    with pytest.raises(UserError, match="cannot read"):
        Config.read(tmp_path)
    with pytest.raises(UserError, match="no configuration at"):
        Config.read(tmp_path / "none.json")
