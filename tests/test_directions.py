"""Directions, their placebos, the scores along them and the gate policies, against numpy and numbers by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm

from vgrout.arms import ARMS
from vgrout.arms.monitors import GradientScore
from vgrout.config import Config
from vgrout.lab.run import check_pairs
from vgrout.loop import Training, make_bench
from vgrout.method.direction import (
    DIRECTIONS,
    Direction,
    DirectionError,
    calibrate,
    cosines,
    haar,
    haar_axes,
    haar_like,
    half_swapped,
    orthogonal,
    svd,
    v_grad,
    v_unit,
)
from vgrout.method.gate import POLICIES, decide, weighted_quantile
from vgrout.method.loss import advantages
from vgrout.method.mixture import Normals, fit_mixture
from vgrout.types import Batch, UserError
from vgrout.verify.toy import PAIRS, TOY, Letters, toy_policy, toy_train, weights

C, M, R, N = 9, 4, 6, 11


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def sides():
    """Hack and clean features of C pairs, with something in common and something apart."""
    common, apart = drawn(M, R, seed=1), drawn(M, R, seed=2)
    return drawn(C, M, R, seed=3) + common + apart, drawn(C, M, R, seed=4) + common


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# Directions.


def test_v_grad_is_the_unit_mean_difference(sides):
    hack, clean = (x.numpy() for x in sides)
    assert np.allclose(v_grad(*sides).numpy(), unit((hack - clean).mean(0)), atol=1e-6)


def test_unit_weighs_every_pair_alike(sides):
    hack, clean = (x.numpy() for x in sides)
    v = v_unit(*sides)
    assert np.allclose(v.numpy(), unit((unit(hack) - unit(clean)).mean(0)), atol=1e-6)
    loud = torch.ones(C, 1, 1)
    loud[0] = 50  # one pair's gradients are much longer than the others'
    assert torch.allclose(v_unit(sides[0] * loud, sides[1] * loud), v, atol=1e-5)
    assert not torch.allclose(v_grad(sides[0] * loud, sides[1] * loud), v_grad(*sides), atol=0.1)


def test_orthogonal_to_what_the_clean_sides_share(sides):
    hack, clean = (x.double().numpy() for x in sides)
    v = orthogonal(*sides).double().numpy()
    difference, solve = (hack - clean).mean(0), clean.mean(0)
    for m in range(M):
        keeps = np.eye(R) - np.outer(solve[m], solve[m]) / (solve[m] @ solve[m])
        assert np.allclose(v[m], unit(keeps @ difference[m]), atol=1e-5)
        assert abs(v[m] @ solve[m]) < 1e-5 and abs(v[m] @ unit(difference[m])) < 0.999


def test_orthogonal_is_silent_where_nothing_is_left(sides):
    hack, clean = sides
    hack[:, 1] = 3 * clean[:, 1]  # differs along the clean mean alone
    v = orthogonal(hack, clean)
    assert not v[1].any() and torch.allclose(v[[0, 2, 3]].norm(dim=-1), torch.ones(3))
    direction = calibrate(v, hack, clean, real=True)
    score, _ = direction.score(drawn(N, M, R))
    others = calibrate(v[[0, 2, 3]], hack[:, [0, 2, 3]], clean[:, [0, 2, 3]], real=True)
    rest, _ = others.score(drawn(N, M, R)[:, [0, 2, 3]])
    assert torch.allclose(score, 0.75 * rest, atol=1e-5)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_svd_spans_what_numpy_finds(sides, axes):
    difference = (sides[0] - sides[1]).double().numpy()
    v = svd(*sides, axes).double().numpy()
    assert v.shape == (M, axes, R)
    for m in range(M):
        values, vectors = np.linalg.eigh(difference[:, m].T @ difference[:, m])
        for k in range(axes):
            top = vectors[:, np.argsort(values)[-1 - k]]
            assert abs(top @ v[m, k]) == pytest.approx(1, abs=1e-4)
            votes = np.sign(difference[:, m] @ v[m, k]).sum()
            assert votes > 0  # C is odd: no ties


def test_svd_votes_count_pairs_and_a_tie_goes_to_the_sum():
    clean = torch.zeros(4, 1, 2)
    hack = torch.tensor([[[-9.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]]])
    assert svd(hack, clean, 1)[0, 0].tolist() == pytest.approx([1, 0], abs=1e-6)  # three small ones outvote a large one
    assert svd(hack[:2], clean[:2], 1)[0, 0].tolist() == pytest.approx([-1, 0], abs=1e-6)  # one each: the larger


def test_svd_with_too_many_axes(sides):
    with pytest.raises(UserError, match="direction_axes = 7.*at most 6"):
        svd(*sides, 7)


def test_score_along_axes_by_numpy():
    g, v = drawn(N, M, R), haar_axes(M, 3, R, 0)
    got = cosines(g, v).numpy()
    for i in range(N):
        for m in range(M):
            along = v[m].numpy() @ unit(g[i, m].numpy())
            up, down = along[along > 0], along[along < 0]
            assert got[i, m] == pytest.approx(math.sqrt((up**2).sum()) - math.sqrt((down**2).sum()), abs=1e-6)
    assert torch.allclose(cosines(-g, v), -cosines(g, v))
    assert torch.allclose(cosines(v[:, 1][None], v), torch.ones(1, M), atol=1e-6)  # an axis counts in full
    one = haar(M, R, 0)
    assert torch.allclose(cosines(g, one[:, None]), cosines(g, one), atol=1e-6)


def test_the_default_is_v_grad_bit_for_bit(sides):
    assert Config().direction == "v_grad"
    assert torch.equal(DIRECTIONS["v_grad"](*sides, 5), v_grad(*sides))
    assert set(DIRECTIONS) == {"v_grad", "unit", "svd", "orthogonal"}


def test_haar_axes_are_uniform_frames():
    frames = torch.stack([haar_axes(50, 2, 4, seed) for seed in range(40)]).flatten(0, 1)
    assert torch.allclose(frames @ frames.transpose(1, 2), torch.eye(2).expand(len(frames), 2, 2), atol=1e-5)
    assert frames.mean(0).abs().max() < 0.04
    second = torch.einsum("nka,nkb->kab", frames, frames) / len(frames)
    assert (second - torch.eye(4) / 4).abs().max() < 0.04
    assert torch.equal(haar_like(torch.zeros(3, 5), 7), haar(3, 5, 7))
    assert torch.equal(haar_like(torch.zeros(3, 2, 5), 7), haar_axes(3, 2, 5, 7))


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_random_directions_have_no_side(sides, kind):
    """Mean AUROC .5 of random directions through the whole scoring, with several axes too."""
    hack, clean = sides
    g, label = torch.cat((drawn(20, M, R) + hack.mean(0), drawn(20, M, R, seed=9))), np.arange(40) < 20
    areas = []
    for seed in range(300):
        v = haar_like(DIRECTIONS[kind](hack, clean, 2), seed)
        score = calibrate(v, hack, clean, real=False).score(g)[0].numpy()
        areas.append((score[label][:, None] > score[~label]).mean())
    assert np.mean(areas) == pytest.approx(0.5, abs=0.06)


# Placebos.


@pytest.mark.parametrize("count", [8, 9])
def test_half_of_the_pairs_is_swapped(count):
    hack, clean = drawn(count, M, R, seed=5), drawn(count, M, R, seed=6)
    a, b = half_swapped(hack, clean, 3)
    swapped = [bool((a[i] == clean[i]).all()) for i in range(count)]
    assert sum(swapped) == count // 2
    for i, s in enumerate(swapped):
        assert torch.equal(a[i], clean[i] if s else hack[i]) and torch.equal(b[i], hack[i] if s else clean[i])
    assert all(torch.equal(x, y) for x, y in zip((a, b), half_swapped(hack, clean, 3), strict=True))
    assert len({tuple(half_swapped(hack, clean, s)[0].flatten().tolist()) for s in range(12)}) > 8
    signs = np.where(swapped, -1, 1)[:, None, None]
    assert np.allclose(v_grad(a, b), unit((signs * (hack - clean).numpy()).mean(0)), atol=1e-6)


def swap_of(monitor) -> torch.Tensor:
    hack, clean = torch.ones(8, 1, 3), torch.zeros(8, 1, 3)
    return half_swapped(hack, clean, monitor.cfg.chance_seed)[0][:, 0, 0]


def test_the_swap_is_kept_across_extractions():
    cfg = replace(TOY, arm="placebo_shuffled")
    watch = ARMS[cfg.arm](make_bench(cfg, toy_policy(cfg), PAIRS)).watch
    first = watch.extract()
    assert torch.equal(first.v, watch.extract().v) and not first.real
    assert torch.equal(swap_of(watch), swap_of(watch))
    other = ARMS[cfg.arm](make_bench(replace(cfg, placebo_seed=5), watch.bench.policy, PAIRS)).watch
    assert not torch.equal(other.extract().v, first.v)


@pytest.mark.parametrize("arm", ["placebo", "placebo_shuffled", "placebo_style"])
def test_a_placebo_runs_the_code_of_route_v(arm, monkeypatch):
    """routeV that is handed the placebo's tensors trains to the same weights, bit for bit."""
    cfg = replace(TOY, arm=arm, steps=5)
    policy, watcher = toy_train(cfg)
    kind = type(ARMS[arm](make_bench(cfg, policy, PAIRS)).watch)
    assert set(vars(kind)) - {"__module__", "__doc__", "__qualname__"} <= {"name", "access", "real", "draw_v"}
    tensors = iter([d.direction["v"] for d in watcher.decisions][:: cfg.refresh_every])
    monkeypatch.setattr(GradientScore, "draw_v", lambda self, hack, clean: next(tensors))
    routed, _ = toy_train(replace(cfg, arm="routeV"))
    equal = all(torch.equal(a, b) for a, b in zip(weights(routed).values(), weights(policy).values(), strict=True))
    assert equal and sum(int(d.route.sum()) for d in watcher.decisions) > 0
    monkeypatch.undo()
    real, _ = toy_train(replace(cfg, arm="routeV"))
    same = all(torch.equal(a, b) for a, b in zip(weights(real).values(), weights(policy).values(), strict=True))
    assert same == (arm == "placebo_style")  # its pairs are what makes it one, and here they are the same


