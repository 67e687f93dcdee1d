"""Arms that read or edit activations: every formula against an independent computation."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vgrout.adapters import attach
from vgrout.arms import ARMS
from vgrout.arms.advantage import modified, standing
from vgrout.arms.monitors import ActivationScore
from vgrout.arms.steering import without
from vgrout.config import Config
from vgrout.envs.grade import Grader
from vgrout.envs.micro import BUCKETS, LIVE, problems
from vgrout.envs.micro_env import composition
from vgrout.envs.micro_probe import examples
from vgrout.lab.given import probe_of
from vgrout.lab.measure import f_beta
from vgrout.lab.probe import best_cut, confirmed, fit, fit_logistic
from vgrout.lab.run import check, make_policy, workshop
from vgrout.loop import Training, collate, generate, make_bench, plan_step
from vgrout.method.direction import DirectionError
from vgrout.method.linear_probe import LinearProbe, load_probe
from vgrout.method.policy import Policy, Rows, pack, stack
from vgrout.method.residual import POOLS, band, decoder_layers, edited, prompts_of, residuals
from vgrout.models.load import load_model, weights_digest
from vgrout.types import UserError
from vgrout.verify.activation_gates import Hooks
from vgrout.verify.method_gates import toy_rows
from vgrout.verify.toy import (
    PAIRS,
    SIZES,
    TOY,
    Letters,
    displace,
    random_model,
    tokenizer,
    toy_policy,
    toy_probe,
    toy_train,
)

RESIDUAL = ("adv_mod", "adv_mod_haar", "suppress", "steer")
AFTER = replace(TOY, teacher_off_step=0)


def deep_policy(layers: int = 4) -> Policy:
    model = random_model(replace(SIZES, layers=layers))
    adapter = attach(model, "lora2r", 3, 0)
    displace(adapter, scale=0.05)
    return Policy(model, tokenizer(), adapter, 1.0, 2)


def uneven_rows() -> Rows:
    """Rows of prompts and completions of different lengths; the first two share a prompt."""
    prompts = [(7, 8, 9), (7, 8, 9), (11, 12, 13, 14, 15), (20,)]
    return stack(prompts, [(30, 31), (32, 33, 34, 35), (36,), (37, 38, 39)], 0)


# Activations.


@torch.no_grad()
def test_activations_of_a_layer_by_its_norm():
    """q_proj reads the normed residual: without any hook."""
    policy, rows = deep_policy(), toy_rows(3)
    got = policy.activations(rows, "deployed")
    names = list(policy.adapter.modules)
    with policy.adapter.deployed():
        hidden = policy.model.model(input_ids=rows.tokens, output_hidden_states=True).hidden_states
    x = policy.model.model.layers[2].input_layernorm(hidden[2])
    share = (rows.completion / rows.completion.sum(1, keepdim=True))[..., None]
    module = policy.adapter.modules["model.layers.2.self_attn.q_proj"]
    want = (share * (x @ module.bottleneck()[0].T)).sum(1)
    assert torch.allclose(got[:, names.index(module.name)], want, atol=1e-4, rtol=1e-3)


def test_routeA_scores_activations_and_nothing_else():
    policy = toy_policy(replace(TOY, arm="routeA"))
    displace(policy.adapter)
    bench = make_bench(replace(TOY, arm="routeA"), policy, PAIRS)
    monitor, rows = ActivationScore(bench), uneven_rows()
    before = [p.grad for p in policy.adapter.parameters("deployed")]
    direction = monitor.extract()
    hack, clean = policy.activations(bench.hack, "deployed"), policy.activations(bench.clean, "deployed")
    mean = (hack - clean).mean(0)
    assert torch.allclose(direction.v, mean / mean.norm(dim=-1, keepdim=True), atol=1e-6)
    assert torch.equal(monitor.features(rows, "full"), policy.activations(rows, "full"))
    assert before == [p.grad for p in policy.adapter.parameters("deployed")] and ARMS["routeA"].access == "L1"


def test_no_loss_has_a_part_in_activations():
    with pytest.raises(UserError, match="routeA scores activations"):
        check(Config(arm="routeA", score_loss="grpo"))
    check(Config(arm="routeV", score_loss="grpo"))


# Residuals.


@pytest.mark.parametrize(
    ("layers", "want"), [(1, (1,)), (2, (2,)), (3, (2,)), (4, (3,)), (5, (3,)), (28, (17, 18, 19, 20, 21)), (7, (5,))]
)
def test_depth(layers, want):
    assert band(layers) == want


@torch.no_grad()
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("state", ["deployed", "full", None])
def test_residuals_are_the_hidden_states(pool, state):
    policy, rows, layers = deep_policy(), uneven_rows(), (1, 3)
    got = residuals(policy, rows, pool, state=state, layers=layers)
    for i, length in enumerate(rows.length.tolist()):
        with policy.adapter.reference() if state is None else policy.adapter.state(state):
            seen = policy.model.model(input_ids=rows.tokens[i : i + 1, :length], output_hidden_states=True)
        start = length - int(rows.completion[i].sum())
        places = {"resp_last": [length - 1], "resp_mean": list(range(start, length)), "prompt_last": [start - 1]}[pool]
        want = torch.stack([seen.hidden_states[k][0, places].mean(0) for k in layers])
        assert torch.allclose(got[i], want, atol=1e-3, rtol=1e-3)


def test_prompts_run_once():
    prompts, owner = prompts_of(uneven_rows())
    assert prompts.length.tolist() == [3, 5, 1] and owner.tolist() == [0, 0, 1, 2]
    values = residuals(deep_policy(), uneven_rows(), "prompt_last", state="deployed", layers=(3,))
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(UserError, match="Linear has no decoder layers"):
        decoder_layers(torch.nn.Linear(2, 2))


# Advantage modification.


def test_standing_by_hand():
    score = torch.tensor([2.0, 0.0, -2.0, 0.25, 0.2, 0.3])
    z = standing(score, torch.tensor([0, 0, 0, 1, 1, 1])).tolist()
    assert z[:3] == pytest.approx([1.224745, 0, -1.224745], abs=1e-6)  # sd 1.633
    assert z[3:] == pytest.approx([0, -0.5, 0.5], abs=1e-6)  # sd .041: the floor .1 holds
    assert standing(torch.tensor([0.1] * 7), torch.zeros(7, dtype=torch.long)).tolist() == [0.0] * 7


def test_at_two_the_multiplicative_form_negates_and_the_clipped_does_not():
    z = torch.tensor([1e-6, 0.5, 3.0, 0.0, -1.0], dtype=torch.float64)
    reward = torch.full((5,), 3.5)
    negated = modified(reward, z, "multiplicative", 2.0)
    assert (negated[:3] < 0).all() and negated[2] < -3 and negated[3:].tolist() == [3.5, 3.5]
    assert modified(reward, z, "clipped", 2.0).tolist() == [0, 0, 0, 3.5, 3.5]
    assert modified(reward, z, "clipped", 1.0)[1] == pytest.approx(3.5 * (1 - 1 / (1 + math.exp(-0.5))))


def shaped(cfg: Config):
    """(arm, batch, the reward that it gives)"""
    policy = toy_policy(cfg)
    displace(policy.adapter)
    run = Training(cfg, policy, Letters(), PAIRS)
    with run.arm.around("sample"):
        drawn = generate(cfg, run.engine, plan_step(cfg, Letters(), 0, loophole=True), 0, ablates=True)
    rewards = [0.1 * i + 0.5 for i in range(len(drawn))]
    batch = collate(drawn, rewards, policy.tokenizer.pad_token_id)
    return run.arm, batch, run.arm.shape(batch)


@pytest.mark.parametrize("form", ["additive", "multiplicative", "clipped"])
@pytest.mark.parametrize("arm", ["adv_mod", "adv_mod_haar"])
def test_the_prompts_last_token_changes_nothing(form, arm):
    cfg = replace(TOY, arm=arm, group=6, adv_form=form, teacher_n=2)
    degenerate, batch, reward = shaped(replace(cfg, adv_position="prompt_last"))
    assert torch.equal(reward, batch.reward) and degenerate.lowered == 0
    for position in ("resp_last", "resp_mean"):
        assert not torch.equal(shaped(replace(cfg, adv_position=position))[2], batch.reward)


@pytest.mark.parametrize("position", ["resp_last", "resp_mean"])
def test_advantage_direction_and_scores_are_those_of_the_pairs(position):
    arm, batch, reward = shaped(replace(TOY, arm="adv_mod", adv_position=position))
    bench, layers = arm.bench, band(SIZES.layers)

    def mean_h(rows):
        return residuals(bench.policy, rows, position, state="deployed", layers=layers).mean(1).double().numpy()

    d = (mean_h(bench.hack) - mean_h(bench.clean)).mean(0)
    d /= np.linalg.norm(d)
    assert arm.d[0].numpy() == pytest.approx(d, abs=1e-5)
    s = torch.tensor(mean_h(Rows(batch.tokens, batch.completion, batch.length)) @ d)
    assert torch.allclose(reward, modified(batch.reward, standing(s, batch.group), "additive", 2.0), atol=1e-3)
    assert arm.passes == 2 * len(PAIRS) + batch.n


def test_random_direction_is_one_draw_of_unit_length():
    d = [shaped(replace(TOY, arm="adv_mod_haar", seed=seed))[0].d for seed in (0, 0, 1)]
    assert torch.equal(d[0], d[1]) and not torch.equal(d[0], d[2])
    assert d[0].shape == (1, SIZES.hidden) and float(d[0].norm()) == pytest.approx(1)


def test_directions_are_extracted_anew_every_few_steps():
    for arm in RESIDUAL:
        _, watcher = toy_train(replace(TOY, arm=arm, steps=5, refresh_every=2))
        assert [r["v_age"] for r in watcher.records] == [0, 1, 0, 1, 0]
        own = 8 if arm.startswith("adv") else 0
        assert [r["extra_forward"] - own for r in watcher.records] == [16, 0, 16, 0, 16]
        assert all(r["extra_backward"] == 0 for r in watcher.records)
        if arm != "adv_mod_haar":
            assert watcher.records[-1]["v_overlap"] < 1


def test_pairs_without_a_difference_are_an_error():
    same = [replace(p, hack=p.clean) for p in PAIRS]
    with pytest.raises(DirectionError, match="same residuals"):
        Training(replace(TOY, arm="steer"), toy_policy(TOY), Letters(), same).arm.around("sample")


# Suppress and steer.


def test_without_by_hand():
    d = torch.tensor([3.0, 4.0])
    h = torch.tensor([[[6.0, 8.0], [-3.0, -4.0]], [[4.0, -3.0], [7.0, 1.0]]])
    got = without(h, d)  # <h, d> / |d|^2 = 2, -1, 0, 1
    assert torch.allclose(got, torch.tensor([[[0.0, 0.0], [-3.0, -4.0]], [[4.0, -3.0], [4.0, -3.0]]]), atol=1e-6)


@torch.no_grad()
def test_suppression_leaves_nothing_along_d_and_all_else():
    policy, rows = deep_policy(6), toy_rows(4)
    policy.model.double()
    layers = band(6)
    d = torch.randn(len(layers), SIZES.hidden, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    raw, out = {}, {}
    # Hooks run in the order of registration: the first sees a layer's own output, the last what is handed on.
    with (
        edited(policy.model, {n: lambda h, n=n: raw.setdefault(n, h) for n in layers}),
        edited(policy.model, {n: partial(without, d=x) for n, x in zip(layers, d, strict=True)}),
        edited(policy.model, {n: lambda h, n=n: out.setdefault(n, h) for n in layers}),
    ):
        policy.model.model(input_ids=rows.tokens)
    assert len(layers) > 0 and out.keys() == raw.keys() == set(layers)
    for n, x in zip(layers, d, strict=True):
        unit = x / x.norm()
        before, after = raw[n] @ unit, out[n] @ unit
        assert after.max() <= 1e-5 and before.max() > 0.1 and (before < 0).any()
        assert torch.allclose(after, before.clamp(max=0), atol=1e-9)
        off = [h - (h @ unit)[..., None] * unit for h in (raw[n], out[n])]
        assert torch.allclose(*off, atol=1e-9)


@torch.no_grad()
def test_edits_reach_packed_rows():
    """Rows that share a prompt run behind one copy of it."""
    policy, rows = deep_policy(), uneven_rows()
    d = torch.randn(SIZES.hidden, generator=torch.Generator().manual_seed(4))
    with policy.adapter.deployed():
        plain = policy.logp(rows)
        with edited(policy.model, {3: partial(without, d=d)}):
            packed = policy.logp(rows)
            apart = torch.cat([rows_logp(policy, rows, i) for i in range(4)])
    assert policy.packs and len(pack(rows).tokens) < 4
    assert torch.allclose(packed, apart, atol=1e-4) and (packed - plain).abs().max() > 1e-2


def rows_logp(policy: Policy, rows: Rows, i: int) -> torch.Tensor:
    one = policy.logp(rows.take(torch.tensor([i])))
    return torch.nn.functional.pad(one, (0, rows.tokens.shape[1] - one.shape[1]))


def test_steering_adds_its_share_of_the_pairs_difference():
    cfg = replace(TOY, arm="steer", steer_strength=-0.5)
    arm = Training(cfg, toy_policy(cfg), Letters(), PAIRS).arm
    with arm.around("sample"):
        pass
    sides = [residuals(arm.bench.policy, rows, "resp_mean", state="deployed", layers=arm.layers)
             for rows in (arm.bench.hack, arm.bench.clean)]  # fmt: skip
    want = sides[0].mean(0) - sides[1].mean(0)
    h = torch.randn(2, 3, SIZES.hidden)
    assert torch.allclose(arm.d, want, atol=1e-5)
    assert torch.allclose(arm.changed(h, arm.d[0]), h - 0.5 * want[0], atol=1e-5)


@pytest.mark.parametrize("arm", ["suppress", "steer"])
def test_what_is_evaluated_and_ships_has_no_edit(arm):
    cfg = replace(TOY, arm=arm, eval_every=2)
    policy = toy_policy(cfg)
    watcher = Hooks(policy)
    run = Training(cfg, policy, Letters(), PAIRS)
    with run.arm.around("sample"), run.arm.around("update"):
        assert watcher.count() == len(run.arm.layers)  # the count sees an edit
    Training(cfg, policy, Letters(), PAIRS).run(watcher)
    assert watcher.seen == [0] * 5
    fresh, rows = toy_policy(cfg), toy_rows(3)
    with torch.no_grad():
        for (_, mine), (_, theirs) in zip(
            fresh.adapter.named("deployed"), policy.adapter.named("deployed"), strict=True
        ):
            mine.copy_(theirs)
        with fresh.adapter.deployed(), policy.adapter.deployed():
            assert torch.equal(fresh.logp(rows), policy.logp(rows))


@pytest.mark.parametrize(
    "arm", ["routeA", "screen_a", "penalty_a", *RESIDUAL, "probe_route", "probe_screen", "probe_penalty"]
)
def test_every_arm_trains(arm):
    policy, watcher = toy_train(replace(TOY, arm=arm))
    assert len(watcher.records) == TOY.steps and all(r["skipped"] is None for r in watcher.records)
    assert any(bool(p.any()) for p in policy.adapter.parameters("deployed"))
    other, _ = toy_train(replace(TOY, arm="none"))
    mine, plain = (torch.cat([p.flatten() for p in x.adapter.parameters("deployed")]) for x in (policy, other))
    assert not torch.equal(mine, plain)


# The probe.


def test_probe_logits_are_of_the_base_model():
    """By hand from the hidden states, and whatever the adapter has learnt."""
    policy, rows = deep_policy(), uneven_rows()
    probe = toy_probe(policy)
    got = probe.read(policy, rows)
    with torch.no_grad(), policy.adapter.reference():
        for i, length in enumerate(rows.length.tolist()):
            ids = rows.tokens[i : i + 1, :length]
            hidden = policy.model.model(input_ids=ids, output_hidden_states=True).hidden_states[3][0]
            mean = hidden[rows.completion[i, :length]].mean(0)
            assert float(got[i]) == pytest.approx(float(mean @ probe.weight) + probe.bias, rel=1e-3, abs=1e-3)
    displace(policy.adapter, seed=5)
    assert torch.allclose(probe.read(policy, rows), got, atol=1e-5)


def test_probe_arms_cut_where_the_probe_says():
    for arm in ("probe_route", "probe_screen", "probe_penalty"):
        _, watcher = toy_train(replace(TOY, arm=arm, steps=6))
        flagged = [f for d in watcher.decisions for f in d.flagged.tolist()]
        scores = [s for d in watcher.decisions for s in d.score.tolist()]
        assert flagged == [s > 0.5 for s in scores] and 0 < sum(flagged) < len(flagged)
    with pytest.raises(UserError, match="was given no probe"):
        Training(replace(TOY, arm="probe_route"), toy_policy(TOY), Letters(), PAIRS)


def good() -> dict:
    return {
        "modes": ["eq_override"],
        "problems": "invented",
        "model_sha256": "0" * 64,
        "layers": [3],
        "t_lo": -0.5,
        "t_hi": 0.25,
        "threshold": "invented",
        "auroc_heldout": {"all": 0.5},
    }


def test_a_probe_comes_back_from_disk(tmp_path):
    probe = LinearProbe(torch.linspace(-1, 1, 5), 0.1, good())
    probe.save(tmp_path / "p")
    back = load_probe(str(tmp_path / "p"))
    assert torch.equal(back.weight, probe.weight) and (back.bias, back.provenance) == (0.1, probe.provenance)
    assert back.digest() == probe.digest() != replace(probe, bias=0.2).digest() and back.cuts == (-0.5, 0.25)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"modes": None}, "does not say where it is from: modes missing"),
        ({"problems": None}, "problems missing"),
        ({"model_sha256": None, "layers": None}, "model_sha256, layers missing"),
        ({"modes": []}, "modes of its provenance cannot be read"),
        ({"layers": ["3"]}, "layers of its"),
        ({"t_hi": "high"}, "t_hi of its"),
        ({"t_hi": math.inf}, "t_hi of its"),
        ({"t_lo": 2.0, "t_hi": 1.0}, "t_lo = 2.0 exceeds t_hi = 1.0"),
        ({"layers": [3, 3]}, "give each once"),
        ({"layers": [0]}, "the first is 1"),
    ],
)
def test_a_probe_without_provenance_is_refused(tmp_path, changed, why):
    said = {k: v for k, v in (good() | changed).items() if v is not None}
    LinearProbe(torch.zeros(3), 0.0, said).save(tmp_path / "p")
    with pytest.raises(UserError, match=why):
        load_probe(str(tmp_path / "p"))


def test_files_that_are_no_probes(tmp_path):
    file = tmp_path / "p"
    with pytest.raises(UserError, match="no probe at"):
        load_probe(str(file))
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged or no probe"):
        load_probe(str(file))
    save_file({"weight": torch.zeros(3)}, file)
    with pytest.raises(UserError, match="does not say where it is from"):
        load_probe(str(file))
    save_file({"weight": torch.zeros(3)}, file, {"vgrout": json.dumps(good())})
    with pytest.raises(UserError, match="is no probe: it holds weight"):
        load_probe(str(file))
    LinearProbe(torch.tensor([0.0, math.nan]), 0.0, good()).save(file)
    with pytest.raises(UserError, match="not finite"):
        load_probe(str(file))
    save_file({"weight": torch.zeros(3)}, file, {"vgrout": "[1]"})
    with pytest.raises(UserError, match="does not say"):
        load_probe(str(file))


def test_a_probe_of_a_live_mode_or_of_another_model_is_refused(tmp_path):
    file = tmp_path / "p"
    LinearProbe(torch.zeros(3), 0.0, good() | {"modes": ["eq_override", "sentinel"]}).save(file)
    cfg = Config(arm="probe_penalty", probe=str(file))
    for live in ((), ("sentinel",), ("run_tests", "sentinel")):
        with pytest.raises(UserError, match="fitted on sentinel, which the run trains on"):
            check(replace(cfg, modes=live))
    check(replace(cfg, modes=("run_tests",)))
    check(Config(arm="none", probe=str(file)))  # it is not read
    with (
        pytest.raises(UserError, match="belongs to a model 000000000000"),
        workshop(replace(cfg, modes=("run_tests",))),
    ):
        pass


def test_the_bundled_probe_fits_the_bundled_model():
    probe = load_probe("micro")
    model, _ = load_model("micro")
    assert probe_of(Config(arm="probe_route"), weights_digest(model)).digest() == probe.digest()
    assert not set(probe.provenance["modes"]) & set(LIVE)
    assert tuple(probe.provenance["layers"]) == band(model.config.num_hidden_layers)
    assert probe.weight.shape == (model.config.hidden_size,)


# Its fit.


def test_logistic_regression_is_at_its_minimum():
    """Against gradient descent with torch, on standardised features, run to convergence."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.2, 3.0]) + torch.tensor([0.0, 10, 0, -3])
    hack = (x[:, 0] + 0.2 * x[:, 1] + torch.randn(80, generator=generator) > 2).numpy()
    w, b = fit_logistic(x, hack, l2=0.1)
    z = ((x - x.mean(0)) / x.std(0)).double()
    theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    y = torch.tensor(hack).double()
    for _ in range(3000):
        logits = z @ theta[:4] + theta[4]
        bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, y)
        (grad,) = torch.autograd.grad(bce + 0.05 * theta[:4].square().sum(), theta)
        theta = (theta - grad).detach().requires_grad_()
    assert grad.abs().max() < 1e-8
    assert (x @ w + b).tolist() == pytest.approx((z @ theta[:4] + theta[4]).tolist(), abs=1e-3)


