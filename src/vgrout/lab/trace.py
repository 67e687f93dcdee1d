"""Traces: what a gate scored, kept so that directions and gates can be judged again without training.

trace/step_000040.safetensors   of the policy's rollouts and demonstrations of one step, in the order of rollouts.jsonl
    unit        [N, M, R] float16   the scored features, each module's row scaled to length 1 (0 where it was 0)
    norm        [N, M]              their lengths: float16 alone would lose small gradients, and scores need only cosines
    score       [N]                 as the gate had them
    v mean sd hack clean pairs      the direction of that step, see `method.direction.Direction`
The metadata name the rollouts' ids, the step, the modules, and the settings that decide what a score is. Labels are in
verdicts.jsonl under the same ids.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vgrout.lab.checkpoint import PART, write
from vgrout.method.direction import Direction
from vgrout.types import Decision, UserError

FOLDER = "trace"
KIND, FORMAT = "trace", 1


@dataclass(frozen=True)
class Trace:
    """One step of a trace. `unit` has rows of length 1; `direction` is what the step was scored along."""

    step: int
    ids: tuple[str, ...]
    unit: Float[Tensor, "N M R"]
    norm: Float[Tensor, "N M"]
    score: Float[Tensor, N]
    direction: Direction
    meta: Mapping[str, Any]


def save_trace(folder: Path, step: int, ids: Sequence[str], decision: Decision, facts: Mapping[str, Any]) -> None:
    """Write the step's features where the decision has any; the file is whole or not there. Raises OSError."""
    if decision.features is None or decision.score is None:
        return
    norm = decision.features.norm(dim=-1)
    unit = decision.features / norm.clamp(min=torch.finfo(norm.dtype).tiny)[..., None]
    fields = decision.direction
    tensors = {
        "unit": unit.half(),
        "norm": norm,
        "score": decision.score,
        **{key: value for key, value in fields.items() if isinstance(value, Tensor)},
    }
    plain = {key: value for key, value in fields.items() if not isinstance(value, Tensor)}
    meta = {"kind": KIND, "format": FORMAT, "step": step, "ids": list(ids), "direction": plain, **facts}
    data = save({key: t.detach().contiguous().clone() for key, t in tensors.items()}, {"vgrout": json.dumps(meta)})
    folder.mkdir(exist_ok=True)
    part = folder / f"{PART}step"
    write(part, data)
    os.replace(part, folder / f"step_{step:06d}.safetensors")


def discard_from(folder: Path, step: int) -> None:
    """Remove the traces of `step` and later ones, and what was not finished. Raises OSError."""
    for file in (*folder.glob("step_*.safetensors"), *folder.glob(f"{PART}*")):
        if file.name.startswith(PART) or int(file.stem[5:]) >= step:
            file.unlink()


def open_tensors(path: Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file of ours. Raises UserError for any other kind of file, or another version of it."""
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("vgrout", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if meta.get("kind") != kind or meta.get("format") != version:
        raise UserError(f"{path} is a {meta.get('kind', 'foreign')} file, not a {kind} of format {version}")
    return tensors, meta


def read_trace(path: Path) -> Trace:
    """Raises UserError where the file is none, or damaged."""
    tensors, meta = open_tensors(path, KIND, FORMAT)
    try:
        own = {key: tensors.pop(key) for key in ("unit", "norm", "score")}
        direction = Direction(**tensors, **meta["direction"])
        return Trace(meta["step"], tuple(meta["ids"]), own["unit"].float(), own["norm"], own["score"], direction, meta)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no whole trace: {error}") from None


def read_traces(run: Path) -> list[Trace]:
    """Every trace of a run, by step. Raises UserError where there is none."""
    traces = [read_trace(path) for path in sorted((run / FOLDER).glob("step_*.safetensors"))]
    if not traces:
        raise UserError(f"{run} has no trace: train an arm that scores with --trace-every 1")
    return traces
