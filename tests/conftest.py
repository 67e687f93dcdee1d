"""Shapes and types of vgrout are checked at every call of every test.

The import hook must precede the first import of vgrout, so fixtures import it inside.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

early = [name for name in sys.modules if name.split(".")[0] == "vgrout"]
if early:
    raise RuntimeError(f"imported before the type checker: {', '.join(early)}")
# The numeric tower of PEP 484: an int is a float where a float is asked for.
install_import_hook("vgrout", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

torch.set_num_threads(1)

hypothesis.settings.register_profile("vgrout", deadline=None, derandomize=True)
hypothesis.settings.load_profile("vgrout")


@pytest.fixture(scope="session")
def package() -> Path:
    """The folder of the package's source."""
    return Path(__file__).parents[1] / "src" / "vgrout"


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> Path:
    """The folder of a finished run of routeV on tiny sizes. Tests copy what they change."""
    from vgrout.config import preset
    from vgrout.lab.run import run

    out = tmp_path_factory.mktemp("runs") / "routeV-s0"
    run(replace(preset("smoke"), arm="routeV", steps=4), out)
    return out


@pytest.fixture(scope="session")
def sandbox():
    from vgrout.envs.sandbox import Sandbox

    with Sandbox() as box:
        yield box


@pytest.fixture(scope="session")
def micro_env(sandbox):
    from vgrout.envs.micro_env import MicroEnv

    return MicroEnv(sandbox)