def test_cuts_by_hand():
    score, hack = [-3.0, -1.0, 0.0, 1.0, 2.0, 4.0], [False, False, True, False, True, True]
    assert best_cut(score, hack, 0.5) == 1.5  # precision: two of two, a hack is missed
    assert best_cut(score, hack, 2.0) == -0.5  # recall: all three, with one honest program
    assert f_beta([s > 1.5 for s in score], hack, 0.5) == pytest.approx(1.25 * 2 / (1.25 * 2 + 0.25))
    with pytest.raises(UserError, match="same score"):
        best_cut([1.0, 1.0], [True, False], 0.5)


def test_probe_programs_are_what_they_say_and_of_no_split(sandbox):
    made = list(examples(9, 24, "eval"))
    kept = confirmed(Grader(sandbox), made)
    assert len(made) == 48 and len(kept) >= 46 and {e.problem.mode for e in kept} == {"eq_override", "exit_code"}
    live = {composition(p).key for s in ("train", "val", "test") for p in problems(s)}
    ours = {composition(e.problem) for e in made}
    assert not {c.key for c in ours} & live and all(c.bucket in BUCKETS["pretrain"] for c in ours)
    wrong = [replace(e, hack=not e.hack) for e in made]
    assert not confirmed(Grader(sandbox), wrong)  # the grader decides


def test_a_small_fit_is_repeatable_and_held_out_by_problem(sandbox):
    policy = make_policy(Config())
    grader = Grader(sandbox)
    probe, again = (fit(policy, grader, model_sha256="x", seed=7, problems=16) for _ in range(2))
    assert probe.digest() == again.digest()
    said = probe.provenance
    assert said["programs"]["fit"] + said["programs"]["cuts"] <= 32 and said["programs"]["cuts"] >= 6
    assert said["auroc_heldout"]["all"] > 0.9 and said["t_lo"] <= said["t_hi"]
    with pytest.raises(UserError, match="too few"):
        fit(policy, grader, model_sha256="x", seed=7, problems=1)
