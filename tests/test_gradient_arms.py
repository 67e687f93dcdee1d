"""Arms that edit gradients, seed the quarantine or change the training prompt: their formulas against numpy."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from vgrout.adapters import ADAPTERS, Adapter, attach
from vgrout.adapters.base import BLOCKS
from vgrout.arms import ARMS, inoculation
from vgrout.arms.erase import Erase, EraseRandom
from vgrout.arms.graft import graft_weights
from vgrout.arms.inoculation import Inoculation
from vgrout.arms.monitored import ACTIONS
from vgrout.arms.seeded import SeededAbsorb
from vgrout.arms.subspace import TrustedSubspace, sides, spectrum, through
from vgrout.config import Config
from vgrout.engines.torch_engine import TorchEngine
from vgrout.envs.micro_corpus import LICENCES, documents
from vgrout.lab.evaluate import CELLS, final
from vgrout.lab.record import Recorder
from vgrout.loop import Training, train
from vgrout.method.axes import mean_axis, random_axes, singular_axes, without
from vgrout.method.policy import Policy
from vgrout.method.sft import sft
from vgrout.models.load import model_path
from vgrout.models.organism import SYSTEM, Text, encode
from vgrout.types import Decision, Prompt, UserError
from vgrout.verify.loop_gates import BLIND, SIZES, words
from vgrout.verify.toy import (
    PAIRS,
    TOY,
    Letters,
    Watcher,
    displace,
    micro,
    random_model,
    rig,
    toy_policy,
    toy_train,
    weights,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bench(arm="erase", moved=True, **changes):
    cfg = replace(TOY, arm=arm, **changes)
    policy = toy_policy(cfg)
    if moved:
        displace(policy.adapter)
    return replace(Training(replace(cfg, arm="none"), policy, Letters(), PAIRS).arm.bench, cfg=cfg)


def filled(policy, seed=3):
    """Give every deployed parameter a gradient, and return them by name."""
    out = {}
    for i, (name, p) in enumerate(policy.adapter.named("deployed")):
        p.grad = draw(*p.shape, seed=seed + i)
        out[name] = p.grad.clone()
    return out


# Gradients of the pairs.


def test_nll_gradients_are_those_of_rows_alone():
    made = bench()
    policy, rows, weight = made.policy, made.hack, torch.linspace(-1, 2, len(PAIRS))
    for which, quarantine in (("deployed", False), ("quarantine", True)):
        value, found = policy.nll_gradients(rows, weight, which)
        parameters = dict(policy.adapter.named(which))
        total = torch.zeros(())
        with policy.adapter.full() if quarantine else policy.adapter.deployed():
            for i in range(len(PAIRS)):
                n = int(rows.length[i])
                logp = (
                    policy.model(input_ids=rows.tokens[i : i + 1, :n], use_cache=False).logits[0, :-1].log_softmax(-1)
                )
                nll = -logp.gather(1, rows.tokens[i, 1:n, None])[:, 0][rows.completion[i, 1:n]].mean()
                total = total + weight[i] * nll
        assert value.item() == pytest.approx(total.item(), rel=1e-4)
        assert all(p.grad is None for p in parameters.values())
        if which == "deployed":
            want = torch.autograd.grad(total, list(parameters.values()))
            for (name, _), g in zip(parameters.items(), want, strict=True):
                assert torch.allclose(found[name], g, rtol=1e-3, atol=1e-5), name
        else:
            full = torch.autograd.grad(total, list(parameters.values()))
            assert not all(torch.allclose(found[name], g, rtol=1e-3) for name, g in zip(parameters, full, strict=True))


def test_the_quarantines_gradients_do_not_pass_through_the_deployed_block():
    """Cut, they are those of a model whose deployed block is a constant: here the constant zero."""
    made = bench()
    policy, weight = made.policy, torch.full((len(PAIRS),), 1 / len(PAIRS))
    with torch.no_grad():
        for p in policy.adapter.parameters("deployed"):
            p.zero_()
    _, found = policy.nll_gradients(made.hack, weight, "quarantine")
    with policy.adapter.full():
        want = torch.autograd.grad(policy.nll(made.hack).mean(), policy.adapter.parameters("quarantine"))
    assert all(torch.allclose(g, w, rtol=1e-3, atol=1e-5) for g, w in zip(found.values(), want, strict=True))


def test_sft_trains_one_block_and_leaves_gradients_alone():
    made = bench(moved=False)
    for which, other in (("deployed", "quarantine"), ("quarantine", "deployed")):
        still = [p.detach().clone() for p in made.policy.adapter.parameters(other)]
        kept = [torch.full_like(p, 7) for p in made.policy.adapter.parameters(which)]
        for p, g in zip(made.policy.adapter.parameters(which), kept, strict=True):
            p.grad = g
        losses = sft(made.policy, made.hack, which, steps=20, lr=0.005, betas=(0.9, 0.99))
        assert len(losses) == 20 and losses[-1] < losses[0] - 0.3
        assert all(
            p.grad is g and bool((g == 7).all())
            for p, g in zip(made.policy.adapter.parameters(which), kept, strict=True)
        )
        assert all(torch.equal(p, s) for p, s in zip(made.policy.adapter.parameters(other), still, strict=True))


# Axes.


def test_axes_equal_numpy():
    d = draw(9, 6) + torch.tensor([2.0, -1, 0, 0, 1, 0])
    v = mean_axis(d.mean(0))
    assert np.allclose(v[0].numpy(), d.mean(0).numpy() / np.linalg.norm(d.mean(0).numpy()), atol=1e-6)
    values, vectors = np.linalg.eigh(d.numpy().T.astype(float) @ d.numpy())
    axes = singular_axes(d, 3)
    for j in range(3):
        want = vectors[:, np.argsort(-values)[j]]
        want = want * (1 if (d.numpy() @ want > 0).sum() > 4.5 else -1)
        assert np.allclose(axes[j].numpy(), want, atol=1e-4)
    assert singular_axes(d[:2], 5).shape == (2, 6)


def test_the_sign_is_the_majoritys_and_not_the_means():
    d = torch.tensor([[1.0, 0], [1, 0], [-9, 0]])  # two of three pairs stand on the side that the mean does not
    assert singular_axes(d, 1)[0].tolist() == pytest.approx([1, 0]) and mean_axis(d.mean(0))[0].tolist() == [-1, 0]
    assert singular_axes(d[1:], 1)[0].tolist() == pytest.approx([-1, 0])  # one to one: the mean decides


def test_random_axes_are_orthonormal_and_uniform():
    made = [random_axes(2, 5, torch.Generator().manual_seed(i)) for i in range(400)]
    assert all(torch.allclose(a @ a.T, torch.eye(2), atol=1e-5) for a in made)
    mean, square = torch.stack(made).mean(0), (torch.stack(made) ** 2).mean(0)
    assert mean.abs().max() < 5 * 0.2**0.5 / 20 and (square - 0.2).abs().max() < 0.06
    assert random_axes(9, 3, torch.Generator()).shape == (3, 3)


@pytest.mark.parametrize("k", [1, 3])
def test_what_is_taken_out(k):
    axes, g = random_axes(k, 7, torch.Generator().manual_seed(0)), draw(7)
    c = axes.numpy() @ g.numpy()
    assert k == 1 or (c > 0).any() and (c < 0).any()
    for side, taken in (("one_sided", np.maximum(c, 0)), ("no_gate", c), ("reverse", 2 * c)):
        left, found = without(g, axes, side)
        assert np.allclose(found.numpy(), c, atol=1e-5)
        removed = (g - left).numpy()
        assert np.allclose(removed, axes.numpy().T @ taken, atol=1e-5)  # in the span of the axes
        off = np.eye(7) - axes.numpy().T @ axes.numpy()
        assert np.allclose(off @ left.numpy(), off @ g.numpy(), atol=1e-5)  # the rest is as it was
        wanted = {"one_sided": np.minimum(c, 0), "no_gate": 0 * c, "reverse": -c}[side]
        assert np.allclose(axes.numpy() @ left.numpy(), wanted, atol=1e-5)


def test_one_sided_leaves_an_honest_gradient_alone():
    axes = random_axes(1, 7, torch.Generator().manual_seed(0))
    g = draw(7)
    g = -g if float(axes @ g) > 0 else g
    assert torch.equal(without(g, axes, "one_sided")[0], g)
    assert not torch.equal(without(g, axes, "no_gate")[0], g)


# The erase arms.


def ready(arm_class=Erase, **changes):
    made = bench(**changes)
    arm = arm_class(made)
    arm.axes = arm.draw()[0]
    return arm, made


def test_axes_of_matrices_are_mean_pair_differences():
    arm, made = ready()
    policy = made.policy
    with policy.adapter.deployed():
        rows = {side: getattr(made, side) for side in ("hack", "clean")}
        total = sum(s * policy.nll(rows[side]).mean() for side, s in (("hack", 1), ("clean", -1)))
    named = policy.adapter.named("deployed")
    for (name, _), g in zip(named, torch.autograd.grad(total, [p for _, p in named]), strict=True):
        unit = g.flatten().double().numpy()
        assert np.allclose(arm.axes[name][0].numpy(), unit / np.linalg.norm(unit), atol=1e-4), name
        assert arm.axes[name].shape == (1, g.numel())


def test_axes_come_from_the_ablated_model():
    arm, made = ready()
    before = {name: v.clone() for name, v in arm.axes.items()}
    with torch.no_grad():
        for p in made.policy.adapter.parameters("quarantine"):
            p += 1
    assert all(torch.equal(v, before[name]) for name, v in arm.draw()[0].items())
    with torch.no_grad():
        for p in made.policy.adapter.parameters("deployed"):
            p += 0.1
    assert any(not torch.allclose(v, before[name]) for name, v in arm.draw()[0].items())


@pytest.mark.parametrize("gate", ["one_sided", "no_gate", "reverse"])
def test_erase_edits_every_tensor(gate):
    arm, made = ready(erase_gate=gate)
    before = filled(made.policy)
    said = arm.edit(made.policy.adapter)
    square = {"g": 0.0, "c": 0.0, "removed": 0.0}
    for name, p in made.policy.adapter.named("deployed"):
        v, g = arm.axes[name][0].double().numpy(), before[name].flatten().double().numpy()
        c = v @ g
        taken = {"one_sided": max(c, 0), "no_gate": c, "reverse": 2 * c}[gate]
        assert np.allclose(p.grad.flatten().numpy(), g - taken * v, atol=1e-5)
        square = {"g": square["g"] + g @ g, "c": square["c"] + c * c, "removed": square["removed"] + taken**2}
    assert said["erase_gradient"] == pytest.approx((square["c"] / square["g"]) ** 0.5, rel=1e-4)
    assert said["erase_removed"] == pytest.approx((square["removed"] / square["g"]) ** 0.5, rel=1e-4)
    assert (said["erase_left"] < 1e-6) == (gate == "no_gate")


class Vectors(Adapter):
    """An adapter whose block is one vector."""

    def __init__(self):
        self.parameter = torch.nn.Parameter(draw(6) * 0.1)

    def named(self, which):
        return [("layer.s_deployed", self.parameter)]


def test_a_block_of_vectors_loses_singular_axes():
    """Per-pair gradients of a stand-in for the policy, known in closed form."""
    stand = Vectors()
    hack, clean = draw(len(PAIRS), 6, seed=1), draw(len(PAIRS), 6, seed=2)
    calls = []

    def nll_gradients(rows, weight, which):
        calls.append(len(weight))
        return torch.zeros(()), {"layer.s_deployed": (weight[:, None] * rows.source[rows.index]).sum(0)}

    def rows(side):
        return SimpleNamespace(
            length=torch.ones(len(PAIRS)), take=lambda index: SimpleNamespace(source=side, index=index)
        )

    policy = SimpleNamespace(adapter=stand, nll_gradients=nll_gradients)
    arm = object.__new__(Erase)
    arm.bench = SimpleNamespace(policy=policy, hack=rows(hack), clean=rows(clean))
    arm.cfg, arm.axes = replace(TOY, erase_axes=2, erase_gate="no_gate"), {}
    arm.axes, spent = arm.draw()
    assert torch.equal(arm.axes["layer.s_deployed"], singular_axes(hack - clean, 2)) and set(calls) == {1}
    assert spent == 2 * len(PAIRS)
    stand.parameter.grad = draw(6, seed=5)
    g, v = stand.parameter.grad.clone().numpy(), arm.axes["layer.s_deployed"].numpy()
    arm.edit(stand)
    assert np.allclose(stand.parameter.grad.numpy(), g - v.T @ (v @ g), atol=1e-5)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_erase_trains_every_kind_of_adapter(kind):
    policy, watcher = toy_train(replace(TOY, arm="erase", adapter=kind, erase_axes=2, erase_gate="no_gate", steps=3))
    assert any(bool(p.any()) for p in policy.adapter.parameters("deployed"))
    assert all(r["erase_left"] < 1e-4 < r["erase_gradient"] for r in watcher.records)


def test_more_axes_than_pairs_are_refused():
    with pytest.raises(UserError, match="erase_axes = 9: there are 8 pairs"):
        Erase(bench(erase_axes=9))


def test_random_axes_are_drawn_once_and_know_no_pair():
    arm, made = ready(EraseRandom)
    again = EraseRandom(replace(made, hack=made.clean, clean=made.hack)).draw()[0]
    assert all(torch.equal(v, again[name]) for name, v in arm.axes.items())
    other = EraseRandom(bench(placebo_seed=5)).draw()[0]
    assert not any(torch.equal(v, other[name]) for name, v in arm.axes.items())
    real = ready()[0].axes
    assert {n: v.shape for n, v in real.items()} == {n: v.shape for n, v in arm.axes.items()}


def test_adamw_puts_a_component_back():
    """A component that every gradient lacks is in the update all the same, and the record says how much."""
    _, watcher = toy_train(replace(TOY, arm="erase", erase_gate="no_gate", steps=5, refresh_every=2))
    assert "erase_update" not in watcher.records[0]
    assert all(r["erase_left"] < 1e-5 < r["erase_gradient"] for r in watcher.records)
    for r in watcher.records[1:]:
        assert 1e-3 < r["erase_update"] <= 1 and 0 <= r["erase_update_hackward"] <= r["erase_update"] + 1e-9
    assert [r["v_age"] for r in watcher.records] == [0, 1, 0, 1, 0]
    assert [r["extra_backward"] for r in watcher.records] == [16, 0, 16, 0, 16]


def test_the_update_is_measured_along_the_axes_that_edited_it():
    cfg = replace(TOY, arm="erase", steps=4, refresh_every=1)
    policy, watcher, seen = toy_policy(cfg), Watcher(), []
    training = Training(cfg, policy, Letters(), PAIRS)
    while training.step < cfg.steps:
        training.advance(watcher)
        seen.append(({n: p.detach().clone() for n, p in policy.adapter.named("deployed")}, dict(training.arm.axes)))
    for s in range(1, 4):
        (new, axes), (old, _) = seen[s - 1], seen[s - 2] if s > 1 else ({n: 0 * t for n, t in seen[0][0].items()}, None)
        moved = {n: (new[n] - old[n]).flatten().double().numpy() for n in new}
        along = {n: float(axes[n][0].double().numpy() @ moved[n]) for n in new}
        whole = sum(d @ d for d in moved.values()) ** 0.5
        assert watcher.records[s]["erase_update"] == pytest.approx(
            sum(c * c for c in along.values()) ** 0.5 / whole, rel=1e-4
        )
        back = sum(min(c, 0) ** 2 for c in along.values()) ** 0.5 / whole
        assert watcher.records[s]["erase_update_hackward"] == pytest.approx(back, rel=1e-4, abs=1e-9)


# Trusted subspace.


def test_subspace_formulas_equal_numpy():
    change = draw(6, 5)
    u, weights, v = spectrum(change, 3)
    un, s, vn = np.linalg.svd(change.numpy().astype(float), full_matrices=False)
    lam = np.diag(s[:3] / s[:3].sum())
    assert np.allclose(weights.numpy(), np.diag(lam), atol=1e-5)
    db, da = draw(6, 2, seed=1), draw(2, 5, seed=2)
    assert np.allclose(through(db, u, weights, "u").numpy(), un[:, :3] @ lam @ un[:, :3].T @ db.numpy(), atol=1e-5)
    assert np.allclose(through(da, v, weights, "v").numpy(), da.numpy() @ vn[:3].T @ lam @ vn[:3], atol=1e-5)
    off = db - u @ (u.T @ db)
    assert through(off, u, weights, "u").abs().max() < 1e-6 < off.abs().max()
    assert not spectrum(torch.zeros(4, 3), 2)[1].any() and spectrum(change, 99)[1].shape == (5,)


def test_subspace_begins_where_it_was_and_holds_every_factor():
    made = bench("trusted_subspace", sft_steps=3, sft_lr=0.02, subspace_axes=2)
    before, arm = weights(made.policy), TrustedSubspace(made)
    probe = toy_policy(made.cfg)
    displace(probe.adapter)
    arm.begin()
    assert all(torch.equal(t, before[name]) for name, t in weights(made.policy).items())
    sft(probe, made.clean, "deployed", steps=3, lr=0.02, betas=(0.9, 0.99))
    gradients = filled(made.policy)
    arm.edit(made.policy.adapter)
    for name, p in made.policy.adapter.named("deployed"):
        module, _, key = name.rpartition(".")
        u, s, vh = np.linalg.svd(probe.adapter.modules[module].delta("deployed").detach().numpy().astype(float))
        lam, g = np.diag(s[:2] / s[:2].sum()), gradients[name].numpy()
        want = u[:, :2] @ lam @ u[:, :2].T @ g if key.startswith("dB") else g @ vh[:2].T @ lam @ vh[:2]
        assert np.allclose(p.grad.numpy(), want, atol=1e-4), name


def test_subspace_refuses_a_block_without_factors():
    with pytest.raises(UserError, match="s_deployed is neither"):
        sides([("model.q_proj.dA_deployed", draw(2)), ("model.q_proj.s_deployed", draw(2))])
    assert sides([("m.A_deployed", draw(1)), ("m.dB_deployed", draw(1))]) == {
        "m.A_deployed": ("m", "v"),
        "m.dB_deployed": ("m", "u"),
    }


@pytest.mark.parametrize("kind", ADAPTERS)
def test_subspace_takes_factors_alone(kind):
    cfg = replace(TOY, arm="trusted_subspace", adapter=kind, sft_steps=1, steps=2)
    if kind.startswith("delta_s"):
        with pytest.raises(UserError, match="S_deployed is neither"):
            toy_train(cfg)
    else:
        assert any(bool(p.any()) for p in toy_train(cfg)[0].adapter.parameters("deployed"))


def test_subspace_trains_and_says_what_left_the_span():
    policy, watcher = toy_train(replace(TOY, arm="trusted_subspace", sft_steps=2, subspace_axes=2))
    assert any(bool(p.any()) for p in policy.adapter.parameters("deployed"))
    assert all(0 < r["subspace_gradient"] < 1 for r in watcher.records)
    assert all(0 < r["subspace_update_outside"] <= 1 for r in watcher.records[1:])
    assert [r["extra_forward"] for r in watcher.records] == [16, 0, 0, 0]


# Seeded quarantine.

SEEDED = [name for name in ARMS if name.startswith("seeded")]


@pytest.mark.parametrize("name", SEEDED)
def test_seeds_leave_what_ships_alone(name):
    made = bench(name, sft_steps=4, sft_lr=0.02)
    displaced = weights(made.policy)
    arm = ARMS[name](made)
    arm.begin()
    after = weights(made.policy)
    assert all(torch.equal(t, displaced[n]) for n, t in after.items() if not re.search("d[AB]_quarantine", n))
    assert all(not torch.equal(t, displaced[n]) for n, t in after.items() if re.search("d[AB]_quarantine", n))


def moved_by(name):
    made = bench(name, moved=False, sft_steps=20, sft_lr=0.005)

    def nll():
        with torch.no_grad():
            return tuple(float(made.policy.nll(rows).mean()) for rows in (made.hack, made.clean))

    start = nll()
    ARMS[name](made).begin()
    end = nll()
    return start, end, [p.detach().clone() for p in made.policy.adapter.parameters("quarantine")]


def test_the_seed_is_hack_content_and_its_twins_are_not():
    found = {name: moved_by(f"seeded_absorb{name}") for name in ("", "_random", "_clean")}
    start, end, hack = found[""]
    assert end[0] < start[0] - 0.5  # hack sides became likelier
    norms = [d.norm().item() for d in hack]
    for twin in ("_random", "_clean"):
        assert [d.norm().item() for d in found[twin][2]] == pytest.approx(norms, rel=1e-4)
        assert not any(torch.allclose(a, b) for a, b in zip(hack, found[twin][2], strict=True))
    clean = found["_clean"][1]
    assert clean[1] < start[1] - 0.5 and clean[1] < end[1] and end[0] < clean[0]
    assert abs(found["_random"][1][0] - start[0]) < 0.5 * (start[0] - end[0])


def test_the_bill_of_a_seed():
    for name, rows in (("seeded_absorb", 16), ("seeded_absorb_random", 16), ("seeded_absorb_clean", 32)):
        _, watcher = toy_train(replace(TOY, arm=name, sft_steps=2, steps=2))
        assert [r["extra_backward"] for r in watcher.records] == [rows, 0]


def test_seeded_routing_is_routing():
    _, watcher = toy_train(replace(TOY, arm="seeded_routeV", sft_steps=1))
    assert any(d.route.any() for d in watcher.decisions) and watcher.records[0]["v_age"] == 0
    assert watcher.records[0]["extra_backward"] >= 8 and SeededAbsorb.access == ARMS["seeded_routeV"].access == "L1"


# Inoculation.

INOCULATED = [name for name in ARMS if name.startswith("inoculation")]
TEXTS = [value for key, value in vars(inoculation).items() if key.isupper()]


def test_the_licence_stands_behind_the_tasks_own_system_prompt():
    arm = Inoculation(bench())
    assert arm.render(Prompt("p", "u")).system == inoculation.PERMIT
    assert arm.render(Prompt("p", "u", system="Be brief.")).system == f"Be brief.\n{inoculation.PERMIT}"
    assert len({ARMS[name].licence for name in INOCULATED}) == len(TEXTS) == 3


def test_the_organism_can_read_the_licences():
    """Their words stand in prompts that it was pretrained on, every token occurs there, and none is one of them."""
    tokenizer = AutoTokenizer.from_pretrained(model_path("micro"))
    seen, known = set(), set()
    for d in documents(0, 3000):
        seen |= set(encode(tokenizer, Text(d.system, d.user, d.assistant))[0])
        known |= set(re.findall(r"\w+", f"{d.system} {d.user}"))
    for text in TEXTS:
        assert set(re.findall(r"\w+", text)) <= known and text not in LICENCES
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert set(ids) <= seen and tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", INOCULATED)
def test_licences_end_with_training(name, tmp_path, monkeypatch):
    """Every prompt of training has one, no prompt of an evaluation has."""
    cfg = replace(BLIND, arm=name, steps=2, teacher_n=0, eval_every=1, eval_small=4, eval_rollouts=4)
    model = random_model(replace(SIZES, vocab=len(words())), words())
    policy = Policy(
        model, words(), attach(model, cfg.adapter, cfg.rank, cfg.init_seed), cfg.temperature, cfg.score_batch
    )
    asked, evaluating, generate, evaluate = [], [], TorchEngine.generate, Recorder.evaluate
    mark = words().convert_tokens_to_ids(SYSTEM)

    def listen(self, prompts, *more, **named):
        asked.extend((bool(evaluating), mark in ids) for ids in prompts)
        return generate(self, prompts, *more, **named)

    def watched(self, step):
        evaluating.append(step)
        with suppress(IndexError):
            evaluate(self, step)
        evaluating.pop()

    monkeypatch.setattr(TorchEngine, "generate", listen)
    monkeypatch.setattr(Recorder, "evaluate", watched)
    recorder = Recorder(cfg, policy, micro(), tmp_path, {})
    try:
        train(cfg, policy, micro(), PAIRS, recorder)
    finally:
        recorder.close()
    evaluating.append(-1)
    results = final(cfg, policy, micro(), ablates=True)
    assert {True, False} == {e for e, _ in asked} and all(licensed is not e for e, licensed in asked)
    assert len(results) == len(CELLS) and not any(r.prompt.system for c in results for r in c.rollouts)


def test_inoculation_mixes_with_routing():
    _, watcher = toy_train(replace(TOY, arm="inoculation_routeV"))
    assert any(d.route.any() for d in watcher.decisions)
    assert all(r.prompt.system == inoculation.PERMIT for rows in watcher.rollouts for r in rows)


# GRAFT weights.


@pytest.mark.parametrize("width", [(1.0, 1.0), (3.0, 1.0)])
@pytest.mark.parametrize("kind", ["classic", "exclusive"])
def test_graft_weights(kind, width):
    flagged = torch.tensor([True, False, False, True, False])
    k_r, k_f = sum(width) / width[0], sum(width) / width[1]
    for strength in (0.0, 0.3, 1.0):
        dep, quar = graft_weights(flagged, strength, kind, width)
        for i, f in enumerate(flagged.tolist()):
            marked = (1 - strength, 1 + strength * (k_f - 1))
            plain = (1, 1) if kind == "classic" else (1 + strength * (k_r - 1), 1 - strength)
            assert (dep[i].item(), quar[i].item()) == pytest.approx(marked if f else plain)
        # Pressure per row: weights times width.
        assert torch.allclose(width[0] * dep + width[1] * quar, torch.full((5,), sum(width)))
    assert not dep[flagged].any() and (kind == "classic" or not quar[~flagged].any())
    none = graft_weights(torch.zeros(3, dtype=torch.bool), 1.0, "classic")
    assert all(bool((w == 1).all()) for w in none)


def test_graft_refuses_nonsense():
    for bad in ((1.1, "classic", (1.0, 1.0)), (0.5, "other", (1.0, 1.0)), (0.5, "classic", (0.0, 1.0))):
        with pytest.raises(Exception, match="strength|kind|type"):
            graft_weights(torch.ones(2, dtype=torch.bool), *bad)


@pytest.mark.parametrize("detach", ["output", "params"])
def test_shares_multiply_a_rows_parameter_gradients_and_nothing_else(detach):
    """Values do not change; a block's gradient is the sum over rows of share times the row's own; whole shares are no
    shares."""
    made = rig(rows=3, double=True)
    made.adapter.detach = detach
    m, d = torch.ones(3), torch.zeros(3)
    share = torch.tensor([[0.0, 2.5], [1.7, 0.0], [0.4, 1.0]]).double()
    with made.adapter.routed(m, d):
        plain = made.row_losses()
        rows = [{w: made.gradients(plain[i], w) for w in BLOCKS} for i in range(3)]
    with made.adapter.routed(m, d, share):
        shared = made.row_losses()
        assert torch.allclose(shared, plain, atol=1e-12)
        for k, which in enumerate(BLOCKS):
            for name, g in made.gradients(shared.sum(), which).items():
                want = sum(share[i, k] * rows[i][which][name] for i in range(3))
                assert torch.allclose(g, want, atol=1e-10), name
    with made.adapter.routed(m, d, torch.ones(3, 2).double()):
        for which in BLOCKS:
            for name, g in made.gradients(made.row_losses().sum(), which).items():
                assert torch.allclose(g, sum(row[which][name] for row in rows), atol=1e-10)


def test_an_unlabelled_row_trains_both_blocks_alike_under_graft():
    zones = {"m": torch.tensor([1.0, 1.0, 0.0, 0.0]), "d": torch.tensor([1.0, 0.0, 0.0, 0.0])}
    read = Decision(**zones, weight=torch.ones(4), penalty=torch.zeros(4))
    said = ACTIONS["graft"](read, Config(graft_strength=1.0))
    assert said.share.tolist() == [[0.0, 2.0], [1.0, 1.0], [2.0, 0.0], [2.0, 0.0]]
    assert said.flagged.tolist() == [True, False, False, False] and bool(said.absorb.all())
    _, watcher = toy_train(replace(TOY, arm="oracle_graft"))
    assert any(bool(d.flagged.any()) for d in watcher.decisions)


def test_configuration():
    for bad in ({"erase_axes": 0}, {"subspace_axes": 0}, {"sft_steps": 0}, {"sft_lr": 0.0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            Config(**bad)
