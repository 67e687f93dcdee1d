"""Checkpoints without pickle: a folder that is whole, or does not count.

    checkpoints/.tmp-step_000040/   state.safetensors and state.json, then MANIFEST.json, each synced to the disk
    checkpoints/step_000040/        the same folder after one rename, and the parent synced

A crash at any point leaves the older ones as they were. The manifest has the size and SHA-256 of both files and of
itself, and the stamp: everything that the run depends on. A checkpoint that does not agree with its manifest is
skipped, with a warning, for the one before it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from vgrout.faults import warn
from vgrout.types import UserError

FOLDER = "checkpoints"
TENSORS, PLAIN, MANIFEST = "state.safetensors", "state.json", "MANIFEST.json"
FORMAT = 2  # of these files; another one is refused
NEWEST = 3  # checkpoints that stay in any case
PART = ".tmp-"  # starts the name of what is not finished


class Damaged(Exception):
    """A checkpoint is not what was saved."""


@dataclass(frozen=True)
class Checkpoint:
    """`state` is flat: tensors, and plain values that JSON keeps exactly. `logs`: bytes of each log that belong to the
    steps done. `stamp`: what a run must share to go on from here."""

    step: int
    state: Mapping[str, Any]
    logs: Mapping[str, int]
    stamp: Mapping[str, Any]


def write(path: Path, data: bytes, mode: int | None = None) -> None:
    """A whole file on the disk, with the permissions `mode` where given. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644 if mode is None else mode)
    try:
        if mode is not None:
            os.fchmod(fd, mode)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync(path: Path) -> None:
    """Put a file's content, or a folder's names, on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, text: str, mode: int | None = None) -> None:
    """Write a file that a reader finds old or new, and always whole; with the permissions `mode` where given. Raises
    OSError."""
    part = path.with_name(PART + path.name)
    try:
        if mode is not None:
            part.unlink(missing_ok=True)  # one left over may have others
        write(part, text.encode(), mode)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def save(root: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Add a checkpoint, and drop all but the newest three and those at multiples of `keep` (0: no others).

    Raises OSError; the older ones are as they were, and nothing is left of what was not finished.
    """
    tensors = {key: value.contiguous().clone() for key, value in checkpoint.state.items() if isinstance(value, Tensor)}
    plain = {key: value for key, value in checkpoint.state.items() if key not in tensors}
    files = {TENSORS: save_tensors(tensors), PLAIN: _json({"state": plain, "logs": dict(checkpoint.logs)})}
    manifest = {
        "format": FORMAT,
        "step": checkpoint.step,
        "stamp": dict(checkpoint.stamp),
        "files": {name: _facts(data) for name, data in files.items()},
    }
    files[MANIFEST] = _json(manifest | {"sha256": _digest(_json(manifest))})
    home = root / f"step_{checkpoint.step:06d}"
    part = root / (PART + home.name)
    try:
        root.mkdir(exist_ok=True)
        for left in root.glob(f"{PART}*"):
            shutil.rmtree(left)
        part.mkdir()
        for name, data in files.items():
            write(part / name, data)
        sync(part)
        discard(home)
        os.rename(part, home)
        sync(root)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    with contextlib.suppress(OSError):  # what cannot go now goes next time
        for old in _homes(root)[NEWEST:]:
            if not keep or _step(old) % keep:
                discard(old)


def discard(home: Path) -> None:
    """Remove a checkpoint so that no part of it is ever taken for one. Raises OSError."""
    if home.exists():
        gone = home.with_name(f"{PART}gone-{home.name}")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(home, gone)
        shutil.rmtree(gone)


def whole(root: Path) -> Iterator[Checkpoint]:
    """The checkpoints under `root`, newest first; a warning for each that is damaged.

    Raises UserError for one of another format.
    """
    for home in _homes(root):
        try:
            yield read(home)
        except Damaged as fault:
            warn(f"{home} is damaged ({fault}): going back to the one before it")


def read(home: Path) -> Checkpoint:
    """Raises Damaged, and UserError for another format."""
    try:
        manifest = json.loads((home / MANIFEST).read_bytes())
        if manifest.pop("sha256") != _digest(_json(manifest)):
            raise Damaged(f"{MANIFEST} is not what was written")
        if manifest["format"] != FORMAT:
            other = f"{home} has format {manifest['format']}, this vgrout reads {FORMAT}"
            raise UserError(f"{other}: resume it with the version that wrote it")
        data = {name: (home / name).read_bytes() for name in (TENSORS, PLAIN)}
        for name, content in data.items():
            if _facts(content) != manifest["files"][name]:
                raise Damaged(f"{name} is not what was written")
        plain = json.loads(data[PLAIN])
        tensors = {key: tensor.clone() for key, tensor in load_tensors(data[TENSORS]).items()}
        return Checkpoint(manifest["step"], plain["state"] | tensors, plain["logs"], manifest["stamp"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise Damaged(" ".join(f"{type(error).__name__}: {error}".split())) from None


def discard_after(root: Path, step: int) -> None:
    """Remove the checkpoints of later steps: a run that goes back writes them anew. Raises OSError."""
    for home in _homes(root):
        if _step(home) > step:
            discard(home)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What two stamps disagree on, with short values named."""
    out = []
    for key in sorted({*there, *here}):
        values = [json.dumps(side.get(key), sort_keys=True) for side in (there, here)]
        if values[0] != values[1]:
            out.append(f"{key} ({values[0]} there, {values[1]} here)" if max(map(len, values)) < 40 else key)
    return out


def _homes(root: Path) -> list[Path]:
    """Newest first."""
    return sorted((home for home in root.glob("step_*") if home.name[5:].isdecimal()), key=_step, reverse=True)


def _step(home: Path) -> int:
    return int(home.name[5:])


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _facts(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": _digest(data)}
