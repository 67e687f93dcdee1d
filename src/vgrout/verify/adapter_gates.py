"""Gates of the adapter: two blocks that cannot see each other, and a model that is intact without them."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from vgrout.adapters import attach
from vgrout.types import UserError
from vgrout.verify.evidence import Evidence, gap, same, worst
from vgrout.verify.toy import RANK, TOY, Rig, displace, random_model, rig, toy_policy, toy_train, weights

ZONE_MASKS = {"keep": (0.0, 0.0), "absorb": (1.0, 0.0), "route": (1.0, 1.0)}


def masks(zones: list[str], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    m, d = zip(*(ZONE_MASKS[z] for z in zones), strict=True)
    return torch.tensor(m, dtype=dtype), torch.tensor(d, dtype=dtype)


@torch.no_grad()
def identity() -> Evidence:
    made = rig(moved=False)
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
    blocks = [float(m.block(torch.ones(1, 2, m.base.in_features), "deployed").abs().max()) for m in modules(made)]
    ok = all(torch.tensor(value) == 0 for value in [*seen.values(), *blocks])
    return Evidence(ok, f"largest difference to the base {max(seen.values()):g} in {len(seen)} states")


def modules(made: Rig):
    return made.adapter.modules.values()


def zeros() -> Evidence:
    made = rig(rows=3, double=True)
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
    with torch.no_grad():
        with made.adapter.deployed():
            deployed = made.logits()
        with made.adapter.full():
            full = made.logits()
    forward = torch.equal(mixed[0], deployed[0]) and torch.equal(mixed[1:], full[1:])
    tensors = len(made.adapter.named("deployed"))
    ok = forward and not torch.equal(full[0], deployed[0])
    for name, (entries, _, touched) in live.items():
        ok = ok and (entries == 0 if name in ("keep quarantine", "route deployed") else touched == tensors)
    text = ", ".join(f"{name} {entries}/{of}" for name, (entries, of, _) in live.items())
    return Evidence(ok, f"non-zero gradients: {text}; forward passes {'equal' if forward else 'DIFFER'}")


def mixture() -> Evidence:
    made = rig(rows=6, double=True)
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
    return Evidence(
        ok,
        f"relative difference: outputs {apart:.1e}, gradients {off['deployed']:.1e} deployed, "
        f"{off['quarantine']:.1e} quarantine",
    )


class OneBlock(nn.Module):
    """A Linear and one LoRA block, written down independently: W x + B (A x) - B0 (A0 x)."""

    def __init__(self, base: nn.Linear, tensors: dict[str, Tensor], name: str) -> None:
        super().__init__()
        self.base = base
        a0, b0 = tensors[f"{name}.A0_deployed"], tensors[f"{name}.B0_deployed"]
        a, b = a0 + tensors[f"{name}.dA_deployed"], b0 + tensors[f"{name}.dB_deployed"]
        self.factors = a, b, a0, b0

    def forward(self, x: Tensor) -> Tensor:
        a, b, a0, b0 = self.factors
        return self.base(x) + (x @ a.T) @ b.T - (x @ a0.T) @ b0.T


def ablation() -> Evidence:
    made = rig(moved=False)
    with torch.no_grad(), made.adapter.deployed():
        before = made.logits()
    with torch.no_grad():
        noop = torch.equal(before, made.logits())
    policy, _ = toy_train(TOY)
    tensors = weights(policy)
    plain = random_model()
    for name in policy.adapter.modules:
        parent, _, child = name.rpartition(".")
        holder = plain.get_submodule(parent)
        setattr(holder, child, OneBlock(getattr(holder, child), tensors, name))
    run = Rig(policy.model, policy.adapter, made.tokens)
    with torch.no_grad():
        want = plain(input_ids=made.tokens, use_cache=False).logits
        with policy.adapter.deployed():
            ablated = run.logits()
        with policy.adapter.full():
            full = run.logits()
        for module in policy.adapter.modules.values():  # what resetting A and B themselves to zero would do
            for key in ("A", "B"):
                module.get_parameter(f"d{key}_quarantine").copy_(-module.get_buffer(f"{key}0_quarantine"))
        with policy.adapter.full():
            zeroed = run.logits()
    off, live, wrong = gap(ablated, want), gap(full, want), gap(zeroed, want)
    ok = noop and off < 1e-5 and live > 1e-4 and wrong > 1e-2
    return Evidence(
        ok,
        f"no-op at init: {noop}; after {TOY.steps} steps, relative difference to a model without the quarantine: "
        f"ablated {off:.1e}, live {live:.1e}, A and B zeroed {wrong:.1e}",
    )


def reference() -> Evidence:
    policy, _ = toy_train(TOY)
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
                return Evidence(False, f"merged({state!r}) does not give the base weights back")
    ok = exact and max(off.values()) < 1e-5 and min(moved.values()) > 1e-4
    return Evidence(
        ok,
        f"reference equals the base bit for bit: {exact}; merged against unmerged {max(off.values()):.1e} "
        f"where training moved the logits by {min(moved.values()):.1e}; weights restored",
    )


def round_trip() -> Evidence:
    policy, _ = toy_train(TOY)
    want = weights(policy)
    meta = {"arm": "routeV", "step": 4}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        policy.adapter.save(path, meta)
        other = toy_policy(TOY)
        displace(other.adapter, seed=5)
        with torch.no_grad():
            for module in other.adapter.modules.values():
                for buffer in module.buffers(recurse=False):
                    buffer.zero_()
        back = other.adapter.load(path)
        exact = same(weights(other), want)
        refused = 0
        wider = attach(random_model(), "lora2r", RANK + 1, 0)
        fewer = copy.deepcopy(random_model())
        fewer.model.layers = fewer.model.layers[:1]
        for wrong in (wider, attach(fewer, "lora2r", RANK, 0)):
            untouched = {k: v.clone() for k, v in wrong.tensors().items()}
            try:
                wrong.load(path)
            except UserError:
                refused += same(wrong.tensors(), untouched)
    ok = exact and back == meta and refused == 2
    return Evidence(ok, f"{len(want)} tensors bit for bit: {exact}; {refused} of 2 wrong shapes refused untouched")