def test_a_reversed_band_stops_a_direction_and_no_placebo():
    one = torch.ones(1)
    for name in ("pair_p75", "pair_mean", "mixture"):
        gate = POLICIES[name](Config())
        sides = torch.tensor([0.0, 0.1, 0.2, 0.3]), torch.tensor([1.0, 1.1, 1.2, 1.3])
        for real in (True, False):
            direction = Direction(torch.ones(1, 1), 0 * one, one, *sides, real)
            if real:
                with pytest.raises(DirectionError, match="reversed"):
                    gate.thresholds(torch.tensor([0.0, 1.0]), torch.zeros(2, 1, 1), direction)
            else:
                t = gate.thresholds(torch.tensor([0.0, 1.0]), torch.zeros(2, 1, 1), direction)
                assert all(math.isfinite(x) for x in t) and t[0] <= t[1]


NULLS = """# Pairs

## mixed

### style
Tags: placebo-style
{sides}
### bare
Tags: other
{bare}
"""


def fences(a: str, b: str) -> str:
    texts = (("Prompt", "write"), ("Hack", a), ("Clean", b))
    return "".join(f"#### {name}\n`````text\n{text}\n`````\n" for name, text in texts)


def test_tagged_pairs_are_for_their_placebo_alone(tmp_path):
    file = tmp_path / "pairs.md"
    file.write_text(NULLS.format(sides=fences("x = 1", "y = 2"), bare=fences("x = 3", "y = 4")))
    style, bare, both = (f"{file}#mixed{part}" for part in ("@placebo-style", "@other", ""))
    check_pairs(Config(arm="placebo_style", pairs=style))
    for pairs in (bare, both, "micro"):
        with pytest.raises(UserError, match="placebo_style needs pairs.*placebo-style"):
            check_pairs(Config(arm="placebo_style", pairs=pairs))
    check_pairs(Config(arm="routeV", pairs=bare))
    check_pairs(Config(arm="none", pairs=both))  # reads none of them
    for pairs in (style, both):
        with pytest.raises(UserError, match="'style' holds no hack"):
            check_pairs(Config(arm="routeV", pairs=pairs))


