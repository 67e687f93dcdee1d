"""Traces: what a gate scored, kept so that directions and gates can be judged again without training.

trace/step_000040.safetensors   of the rollouts of one step, demonstrations included, in the order of rollouts.jsonl
    unit        [N, M, R] float16   the scored features, each module's row scaled to length 1 (0 where it was 0)
    norm        [N, M]              their lengths: in float16 small gradients would be lost; scores need cosines only
    score       [N]                 as the gate had them
    v mean sd hack clean pairs      the direction of that step, see `method.direction.Direction`
The metadata name the rollouts' ids, the step, the modules, and the settings that decide what a score is. Labels are in
verdicts.jsonl under the same ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vgrout.adapters import Adapter
from vgrout.adapters.base import BLOCKS
from vgrout.arms import ARMS
from vgrout.arms.monitored import Monitored
from vgrout.arms.monitors import GradientScore
from vgrout.config import Config
from vgrout.lab.checkpoint import PART
from vgrout.lab.tensorfile import read_file, write_file
from vgrout.method.direction import Direction
from vgrout.types import Decision, UserError

FOLDER = "trace"
KIND, FORMAT = "trace", 2
# Settings behind a score.
SCORING = ("direction", "direction_axes", "score_state", "score_dtype", "score_loss", "policy", "pairs")


def scoring(cfg: Config) -> dict[str, Any]:
    """What decides what a score of this run's arm is: its settings, and what the features are (None: it has none)."""
    arm = ARMS[cfg.arm]
    watches = issubclass(arm, Monitored) and issubclass(arm.monitor, GradientScore)
    return {**{key: getattr(cfg, key) for key in SCORING}, "features": arm.monitor.of if watches else None}


@dataclass(frozen=True)
class Trace:
    """One step of a trace. Rows of `unit` have length 1; `direction` is what the step was scored along."""

    step: int
    ids: tuple[str, ...]
    unit: Float[Tensor, "N M R"]
    norm: Float[Tensor, "N M"]
    score: Float[Tensor, N]
    direction: Direction
    meta: Mapping[str, Any]


def split_fields(direction: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The fields of a direction: tensors, and the rest."""
    tensors = {key: value for key, value in direction.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in direction.items() if key not in tensors}


def save_trace(folder: Path, step: int, ids: Sequence[str], decision: Decision, facts: Mapping[str, Any]) -> None:
    """Write the step's features where the decision has any; the file is whole or not there. Raises OSError."""
    if decision.features is None or decision.score is None:
        return
    norm = decision.features.norm(dim=-1)
    unit = decision.features / norm.clamp(min=torch.finfo(norm.dtype).tiny)[..., None]
    tensors, plain = split_fields(decision.direction)
    tensors |= {"unit": unit.half(), "norm": norm, "score": decision.score}
    folder.mkdir(exist_ok=True)
    meta = {"step": step, "ids": list(ids), "fields": plain, **facts}
    write_file(folder / f"step_{step:06d}.safetensors", KIND, FORMAT, tensors, meta)


def discard_from(folder: Path, step: int) -> None:
    """Remove the traces of `step` and later ones, and what was not finished. Raises OSError."""
    for file in folder.glob("*.safetensors"):
        if file.name.startswith(PART) or int(file.stem.removeprefix("step_")) >= step:
            file.unlink()


def read_trace(path: Path) -> Trace:
    """Raises UserError where the file is none, or damaged."""
    tensors, meta = read_file(path, KIND, FORMAT)
    try:
        own = {key: tensors.pop(key) for key in ("unit", "norm", "score")}
        direction = Direction(**tensors, **meta["fields"])
        return Trace(meta["step"], tuple(meta["ids"]), own["unit"].float(), own["norm"], own["score"], direction, meta)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no whole trace: {error}") from None


def read_traces(run: Path) -> list[Trace]:
    """Every trace of a run, by step. Raises UserError where there is none."""
    traces = [read_trace(path) for path in sorted((run / FOLDER).glob("step_*.safetensors"))]
    if not traces:
        raise UserError(f"{run} has no trace: train an arm that scores with --trace-every 1")
    return traces


def init_digest(adapter: Adapter) -> str:
    """SHA-256 of what of an adapter is never trained. A c-gradient's coordinates are those of this init."""
    trained = {name for which in BLOCKS for name, _ in adapter.named(which)}
    digest = sha256()
    for name, tensor in sorted(adapter.tensors().items()):
        if name not in trained:
            digest.update(
                f"{name} {tuple(tensor.shape)} ".encode() + tensor.contiguous().cpu().float().numpy().tobytes()
            )
    return digest.hexdigest()
