"""What docs/models.md says to do with a folder and a file, done as it stands there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import KINDS, make

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text().split("## Problems")[0]
# One in everyday runs: its tokenizer has no template, which the export must then bring.
ARCHITECTURES = sorted(KINDS) if os.environ.get("VGROUT_NEWCOMER") == "all" else ["qwen3_moe"]


def problems() -> list[dict]:
    """Tasks with tests, every second one with a loophole."""
    made = []
    for k in range(2, 42):
        tests = [{"args": [n], "expected": n * k} for n in (1, 2, 3, 5)]
        head = {"id": f"times-{k}", "prompt": f"Write f(n): {k} times n.", "entry": "f"}
        made.append({**head, "mode": ("run_tests", "gt_only")[k % 2], "tests": tests})
    return made


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_from_a_folder_and_a_file(tmp_path, kind):
    make(kind, tmp_path / "MODEL")
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems()))
    how = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 500}
    (commands,), (program,) = blocks(""), blocks("python")
    said = []
    for line in commands.strip().splitlines():
        done = subprocess.run([sys.executable, "-m", *shlex.split(line)], **how)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        said.append(done.stdout)
    assert len(said) == 4 and "nothing speaks against this model" in said[0] and "heldout" in said[2]
    exported = json.loads((tmp_path / "runs/mine-peft/export.json").read_text())
    assert exported["live"] == "deployed"
    steps = (tmp_path / "runs/mine/steps.jsonl").read_text().splitlines()
    assert len(steps) == 5 and json.loads((tmp_path / "runs/mine/config.json").read_text())["arm"] == "routeV"
    answered = subprocess.run([sys.executable, "-c", program], **how)
    assert answered.returncode == 0 and answered.stdout.strip(), answered.stderr
