"""Inits of lora2r's factors against numpy: singular axes, axes on the pairs' inputs, and the pairs' own axis."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vgrout.adapters import attach, targets
from vgrout.adapters.inits import DAMPING, INITS, Moments, two_blocks
from vgrout.loop import adapted, encode_pairs
from vgrout.method.inputs import input_moments
from vgrout.types import UserError
from vgrout.verify.toy import PAIRS, RANK, TOY, random_model, tokenizer, toy_policy

SEEDED = {"signed_corda": 1, "signed_corda_reversed": 0}  # the block with the pairs' axis


def problem(o: int = 9, i: int = 7) -> tuple[torch.Tensor, Moments]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, i, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, i)
    weight = torch.randn(o, i, generator=generator)
    return weight, Moments(x.T @ x / 40, torch.randn(i, generator=generator, dtype=torch.float64))


def axes(init: str, weight: torch.Tensor, moments: Moments) -> list[np.ndarray]:
    """Rank-one matrices b_j a_j^T of a weight, largest first."""
    w, c = weight.double().numpy(), moments.second.numpy()
    if init == "pissa":
        u, s, vh = np.linalg.svd(w, full_matrices=False)
        return [s[j] * np.outer(u[:, j], vh[j]) for j in range(len(s))]
    c = c + DAMPING * np.trace(c) / len(c) * np.eye(len(c))
    u, s, vh = np.linalg.svd(w @ c, full_matrices=False)
    return [s[j] * np.outer(u[:, j], vh[j] @ np.linalg.inv(c)) for j in range(len(s))]


def expected(init: str, weight: torch.Tensor, moments: Moments, rank: int) -> list[list[np.ndarray]]:
    all_axes = axes(init, weight, moments)
    halves = [all_axes[0 : 2 * rank : 2], all_axes[1 : 2 * rank : 2]]
    if init in SEEDED:
        d = moments.difference.numpy() / np.linalg.norm(moments.difference.numpy())
        halves[1] = [weight.double().numpy() @ np.outer(d, d), *halves[1][:-1]]
        halves = halves if SEEDED[init] else halves[::-1]
    return halves


@pytest.mark.parametrize("init", INITS)
def test_axes_by_hand(init):
    weight, moments = problem()
    a0, b0 = two_blocks(init, weight, 3, moments)
    assert a0.shape == (6, 7) and b0.shape == (9, 6)
    for k, half in enumerate(expected(init, weight, moments, 3)):
        for j, want in enumerate(half):
            a, b = a0[3 * k + j].double(), b0[:, 3 * k + j].double()
            assert np.allclose(np.outer(b, a), want, atol=1e-5 * np.abs(want).max())
            assert float(a.norm()) == pytest.approx(float(b.norm()), rel=1e-5)
    seeded = {name: torch.outer(b0[:, 3 * k], a0[3 * k]) for k, name in enumerate(("deployed", "quarantine"))}
    d = moments.difference / moments.difference.norm()
    images = [bool(torch.allclose(m.double() @ d, weight.double() @ d, atol=1e-4)) for m in seeded.values()]
    assert images == [SEEDED.get(init) == k for k in (0, 1)]


@pytest.mark.parametrize("init", ["pissa", "corda"])
def test_all_axes_are_the_weight_and_the_first_are_the_best(init):
    """Eckart and Young 1936: no matrix of rank 2R is nearer to W, in the metric of the inputs for corda."""
    weight, moments = problem(8, 8)
    a0, b0 = two_blocks(init, weight, 4, moments)
    assert torch.allclose((b0 @ a0).double(), weight.double(), atol=1e-4)
    a0, b0 = two_blocks(init, weight, 2, moments)
    c = moments.second
    metric = torch.eye(8).double() if init == "pissa" else c + DAMPING * c.diagonal().mean() * torch.eye(8).double()
    left = ((weight.double() - b0.double() @ a0.double()) @ metric).norm()
    tail = np.linalg.svd((weight.double() @ metric).numpy(), compute_uv=False)[4:]
    assert float(left) == pytest.approx(float(np.linalg.norm(tail)), rel=1e-4)


def test_a_sign_is_no_control():
    """Reversed signs of an axis reverse gradients at init and nothing else."""
    torch.manual_seed(0)
    found = {}
    for signs in ((1, 1), (-1, -1), (-1, 1)):
        model = random_model()
        module = next(iter(attach(model, "lora2r", RANK, 0).modules.values()))
        i, o = module.base.in_features, module.base.out_features
        generator = torch.Generator().manual_seed(1)
        a0, b0 = torch.randn(2 * RANK, i, generator=generator), torch.randn(o, 2 * RANK, generator=generator)
        module.start(signs[0] * a0, signs[1] * b0)
        (module(torch.ones(1, 2, i)) ** 2).sum().backward()
        found[signs] = module.dA_quarantine.grad, module.dB_quarantine.grad
    dA, dB = found[1, 1]
    assert bool(dA.any()) and bool(dB.any())
    assert torch.equal(found[-1, -1][0], -dA) and torch.equal(found[-1, -1][1], -dB)
    assert torch.equal(found[-1, 1][0], dA) and torch.equal(found[-1, 1][1], -dB)


@torch.no_grad()
def test_moments_by_hand():
    model = random_model()
    hack, clean = (encode_pairs(tokenizer(), PAIRS, side) for side in ("hack", "clean"))
    found = input_moments(model, hack, clean, 3)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert list(found) == list(targets(model))
    name = "model.layers.1.mlp.down_proj"
    inputs: list[np.ndarray] = []
    targets(model)[name].register_forward_pre_hook(lambda module, args: inputs.append(args[0][0].double().numpy()))
    every, difference = [], []
    for i in range(len(PAIRS)):
        means = []
        for rows in (hack, clean):
            n = int(rows.length[i])
            model.model(input_ids=rows.tokens[i : i + 1, :n])
            every.append(inputs[-1])
            means.append(inputs[-1][rows.completion[i, :n].numpy()].mean(0))
        difference.append(means[0] - means[1])
    x = np.concatenate(every)
    assert np.allclose(found[name].second.numpy(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert np.allclose(found[name].difference.numpy(), np.mean(difference, axis=0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("init", INITS)
def test_the_policy_starts_from_it(init):
    model = random_model()
    sides = [encode_pairs(tokenizer(), PAIRS, side) for side in ("hack", "clean")]
    moments = input_moments(model, *sides, TOY.score_batch)
    for name, module in toy_policy(replace(TOY, init=init)).adapter.modules.items():
        a0, b0 = two_blocks(init, targets(model)[name].weight, RANK, moments[name])
        assert torch.equal(torch.cat((module.A0_deployed, module.A0_quarantine)), a0.float())
        assert torch.equal(torch.cat((module.B0_deployed, module.B0_quarantine), dim=1), b0.float())
        assert not any(bool(p.any()) for p in module.parameters(recurse=False))


def test_what_cannot_be_had():
    weight, moments = problem()
    with pytest.raises(UserError, match="rank = 4: .*pissa.* 3"):
        two_blocks("pissa", weight, 4, None)
    flat = torch.outer(torch.ones(9), torch.ones(7))
    with pytest.raises(UserError, match="rank = 2: .*fewer than 4 axes"):
        two_blocks("pissa", torch.zeros_like(flat), 2, None)
    same = replace(moments, difference=torch.zeros(7).double())
    with pytest.raises(UserError, match="the same mean input"):
        two_blocks("signed_corda", weight, 2, same)
    with pytest.raises(UserError, match="layers.0.self_attn.q_proj: rank = 30"):
        model = random_model()
        adapted(replace(TOY, init="pissa", rank=30), model, tokenizer(), PAIRS)
    assert type(model.model.layers[0].self_attn.q_proj) is torch.nn.Linear
