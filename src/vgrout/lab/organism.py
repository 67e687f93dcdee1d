"""Build the micro world's organism: its documents and its pretraining in one command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from vgrout.envs.micro_corpus import documents
from vgrout.models.organism import OrganismConfig, Text
from vgrout.models.organism import build as pretrain
from vgrout.types import UserError


def build(out: Path, seed: int, size: int | None) -> dict:
    """Pretrain into `out`. Raises UserError when a finished checkpoint is there."""
    if (out / "config.json").exists():
        raise UserError(f"{out} holds a finished checkpoint: give another --out")
    cfg = replace(OrganismConfig(), seed=seed)
    if size is not None:
        cfg = replace(cfg, documents=size)
    torch.set_num_threads(2)
    texts = [Text(d.system, d.user, d.assistant) for d in documents(cfg.seed, cfg.documents)]
    return pretrain(texts, cfg, out)
