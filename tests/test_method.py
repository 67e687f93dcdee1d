"""What the method's gates leave open: edge cases of scores, advantages, rows and log-probabilities."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vgrout.adapters import attach
from vgrout.config import Config
from vgrout.method.direction import Direction, DirectionError, haar
from vgrout.method.gate import POLICIES, decide, uniform
from vgrout.method.loss import advantages, live_groups
from vgrout.method.policy import Policy, pack, stack
from vgrout.method.prefix import by_prompt
from vgrout.verify.method_gates import sharing_rows, toy_rows
from vgrout.verify.toy import TOY, displace, rig, tokenizer, toy_policy


def flat_direction() -> Direction:
    v = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    return Direction(v, torch.zeros(2), torch.ones(2), torch.ones(3), torch.zeros(3), True)


def test_score_by_hand():
    g = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[-1.0, 0.0], [1.0, 0.0]]])
    score, live = flat_direction().score(g)
    assert score.tolist() == pytest.approx([(0.6 + 1.0) / 2, -0.5])
    assert live.tolist() == [True, True]


def test_a_row_without_gradient_is_absorbed():
    score, live = flat_direction().score(torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]]))
    assert live.tolist() == [False, True]
    assert decide(score, live, -1.0, -0.5).zones() == ["absorb", "route"]
    assert decide(score, live, 5.0, 6.0).zones() == ["absorb", "keep"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_is_an_error(bad):
    with pytest.raises(DirectionError, match="non-finite"):
        flat_direction().score(torch.tensor([[[bad, 0.0], [1.0, 0.0]]]))


def test_haar_rows():
    v = haar(500, 4, 0)
    assert torch.allclose(v.norm(dim=-1), torch.ones(500))
    assert v.mean(0).abs().max() < 0.1
    assert torch.equal(v, haar(500, 4, 0)) and not torch.equal(v, haar(500, 4, 1))


@pytest.mark.parametrize("zone", ["keep", "absorb", "route"])
def test_uniform(zone):
    assert uniform(3, zone).zones() == [zone] * 3


def test_top2q_keeps_a_bounded_history():
    gate = POLICIES["top2q"](Config(q=0.2, buffer=5))
    for i in range(4):
        g = torch.full((3, 2, 2), float(i + 1))
        gate.thresholds(torch.zeros(3), g, flat_direction())
    assert gate.history.shape == (5, 2, 2)
    assert gate.history[0, 0, 0] == 3 and gate.history[-1, 0, 0] == 4


def test_baseline_of_kept_rows():
    reward, group = torch.tensor([3.5, 0.5, 0.0, 0.0]), torch.zeros(4, dtype=torch.long)
    kept = torch.tensor([False, True, True, True])
    a = advantages(reward, group, norm="mean", counted=kept)
    assert a.tolist() == pytest.approx([3.5 - 1 / 6, 0.5 - 1 / 6, -1 / 6, -1 / 6])
    nobody = advantages(reward, group, norm="mean", counted=torch.zeros(4, dtype=torch.bool))
    assert not nobody.any()


def test_dead_groups():
    reward, group = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 5, 5])
    assert live_groups(reward, group).tolist() == [False, False, True, True]
    assert advantages(reward, group, norm="sd").tolist()[:2] == [0, 0]


def test_stack_and_take():
    rows = stack([[1, 2], [3]], [[4], [5, 6, 7, 8]], 0)
    assert rows.tokens.tolist() == [[1, 2, 4, 0, 0], [3, 5, 6, 7, 8]]
    assert rows.completion.tolist() == [[False, False, True, False, False], [False, True, True, True, True]]
    short = rows.take(torch.tensor([0]))
    assert short.tokens.tolist() == [[1, 2, 4]] and short.length.tolist() == [3]


@pytest.fixture(scope="module")
def policy():
    made = toy_policy(TOY)
    displace(made.adapter)
    return made


@torch.no_grad()
def test_logp_is_of_the_completion_at_the_temperature(policy):
    warm = Policy(policy.model, policy.tokenizer, policy.adapter, 0.7, 2)
    rows = toy_rows(3)
    logp = warm.logp(rows)
    logits = policy.model(input_ids=rows.tokens, use_cache=False).logits / 0.7
    for i in range(3):
        for t in range(rows.tokens.shape[1]):
            dist = logits[i, t - 1].log_softmax(-1)
            on = bool(rows.completion[i, t])
            assert logp[i, t].item() == pytest.approx(dist[rows.tokens[i, t]].item() if on else 0, abs=1e-4)


def test_micro_batches_change_nothing(policy):
    rows = toy_rows(5)
    small = Policy(policy.model, policy.tokenizer, policy.adapter, 1.0, 1)
    large = Policy(policy.model, policy.tokenizer, policy.adapter, 1.0, 64)
    assert torch.allclose(small.c_gradients(rows, "full"), large.c_gradients(rows, "full"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_rows_of_one_prompt_share_its_forward_pass(policy, size):
    """Whatever the groups and the batches, c-gradients are those of rows that stand apart."""
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7], [10, 11, 12, 13], [8, 9], [5, 6, 7], [10, 11, 12, 13]]
    rows = stack(prompts, [[11, 12], [13], [14, 15, 16, 17], [21], [11, 12], [18, 19, 20], [30, 31]], 0)
    for state in ("full", "deployed"):
        shared = policy._c_gradients(rows, state, size)
        apart = torch.cat([policy.c_gradients(rows.take(torch.tensor([i])), state) for i in range(len(prompts))])
        assert (shared - apart).norm() < 1e-5 * apart.norm() and apart.norm() > 0


def test_when_rows_share_a_prompt():
    assert by_prompt(stack([[1, 2], [1, 2], [3, 4]], [[5], [6], [7]], 0)) == ([2], [[((1, 2), [0, 1])]])
    assert by_prompt(stack([[1], [1]], [[5], [6]], 0)) == ([0, 1], [])  # the last token is all there is
    found = by_prompt(stack([[1, 2, 2], [1, 2], [1, 2], [1, 2, 2]], [[5, 5], [6], [2], [8]], 0))
    assert found == ([], [[((1, 2), [1, 2]), ((1, 2, 2), [3, 0])]])
    found = by_prompt(stack([[1, 2], [3, 4], [1, 2], [3, 4], [1, 2]], [[5]] * 5, 0))
    assert found == ([], [[((1, 2), [0, 2, 4])], [((3, 4), [1, 3])]])


def test_scored_rows_are_bounded_by_the_batch(policy, monkeypatch):
    """However many rows share a prompt, and however few: no pass has more rows than asked for."""
    seen: list[int] = []
    run = policy.model.model.forward
    monkeypatch.setattr(policy.model.model, "forward", lambda **how: seen.append(len(how["input_ids"])) or run(**how))
    rows = stack([[5, 6]] * 9 + [[7, 8], [9, 10], [11, 12]], [[13, 14]] * 12, 0)
    for size in (1, 2, 4):
        policy._c_gradients(rows, "full", size)
        assert max(seen) == size


@pytest.mark.parametrize("rows", [toy_rows(6), sharing_rows()], ids=["apart", "shared"])
def test_bfloat16_scores(policy, rows):
    """Gradients and activations are near those of float32; log-probabilities outside of the score pass are the same."""
    adapter = policy.adapter
    low = Policy(policy.model, policy.tokenizer, adapter, 1.0, 4, torch.bfloat16)
    for features in ("c_gradients", "activations"):
        near, exact = (getattr(p, features)(rows, "full") for p in (low, policy))
        assert near.dtype == torch.float32
        assert 1e-5 < (near - exact).norm() / exact.norm() < 0.03
        assert torch.cosine_similarity(near, exact, dim=-1).mean() > 0.995
    with adapter.full():
        assert torch.equal(low.logp(rows), policy.logp(rows))


def test_products_in_the_dtype_of_their_weights():
    """Rounded factors, sums in float32, rounded again: by hand, with a bias."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 3)
    adapter = attach(torch.nn.ModuleDict({"q_proj": linear}), "lora2r", 2, 0)
    (module,) = adapter.modules.values()
    x = torch.randn(2, 4, 5)
    weight, bias = (t.detach().bfloat16().double() for t in (linear.weight, linear.bias))
    want = (x.bfloat16().double() @ weight.T + bias).float().bfloat16().float()
    with adapter.merged("full", torch.bfloat16):
        assert torch.allclose(module(x), want, rtol=2**-7, atol=2**-8) and module(x).dtype == torch.float32
        assert not torch.allclose(module(x), linear(x), rtol=1e-5, atol=1e-6)
    with adapter.merged("full"):
        assert torch.equal(module(x), linear(x))


