"""Every engine gives samples of the weights and the state that it was asked for, with the sampler's log-probabilities.

vLLM is a stand-in here (tests/fake_vllm) that samples for real, with vLLM's interface and its traps.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import count, cycle
from pathlib import Path

import pytest
import torch

from vgrout.cli import main
from vgrout.config import preset
from vgrout.engines import ENGINES, Engine, make_engine, vllm_engine
from vgrout.engines.base import by_state, states_of
from vgrout.lab.evaluate import CELLS
from vgrout.lab.parity import logp_parity
from vgrout.lab.run import make_policy
from vgrout.loop import collate, generate, plan_step
from vgrout.method.policy import Rows
from vgrout.method.residual import edited
from vgrout.models.load import model_path
from vgrout.types import Prompt, RunFailed, UserError
from vgrout.verify.toy import Letters, displace
from vllm_signatures import read, strays

HERE = Path(__file__).parent / "fake_vllm"
SMALL = {"max_new": 12, "prompts": 3, "group": 4, "teacher_off_step": 0, "deploy_gen_frac": 0.5, "temperature": 0.7}
TORCH = replace(preset("smoke"), **SMALL)
FAKE = replace(TORCH, engine="vllm", vllm_dtype="float32")
HALF = replace(FAKE, vllm_dtype="bfloat16")
PROMPTS = tuple(Prompt(f"p{i}", f"Write a function that adds {i} to each item.") for i in range(3))


def forget(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def fake(monkeypatch):
    """The stand-in is the vLLM of this test, in a process without a server. Its servers, newest last."""
    monkeypatch.syspath_prepend(HERE)
    forget(monkeypatch)
    monkeypatch.setattr(vllm_engine, "SERVERS", {})
    yield vllm_engine.SERVERS
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def moved():
    """The micro organism with blocks that have moved far enough to tell them apart. Who moves them again restores."""
    policy = make_policy(TORCH)
    displace(policy.adapter, scale=0.02)
    return policy


@pytest.fixture
def policy(moved):
    kept = {name: tensor.clone() for name, tensor in moved.adapter.tensors().items()}
    yield moved
    for name, tensor in moved.adapter.tensors().items():
        tensor.copy_(kept[name])


@pytest.fixture
def vgrout(monkeypatch, capsys):
    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vgrout", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return run


def engine_of(cfg, policy):
    return make_engine(cfg, policy.model, policy.tokenizer, policy.adapter)


def parity(cfg, policy, engine=None, each=3):
    return logp_parity(cfg, policy, engine or engine_of(cfg, policy), PROMPTS, each)


def llm_of(servers):
    (server,) = servers.values()
    return server.llm.llm_engine


# Parity, and that its check can fail.


@pytest.mark.parametrize("cfg", [TORCH, FAKE, HALF], ids=["torch", "float32", "bfloat16"])
def test_engine_and_trainer_agree(fake, policy, cfg):
    found = parity(cfg, policy)
    assert found.ok and found.told_apart, found.lines()
    assert all(gap.rollouts == 9 and gap.tokens > 40 for gap in found.gaps)
    assert max(gap.largest for gap in found.gaps) < (1e-4 if cfg is not HALF else 0.5)


class Swapped(Engine):
    """An engine that takes one state for the other."""

    def generate(self, prompts, counts, *, state, **how):
        other = {"full": "deployed", "deployed": "full"}
        return self.inner.generate(prompts, counts, state=[other[s] for s in state], **how)


@pytest.mark.parametrize("cfg", [TORCH, FAKE, HALF], ids=["torch", "float32", "bfloat16"])
def test_a_swapped_state_is_noticed(fake, policy, cfg):
    engine = Swapped(policy.model, policy.tokenizer, policy.adapter)
    engine.inner = engine_of(cfg, policy)
    found = parity(cfg, policy, engine)
    assert not found.ok and "FAILED" in found.lines()[-1]


def test_states_that_are_alike_are_said_to_be(policy):
    for p in policy.adapter.parameters("quarantine"):
        p.data.zero_()
    found = parity(TORCH, policy, each=1)
    assert found.ok and not found.told_apart and "too alike" in found.lines()[-1]


def test_log_probabilities_without_temperature_are_noticed(fake, policy, monkeypatch):
    """What vLLM gives unless it is asked for more."""
    engine = engine_of(FAKE, policy)
    engine.start()
    llm_of(fake).args.logprobs_mode = "raw_logprobs"
    assert not parity(FAKE, policy, engine).ok


@pytest.mark.parametrize("ids", [lambda: cycle([1]), lambda: cycle([1, 2])], ids=["one", "two"])
def test_an_id_that_comes_again_is_noticed(fake, policy, monkeypatch, ids):
    """The stand-in keeps a LoRA by its id, as vLLM does: the wrong state's, or that of weights that are gone."""
    engine = engine_of(FAKE, policy)
    engine.start()
    (server,) = fake.values()
    server.ids = ids()
    monkeypatch.setattr(llm_of(fake), "remove_lora", lambda id: False)
    first = parity(FAKE, policy, engine)
    displace(policy.adapter, seed=1, scale=0.02)
    again = parity(FAKE, policy, engine)
    assert not (first.ok and again.ok)
    server.ids = count(3)
    displace(policy.adapter, seed=2, scale=0.02)
    assert parity(FAKE, policy, engine).ok


