"""Traces, gate files and what judges a direction on them: numbers by hand and by numpy, resumed runs, refusals."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from vgrout.config import Config
from vgrout.envs.micro import problems
from vgrout.lab import ceiling as ceiling_module
from vgrout.lab import direction as direction_module
from vgrout.lab import run as run_module
from vgrout.lab.ceiling import ceiling, fit_lda, fit_mean, fitted_scores, show_ceiling
from vgrout.lab.direction import check, draw_scores, export, haar_draws, show_check
from vgrout.lab.gatefile import load_gate, save_gate
from vgrout.lab.gates import choice, of_run, replay, saturation, show_gates
from vgrout.lab.labels import Labelled, modes_in_pairs, read_labelled, windows
from vgrout.lab.measure import auroc, f_beta
from vgrout.lab.ranking import chance, ranking
from vgrout.lab.record import MADE, MARK, read_jsonl
from vgrout.lab.run import Workshop, resume, run
from vgrout.lab.trace import discard_from, init_digest, read_trace, read_traces, save_trace, scoring
from vgrout.method.direction import Direction, calibrate, cosines, haar, svd, v_grad
from vgrout.method.gate import POLICIES
from vgrout.types import Decision, UserError
from vgrout.verify.toy import PAIRS, TOY, toy_policy

from test_survival import FACTS, Died, die, letters, patched  # isort: skip

CFG = replace(TOY, steps=6, refresh_every=3, checkpoint_every=2, teacher_n=0, eval_small=4, eval_rollouts=4)
CFG = replace(CFG, trace_every=1, policy="ema_quantile", buffer=12)


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """Runs with the tiny model, its letters and its pairs."""

    @contextmanager
    def workshop(cfg, ranks):
        yield Workshop(toy_policy(cfg), letters(), dict(FACTS))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "workshop", workshop)
        patch.setattr(run_module, "load_pairs", lambda _: PAIRS)
        patch.setattr(direction_module, "make_policy", toy_policy)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A finished run with a trace; its verdicts are not yet there."""
    out = tmp_path_factory.mktemp("made") / "run"
    run(CFG, out)
    return out


# Measures.


def test_ranking_by_hand():
    # Descending: hack, other, hack, other, other. AUROC: 3 + 2 of 6 pairs; AP: (1 + 2/3) / 2.
    found = ranking(np.array([[0.5, 0.4, 0.3, 0.2, 0.1]]), np.array([True, False, True, False, False]))
    assert found["auroc"][0] == pytest.approx(5 / 6) and found["ap"][0] == pytest.approx((1 + 2 / 3) / 2)
    # Cuts behind each hack: precision 1, recall .5: 1.25 * 1 / (1 + .25 * 2); 2/3 and 1: 1.25 * 2 / (3 + .25 * 2).
    assert found["f05"][0] == pytest.approx(max(1.25 / 1.5, 2.5 / 3.5))
    # All equal: one step of the curve.
    found = ranking(np.zeros((1, 4)), np.array([True, False, False, False]))
    assert (found["auroc"][0], found["ap"][0], found["f05"][0]) == pytest.approx((0.5, 0.25, 1.25 / 4.25))


def test_ranking_equals_one_score_at_a_time():
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = int(rng.integers(4, 40))
        label = np.arange(n) < rng.integers(1, n)
        score = rng.integers(0, rng.integers(2, 12), (600, n)).astype(np.float32)  # ties, and several chunks
        found = ranking(score, label)
        for i in range(0, 600, 97):
            s = score[i]
            best = max(f_beta((s >= t).tolist(), label.tolist()) for t in set(s.tolist()))
            cuts = sorted(set(s.tolist()), reverse=True)
            recall = [0.0, *((label & (s >= t)).sum() / label.sum() for t in cuts)]
            precision = [(label & (s >= t)).sum() / (s >= t).sum() for t in cuts]
            area = sum((b - a) * p for (a, b), p in zip(pairwise(recall), precision, strict=True))
            want = (auroc(s.tolist(), label.tolist()), area, best)
            assert (found["auroc"][i], found["ap"][i], found["f05"][i]) == pytest.approx(want)
    with pytest.raises(ValueError):
        ranking(score, np.ones(n, bool))


