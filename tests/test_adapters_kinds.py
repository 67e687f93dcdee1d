"""What the gates leave open of the adapter kinds: their formulas by hand, what their blocks share, and their widths."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

from vgrout.adapters import ADAPTERS, attach, svd
from vgrout.adapters.base import BLOCKS, Detach, Switch
from vgrout.adapters.inits import INITS
from vgrout.arms.base import Bench
from vgrout.arms.monitors import GradientScore, HaarScore
from vgrout.config import Config, stream
from vgrout.lab.run import check
from vgrout.loop import rows_of_pairs
from vgrout.method.policy import Policy, stack
from vgrout.types import UserError
from vgrout.verify.evidence import gap
from vgrout.verify.method_gates import toy_rows
from vgrout.verify.toy import PAIRS, RANK, TOY, VARIANTS, displace, rig, tokenizer, toy_policy, toy_train


def test_configuration_names_what_there_is():
    hints = get_type_hints(Config)
    assert get_args(hints["init"]) == ("random", *INITS) == ADAPTERS["lora2r"].inits
    assert get_args(hints["detach"]) == get_args(Detach)


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "lora2r"])
def test_an_init_that_a_kind_does_not_have(kind):
    with pytest.raises(UserError, match=f"init = pissa: adapter {kind} has random"):
        check(Config(adapter=kind, init="pissa"))


# Formulas.


def one(kind: str) -> nn.Module:
    """A displaced module over a Linear [4, 6] with a bias."""
    torch.manual_seed(0)
    base = nn.Linear(6, 4)
    made = ADAPTERS[kind](base, "q_proj", Switch(), 2, torch.Generator().manual_seed(3))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if not name.startswith("base."):
                p.normal_()
    return made


def numbers(module: nn.Module) -> dict[str, np.ndarray]:
    own = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    return {name: value.detach().double().numpy() for name, value in own.items()}


def by_hand(kind: str, t: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """METHOD.md section 1, for x [i]."""
    y = t["base.weight"] @ x + t["base.bias"]
    if kind == "frozen_b":
        return y + t["B"] @ ((t["A_deployed"] + t["A_quarantine"]) @ x)
    if kind == "frozen_b_split":
        return y + t["B"] @ t["A_deployed"] @ x + t["B_quarantine"] @ t["A_quarantine"] @ x
    u, _, vh = np.linalg.svd(t["base.weight"], full_matrices=False)
    sign = np.sign((u * t["U"]).sum(0))  # an axis is defined up to the sign of both of its vectors
    assert np.allclose(u * sign, t["U"], atol=1e-5) and np.allclose(vh * sign[:, None], t["Vh"], atol=1e-5)
    if kind == "delta_s":
        return y + u @ ((vh @ x) * (t["S_deployed"] + t["S_quarantine"]))
    return y + u @ ((vh @ x) * t["S_deployed"]) + t["U2"] @ ((t["Vh2"] @ x) * t["S_quarantine"])


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "lora2r"])
def test_output_by_hand(kind):
    module, x = one(kind), torch.randn(2, 3, 6)
    y, t = module(x), numbers(module)
    for n in range(2):
        for k in range(3):
            assert np.allclose(y[n, k].detach().numpy(), by_hand(kind, t, x[n, k].double().numpy()), atol=1e-4)
    both = sum(module.delta(which) for which in BLOCKS)
    assert torch.allclose(x @ both.T + module.base(x), y, atol=1e-4)


def test_split_delta_s_has_orthonormal_coders():
    module = one("delta_s_split")
    assert torch.allclose(module.U2.T @ module.U2, torch.eye(4), atol=1e-5)
    assert torch.allclose(module.Vh2 @ module.Vh2.T, torch.eye(4), atol=1e-5)
    assert gap(module.U2, module.U) > 0.1 and gap(module.Vh2, module.Vh) > 0.1


def test_split_frozen_b_has_a_twin():
    a, b = (toy_policy(replace(TOY, adapter=kind)).adapter.tensors() for kind in ("frozen_b", "frozen_b_split"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {name.rsplit(".", 1)[-1] for name in b.keys() - a.keys()} == {"B_quarantine"}


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("kind", ["delta_s", "frozen_b"])
def test_shared_coders_give_both_blocks_one_gradient(kind, moved):
    """The gauge: before routing the two blocks cannot be told apart. Coders of their own end it."""

    def gradients(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        made = rig(moved=moved, adapter=name)
        found = [made.gradients(made.row_losses().sum(), which).values() for which in BLOCKS]
        assert all(bool(g.any()) for block in found for g in block)
        return list(zip(*found, strict=True))

    assert all(torch.equal(dep, quar) for dep, quar in gradients(kind))
    assert all(gap(dep, quar) > 1e-2 for dep, quar in gradients(f"{kind}_split"))


def test_random_init_is_the_same_draws_as_ever():
    adapter = toy_policy(TOY).adapter
    generator = torch.Generator().manual_seed(stream(0, "init"))
    for module in adapter.modules.values():
        o, i = module.base.weight.shape
        a0 = torch.randn(2 * RANK, i, generator=generator) * i**-0.5
        b0 = torch.randn(o, 2 * RANK, generator=generator) * (2 * RANK) ** -0.5
        assert torch.equal(torch.cat((module.A0_deployed, module.A0_quarantine)), a0)
        assert torch.equal(torch.cat((module.B0_deployed, module.B0_quarantine), dim=1), b0)


# Scores.


@pytest.mark.parametrize("kind", ["delta_s", "delta_s_split"])
def test_delta_s_is_scored_by_its_parameters_own_gradient(kind):
    policy, rows = toy_policy(replace(TOY, adapter=kind)), toy_rows(3)
    displace(policy.adapter)
    scored = policy.c_gradients(rows, "full")
    for i in range(3):
        row = rows.take(torch.tensor([i]))
        with policy.adapter.full():
            nll = -policy.logp(row).sum() / row.completion.sum()
            own = torch.autograd.grad(nll, policy.adapter.parameters("deployed"))
        for g, (m, width) in zip(own, enumerate(policy.adapter.widths.values()), strict=True):
            assert gap(scored[i, m, :width], g) < 1e-4 and not scored[i, m, width:].any()


def test_widths_differ_and_change_no_cosine():
    policy = toy_policy(replace(TOY, adapter="delta_s"))
    widths = list(policy.adapter.widths.values())
    assert widths == [min(m.base.weight.shape) for m in policy.adapter.modules.values()] and len(set(widths)) > 1
    bench = Bench(TOY, policy, *(rows_of_pairs(policy, PAIRS, side) for side in ("hack", "clean")))
    g = policy.c_gradients(toy_rows(5), "full")
    assert g.shape == (5, len(widths), max(widths))
    hack, clean = (policy.c_gradients(rows, "deployed").double().numpy() for rows in (bench.hack, bench.clean))
    for score in (GradientScore, HaarScore):
        direction = score(bench).extract()
        z = np.zeros(5)
        for m, k in enumerate(widths):
            v = (hack - clean)[:, m, :k].mean(0)
            if score is HaarScore:
                v = direction.v[m, :k].double().numpy()
                assert np.isclose(np.linalg.norm(v), 1, atol=1e-5) and not direction.v[m, k:].any()

            def cosines(rows, v=v, m=m, k=k):
                return rows[:, m, :k] @ v / np.linalg.norm(rows[:, m, :k], axis=1) / np.linalg.norm(v)

            pairs = cosines(np.concatenate((hack, clean)))
            z += (cosines(g.double().numpy()) - pairs.mean()) / pairs.std(ddof=1) / len(widths)
        assert np.allclose(direction.score(g)[0].numpy(), z, atol=1e-3)


# Paths.


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_rows_equal_rows_under_masks(variant):
    made = rig(rows=2, **VARIANTS[variant])
    policy = Policy(made.model, tokenizer(), made.adapter, 0.7, 8)
    rows = stack([[5, 6, 7], [8, 9], [5, 6, 7], [5, 6, 7]], [[11, 12], [13], [14, 15, 16], [21]], 0)
    m = torch.tensor([1.0, 1, 1, 0])
    with made.adapter.routed(m, torch.zeros(4)):
        assert made.adapter.switch.flow.rowwise
        masked = policy.logp(rows)
    with made.adapter.full():
        assert not made.adapter.switch.flow.rowwise and policy.packs
        full = policy.logp(rows)
    with made.adapter.deployed():
        deployed = policy.logp(rows)
    assert torch.allclose(masked[:3], full[:3], atol=1e-4) and torch.allclose(masked[3], deployed[3], atol=1e-4)
    assert not torch.allclose(full[3], deployed[3], atol=1e-3)
    for which in BLOCKS:
        a, b = (made.gradients(logp[:3].sum(), which) for logp in (masked, full))
        assert all(gap(a[name], b[name]) < 1e-3 for name in a)


@pytest.mark.parametrize("detach", get_args(Detach))
@pytest.mark.parametrize("variant", VARIANTS)
def test_training(variant, detach):
    start = toy_policy(replace(TOY, **VARIANTS[variant])).adapter
    policy, watcher = toy_train(replace(TOY, detach=detach, **VARIANTS[variant]))
    zones = {zone for decision in watcher.decisions for zone in decision.zones()}
    assert zones == {"keep", "absorb", "route"} and {r["skipped"] for r in watcher.records} == {None}
    for which in BLOCKS:
        pairs = zip(start.parameters(which), policy.adapter.parameters(which), strict=True)
        assert all(not torch.equal(a, b) for a, b in pairs)
    frozen = {key for key in start.tensors() if not key.endswith(BLOCKS) or "0_" in key or ".B_q" in key}
    assert all(torch.equal(start.tensors()[key], policy.adapter.tensors()[key]) for key in frozen)


def test_one_decomposition_per_weight(monkeypatch):
    calls, real = [], torch.linalg.svd
    monkeypatch.setattr(svd, "_KNOWN", {})
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    torch.manual_seed(0)
    weight = torch.randn(4, 6)
    u, s, vh = svd.svd(weight)
    assert torch.allclose(u * s @ vh, weight, atol=1e-5)
    assert svd.svd(weight.clone())[0] is u and len(calls) == 1
    svd.svd(weight + 1e-6)
    svd.svd(weight.view(6, 4))
    assert svd.svd(weight.double())[0].dtype is torch.float64 and svd.svd(weight.bfloat16())[0].dtype is torch.float32
    assert len(calls) == 5
    for _ in range(2):
        model = nn.Module()
        model.q_proj = nn.Linear(3, 2)
        nn.init.eye_(model.q_proj.weight)
        attach(model, "delta_s", 2, 0)
    assert len(calls) == 6
