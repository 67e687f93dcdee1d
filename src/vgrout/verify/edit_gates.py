"""Gates of the arms that edit gradients or seed the quarantine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from vgrout.arms import ARMS, Bench
from vgrout.arms.erase import Erase
from vgrout.arms.subspace import TrustedSubspace
from vgrout.loop import Training
from vgrout.method.axes import singular_axes
from vgrout.method.sft import sft
from vgrout.verify.evidence import Evidence, same
from vgrout.verify.toy import PAIRS, TOY, Letters, displace, toy_policy, weights

SFT = {"sft_steps": 20, "sft_lr": 5e-3}
SEEDED = ("seeded_absorb", "seeded_absorb_random", "seeded_absorb_clean")


def toy_bench(arm: str, *, moved: bool = False, **changes: object) -> Bench:
    cfg = replace(TOY, arm=arm, **changes)
    policy = toy_policy(cfg)
    if moved:
        displace(policy.adapter)
    return replace(Training(replace(cfg, arm="none"), policy, Letters(), PAIRS).arm.bench, cfg=cfg)


def drawn_gradients(bench: Bench) -> dict[str, np.ndarray]:
    """Give every deployed parameter a random gradient, and return them."""
    generator = torch.Generator().manual_seed(3)
    for _, p in bench.policy.adapter.named("deployed"):
        p.grad = torch.randn(p.shape, generator=generator)
    return {name: p.grad.numpy().astype(float) for name, p in bench.policy.adapter.named("deployed")}


def off(edited: dict[str, np.ndarray], bench: Bench) -> float:
    """The largest difference between the gradients and what they should be."""
    return max(float(np.abs(p.grad.numpy() - edited[name]).max()) for name, p in bench.policy.adapter.named("deployed"))


def erased() -> tuple[float, int]:
    """How far erase is from g - gate(<g, v>) v, v computed apart; and how many tensors one_sided left alone."""
    worst, honest = 0.0, 0
    gates = {"one_sided": lambda c: max(c, 0.0), "no_gate": lambda c: c, "reverse": lambda c: 2 * c}
    for gate, taken in gates.items():
        bench = toy_bench("erase", moved=True, erase_gate=gate)
        policy, arm = bench.policy, Erase(bench)
        arm.axes, _ = arm.draw()
        names, parameters = zip(*policy.adapter.named("deployed"), strict=True)
        with policy.adapter.deployed():
            total = policy.nll(bench.hack).mean() - policy.nll(bench.clean).mean()
        axes = (g.flatten().double().numpy() for g in torch.autograd.grad(total, parameters))
        v = {name: axis / np.linalg.norm(axis) for name, axis in zip(names, axes, strict=True)}
        g = drawn_gradients(bench)
        want = {name: x - (taken(float(x.ravel() @ v[name])) * v[name]).reshape(x.shape) for name, x in g.items()}
        arm.edit(policy.adapter)
        worst = max(worst, off(want, bench))
        if gate == "one_sided":
            honest = sum(bool((want[name] == g[name]).all()) for name in g)
    return worst, honest


def signed() -> bool:
    """The sign of a singular axis is that of most pairs, where the mean says otherwise."""
    return float(singular_axes(torch.tensor([[1.0, 0], [1, 0], [-9, 0]]), 1)[0, 0]) > 0.99


def trusted() -> tuple[float, bool]:
    """How far trusted_subspace is from numpy's U L U^T g, and whether its fine-tuning left the adapter as it was."""
    bench = toy_bench("trusted_subspace", moved=True, subspace_axes=2, **SFT)
    other = toy_bench("trusted_subspace", moved=True, **SFT)
    before, arm = weights(bench.policy), TrustedSubspace(bench)
    arm.begin()
    back = same(before, weights(bench.policy))
    betas = (bench.cfg.beta1, bench.cfg.beta2)
    sft(other.policy, other.clean, "deployed", steps=SFT["sft_steps"], lr=SFT["sft_lr"], betas=betas)
    g, want = drawn_gradients(bench), {}
    arm.edit(bench.policy.adapter)
    for name, x in g.items():
        module, _, key = name.rpartition(".")
        change = other.policy.adapter.modules[module].delta("deployed").detach().numpy().astype(float)
        u, s, vh = np.linalg.svd(change)
        held = np.diag(s[:2] / s[:2].sum())
        want[name] = u[:, :2] @ held @ u[:, :2].T @ x if key.startswith("dB") else x @ vh[:2].T @ held @ vh[:2]
    return off(want, bench), back


def edits() -> Evidence:
    wrong, honest = erased()
    held, back = trusted()
    axis = signed()
    ok = wrong < 1e-4 and held < 1e-3 and back and honest > 0 and axis
    return Evidence(
        ok,
        f"erase differs from numpy by {wrong:.1e}, {honest} tensors of an honest gradient as they were; majority sign: "
        f"{axis}; trusted_subspace differs by {held:.1e}, adapter back at its init: {back}",
    )


def hack_nll(bench: Bench) -> float:
    """Mean NLL in nats per token of the hack sides with the quarantine live."""
    with torch.no_grad():
        return float(bench.policy.nll(bench.hack).mean())


def seeds() -> Evidence:
    norms, gains, still = {}, {}, True
    for name in SEEDED:
        bench = toy_bench(name, **SFT)
        adapter = bench.policy.adapter
        trained = {key for key, _ in adapter.named("quarantine")}
        before = {key: t for key, t in weights(bench.policy).items() if key not in trained}
        start = hack_nll(bench)
        ARMS[name](bench).begin()
        still = still and all(torch.equal(t, before[key]) for key, t in weights(bench.policy).items() if key in before)
        gains[name] = start - hack_nll(bench)
        norms[name] = torch.stack([p.detach().norm() for p in adapter.parameters("quarantine")])
    hack, *twins = (norms[name] for name in SEEDED)
    apart = max(float((twin / hack - 1).abs().max()) for twin in twins)
    best, *others = (gains[name] for name in SEEDED)
    fell = " and ".join(f"{g:.2f}" for g in others)
    return Evidence(
        still and apart < 1e-3 and best > 0.3 and best > 2 * max(others),
        f"NLL of hack sides falls by {best:.2f} nats, by {fell} under its twins, whose norms differ by {apart:.0e}; "
        f"all but the quarantine as it was: {still}",
    )