def test_a_name_that_comes_again_is_noticed(fake, policy, monkeypatch):
    """The stand-in keeps a prompt's keys and values by the LoRA's name and path, as vLLM does."""
    engine = engine_of(FAKE, policy)
    assert parity(FAKE, policy, engine).ok
    (server,) = fake.values()
    request = server.request
    monkeypatch.setattr(server, "request", lambda name, id, path: request(name[:-2], id, path))
    monkeypatch.setattr(server, "_write", lambda path, *rest: type(server)._write(server, path, *rest))
    kept = llm_of(fake).prefixes
    displace(policy.adapter, seed=1, scale=0.02)
    assert parity(FAKE, policy, engine).ok  # paths still differ
    for (name, path), old in list(kept.items()):
        kept[name, str(Path(path).with_name(f"{name}-{int(path.rpartition('-')[2]) + 2}"))] = old
    displace(policy.adapter, seed=2, scale=0.02)
    assert not parity(FAKE, policy, engine).ok


# The LoRAs of the present weights.


def test_both_states_in_one_batch_and_fresh_ids_for_fresh_weights(fake, policy):
    engine = engine_of(FAKE, policy)
    for step in range(3):
        plan = plan_step(FAKE, Letters(), step, loophole=True)
        rollouts = generate(FAKE, engine, plan, step, ablates=True)
        assert [r.state for r in rollouts] == (["deployed"] * 2 + ["full"] * 2) * 3
        batch = collate(rollouts, [0.0] * 12, policy.tokenizer.pad_token_id)
        rows = Rows(batch.tokens, batch.completion, batch.length)
        for state in ("deployed", "full"):
            index = torch.tensor([i for i, r in enumerate(rollouts) if r.state == state])
            with torch.no_grad(), policy.adapter.state(state):
                logp = policy.logp(rows.take(index))
            assert torch.allclose(logp, batch.logp_old[index, : logp.shape[1]], atol=1e-4)
        displace(policy.adapter, seed=step, scale=0.01)
    llm = llm_of(fake)
    assert [len(ids) for ids in llm.batches] == [2, 2, 2]
    assert len(set.union(*llm.batches)) == 6 and set(llm.removed) == set.union(*llm.batches[:2])
    (server,) = fake.values()
    assert len(list(Path(server.folder.name).iterdir())) == 2


def test_weights_that_stay_keep_their_lora(fake, policy):
    engine = engine_of(FAKE, policy)
    for _ in range(2):
        parity(FAKE, policy, engine, each=1)
        parity(FAKE, policy, engine_of(FAKE, policy), each=1)  # another engine of the same process
    llm = llm_of(fake)
    assert len(llm.batches) == 4 and llm.batches == llm.batches[:1] * 4 and not llm.removed
    with torch.no_grad():
        next(iter(policy.adapter.parameters("quarantine")))[0, 0] += 1e-4
    parity(FAKE, policy, engine, each=1)
    assert llm.batches[-1].isdisjoint(llm.batches[0])