def test_p_counts_the_value_itself():
    draws = np.linspace(0, 1, 100)
    assert chance(2.0, draws) == 1 / 101 and chance(1.0, draws) == 2 / 101 and chance(-1.0, draws) == 1.0


@pytest.mark.parametrize("axes", [0, 2])
def test_many_directions_score_as_one(axes):
    generator = torch.Generator().manual_seed(0)
    hack, clean, g = (torch.randn(n, 4, 5, generator=generator) for n in (6, 6, 9))
    v = svd(hack, clean, axes) if axes else v_grad(hack, clean)
    draws = haar_draws(v, 260)  # more than are scored at once
    got = draw_scores(torch.nn.functional.normalize(g, dim=-1), torch.cat((hack, clean)), draws)
    for seed in (0, 1, 100, 259):
        one = calibrate(draws[seed], hack, clean, real=False)
        assert torch.allclose(got[seed], one.score(g)[0], atol=1e-4)
    if not axes:
        assert torch.equal(draws[7], haar(4, 5, 7))  # the placebo's own draw


def test_windows():
    assert windows(range(65), 30) == [(0, 29), (30, 59), (60, 64)]
    assert windows([4, 8, 12], 0) == [(4, 12)] and windows([4, 8, 12], 5) == [(0, 4), (5, 9), (10, 12)]


# Traces.


def test_a_trace_gives_the_scores_back(made):
    traces, rows = read_traces(made), read_jsonl(made / "rollouts.jsonl")
    assert [t.step for t in traces] == list(range(6))
    for trace in traces:
        mine = [r for r in rows if r.get("step") == trace.step and r["phase"] == "train"]
        assert list(trace.ids) == [r["id"] for r in mine]
        again, live = trace.direction.score(trace.unit)
        assert live.all() and (again - trace.score).abs().max() < 1e-3
        assert trace.score.tolist() == pytest.approx([r["score"] for r in mine], rel=1e-5)
        assert trace.direction.real and len(trace.direction.pairs) == 2 * len(PAIRS)
        assert trace.meta["modules"] and trace.meta["score_state"] == "full"
    assert not torch.equal(traces[0].direction.v, traces[3].direction.v)
    assert torch.equal(traces[0].direction.v, traces[2].direction.v)


def test_features_of_any_size_come_back(tmp_path):
    g = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 12, 5)[:, None, None]
    g[2] = 0
    direction = calibrate(haar(3, 4, 0), g[:2], g[3:], real=False)
    score, live = direction.score(g)
    n = torch.zeros(5)
    save_trace(tmp_path / "trace", 7, list("abcde"), Decision(n, n, n, n, score, None, {}, g, vars(direction)), {})
    trace = read_trace(tmp_path / "trace" / "step_000007.safetensors")
    again, alive = trace.direction.score(trace.unit)
    assert (again - score).abs().max() < 1e-3 and alive.tolist() == live.tolist() == [True, True, False, True, True]
    assert torch.allclose(trace.unit * trace.norm[..., None], g, rtol=2e-3, atol=0)
    stored = load_file(tmp_path / "trace" / "step_000007.safetensors")
    assert stored["unit"].dtype == torch.float16


def test_every_kth_step_and_arms_without_scores(tmp_path):
    run(replace(CFG, trace_every=4), tmp_path / "every")
    assert [t.step for t in read_traces(tmp_path / "every")] == [0, 4]
    for changes in ({"trace_every": 0}, {"arm": "absorb"}):
        out = tmp_path / "-".join(map(str, changes.values()))
        run(replace(CFG, **changes), out)
        assert not (out / "trace").exists()
        with pytest.raises(UserError, match="no trace"):
            read_traces(out)


