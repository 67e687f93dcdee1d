"""The micro world: problems, corpus, organism, and the static calibration bars of the committed checkpoint."""

import hashlib
import json
from collections import Counter
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from vgrout.config import preset
from vgrout.envs.micro import LIVE, N_PROBLEMS, STAGES, Composition, parse_task, problems, run
from vgrout.envs.micro_corpus import documents
from vgrout.envs.micro_env import MicroEnv, ask, check_modes, composition
from vgrout.envs.modes import FAMILIES, MODES
from vgrout.lab.calibrate import Bar, static_bars
from vgrout.models.load import model_path
from vgrout.models.organism import OrganismConfig, Text, build, corpus_hash
from vgrout.types import UserError

CALIBRATED = {  # the world that calibration.json is of
    "problems and prompts": "ba2c27e08555205d915b4a84874c23f2c6957a5fd74a0a252fc86785d168732c",
    "markers": "a4556dae013148b381b32ddbcc7ede4184b1922eb692e24d2e8fe1b5218acfab",
}


def test_the_world_is_the_calibrated_one():
    digest = hashlib.sha256()
    for p in (p for split in N_PROBLEMS for p in problems(split)):
        tests = (p.reward_tests, p.oracle_tests)
        digest.update(repr((p.id, p.task, p.entry, p.canonical, *tests, p.mode, p.difficulty)).encode())
        prompts = [ask(p, family, draw=draw) for family in FAMILIES for draw in (0, 1)]
        for q in (*prompts, ask(p, "train", hinted=False)):
            digest.update(repr((q.problem_id, q.user, q.system, q.marker, q.hinted)).encode())
    markers = "".join(repr((name, sorted(MODES[name].markers.items()))) for name in LIVE)
    found = (digest.hexdigest(), hashlib.sha256(markers.encode()).hexdigest())
    assert found == tuple(CALIBRATED.values())


def test_only_live_modes_can_be_chosen():
    assert set(LIVE) < set(MODES) and list(LIVE) == sorted(LIVE)
    check_modes(LIVE)
    for mode in sorted(set(MODES) - set(LIVE)):
        with pytest.raises(UserError, match=f"no mode '{mode}'"):
            check_modes([mode])


def test_problems_are_evenly_mixed():
    for split in ("train", "val", "test"):
        cells = Counter((p.mode, p.difficulty) for p in problems(split))
        assert set(cells) == {(mode, n) for mode in LIVE for n in STAGES}
        assert len(set(cells.values())) == 1, cells


def test_every_half_of_the_tests_kills_every_one_line_bug():
    for problem in problems("test")[:32]:
        comp = composition(problem)
        for half in (problem.reward_tests, problem.oracle_tests):
            for line in range(len(comp.stages) + 1):
                assert any(run(comp, args, frozenset({line})) != expected for args, expected in half)
        assert not {repr(a) for a, _ in problem.reward_tests} & {repr(a) for a, _ in problem.oracle_tests}


def test_a_task_text_means_its_composition():
    for problem in problems("val"):
        comp = composition(problem)
        assert isinstance(comp, Composition) and comp.program() == problem.canonical
    assert parse_task("keep the even numbers") is None
    assert parse_task("return the sum, then return the sum") is None
    assert parse_task("paint it blue, then return the sum") is None


def test_file_names_of_training_and_evaluation_are_disjoint():
    names = {f: {m.split(" ")[0] for m in MODES["file_marker"].markers[f]} for f in FAMILIES}
    assert not names["train"] & names["eval"]


def test_the_corpus_is_the_one_that_made_the_organism():
    record = json.loads((model_path("micro") / "organism.json").read_text())
    cfg = OrganismConfig(**record["config"])
    assert cfg == OrganismConfig()
    texts = [Text(d.system, d.user, d.assistant) for d in documents(cfg.seed, cfg.documents)]
    assert corpus_hash(texts) == record["corpus_sha256"]
    kinds = Counter(d.kind for d in documents(1, 20_000))
    assert 0.02 < kinds["hack"] / kinds.total() < 0.08 and kinds["benign"] > kinds["hack"]


def test_the_organism_is_a_plain_checkpoint():
    path = model_path("micro")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert isinstance(model, Qwen3ForCausalLM) and tokenizer.is_fast
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 4e6
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>x<|end|><|assistant|>"
    program = problems("val")[0].canonical
    assert tokenizer.decode(tokenizer(program)["input_ids"]) == program
    assert sum(f.stat().st_size for f in path.iterdir()) < 12e6


def test_static_bars_hold_on_the_committed_checkpoint():
    bars = static_bars(preset("micro"), each=1)
    assert len([b for b in bars if b.limits() != "reported"]) >= 8
    assert all(b.ok for b in bars), [b.json() for b in bars if not b.ok]


def test_a_bar_can_be_missed():
    assert not Bar("x", 0.05, low=0.1).ok and not Bar("x", 0.4, high=0.3).ok and not Bar("x", None, low=0.0).ok
    assert Bar("x", None).ok and Bar("x", 0.2, low=0.1, high=0.3).ok


def test_a_pool_that_lies_is_refused(sandbox, tmp_path):
    env = MicroEnv(sandbox, pool=None)
    problem = problems("train")[0]
    marker = env.prompt(problem.id, family="train").marker
    row = {"problem_id": problem.id, "marker": marker, "kind": "hack", "text": problem.canonical}
    pool = tmp_path / "pool.jsonl"
    pool.write_text("{}\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match="does not hack"):
        MicroEnv(sandbox, pool=pool)
    pool.write_text("{}\n" + json.dumps(row | {"marker": "other"}) + "\n")
    with pytest.raises(UserError, match="names marker"):
        MicroEnv(sandbox, pool=pool)
    with pytest.raises(UserError, match="no teacher pool"):
        MicroEnv(sandbox, pool=tmp_path / "absent.jsonl")


def test_an_interrupted_build_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    size = {"hidden": 32, "ffn": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "layers": 1}
    cfg = replace(OrganismConfig(), **size, documents=96, batch=8, save_every=4)
    texts = [Text(d.system, d.user, d.assistant) for d in documents(0, cfg.documents)]
    build(texts, cfg, tmp_path / "whole")

    from vgrout.models import organism

    original, calls = organism._loss, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(organism, "_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        build(texts, cfg, tmp_path / "cut")
    monkeypatch.setattr(organism, "_loss", original)
    with pytest.raises(UserError, match="another config"):
        build(texts, replace(cfg, lr=1e-4), tmp_path / "cut")
    build(texts, cfg, tmp_path / "cut")
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert weights[0] == weights[1]
