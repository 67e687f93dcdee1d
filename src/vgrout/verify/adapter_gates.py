"""Gates of the adapter: two blocks that cannot see each other, and a model that is intact without them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from vgrout.adapters import attach
from vgrout.adapters.base import BLOCKS, Detach
from vgrout.types import UserError
from vgrout.verify.evidence import Evidence, gap, same, worst
from vgrout.verify.toy import (
    RANK,
    SIZES,
    TOY,
    VARIANTS,
    Rig,
    random_model,
    rig,
    toy_policy,
    trained,
    weights,
)

ZONE_MASKS = {"keep": (0.0, 0.0), "absorb": (1.0, 0.0), "route": (1.0, 1.0)}


def masks(zones: list[str], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    m, d = zip(*(ZONE_MASKS[z] for z in zones), strict=True)
    return torch.tensor(m, dtype=dtype), torch.tensor(d, dtype=dtype)


def every(check: Callable[[str], tuple[bool, str]]) -> Evidence:
    """One check of every variant: the numbers of lora2r, or of the first that fails."""
    found = {name: check(name) for name in VARIANTS}
    wrong = [name for name, (ok, _) in found.items() if not ok]
    shown = wrong[0] if wrong else "lora2r"
    kinds = f"{len(wrong)} of {len(found)} kinds and inits wrong" if wrong else f"{len(found)} kinds and inits"
    return Evidence(not wrong, f"{kinds}; {shown}: {found[shown][1]}")


@torch.no_grad()
def _identity(variant: str) -> tuple[bool, str]:
    made = rig(moved=False, **VARIANTS[variant])
    base = random_model()(input_ids=made.tokens, use_cache=False).logits
    m, d = masks(["keep", "absorb", "route"] * 2, torch.float32)
    adapter, seen = made.adapter, {}
    for name, state in {
        "full": adapter.full(),
        "deployed": adapter.deployed(),
        "reference": adapter.reference(),
        "routed": adapter.routed(m, d),
        "merged full": adapter.merged("full"),
        "merged deployed": adapter.merged("deployed"),
    }.items():
        with state:
            seen[name] = float((made.logits() - base).abs().max())
    blocks = [
        float(module.block(torch.ones(1, 2, module.base.in_features), which).abs().max())
        for module in modules(made)
        for which in BLOCKS
    ]
    ok = all(torch.tensor(value) == 0 for value in [*seen.values(), *blocks])
    return ok, f"largest difference to the base {max(seen.values()):g} in {len(seen)} states"


def identity() -> Evidence:
    return every(_identity)


def modules(made: Rig):
    return made.adapter.modules.values()


def zeros() -> Evidence:
    """For both meanings of `detach`, in a batch of three zones and in one where all rows are routed."""

    def both(variant: str) -> tuple[bool, str]:
        (one, text), (other, more) = (_zeros(variant, detach) for detach in get_args(Detach))
        return one and other, text if one == other else f"{text}; {more}"

    return every(both)


def _zeros(variant: str, detach: Detach) -> tuple[bool, str]:
    made = rig(rows=3, double=True, detach=detach, **VARIANTS[variant])
    zones = ["keep", "absorb", "route"]
    with made.adapter.routed(*masks(zones)):
        losses = made.row_losses()
        mixed = made.logits().detach()
        live: dict[str, tuple[int, int, int]] = {}
        for zone, loss in zip(zones, losses, strict=True):
            for which in ("deployed", "quarantine"):
                found = made.gradients(loss, which).values()
                entries = sum(int((g != 0).sum()) for g in found)
                live[f"{zone} {which}"] = entries, sum(g.numel() for g in found), sum(bool(g.any()) for g in found)
    with made.adapter.routed(*masks(["route"] * 3)):
        total = made.row_losses().sum()
        alone = sum(int((g != 0).sum()) for g in made.gradients(total, "deployed").values())
        quarantined = all(bool(g.any()) for g in made.gradients(total, "quarantine").values())
    with torch.no_grad():
        with made.adapter.deployed():
            deployed = made.logits()
        with made.adapter.full():
            full = made.logits()
    forward = torch.equal(mixed[0], deployed[0]) and torch.equal(mixed[1:], full[1:])
    tensors = len(made.adapter.named("deployed"))
    ok = forward and not torch.equal(full[0], deployed[0]) and alone == 0 and quarantined
    for name, (entries, _, touched) in live.items():
        ok = ok and (entries == 0 if name in ("keep quarantine", "route deployed") else touched == tensors)
    text = ", ".join(f"{name} {entries}/{of}" for name, (entries, of, _) in live.items())
    text += f", deployed in a routed batch {alone}"
    return ok, f"non-zero gradients ({detach}): {text}; forward passes {'equal' if forward else 'DIFFER'}"


def detach() -> Evidence:
    """What reaches lower layers through a routed row: with `params` all of it, as in a pass without masks."""

    def seen(variant: str) -> tuple[bool, str]:
        gaps = {}
        for detach in get_args(Detach):
            made = rig(rows=2, double=True, detach=detach, **VARIANTS[variant])
            want = _by_hand(made)
            for batch, zones in (("mixed", ["keep", "route"]), ("routed", ["route", "route"])):
                with made.adapter.routed(*masks(zones)):
                    got = made.gradients(made.row_losses()[1], "quarantine")
                gaps[detach, batch] = worst(got, want)
        params = max(gap for (detach, _), gap in gaps.items() if detach == "params")
        output = min(gap for (detach, _), gap in gaps.items() if detach == "output")
        text = f"gradient of the quarantine against plain matrices: params {params:.1e}, output {output:.1e}"
        return params < 1e-9 and output > 1e-3, text

    return every(seen)


def _by_hand(made: Rig) -> dict[str, Tensor]:
    """The quarantine's gradients of row 1 with both blocks live and no mask anywhere: W x + D_deployed x + D x, with
    the chain rule from D to the parameters."""
    plain, adapter = random_model().double(), made.adapter
    dense = {name: module.delta("quarantine") for name, module in adapter.modules.items()}
    with torch.no_grad():
        for name, module in adapter.modules.items():
            plain.get_submodule(name).weight += module.delta("deployed")
    total = {f"{name}.weight": plain.get_submodule(name).weight.detach() + d for name, d in dense.items()}
    logits = functional_call(plain, total, kwargs={"input_ids": made.tokens, "use_cache": False}).logits
    weights = torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).view_as(logits[0])
    named = adapter.named("quarantine")
    found = torch.autograd.grad((logits[1] * weights).sum(), [p for _, p in named])
    return dict(zip((name for name, _ in named), found, strict=True))


def mixture() -> Evidence:
    return every(_mixture)


def _mixture(variant: str) -> tuple[bool, str]:
    made = rig(rows=6, double=True, **VARIANTS[variant])
    zones = ["keep", "absorb", "route", "route", "keep", "absorb"]
    m, d = masks(zones)
    with made.adapter.routed(m, d):
        logits = made.logits().detach()
        total = made.row_losses().sum()
        both = {w: made.gradients(total, w) for w in ("deployed", "quarantine")}
    solo = {w: {name: torch.zeros_like(p) for name, p in made.adapter.named(w)} for w in both}
    apart = 0.0
    for i in range(len(zones)):
        row = made.tokens[i : i + 1]
        with made.adapter.routed(m[i : i + 1], d[i : i + 1]):
            apart = max(apart, gap(made.logits(row).detach(), logits[i : i + 1]))
            loss = made.row_losses(row).sum()
            for which, sums in solo.items():
                for name, g in made.gradients(loss, which).items():
                    sums[name] += g
    off = {which: worst(both[which], solo[which]) for which in both}
    ok = apart < 1e-5 and max(off.values()) < 1e-5
    return ok, (
        f"relative difference: outputs {apart:.1e}, gradients {off['deployed']:.1e} deployed, "
        f"{off['quarantine']:.1e} quarantine"
    )


class OneBlock(nn.Module):
    """A Linear and one dense block: W x + D x."""

    def __init__(self, base: nn.Linear, dense: Tensor) -> None:
        super().__init__()
        self.base, self.dense = base, dense

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.dense.T


def deployed_block(kind: str, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
    """D [o, i] of a module's deployed block, written down independently, from its saved tensors."""
    if kind == "lora2r":
        a0, b0 = own["A0_deployed"], own["B0_deployed"]
        return (b0 + own["dB_deployed"]) @ (a0 + own["dA_deployed"]) - b0 @ a0
    if kind.startswith("delta_s"):
        u, _, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
        return torch.from_numpy((u * own["S_deployed"].double().numpy()) @ vh).float()
    return own["B"] @ own["A_deployed"]