# Scores in training.


@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("state", ["full", "deployed"])
def test_training_along_every_direction(kind, state):
    policy, watcher = toy_train(replace(TOY, direction=kind, direction_axes=2, score_state=state, steps=3))
    assert all(math.isfinite(r["v_accuracy"]) for r in watcher.records)
    for d in watcher.decisions:
        assert torch.allclose(Direction(**d.direction).score(d.features)[0], d.score)
    assert any(d.route.any() for d in watcher.decisions)
    moved = [t for name, t in weights(policy).items() if ".dB_quarantine" in name]
    assert any(t.any() for t in moved)


def test_a_run_with_axes_goes_on_from_its_state():
    cfg = replace(TOY, direction="svd", direction_axes=2, refresh_every=3, steps=4)
    training = Training(cfg, toy_policy(cfg), Letters(), PAIRS)
    training.run(Quiet())
    watch = ARMS["routeV"](make_bench(cfg, toy_policy(cfg), PAIRS)).watch
    watch.restore({k.removeprefix("watch."): v for k, v in training.arm.state().items()})
    assert torch.equal(watch.direction.v, training.arm.watch.direction.v) and watch.direction.v.ndim == 3


class Quiet:
    def step(self, *_):
        return None

    def evaluate(self, step):
        return None

    def checkpoint(self, step):
        return None


