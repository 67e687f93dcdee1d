"""gate.safetensors: the gate of a run as a file of its own, to be judged on stored traces.

    v mean sd hack clean pairs      the direction that the run used last, see `method.direction.Direction`
The metadata say what a score is (modules, settings, pooling), the thresholds of the last step, and the hashes of pairs,
model and adapter init, without which v has no meaning. A file of any other kind is refused: what was fitted with the
oracle's labels (lab/ceiling.py) is no gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgrout.arms.base import part
from vgrout.config import Config
from vgrout.lab.tensorfile import read_file, write_file
from vgrout.lab.trace import scoring, split_fields
from vgrout.method.direction import Direction
from vgrout.types import UserError

NAME = "gate.safetensors"
KIND, FORMAT = "gate", 2
POOLING = "mean over modules of (cosine - mean) / sd"
HASHES = ("pairs_sha256", "model_sha256")


@dataclass(frozen=True)
class GateFile:
    direction: Direction
    meta: Mapping[str, Any]


def direction_of(state: Mapping[str, Any]) -> Direction | None:
    """The direction in the state of a training; None for an arm that has none, or has not extracted it yet."""
    fields = part(part(state, "arm."), "watch.direction.")
    return Direction(**fields) if fields else None


def gate_meta(
    cfg: Config, provenance: Mapping[str, Any], init: str, modules: list[str], last: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Metadata of a gate; `last` is the record of the run's last step."""
    return {
        "arm": cfg.arm,
        "seed": cfg.seed,
        "steps": 0 if last is None else last["step"] + 1,
        "v_age": None if last is None else last.get("v_age"),
        **scoring(cfg),
        "pooling": POOLING,
        "modules": modules,
        "thresholds": [None, None] if last is None else [last.get("t_lo"), last.get("t_hi")],
        **{key: provenance.get(key) for key in HASHES},
        "init_sha256": init,
    }


def save_gate(path: Path, direction: Direction, meta: Mapping[str, Any]) -> None:
    """Raises OSError."""
    tensors, plain = split_fields(vars(direction))
    write_file(path, KIND, FORMAT, tensors, {**meta, "fields": plain})


def load_gate(path: Path) -> GateFile:
    """Raises UserError for anything that is no gate, a direction fitted with labels above all."""
    tensors, meta = read_file(path, KIND, FORMAT)
    try:
        return GateFile(Direction(**tensors, **meta["fields"]), meta)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no whole gate: {error}") from None