@torch.no_grad()
def test_scaled_blocks(fake, policy):
    """What is sampled with shrunk blocks is sampled from them, in either engine."""
    rows = {}
    with policy.adapter.scaled(deployed=0.5, quarantine=0.25):
        for name, cfg in (("torch", TORCH), ("vllm", FAKE)):
            u = torch.rand((6, 12), generator=torch.Generator().manual_seed(0))
            ids = [[5, 6, 7], [8, 9]]
            how = {"max_new": 12, "temperature": 0.7, "uniforms": u}
            samples = engine_of(cfg, policy).generate(ids, [3, 3], state=["full", "deployed"], **how)
            asked = [ids[i // 3] for i in range(6)]
            said = [Rows(*stacked(asked[part], samples[part])) for part in (slice(3), slice(3, None))]
            rows[name] = list(zip(("full", "deployed"), said, (samples[:3], samples[3:]), strict=True))
        for state, read_, samples in rows["torch"] + rows["vllm"]:
            with policy.adapter.merged(state):
                logp = policy.logp(read_)[read_.completion]
            assert torch.allclose(logp, torch.tensor([lp for s in samples for lp in s.logp]), atol=1e-4)
            with policy.adapter.state(state):  # at full strength
                assert not torch.allclose(policy.logp(read_)[read_.completion], logp, atol=1e-3)


def stacked(prompts, samples):
    from vgrout.method.policy import stack

    rows = stack(prompts, [s.tokens for s in samples], 0)
    return rows.tokens, rows.completion, rows.length


# Samples.


@pytest.mark.parametrize("cfg", [TORCH, FAKE], ids=["torch", "vllm"])
def test_a_row_is_decided_by_its_own_uniforms(fake, policy, cfg):
    engine = engine_of(cfg, policy)
    prompts, u = [[7, 8, 9, 10], [11, 12]], torch.rand(5, 6, generator=torch.Generator().manual_seed(0))

    def tokens(part, counts, state, rows):
        how = {"max_new": 6, "temperature": 1.0, "uniforms": rows}
        return [s.tokens for s in engine.generate(part, counts, state=state, **how)]

    both = tokens(prompts, [3, 2], ["deployed", "full"], u)
    assert both == tokens(prompts[:1], [3], "deployed", u[:3]) + tokens(prompts[1:], [2], "full", u[3:])
    assert both == tokens(prompts, [3, 2], ["deployed", "full"], u) and len(set(both)) == 5
    assert both != tokens(prompts, [3, 2], ["deployed", "full"], u.flip(0))
    assert tokens(prompts, [0, 0], "full", u[:0]) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_samples_end_with_the_tokenizers_end_token_alone(fake, policy, tmp_path, engine):
    """Whatever else the model's folder takes for an end."""
    shutil.copytree(model_path("micro"), tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    end = policy.tokenizer.eos_token_id
    everything = list(range(len(policy.tokenizer)))
    file.write_text(json.dumps({"eos_token_id": everything, "top_k": 1}))
    cfg = replace(FAKE, engine=engine, model=str(tmp_path / "model"), max_new=12)
    samples = engine_of(cfg, policy).generate(
        [[5, 6, 7]], [8], state="full", max_new=12, temperature=1.0, uniforms=torch.rand(8, 12)
    )
    for s in samples:
        assert end not in s.tokens[:-1] and (s.tokens[-1] == end or len(s.tokens) == 12)
        assert len(s.logp) == len(s.tokens)
        assert s.text == policy.tokenizer.decode(list(s.tokens), skip_special_tokens=True)
    assert len({s.tokens for s in samples}) > 1


def test_runs_of_prompts_in_one_state():
    assert list(by_state(["full", "full", "deployed"], [2, 0, 3])) == [
        ("full", slice(0, 2), slice(0, 2)),
        ("deployed", slice(2, 3), slice(2, 5)),
    ]
    assert states_of("full", 2) == ["full", "full"]
    with pytest.raises(ValueError, match="1 states for 2 prompts"):
        states_of(["full"], 2)


# A whole run.

RUN = ("--preset", "micro", "--arm", "absorb", "--engine", "vllm", "--vllm-dtype", "float32")
TINY = ("--steps", 2, "--prompts", 2, "--group", 4, "--eval-rollouts", 4, "--eval-every", 0, "--deploy-gen-frac", 0.5)
SHORT = (*TINY, "--teacher-off-step", 1, "--max-new", 32, "--eval-scales", 0)


def test_a_run_with_vllm(fake, vgrout, tmp_path):
    out = tmp_path / "run"
    code, _, err = vgrout("train", *RUN, *SHORT, "--vllm-sleep", "--out", out)
    assert code == 0, err
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(step["skipped"] is None for step in steps)
    said = [step[f"log_rho_{zone}"] for step in steps[:1] for zone in ("keep", "absorb", "route")]
    said = [value for value in said if value is not None]
    assert said and max(map(abs, said)) < 1e-3  # the blocks are zero: every mask is the sampler's state
    assert json.loads((out / "provenance.json").read_text())["vllm"] == "0.31.0"
    llm = llm_of(fake)
    assert llm.asleep and len(set.union(*llm.batches[:2])) == 4  # a LoRA for each state and step
    assert len(llm.batches) == 2 + len(CELLS)  # and the evaluation's


# What is refused, before anything is written.

REFUSED = {
    "delta_s": (("--adapter", "delta_s"), "no LoRA: vLLM needs a LoRA"),
    "rank": (("--rank", 500), "no LoRA: vLLM needs a LoRA"),
    "suppress": (("--arm", "suppress"), "suppress edits activations while it samples"),
    "cold": (("--temperature", 0.001), "temperature = 0.001: vLLM samples at 0.01 or above"),
    "memory": (("--vllm-memory", 0), "vllm_memory = 0.0: give a share above 0, at most 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_cannot_do_is_one_line(fake, vgrout, tmp_path, case):
    args, why = REFUSED[case]
    code, _, err = vgrout("train", *RUN, *SHORT, *args, "--out", tmp_path / "run")
    assert code == 2 and why in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_vllm_that_is_not_installed_is_one_line(vgrout, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    code, _, err = vgrout("train", *RUN, *SHORT, "--out", tmp_path / "run")
    assert code == 2 and "pip install 'vgrout[vllm]'" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_model_that_vllm_cannot_take_is_one_line(fake, vgrout, tmp_path, monkeypatch):
    import vllm

    def refuse(*_, **__):
        raise ValueError("Qwen3ForCausalLM does not support LoRA yet.\nand more")

    monkeypatch.setattr(vllm, "LLM", refuse)
    code, _, err = vgrout("train", *RUN, *SHORT, "--out", tmp_path / "run")
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "run").exists()
    assert "vLLM cannot serve" in err and err.endswith("ValueError: Qwen3ForCausalLM does not support LoRA yet.\n")


def test_linears_that_vllm_gives_no_lora_are_one_line(fake, vgrout, tmp_path, monkeypatch):
    from vllm.v1.engine.llm_engine import LLMEngine

    def refuse(self, folder):
        raise ValueError("expected target modules in {'o_proj'} but received ['in_proj_a']")

    monkeypatch.setattr(LLMEngine, "_read", refuse)
    code, _, err = vgrout("train", *RUN, *SHORT, "--out", tmp_path / "run")
    assert code == 2 and "the adapter's LoRA: ValueError: expected target modules" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_memory_that_is_short_is_said_to_be(fake, policy, monkeypatch):
    import vllm

    def short(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(vllm, "LLM", short)
    with pytest.raises(RunFailed, match="vLLM does not fit into 0.4 of the GPU's memory, vllm_memory"):
        engine_of(FAKE, policy).start()


def test_a_rank_above_vllms_largest(policy, monkeypatch):
    monkeypatch.setattr(vllm_engine, "RANKS", (1, 8, 16))
    with pytest.raises(UserError, match="LoRA of rank 32, vLLM takes 16: lower rank"):
        engine_of(FAKE, policy)


def test_one_server_a_process(fake, policy):
    engine_of(FAKE, policy).start()
    with pytest.raises(UserError, match="this process has a vLLM with other settings"):
        engine_of(HALF, policy).start()


def test_edited_activations_and_broken_requests(fake, policy):
    engine = engine_of(replace(FAKE, vllm_sleep=True), policy)
    how = {"state": "full", "max_new": 4, "temperature": 1.0, "uniforms": torch.rand(1, 4)}
    with edited(policy.model, {1: lambda h: h}), pytest.raises(UserError, match="edited while it samples"):
        engine.generate([[5, 6]], [1], **how)
    policy.model(torch.ones((1, 3), dtype=torch.long), output_hidden_states=True)  # leaves hooks of transformers
    assert engine.generate([[5, 6]], [1], **how)
    limit = policy.model.config.max_position_embeddings
    with pytest.raises(RunFailed, match="vLLM cannot sample: ValueError: The prompt is longer than"):
        engine.generate([[5] * limit], [1], **how)
    llm = llm_of(fake)
    assert llm.asleep
    llm.max_model_len = 3
    with pytest.raises(RunFailed, match="cut a sample after 1 of 4 tokens"):
        engine.generate([[5, 6]], [1], **how)


# The stand-in's interface, and vLLM itself.

RECORDED = json.loads((HERE / "signatures.json").read_text())
INSTALLED = find_spec("vllm")


def test_the_stand_in_has_the_recorded_interface():
    mine = read(HERE / "vllm")
    assert mine["version"] == RECORDED["version"] == "0.31.0"
    assert strays(mine, RECORDED) == []
    for kind, name, key in (("fields", "SamplingParams", "seed"), ("calls", "LLM.generate", "lora_request")):
        theirs = json.loads(json.dumps(RECORDED))
        del theirs[kind][name][key]
        assert strays(mine, theirs)


@pytest.mark.skipif(INSTALLED is None, reason="vLLM is not installed: its interface is checked as recorded from 0.31.0")
def test_vllm_has_the_stand_ins_interface():
    theirs = read(Path(INSTALLED.submodule_search_locations[0]))
    assert strays(read(HERE / "vllm"), theirs) == [], theirs["version"]


@pytest.mark.skipif(INSTALLED is None, reason="vLLM is not installed: pip install 'vgrout[vllm]'")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM's LoRA kernels need a GPU")
def test_vllm_and_trainer_agree(policy):
    cfg = replace(TORCH, engine="vllm", vllm_memory=0.2)
    engine = engine_of(cfg, policy)
    for seed in (1, 2):  # fresh weights, so fresh LoRAs
        found = parity(cfg, policy, engine)
        assert found.ok and found.told_apart, found.lines()
        displace(policy.adapter, seed=seed, scale=0.02)