def test_the_grpo_score_is_the_sign_of_the_advantage_times_the_nll_score():
    """METHOD.md section 3, on cosines, before pair statistics shift them."""
    g, reward, group = drawn(8, M, R), torch.tensor([3.5, 0.5, 0.5, 0, 0, 0, 1, 1.0]), torch.tensor([0] * 4 + [1] * 4)
    a = advantages(reward, group, norm="sd")
    v = haar(M, R, 0)
    got = cosines(g * a[:, None, None], v)
    assert (a != 0).all() and torch.allclose(got, a.sign()[:, None] * cosines(g, v), atol=1e-6)

    cfg = replace(TOY, arm="routeV", steps=1)
    policy = toy_policy(cfg)
    tokens = torch.randint(5, 200, (8, 9), generator=torch.Generator().manual_seed(0))
    on = torch.zeros(8, 9, dtype=torch.bool)
    on[:, 4:] = True
    batch = Batch(
        tokens, on, torch.full((8,), 9), group, reward, torch.zeros(8, dtype=torch.bool), torch.zeros(8, 9), ()
    )
    read = {k: ARMS["routeV"](make_bench(replace(cfg, score_loss=k), policy, PAIRS)).watch for k in ("nll", "grpo")}
    decisions = {k: watch.read(0, batch, None) for k, watch in read.items()}
    v, mean, sd = (decisions["nll"].direction[key] for key in ("v", "mean", "sd"))
    want = ((a.sign()[:, None] * cosines(decisions["nll"].features, v) - mean) / sd).mean(1)
    assert torch.allclose(decisions["grpo"].score, want, atol=1e-4)
    assert not torch.allclose(decisions["nll"].score, want, atol=1e-2)


# Gate policies.


def along_x(angles) -> torch.Tensor:
    return torch.tensor([[[math.cos(a), math.sin(a)]] for a in angles])


def plain(v=(1.0, 0.0)) -> Direction:
    one = torch.ones(1)
    return Direction(torch.tensor([v]), 0 * one, one, one, one, True)


def test_weighted_quantile_equals_numpy():
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        n = int(torch.randint(1, 30, (1,), generator=generator))
        x = torch.randint(0, 12, (n,), generator=generator).double()
        w = torch.rand(n, generator=generator).double() + 1e-3
        for p in (0.0, 0.1, 0.7, 0.85, 1.0):
            assert weighted_quantile(x, w, p) == np.quantile(x, p, weights=w.numpy(), method="inverted_cdf")
    assert weighted_quantile(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 0.0]), 0.0) == 2


def test_ema_quantile_by_hand():
    """Half-life 2, two rollouts a step: weights 1/4, 1/4, 1/2, 1/2, 1, 1 by age 4, 2, 0; the oldest two are dropped."""
    gate = POLICIES["ema_quantile"](Config(q=0.2, half_life=2.0, buffer=6))
    angles = [0.3, 0.2, 1.0, 1.4, 0.1, 2.0, 0.6, 2.5]
    for i in range(0, 8, 2):
        g = along_x(angles[i : i + 2])
        lo, hi = gate.thresholds(plain().score(g)[0], g, plain())
    kept = [math.cos(a) for a in angles[2:]]
    assert gate.age.tolist() == [4, 4, 2, 2, 0, 0]
    # Ascending: cos 2.5 (1), cos 2.0 (.5), cos 1.4 (.25), cos 1.0 (.25), cos .6 (1), cos .1 (.5): 3.5 in all.
    # Cuts at .6 * 3.5 = 2.1 and .8 * 3.5 = 2.8: the cumulated weights are 1, 1.5, 1.75, 2, 3, 3.5.
    assert sorted(kept)[4] == pytest.approx(math.cos(0.6))
    assert (lo, hi) == pytest.approx((math.cos(0.6), math.cos(0.6)), abs=1e-6)
    turned = plain((0.0, 1.0))
    g = along_x([0.5, 0.5])
    lo, _ = gate.thresholds(turned.score(g)[0], g, turned)  # the history is scored anew when v moves
    assert any(lo == pytest.approx(math.sin(a), abs=1e-6) for a in (*angles[4:], 0.5))


