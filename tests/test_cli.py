"""A user's mistake is one clear line on stderr, exit code 2, and nothing written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from vgrout.cli import main
from vgrout.faults import OutOfMemory


@pytest.fixture
def vgrout(monkeypatch, capsys, tmp_path):
    """Run the command line in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vgrout", *args])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return run


def mistake(result: tuple[int, str, str], *words: str) -> None:
    code, _, err = result
    assert code == 2, err
    assert err.startswith("vgrout: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


@pytest.fixture
def files(tmp_path):
    (tmp_path / "bad.md").write_text("# pairs\n\n## one\n\n### a pair\n#### Prompt\n\nno fence\n")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "odd.json").write_text(json.dumps({"stepz": 3}))
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text("{}")
    (tmp_path / "partial.json").write_text(json.dumps({"steps": 3}))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    (tmp_path / "used" / "config.json").write_text("{}")
    (tmp_path / "task.py").write_text("PROMPTS = ['write a']\n\ndef reward(prompt, completion):\n    return 1.0\n")
    (tmp_path / "broken.py").write_text("PROMPTS = [")
    return tmp_path


TASK = ["--env", "task.py", "--teacher-n", "0"]
MISTAKES = {
    "arm": (["--arm", "route"], ["'route'", "routeV", "oracle_route"]),
    "mode": (["--modes", "run_tests", "sentinal"], ["'sentinal'", "sentinel"]),
    "preset": (["--preset", "huge"], ["'huge'", "micro", "smoke"]),
    "adapter": (["--adapter", "lora3r"], ["'lora3r'", "lora2r"]),
    "pairs missing": (["--pairs", "none.md"], ["none.md"]),
    "pairs malformed": (["--pairs", "bad.md"], ["bad.md:8", "fence"]),
    "pairs selector": (["--pairs", "micro#nowhere"], ["nowhere"]),
    "model missing": (["--model", "nowhere"], ["nowhere", "vgrout model download"]),
    "model hollow": (["--model", "hollow"], ["hollow"]),
    "share": (["--unhackable-frac", "1.5"], ["unhackable_frac", "1.5"]),
    "steps": (["--steps", "0"], ["steps"]),
    "teacher": (["--teacher-n", "4"], ["teacher_n"]),
    "config missing": (["--config", "none.json"], ["none.json"]),
    "config broken": (["--config", "bad.json"], ["bad.json", "JSON"]),
    "config odd": (["--config", "odd.json"], ["odd.json", "stepz"]),
    "config partial": (["--config", "partial.json"], ["partial.json", "missing", "kl, kl_ceiling, label_accuracy"]),
    "config folder": (["--config", "hollow"], ["hollow", "cannot read"]),
    "config and preset": (["--config", "odd.json", "--preset", "smoke"], ["--config", "--preset"]),
    "warmup": (["--warmup", "0"], ["warmup"]),
    "task unknown": (["--env", "macro"], ["'macro'", "micro"]),
    "task missing": (["--env", "none.py", "--teacher-n", "0"], ["none.py"]),
    "task broken": (["--env", "broken.py", "--teacher-n", "0"], ["broken.py", "SyntaxError"]),
    "task and demonstrations": (["--env", "task.py"], ["task.py", "--teacher-n 0"]),
    "task and modes": ([*TASK, "--modes", "run_tests"], ["task.py", "modes"]),
    "task and oracle": ([*TASK, "--arm", "oracle_route"], ["oracle_route", "no oracle"]),
    "task and honesty": ([*TASK, "--arm", "rl_baseline"], ["rl_baseline", "loophole"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_train(vgrout, files, name):
    args, words = MISTAKES[name]
    before = sorted(files.rglob("*"))
    mistake(vgrout("train", "--out", "run", *args), *words)
    assert sorted(files.rglob("*")) == before


def test_folder_in_use(vgrout, files):
    mistake(vgrout("train", "--out", "used"), "used", "in use")
    mistake(vgrout("train", "--out", "used", "--force"), "used", "not replaced")
    mistake(vgrout("train", "--out", "bad.md"), "bad.md", "file")
    assert (files / "used" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--arms", "none", "wrong"], ["'wrong'"]),
        (["--arms", "none", "none"], ["twice"]),
        (["--arms", "none", "--seeds", "1", "1"], ["twice"]),
        (["--arm", "none"], ["--arms"]),
        (["--arm=none"], ["--arms"]),
        (["--seed", "3"], ["--seeds"]),
        (["--seed=3", "--plan"], ["--seeds"]),
        (["--workers", "0"], ["workers"]),
        (["--adapter", "bogus"], ["'bogus'", "lora2r"]),
        (["--model", "hollow"], ["hollow"]),
    ],
)
def test_mistakes_of_decide(vgrout, files, args, words):
    before = sorted(files.rglob("*"))
    mistake(vgrout("decide", "--out", "run", *args), *words)
    assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["eval", "hollow", "--split", "train"], ["'train'", "val"]),
        (["eval", "nowhere"], ["nowhere"]),
        (["pairs", "lint", "bad.md"], ["bad.md:8"]),
        (["verify", "--only", "identity", "gravity"], ["'gravity'", "identity"]),
        (["micro", "pools", "--out", "bad.md"], ["bad.md", "exists"]),
        (["micro"], ["micro build", "micro pools", "micro calibrate"]),
        (["micro", "--seed", "1"], ["micro build"]),
        (["micro", "fly"], ["micro calibrate"]),
        (["micro", "calibrate", "--seed", "1"], ["--seeds"]),
        (["micro", "calibrate", *TASK], ["task.py"]),
        (["micro", "calibrate", "--record", "nowhere/bars.json"], ["nowhere"]),
        (["pairs"], ["pairs lint", "pairs audit"]),
        (["pairs", "lint", "--model", "micro", "--no-model"], ["not both"]),
        (["direction"], ["direction export", "direction check"]),
        (["direction", "export", "hollow"], ["hollow", "missing"]),
        (["direction", "check", "bad.md", "used"], ["bad.md", "cannot read"]),
        (["direction", "check", "none", "used"], ["no file at none"]),
        (["lab", "ceiling", "nowhere"], ["nowhere", "no trace"]),
        (["lab", "gates", "hollow"], ["hollow", "no finished run"]),
        (["lab", "gates", "hollow", "--out", "nowhere/gates.json"], ["cannot write nowhere/gates.json"]),
        (["direction", "check", "none", "used", "--out", "used"], ["cannot write used"]),
        (["data"], ["data leetcode"]),
        (["env"], ["env audit"]),
        (["grade", "none.jsonl", "bad.md"], ["none.jsonl"]),
        (["grade", "none.jsonl", "bad.md", "--mode", "fly"], ["'fly'"]),
        (["env", "audit", "bad.md"], ["bad.md:1"]),
        (["data", "leetcode", "--from", "none.jsonl", "--out", "leet"], ["none.jsonl"]),
        (["data", "leetcode", "--from", "bad.md", "--out", "used"], ["used", "in use"]),
    ],
)
def test_mistakes_of_the_rest(vgrout, files, args, words):
    mistake(vgrout(*args), *words)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["--out", "--resume"]),
        (["--out", "new", "--resume", "used"], ["drop --out"]),
        (["--resume", "used", "--lr", "1e-3", "--kl=0.1"], ["drop --kl, --lr"]),
        (["--resume", "used", "--eval_every=2", "--allow-drift"], ["drop --eval-every"]),
        (["--resume", "nowhere"], ["no run at nowhere"]),
        (["--resume", "hollow"], ["hollow", "not a folder that vgrout made"]),
        (["--out", "new", "--allow-drift"], ["--allow-drift", "--resume"]),
    ],
)
def test_mistakes_of_resume(vgrout, files, args, words):
    before = sorted(files.rglob("*"))
    mistake(vgrout("train", *args), *words)
    assert sorted(files.rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "work"),
    [
        (["train", "--out", "new"], "vgrout.lab.run.run"),
        (["train", "--resume", "used", "--allow-drift"], "vgrout.lab.run.resume"),
        (["decide", "--out", "new"], "vgrout.lab.decide.decide"),
    ],
)
def test_a_signal_is_one_line_and_its_exit_code(vgrout, monkeypatch, args, work):
    monkeypatch.setattr(work, lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = vgrout(*args)
    assert code == 143 and err == "vgrout: interrupted by SIGTERM\n"


def test_a_failed_run_is_one_line_and_exit_code_1(vgrout, monkeypatch):
    def fails(*_, **__):
        raise OutOfMemory("step 3: not enough memory")

    monkeypatch.setattr("vgrout.lab.run.run", fails)
    assert vgrout("train", "--out", "new") == (1, "", "vgrout: OutOfMemory: step 3: not enough memory\n")


def test_unknown_command_and_flag(vgrout):
    for args in (["fly"], ["train", "--out", "run", "--wings", "2"], ["train", "--out", "run", "--steps", "many"]):
        code, out, err = vgrout(*args)
        assert code == 2 and args[-1 if args[-1] == "many" else -2 if len(args) > 1 else 0].strip("-") in out + err


def test_help_of_a_group(vgrout):
    code, out, _ = vgrout("micro", "--help")
    assert code == 0 and [line.split()[:3] for line in out.splitlines()] == [
        ["vgrout", "micro", name] for name in ("build", "pools", "calibrate")
    ]
    code, out, _ = vgrout("--help")
    assert code == 0 and "micro build" in out


def test_no_telemetry():
    code = "import vgrout, huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)"
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_TELEMETRY"}
    assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == "True"


def test_arms(vgrout):
    from vgrout.arms import ARMS

    code, out, _ = vgrout("arms")
    assert code == 0 and all(name in out for name in ARMS)


def test_plan_writes_nothing(vgrout, tmp_path):
    code, out, _ = vgrout("decide", "--out", "run", "--plan", "--arms", "none", "routeV", "--seeds", "0", "1")
    assert code == 0 and "4 runs" in out
    assert not list(tmp_path.iterdir())


def test_verify(vgrout):
    code, out, _ = vgrout("verify", "--only", "identity", "grpo_identity")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [["ok", "identity"], ["ok", "grpo_identity"]]
