"""Adapters by name. Adding one: a file with a BlockLinear and an entry here."""

from __future__ import annotations

import torch
from torch import nn

from vgrout.adapters.base import TARGETS, Adapter, BlockLinear, Switch
from vgrout.adapters.lora2r import Lora2r
from vgrout.config import stream
from vgrout.types import UserError

ADAPTERS: dict[str, type[BlockLinear]] = {
    "lora2r": Lora2r,
}


def attach(model: nn.Module, kind: str, rank: int, seed: int) -> Adapter:
    """Put an adapter on every target Linear of `model`, in place; nothing else of the model can train.

    Raises UserError for an unknown kind and for a model without target Linears.
    """
    if kind not in ADAPTERS:
        raise UserError(f"unknown adapter {kind!r}: choose one of {', '.join(ADAPTERS)}")
    for p in model.parameters():
        p.requires_grad_(False)
    generator = torch.Generator().manual_seed(stream(seed, "init"))
    switch = Switch()
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS
    ]
    if not found:
        raise UserError(
            f"no target Linear in {type(model).__name__}: expected names ending in {', '.join(sorted(TARGETS))}"
        )
    modules: dict[str, BlockLinear] = {}
    for name, linear in found:
        parent, _, child = name.rpartition(".")
        block = ADAPTERS[kind](linear, name, switch, rank, generator)
        setattr(model.get_submodule(parent), child, block)
        modules[name] = block
    return Adapter(model, modules, switch, rank)