def _ablation(variant: str) -> tuple[bool, str]:
    made = rig(moved=False, **VARIANTS[variant])
    with torch.no_grad(), made.adapter.deployed():
        before = made.logits()
    with torch.no_grad():
        noop = torch.equal(before, made.logits())
    policy, plain = trained(variant), random_model()
    tensors = weights(policy)
    for name, module in policy.adapter.modules.items():
        own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        parent, _, child = name.rpartition(".")
        dense = deployed_block(VARIANTS[variant].get("adapter", "lora2r"), module.base.weight, own)
        setattr(plain.get_submodule(parent), child, OneBlock(plain.get_submodule(name), dense))
    run = Rig(policy.model, policy.adapter, made.tokens)
    with torch.no_grad():
        want = plain(input_ids=made.tokens, use_cache=False).logits
        with policy.adapter.deployed():
            ablated = run.logits()
        with policy.adapter.full():
            full = run.logits()
    off, live = gap(ablated, want), gap(full, want)
    return noop and off < 1e-5 and live > 1e-4, (
        f"no-op at init: {noop}; after {TOY.steps} steps, relative difference to a model without the quarantine: "
        f"ablated {off:.1e}, live {live:.1e}"
    )


def ablation() -> Evidence:
    shown = every(_ablation)
    made = rig()
    with torch.no_grad():
        with made.adapter.deployed():
            want = made.logits()
        for module in modules(made):  # what resetting A and B themselves to zero would do
            for key in ("A", "B"):
                module.get_parameter(f"d{key}_quarantine").copy_(-module.get_buffer(f"{key}0_quarantine"))
        with made.adapter.full():
            wrong = gap(made.logits(), want)
    return Evidence(shown.ok and wrong > 1e-2, f"{shown.text}, A and B zeroed {wrong:.1e}")


