"""Which files a run's hash of the code covers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vgrout.lab.source import executed

RUN = """
import json, sys
from dataclasses import replace
from pathlib import Path
from vgrout.config import preset
from vgrout.lab.run import run
cfg = replace(preset("smoke"), arm="routeV", steps=2, prompts=2, group=4, eval_every=1, eval_small=2, eval_rollouts=4)
run(cfg, Path(sys.argv[1]))
print(json.dumps([m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "vgrout"]))
"""


@pytest.fixture
def house(tmp_path):
    """A package: a -> b (inside a function), b -> c.d, which lies in a package; e imports a."""
    root = tmp_path / "house"
    (root / "c").mkdir(parents=True)
    sources = {
        "__init__": "",
        "a": "import os\ndef f():\n    from house import b\n    return b",
        "b": "from house.c.d import x",
        "c/__init__": "import house.g",
        "c/d": "x = 1",
        "e": "import house.a",
        "g": "",
    }
    for name, text in sources.items():
        (root / f"{name}.py").write_text(text)
    return root


@pytest.mark.parametrize(
    ("entry", "files"),
    [
        ("house.a", ["__init__", "a", "b", "c/__init__", "c/d", "g"]),
        ("house.c.d", ["__init__", "c/__init__", "c/d", "g"]),
        ("house.e", ["__init__", "a", "b", "c/__init__", "c/d", "e", "g"]),
        ("house.g", ["__init__", "g"]),
        ("os.path", []),
    ],
)
def test_what_an_entry_reaches(house, entry, files):
    assert executed(entry, house) == sorted(house / f"{name}.py" for name in files)


def test_a_run_depends_on_what_trains_and_on_no_report(package):
    files = {str(path.relative_to(package)) for path in executed()}
    assert {"loop.py", "types.py", "signals.py", "lab/record.py", "envs/_forkserver.py", "envs/_confine.py"} <= files
    assert {f"arms/{name.name}" for name in (package / "arms").glob("*.py")} <= files
    assert not any(name.startswith(("verify/", "integrations/")) for name in files)
    assert files.isdisjoint({"cli.py", "lab/report.py", "lab/figures.py", "lab/claims.py", "lab/decide.py"})


@pytest.mark.slow
def test_a_run_loads_nothing_else(tmp_path):
    said = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "run")], capture_output=True, text=True, check=True, timeout=300
    )
    loaded = set(json.loads(said.stdout.splitlines()[-1]))
    assert len(loaded) > 40 and loaded <= {str(path) for path in executed()}
