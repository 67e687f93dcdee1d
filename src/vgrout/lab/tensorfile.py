"""Safetensors files of ours: tensors, and JSON in the metadata that says of which kind and format they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vgrout.lab.checkpoint import PART, write
from vgrout.types import UserError


def write_file(path: Path, kind: str, version: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """A file that a reader finds old or new, and always whole. Raises OSError."""
    said = json.dumps({"kind": kind, "format": version, **meta})
    data = save({key: t.detach().contiguous().clone() for key, t in tensors.items()}, {"vgrout": said})
    part = path.with_name(PART + path.name)
    try:
        write(part, data)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def read_file(path: Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata. Raises UserError for any other kind of file, another format, and a damaged one."""
    try:
        if not path.is_file():
            raise UserError(f"no file at {path}")
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {}).get("vgrout", "{}"))
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if (meta.get("kind"), meta.get("format")) != (kind, version):
        found = f"kind {meta.get('kind', 'unknown')}, format {meta.get('format', 'unknown')}"
        raise UserError(f"{path} is no {kind} file of format {version}: it says {found}")
    return tensors, meta