def test_a_trace_changes_nothing(made, tmp_path):
    run(replace(CFG, trace_every=0), tmp_path / "plain")
    for name in ("adapter.safetensors", "steps.jsonl", "rollouts.jsonl", "eval.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (made / name).read_bytes()


def test_a_resumed_run_has_the_trace_and_the_gate_of_a_whole_one(made, tmp_path):
    out = tmp_path / "run"
    from vgrout import loop

    with patched(loop, "backward", die, 5), pytest.raises(Died):
        run(CFG, out)
    (out / "trace" / "step_000099.safetensors").write_bytes(b"of an earlier attempt")
    (out / "trace" / ".tmp-step_000005.safetensors").write_bytes(b"half")
    resume(out)
    names = sorted(p.name for p in (out / "trace").iterdir())
    assert names == [f"step_{i:06d}.safetensors" for i in range(6)]
    for name in names:
        assert (out / "trace" / name).read_bytes() == (made / "trace" / name).read_bytes()
    assert (out / "gate.safetensors").read_bytes() == (made / "gate.safetensors").read_bytes()


def test_discard_from(tmp_path):
    for step in (0, 5, 6, 10):
        (tmp_path / f"step_{step:06d}.safetensors").touch()
    discard_from(tmp_path, 6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000000.safetensors", "step_000005.safetensors"]


def test_a_full_disk_costs_the_trace_alone(tmp_path, monkeypatch, capsys):
    from vgrout.lab import tensorfile

    write = tensorfile.write

    def full(path, data):
        if "step_000002" in path.name:
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(tensorfile, "write", full)
    run(CFG, tmp_path / "run")
    assert [t.step for t in read_traces(tmp_path / "run")] == [0, 1, 3, 4, 5]
    assert "trace of step 2" in capsys.readouterr().err


# Gate files.


def test_the_gate_of_a_run(made):
    gate, last = load_gate(made / "gate.safetensors"), read_jsonl(made / "steps.jsonl")[-1]
    trace = read_traces(made)[-1]
    for key, value in vars(gate.direction).items():
        other = getattr(trace.direction, key)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert gate.meta["thresholds"] == [last["t_lo"], last["t_hi"]] and gate.meta["v_age"] == 2
    assert gate.meta["modules"] == list(toy_policy(CFG).adapter.modules)
    assert (gate.meta["pairs_sha256"], gate.meta["model_sha256"]) == ("p" * 64, "m" * 64)
    assert gate.meta["init_sha256"] == init_digest(toy_policy(CFG).adapter) == trace.meta["init_sha256"]
    assert init_digest(toy_policy(replace(CFG, seed=1)).adapter) != gate.meta["init_sha256"]
    assert "sd" in gate.meta["pooling"] and gate.meta["policy"] == "ema_quantile"


def test_the_init_of_a_trained_adapter_is_its_init(made):
    policy = toy_policy(CFG)
    before = init_digest(policy.adapter)
    policy.adapter.load(made / "adapter.safetensors")
    assert init_digest(policy.adapter) == before


def test_export_is_what_the_run_wrote(made, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(made, out)
    (out / "gate.safetensors").unlink()
    assert export(out) == out / "gate.safetensors"
    assert (out / "gate.safetensors").read_bytes() == (made / "gate.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoints" / "step_000006")
    assert load_gate(export(out, tmp_path / "g")).meta["steps"] == 4  # where it was interrupted
    with pytest.raises(UserError, match="exists"):
        export(out, tmp_path / "g")
    run(replace(CFG, arm="absorb"), tmp_path / "absorb")
    assert not (tmp_path / "absorb" / "gate.safetensors").exists()
    with pytest.raises(UserError, match="no checkpoint with a direction: absorb"):
        export(tmp_path / "absorb")


def test_files_of_another_kind_are_refused(made, tmp_path):
    (tmp_path / "text").write_text("no tensors")
    for path, word in (
        (made / "adapter.safetensors", "no gate file"),
        (made / "trace" / "step_000000.safetensors", "kind trace"),
        (tmp_path / "text", "cannot read"),
        (tmp_path / "none", "no file"),
    ):
        with pytest.raises(UserError, match=word):
            load_gate(path)
    with pytest.raises(UserError, match="kind gate"):
        read_trace(made / "gate.safetensors")


# Judging a direction, with verdicts.


def plant(out: Path, made: Path) -> Path:
    """A copy of the run as one of the micro world: 40 steps of eight, ever more hacks, those of run_tests along v."""
    shutil.copytree(made, out)
    shutil.rmtree(out / "trace")
    cfg = replace(CFG, steps=40)
    (out / "config.json").write_text(cfg.to_json())
    gate = load_gate(made / "gate.safetensors")
    direction, rng = gate.direction, np.random.default_rng(0)
    ids = {mode: [p.id for p in problems("train") if p.mode == mode] for mode in ("run_tests", "sentinel")}
    rollouts, verdicts = [], []
    modules, rank = direction.v.shape
    for step in range(40):
        hacked = rng.random(8) < step / 40
        g = torch.randn(8, modules, rank, generator=torch.Generator().manual_seed(step))
        mode = np.where(np.arange(8) % 2 == 0, "run_tests", "sentinel")
        away = torch.tensor(np.where(hacked & (mode == "run_tests"), 3.0, 0.0)).float()
        g = g + away[:, None, None] * direction.v
        score, _ = direction.score(g)
        z = torch.zeros(8)
        flagged = score > score.quantile(0.5)
        decision = Decision(z, z, z, z, score, (0.0, 0.0), {}, g, vars(direction))
        names = [f"{step}-{i}" for i in range(8)]
        meta = {k: gate.meta[k] for k in ("modules", "init_sha256")}
        save_trace(out / "trace", step, names, decision, {**meta, **scoring(Config()), "arm": "routeV"})
        for i, name in enumerate(names):
            source = "teacher" if step == 0 and i == 0 else "policy"
            row = {"id": name, "phase": "train", "problem": ids[str(mode[i])][step], "source": source, "step": step}
            rollouts.append(row | {"flagged": bool(flagged[i]), "score": float(score[i])})
            verdicts.append({"id": name, "hacked": bool(hacked[i]), "solved": bool(not hacked[i] and i > 2)})
    for name, rows in (("rollouts", rollouts), ("verdicts", verdicts)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (out / MARK).write_text(MADE)
    return out


@pytest.fixture(scope="module")
def planted(made, tmp_path_factory) -> Path:
    """A run whose hacks of run_tests point along v, and whose hacks of sentinel do not."""
    return plant(tmp_path_factory.mktemp("planted") / "run", made)


def test_labels_of_a_run(planted):
    labelled = read_labelled(planted)
    assert len(labelled.id) == 319 and "0-0" not in labelled.id  # the demonstration does not count
    assert set(labelled.mode) == {"run_tests", "sentinel"}
    half = labelled.take(labelled.step >= 20)
    assert half.step.min() == 20 and len(half.id) == 160 and half.id[0] == "20-0"
    assert modes_in_pairs("micro") == {"run_tests", "stdout_marker", "eq_override", "exit_code"}


def test_check_finds_what_is_there_and_nothing_else(planted):
    result = check(planted / "gate.safetensors", planted, draws=200, window=20)
    cells = {(c["direction"], tuple(c["steps"]), c["mode"]): c for c in result["cells"]}
    assert {k[1] for k in cells} == {(0, 39), (0, 19), (20, 39)} and {k[2] for k in cells} == {
        "all",
        "run_tests",
        "sentinel",
    }
    labelled = read_labelled(planted)
    direction = load_gate(planted / "gate.safetensors").direction
    units = {id: t.unit[i] for t in read_traces(planted) for i, id in enumerate(t.ids)}
    score = direction.score(torch.stack([units[id] for id in labelled.id]))[0].numpy()
    late = (labelled.step >= 20) & (labelled.mode == "sentinel")
    cell = cells["gate file", (20, 39), "sentinel"]
    assert cell["auroc"] == pytest.approx(auroc(score[late].tolist(), labelled.hacked[late].tolist()), abs=1e-5)
    assert (cell["rollouts"], cell["hacks"]) == (late.sum(), labelled.hacked[late].sum())
    for direction in ("gate file", "of each step"):
        assert cells[direction, (0, 39), "run_tests"]["auroc"] > 0.95
        assert cells[direction, (0, 39), "run_tests"]["auroc_p"] == pytest.approx(1 / 201, abs=1e-6)
        assert cells[direction, (0, 39), "run_tests"]["ap_p"] == pytest.approx(1 / 201, abs=1e-6)
        assert cells[direction, (0, 39), "sentinel"]["auroc_p"] > 0.02
        assert abs(cells[direction, (0, 39), "sentinel"]["auroc_null"][0] - 0.5) < 0.05
    assert result["least_p"] == pytest.approx(1 / 201, abs=1e-6)


def test_check_as_a_table_and_as_json(planted, tmp_path, capsys):
    show_check(planted / "gate.safetensors", planted / "trace", 20, 0, tmp_path / "out.json", Console(width=80))
    said = capsys.readouterr().out
    assert "run_tests" in said and "0.048" in said  # 1/21
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["draws"] == 20 and len(written["cells"]) == 6
    assert check(planted / "gate.safetensors", planted, draws=20, window=0) == written


def test_check_refuses_what_does_not_fit(planted, made, tmp_path):
    gate = load_gate(planted / "gate.safetensors")
    changes = {
        "init_sha256": "0",
        "modules": ["a"],
        "model_sha256": "0",
        "features": "activations",
        "score_loss": "grpo",
    }
    for change in ({key: value} for key, value in changes.items()):
        save_gate(tmp_path / "other", gate.direction, {**gate.meta, **change})
        with pytest.raises(UserError, match=f"does not fit.*{next(iter(change))}"):
            check(tmp_path / "other", planted, draws=5, window=0)
    for arguments, word in (({"draws": 0, "window": 0}, "draws"), ({"draws": 5, "window": -1}, "window")):
        with pytest.raises(UserError, match=word):
            check(planted / "gate.safetensors", planted, **arguments)
    with pytest.raises(UserError, match="no verdicts"):
        check(made / "gate.safetensors", made, draws=5, window=0)  # letters have no oracle


# The ceiling.


def test_fits_by_numpy():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(30, 2, 3, generator=generator) + 0.5, torch.randn(20, 2, 3, generator=generator)
    d = (a.numpy().mean(0) - b.numpy().mean(0)).astype(np.float64)
    assert np.allclose(fit_mean(a, b), d / np.linalg.norm(d, axis=1, keepdims=True), atol=1e-6)
    x, y = a.flatten(1).double().numpy(), b.flatten(1).double().numpy()
    s = ((x - x.mean(0)).T @ (x - x.mean(0)) + (y - y.mean(0)).T @ (y - y.mean(0))) / 50
    w = np.linalg.inv(0.9 * s + 0.1 * np.trace(s) / 6 * np.eye(6)) @ (x.mean(0) - y.mean(0))
    assert np.allclose(fit_lda(a.flatten(1), b.flatten(1)), w / np.linalg.norm(w), atol=1e-5)
    one = fit_lda(torch.tensor([[1.0, 1.0], [3.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    assert one.tolist() == pytest.approx([0, 1])  # what varies within a class tells nothing


def test_the_ceiling_sees_labels_of_even_steps_alone():
    generator = torch.Generator().manual_seed(2)
    g = torch.randn(40, 3, 4, generator=generator)
    fit = torch.arange(40) % 2 == 0
    hacked, solved = torch.arange(40) % 4 < 2, torch.arange(40) % 4 >= 2
    scores, _ = fitted_scores(g, fit, hacked, solved)
    lied, _ = fitted_scores(g, fit, torch.where(fit, hacked, ~hacked), torch.where(fit, solved, ~solved))
    assert all(torch.equal(scores[k], lied[k]) for k in scores)
    other, _ = fitted_scores(g, fit, ~hacked, ~solved)
    assert not torch.allclose(scores["lda"], other["lda"])
    moved = g.clone()
    moved[~fit] += 1
    same, _ = fitted_scores(moved, fit, hacked, solved)
    assert all(torch.equal(scores[k][fit], same[k][fit]) for k in scores)
    cos = cosines(g, fit_mean(g[fit & hacked], g[fit & solved]))
    z = (cos - cos[fit].mean(0)) / cos[fit].std(0)
    assert torch.allclose(scores["mean difference"], z.mean(1), atol=1e-5)


def test_ceiling_of_a_run(planted):
    rows, _ = ceiling(planted)
    found = {(r["score"], r["mode"], r["against"]): r for r in rows}
    assert found["mean difference", "run_tests", "not hacked"]["auroc"] > 0.9
    assert found["v of each step", "run_tests", "not hacked"]["auroc"] > 0.95
    labelled = read_labelled(planted)
    odd = (labelled.step % 2 == 1) & (labelled.mode == "sentinel")
    cell = found["lda", "sentinel", "not hacked"]
    assert (cell["rollouts"], cell["hacks"], cell["in_pairs"]) == (odd.sum(), labelled.hacked[odd].sum(), False)
    assert found["lda", "sentinel", "solved"]["rollouts"] == (odd & (labelled.hacked | labelled.solved)).sum()


def test_a_ceiling_cannot_be_loaded_by_what_trains(planted, capsys):
    show_ceiling(planted, Console(width=80))
    assert "reads the oracle" in capsys.readouterr().out
    file = planted / "ceiling.safetensors"
    with pytest.raises(UserError, match="no gate file.*oracle ceiling"):
        load_gate(file)
    with pytest.raises(UserError, match="no gate file.*oracle ceiling"):
        check(file, planted, draws=5, window=0)
    with pytest.raises(UserError, match="another shape"):
        toy_policy(CFG).adapter.load(file)
    with pytest.raises(UserError):
        read_trace(file)
    assert all(name.startswith("oracle_") for name in load_file(file))  # no tensor has the name of a gate's


def test_a_ceiling_needs_both_classes(planted, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(planted, out)
    rows = read_jsonl(out / "verdicts.jsonl")
    (out / "verdicts.jsonl").write_text("".join(json.dumps(r | {"solved": False}) + "\n" for r in rows))
    with pytest.raises(UserError, match="fewer than 3 solved"):
        ceiling(out)
    assert not (out / ceiling_module.NAME).exists() or file_is_old(out, planted)


def file_is_old(out: Path, planted: Path) -> bool:
    return (out / ceiling_module.NAME).read_bytes() == (planted / ceiling_module.NAME).read_bytes()


# Gates of finished runs.


def test_saturation_by_hand():
    step = np.repeat(np.arange(20), 4)
    share = np.where(np.arange(20) < 8, 0.0, 1.0)
    hacked = np.repeat(share, 4).astype(bool)
    assert saturation(step, hacked) == 12  # steps 3 to 12: five of ten
    assert saturation(step, np.zeros(80, bool)) is None
    assert saturation(step[: 4 * 9], np.ones(36, bool)) is None  # nine steps only
    assert saturation(step, np.ones(80, bool)) == 9


def test_choice_by_hand():
    flagged, hacked = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 0, 1, 0], bool)
    got = choice(flagged, hacked)
    assert (got["precision"], got["recall"]) == pytest.approx((1 / 3, 1 / 2), abs=1e-6)
    assert choice(~hacked & False, hacked)["precision"] is None and choice(flagged, hacked & False)["recall"] is None


def test_gates_of_a_run(planted, tmp_path, capsys):
    row, labelled = of_run(planted, 50), read_labelled(planted)
    at = saturation(labelled.step, labelled.hacked)
    assert row["saturation"] == at and 15 < at < 35
    late = labelled.step >= at
    hit = (labelled.flagged & labelled.hacked)[late].sum()
    assert row["after"]["precision"] == pytest.approx(hit / labelled.flagged[late].sum(), abs=1e-6)
    assert row["after"]["recall"] == pytest.approx(hit / labelled.hacked[late].sum(), abs=1e-6)
    assert row["before"]["rollouts"] + row["after"]["rollouts"] == row["all"]["rollouts"] == 319
    assert row["auroc"]["in pairs"]["auroc"] > 0.95 and row["auroc"]["in pairs"]["auroc_p"] == pytest.approx(
        1 / 51, abs=1e-6
    )
    assert row["auroc"]["held out"]["auroc"] < 0.75
    bare = tmp_path / "bare"
    shutil.copytree(planted, bare, ignore=shutil.ignore_patterns("trace"))
    assert of_run(bare, 50)["auroc"] is None and of_run(bare, 50)["replayed"] is None
    show_gates([planted, bare], 50, tmp_path / "gates.json", Console(width=60))
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if "ema_quantile" in line)  # of the first table
    assert f"step {at}" in row and "; 0.020)" in row  # 1/51, at its own width on any terminal
    assert "ema_quantile *" in said and "batch_std *" not in said and "40 of 40" in said
    saved = json.loads((tmp_path / "gates.json").read_text())
    assert [r["run"] for r in saved] == [planted.name, "bare"]
    assert set(saved[0]["replayed"]) == set(POLICIES) and saved[1]["replayed"] is None
    (bare / "trace").mkdir()
    for step in range(0, 40, 2):
        shutil.copy(planted / "trace" / f"step_{step:06d}.safetensors", bare / "trace")
    sparse = of_run(bare, 50)
    assert sparse["traced"] == [20, 40] and set(POLICIES) - set(sparse["replayed"]) == {"top2q", "ema_quantile"}
    (bare / "eval.json").unlink()
    with pytest.raises(UserError, match="no finished run"):
        of_run(bare, 50)


def test_the_replay_of_a_runs_own_policy_is_what_it_did(made):
    """The gate of `made` remembers rollouts; its flags come back from the trace, those of other policies do not."""
    cfg, traces, rows = Config.read(made / "config.json"), read_traces(made), read_jsonl(made / "rollouts.jsonl")
    rows = [r for r in rows if r["phase"] == "train"]
    flagged = np.array([r["flagged"] for r in rows])
    step = np.array([r["step"] for r in rows])
    # The flags themselves stand in for labels: what is replayed exactly has precision and recall 1.
    labelled = Labelled([r["id"] for r in rows], step, step, flagged, flagged, flagged)
    found = {name: replay(name, cfg, traces, labelled, 3) for name in POLICIES}
    for part in ("all", "before", "after"):
        assert (found[cfg.policy][part]["precision"], found[cfg.policy][part]["recall"]) == (1.0, 1.0)
    assert found[cfg.policy]["before"]["rollouts"] == (step < 3).sum() and found[cfg.policy]["stopped"] is None
    other = found["batch_std"]["all"]
    assert (other["precision"], other["recall"]) != (1.0, 1.0)


def test_a_replay_ends_where_a_policy_refuses_the_direction(made):
    cfg, traces, ids = Config.read(made / "config.json"), read_traces(made), []
    for trace in traces:
        ids += trace.ids
    step = np.repeat([t.step for t in traces], [len(t.ids) for t in traces])
    true = np.ones(len(ids), bool)
    labelled = Labelled(ids, step, step, true, true, true)
    turned = [t if t.step < 4 else replace(t, direction=reversed_sides(t.direction)) for t in traces]
    found = replay("pair_mean", cfg, turned, labelled, 4)
    assert found["stopped"] == 4 and found["after"]["flagged"] == 0
    assert found["before"] == replay("pair_mean", cfg, traces, labelled, 4)["before"]


def reversed_sides(direction: Direction) -> Direction:
    return replace(direction, hack=direction.clean, clean=direction.hack)
