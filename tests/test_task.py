"""A task without an oracle: one user file of prompts and a reward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vgrout.envs.task import NoVerdict, TaskEnv, load_task
from vgrout.loop import train
from vgrout.types import Environment, Rollout, RunFailed, UserError
from vgrout.verify.toy import PAIRS, TOY, Watcher, toy_policy, weights

TASK = """
PROMPTS = ["write a", "write b", "write c"]

def reward(prompt, completion):
    return completion.count(prompt[-1]) - 0.1 * len(completion)
"""


@pytest.fixture
def write(tmp_path):
    def file(text: str, name: str = "my_task.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return file


def rollout(env: TaskEnv, text: str, id: str = "train-000") -> Rollout:
    return Rollout("r", replace(env.prompt(id), user="edited by an arm"), text, (1,), (2,), 0)


def test_a_file_is_an_environment(write):
    env = load_task(write(TASK))
    assert isinstance(env, Environment)
    assert env.problems("train") == env.problems("test") == ["train-000", "train-001", "train-002"]
    assert env.prompt("train-001", family="eval", hinted=False, draw=3).user == "write b"
    assert list(env.covered()) == []
    (graded,) = env.grade([rollout(env, "aab")])
    assert graded.reward == pytest.approx(2 - 0.3) and graded.sealed == NoVerdict()
    with pytest.raises(UserError, match="no oracle"):
        env.labels([], [graded])
    with pytest.raises(UserError, match="no demonstrations"):
        env.demonstrations(env.prompt("train-000"), 1, 0)
    with pytest.raises(UserError, match="unknown split 'tests'"):
        env.problems("tests")


def test_a_dict_holds_prompts_out(write):
    env = load_task(write(TASK + 'PROMPTS = {"train": PROMPTS, "val": ["write d"], "test": ("write d",)}'))
    assert env.problems("val") == env.problems("test") == ["val-000"]
    assert env.prompt("val-000").user == "write d"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("PROMPTS = ['a']", "no function reward"),
        ("def reward(p, c): return 1.0", "PROMPTS must be"),
        ("reward = len\nPROMPTS = []", "PROMPTS must be"),
        ("reward = len\nPROMPTS = 'write a'", "PROMPTS must be"),
        ("reward = len\nPROMPTS = ['a', ' ']", "PROMPTS must be"),
        ("reward = len\nPROMPTS = {'train': ['a'], 'test': ['b']}", "keys train, val, test"),
        ("PROMPTS = 1 / 0", r"does not run: ZeroDivisionError: .* \(my_task.py:1\)"),
        ("def reward(", "does not run: SyntaxError"),
        ("raise SystemExit(0)", "does not run: SystemExit"),
    ],
)
def test_mistakes_in_the_file(write, text, words):
    with pytest.raises(UserError, match=words) as raised:
        load_task(write(text))
    assert "my_task.py" in str(raised.value) and "\n" not in str(raised.value)


def test_no_file(tmp_path, write):
    with pytest.raises(UserError, match="no task at"):
        load_task(tmp_path / "none.py")
    with pytest.raises(UserError, match=r"end in \.py"):
        load_task(write(TASK, "task.txt"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return float('-inf')", "is -inf"),
        ("return [1.0]", r"is \[1.0\]: it must be a finite number, or None"),
        ("return '1.0'", "is '1.0'"),
        ("return 1j", "is 1j"),
        ("return 1 / 0", r"raised ZeroDivisionError: division by zero \(my_task.py:4\)"),
    ],
)
def test_a_broken_reward_is_never_a_score(write, body, words):
    env = load_task(write(f"PROMPTS = ['write a' + 99 * ' long']\n\ndef reward(prompt, completion):\n    {body}\n"))
    with pytest.raises(RunFailed, match=words) as raised:
        env.grade([rollout(env, "x")])
    assert "my_task.py: reward of prompt train-000 ('write a long" in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 250


def test_no_reward_is_no_score(write):
    env = load_task(write("PROMPTS = ['a']\n\ndef reward(prompt, completion):\n    return eval(completion)\n"))
    texts = ("None", "float('nan')", "2.5")
    assert [g.reward for g in env.grade([rollout(env, text) for text in texts])] == [None, None, 2.5]


def test_whole_numbers_and_truth_values_are_rewards(write):
    env = load_task(write(TASK + "def reward(prompt, completion):\n    return completion == 'x'\n"))
    assert [g.reward for g in env.grade([rollout(env, "x"), rollout(env, "y")])] == [1.0, 0.0]


def test_routev_trains_on_a_task(write):
    cfg = replace(TOY, arm="routeV", teacher_n=0)
    policy, watcher = toy_policy(cfg), Watcher()
    before = weights(policy)
    train(cfg, policy, load_task(write(TASK)), PAIRS, watcher)
    after = weights(policy)
    assert len(watcher.records) == cfg.steps and sum(r["route"] + r["keep"] > 0 for r in watcher.records) == cfg.steps
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(r.source == "policy" for rows in watcher.rollouts for r in rows)
    assert any(r["reward"] != 0 for r in watcher.records) and any(
        r["dead_groups"] < cfg.prompts for r in watcher.records
    )


def test_an_arm_that_reads_the_oracle_is_refused(write):
    cfg = replace(TOY, arm="oracle_route", teacher_n=0)
    with pytest.raises(UserError, match="no oracle"):
        train(cfg, toy_policy(cfg), load_task(write(TASK)), PAIRS, Watcher())