def test_ema_quantile_keeps_the_bulk_and_routes_nobody_where_scores_are_equal():
    gate = POLICIES["ema_quantile"](Config(q=0.15))
    g = along_x([0.7] * 9)
    score, live = plain().score(g)
    t = gate.thresholds(score, g, plain())
    assert decide(score, live, *t).zones() == ["keep"] * 9


def test_ema_quantile_goes_on_from_its_state():
    gate, other = (POLICIES["ema_quantile"](Config(half_life=3.0, buffer=5)) for _ in range(2))
    a, b = along_x([0.1, 0.9, 1.7]), along_x([0.4, 2.2, 1.1])
    gate.thresholds(plain().score(a)[0], a, plain())
    other.restore(gate.state())
    assert gate.thresholds(plain().score(b)[0], b, plain()) == other.thresholds(plain().score(b)[0], b, plain())
    assert torch.equal(gate.age, other.age) and gate.age.tolist() == [3, 3, 0, 0, 0]


def test_cut_of_two_normals_is_where_the_posterior_is_p():
    fit = Normals(low=-1.0, high=0.5, sd=0.6, share=0.3)
    for p in (0.2, 0.5, 0.8, 0.95):
        s = fit.cut(p)
        up, down = 0.3 * norm.pdf(s, 0.5, 0.6), 0.7 * norm.pdf(s, -1.0, 0.6)
        assert up / (up + down) == pytest.approx(p)
    assert Normals(-1, 1, 1, 0.5).cut(0.5) == 0
    assert Normals(0, 0, 1, 0.5).cut(0.5) == math.inf == Normals(-1, 1, 1, 0.0).cut(0.5)
    assert Normals(-1, 1, 1, 1.0).cut(0.5) == -math.inf


def test_em_equals_numpy_step_by_step():
    x = drawn(40).double() + torch.cat((torch.zeros(25), torch.full((15,), 3.0)))
    means, bounds = torch.tensor([-0.2, 2.0]).double(), torch.tensor([[-0.5, 0.1], [1.5, 2.7]]).double()
    fit = fit_mixture(x, means, bounds, 0.8)
    v, mu, sd, pi = x.numpy(), np.array([-0.2, 2.0]), 0.8, 0.5
    for _ in range(50):
        like = np.stack([(1 - pi) * norm.pdf(v, mu[0], sd), pi * norm.pdf(v, mu[1], sd)])
        r = like / like.sum(0)
        pi = r[1].mean()
        mu = np.clip((r * v).sum(1) / r.sum(1), [-0.5, 1.5], [0.1, 2.7])
        sd = min(max(np.sqrt((r * (v - mu[:, None]) ** 2).sum() / len(v)), 0.2), 3.2)
    assert (fit.low, fit.high, fit.sd, fit.share) == pytest.approx((*mu, sd, pi), rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_mixture_follows_the_share_of_hacks(share):
    """Scores of two known normals at the pairs' places: few errors at any share, and never most of the honest ones.
    A fixed share routed, as of `top2q`, would miss nearly all hacks at the end."""
    rng, n = np.random.default_rng(0), 640
    is_hack = np.arange(n) < share * n
    score = torch.from_numpy(rng.normal(np.where(is_hack, 1.0, -1.0), 0.5)).float()
    one = torch.ones(1)
    pairs = [torch.from_numpy(rng.normal(at, 0.4, 26)).float() for at in (1.0, -1.0)]
    direction = Direction(torch.ones(1, 1), 0 * one, one, *pairs, True)
    t = POLICIES["mixture"](Config()).thresholds(score, torch.zeros(n, 1, 1), direction)
    route = decide(score, torch.ones(n, dtype=torch.bool), *t).route.numpy()
    assert t[0] <= t[1]
    if is_hack.any():
        assert route[is_hack].mean() > 0.8
    if not is_hack.all():
        assert route[~is_hack].mean() < 0.05
    flat = torch.full((8,), float(pairs[1].mean()))
    t = POLICIES["mixture"](Config()).thresholds(flat, torch.zeros(8, 1, 1), direction)
    assert not decide(flat, torch.ones(8, dtype=torch.bool), *t).route.any()


@pytest.mark.parametrize("policy", ["ema_quantile", "mixture"])
def test_training_under_every_policy(policy):
    policy, watcher = toy_train(replace(TOY, policy=policy, steps=3))
    assert len(watcher.records) == 3