@pytest.mark.parametrize("dtype, want", [("model", None), ("bfloat16", torch.bfloat16)])
def test_the_configuration_names_the_dtype_of_scores(dtype, want):
    assert toy_policy(replace(TOY, score_dtype=dtype)).score_dtype is want


@pytest.mark.parametrize("room", [512, 7])
def test_packed_rows_are_the_rows(monkeypatch, room):
    """Rows behind one copy of their prompt have the log-probabilities and gradients of rows that stand alone."""
    monkeypatch.setattr("vgrout.method.policy.PACK", room)
    made = rig(rows=2)
    displace(made.adapter)
    policy = Policy(made.model, tokenizer(), made.adapter, 0.7, 2)
    prompts = [[5, 6, 7], [8, 9], [5, 6, 7], [10], [5, 6, 7], [8, 9]]
    completions = [[11, 12], [13], [14, 15, 16, 17], [21], [11, 12], [18, 19, 20]]
    rows = stack(prompts, completions, 0)
    # Blocks of 11, 6 and 2 tokens in two sequences; where few tokens share a prompt, blocks of 9, 6, 2 and 5 in three.
    assert pack(rows).tokens.shape == ((2, 11) if room == 512 else (3, 9))
    parameters = made.adapter.parameters("deployed") + made.adapter.parameters("quarantine")
    with made.adapter.full():
        together = policy.logp(rows)
        alone = torch.zeros_like(together)
        for i in range(len(rows.length)):
            row = rows.take(torch.tensor([i]))
            logits = made.model(input_ids=row.tokens, use_cache=False).logits[0, :-1] / 0.7
            n = int(row.length[0])
            drawn = logits.log_softmax(-1).gather(1, row.tokens[0, 1:, None])[:, 0] * row.completion[0, 1:]
            alone[i, 1:n] = drawn
    assert torch.allclose(together, alone, atol=1e-5)
    weight = torch.linspace(-1, 1, together.numel()).view_as(together)
    for a, b in zip(*(torch.autograd.grad((weight * x).sum(), parameters) for x in (together, alone)), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
