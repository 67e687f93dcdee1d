"""Adapters by name. Adding one: a file with a BlockLinear and an entry here."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from vgrout.adapters.base import TARGETS, Adapter, BlockLinear, Detach, Switch
from vgrout.adapters.delta_s import DeltaS, DeltaSSplit
from vgrout.adapters.frozen_b import FrozenB, FrozenBSplit
from vgrout.adapters.inits import INITS, Moments, two_blocks
from vgrout.adapters.lora2r import Lora2r
from vgrout.config import stream
from vgrout.types import UserError

ADAPTERS: dict[str, type[BlockLinear]] = {
    "lora2r": Lora2r,  # two LoRA blocks
    "delta_s": DeltaS,  # shifts of the singular values
    "delta_s_split": DeltaSSplit,  # the quarantine with singular vectors of its own
    "frozen_b": FrozenB,  # a trained encoder, a frozen decoder
    "frozen_b_split": FrozenBSplit,  # the quarantine with a decoder of its own
}


def check_kind(kind: str, init: str) -> None:
    """Raises UserError for an unknown kind, and for an init that the kind does not have."""
    if kind not in ADAPTERS:
        raise UserError(f"unknown adapter {kind!r}: choose one of {', '.join(ADAPTERS)}")
    if init not in ADAPTERS[kind].inits:
        raise UserError(f"init = {init}: adapter {kind} has {', '.join(ADAPTERS[kind].inits)}")


def targets(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linears that get an adapter, by name. Raises UserError where there is none."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS
    }
    if not found:
        raise UserError(
            f"no target Linear in {type(model).__name__}: expected names ending in {', '.join(sorted(TARGETS))}"
        )
    return found


def attach(
    model: nn.Module,
    kind: str,
    rank: int,
    seed: int,
    *,
    init: str = "random",
    detach: Detach = "output",
    moments: Mapping[str, Moments] | None = None,
) -> Adapter:
    """Put an adapter on every target Linear of `model`, in place; nothing else of the model can train.

    `moments` of the modules' inputs are needed by the inits that are `calibrated`. Raises UserError for what
    `check_kind` refuses, for a model without target Linears, and for an init that a module has no room for.
    """
    check_kind(kind, init)
    for p in model.parameters():
        p.requires_grad_(False)
    generator = torch.Generator().manual_seed(stream(seed, "init"))
    switch = Switch()
    modules: dict[str, BlockLinear] = {}
    for name, linear in targets(model).items():
        block = ADAPTERS[kind](linear, name, switch, rank, generator)
        if init in INITS:
            try:
                block.start(*two_blocks(init, linear.weight, rank, moments[name] if INITS[init].calibrated else None))
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
        # Frozen and trained tensors are drawn on the CPU, in float32.
        modules[name] = block.to(linear.weight.device).train(linear.training)
    if isinstance(model, PreTrainedModel):
        model.get_input_embeddings().register_forward_pre_hook(switch.given)
    for name, block in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, block)
    return Adapter(model, modules, switch, detach)