def reference() -> Evidence:
    return every(_reference)


def _reference(variant: str) -> tuple[bool, str]:
    policy = trained(variant)
    adapter, tokens = policy.adapter, rig().tokens
    run, base = Rig(policy.model, adapter, tokens), random_model()
    before = {name: m.base.weight.clone() for name, m in adapter.modules.items()}
    with torch.no_grad():
        want = base(input_ids=tokens, use_cache=False).logits
        with adapter.reference():
            exact = torch.equal(run.logits(), want)
        off, moved = {}, {}
        for state in ("full", "deployed"):
            with adapter.state(state):
                unmerged = run.logits()
            with adapter.merged(state):
                off[state], moved[state] = gap(run.logits(), unmerged), gap(unmerged, want)
            if not same({n: m.base.weight for n, m in adapter.modules.items()}, before):
                return False, f"merged({state!r}) does not give the base weights back"
    ok = exact and max(off.values()) < 1e-5 and min(moved.values()) > 1e-4
    return ok, (
        f"reference equals the base bit for bit: {exact}; merged against unmerged {max(off.values()):.1e} "
        f"where training moved the logits by {min(moved.values()):.1e}; weights restored"
    )


def round_trip() -> Evidence:
    return every(_round_trip)


def _round_trip(variant: str) -> tuple[bool, str]:
    policy, tokens = trained(variant), rig().tokens
    want = weights(policy)
    meta = {"arm": "routeV", "step": 4}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        policy.adapter.save(path, meta)
        other = toy_policy(replace(TOY, seed_init=9, **VARIANTS[variant]))
        with torch.no_grad():
            for tensor in other.adapter.tensors().values():
                tensor.fill_(7)
        back = other.adapter.load(path)
        exact = same(weights(other), want)
        with torch.no_grad():
            runs = [Rig(p.model, p.adapter, tokens).logits() for p in (policy, other)]
        exact = exact and torch.equal(*runs)
        refused = 0
        kind = VARIANTS[variant].get("adapter", "lora2r")
        other_sizes = attach(random_model(replace(SIZES, hidden=12)), kind, RANK, 0)
        fewer = random_model()
        fewer.model.layers = fewer.model.layers[:1]
        for wrong in (other_sizes, attach(fewer, kind, RANK, 0)):
            untouched = {k: v.clone() for k, v in wrong.tensors().items()}
            try:
                wrong.load(path)
            except UserError:
                refused += same(wrong.tensors(), untouched)
    ok = exact and back == meta and refused == 2
    return ok, f"{len(want)} tensors and the logits bit for bit: {exact}; {refused} of 2 wrong shapes refused untouched"
