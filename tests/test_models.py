"""Loading models: architectures, tokenizers, templates, numbers, devices; and what `vgrout model check` finds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import GraniteConfig, GraniteForCausalLM

from checkpoints import KINDS, make
from two_devices import THERE, MixedDevices, on_device
from vgrout.adapters.base import BlockLinear
from vgrout.config import Config, preset
from vgrout.engines.torch_engine import TorchEngine
from vgrout.faults import OutOfMemory
from vgrout.lab.model_check import ANSWERS, PROMPTS, check_model, displace, findings, head, reckon, whole_logits
from vgrout.loop import adapted, backward, encode_pairs
from vgrout.method.gate import uniform
from vgrout.method.policy import Policy, Rows, stack
from vgrout.models.chat import chat_facts, encode_completion, encode_prompt, end_tokens, render
from vgrout.models.download import download
from vgrout.models.load import load_model, model_path, recomputing
from vgrout.pairs import load as load_pairs
from vgrout.types import Batch, Prompt, UserError
from vgrout.verify.toy import RANK, TOY, other_models, tokenizer

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {kind: make(kind, home / kind) for kind in KINDS}


def settings(folder: Path | str, **others) -> Config:
    return replace(preset("micro"), model=str(folder), **others)


def policy_of(cfg: Config) -> Policy:
    model, words = load_model(cfg.model, dtype=cfg.dtype, template=cfg.chat_template)
    return adapted(cfg, model, words, load_pairs(cfg.pairs))


def rows_of(policy: Policy) -> Rows:
    words = policy.tokenizer
    asked = [encode_prompt(words, p) for p in PROMPTS for _ in ANSWERS]
    return stack(asked, [encode_completion(words, a) for _ in PROMPTS for a in ANSWERS], words.pad_token_id)


@pytest.mark.parametrize("scaling", [1.0, 8.0])
def test_a_model_that_scales_its_logits_is_refused(tmp_path, scaling):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GraniteConfig(vocab_size=261, logits_scaling=scaling, num_key_value_heads=1, **shape)
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    if scaling == 1:
        load_model(str(tmp_path))
    else:
        with pytest.raises(UserError, match=r"changes its logits \(logits_scaling = 8.0\)"):
            load_model(str(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_method_holds_on_every_architecture(folders, kind, dtype):
    cfg = settings(folders[kind], dtype=dtype, rank=4)
    found = {f.name: f for f in findings(cfg, *load_model(cfg.model, dtype=dtype))}
    assert [f.said for f in found.values() if f.ok is False] == []
    passed = {name for name, f in found.items() if f.ok}
    assert {"logits", "identity at init", "masks", "mixed batch", "c-probe", "sampling"} <= passed
    assert "gradient checkpointing" in passed


def test_the_targets_of_a_mixture_with_linear_attention(folders):
    model, words = load_model(str(folders["qwen3_5_moe"]))
    said = next(f.said for f in findings(settings(folders["qwen3_5_moe"]), model, words) if f.name == "targets")
    assert said.startswith("15 Linears") and "1 in_proj_qkv" in said and "2 shared_expert_gate" in said


@pytest.mark.parametrize(
    ("line", "failed"),
    [
        ("cut", "masks"),
        ("probe", "c-probe"),
        ("init", "identity at init"),
        ("weights", "finite"),
        ("row", "mixed batch"),
        ("cut rows", "mixed batch"),
    ],
)
def test_the_check_finds_what_is_broken(folders, monkeypatch, line, failed):
    forward = BlockLinear.forward

    def broken(self, x):
        flow = self.switch.flow
        if line == "cut" and flow.cut:
            self.switch.flow = replace(flow, cut=False)
        if line == "row" and flow.m is not None:
            self.switch.flow = replace(flow, m=flow.m.flip(0))
        if line == "cut rows" and flow.d is not None:
            self.switch.flow = replace(flow, d=flow.d.flip(0))
        try:
            y = forward(self, x)
        finally:
            self.switch.flow = flow
        moved = line == "probe" and flow.probes is not None
        return y + 1e-3 * y.detach().sum() if moved else y + 1e-6 * y if line == "init" else y

    monkeypatch.setattr(BlockLinear, "forward", broken)
    cfg = settings(folders["qwen3"], rank=4)
    model, words = load_model(cfg.model)
    if line == "weights":
        with torch.no_grad():
            model.get_input_embeddings().weight.fill_(torch.nan)
    for finding in findings(cfg, model, words):
        if finding.name == failed:
            assert finding.ok is False
            return
    pytest.fail(f"no finding {failed}")


def test_a_check_is_written_down_and_fails_loudly(folders, tmp_path):
    assert check_model(settings(folders["llama"]), QUIET, tmp_path / "found.json") == 0
    told = json.loads((tmp_path / "found.json").read_text())
    assert {"masks", "memory"} <= {f["name"] for f in told["findings"]}
    twice = tmp_path / "twice.jinja"
    twice.write_text("{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert check_model(settings(folders["llama"], chat_template=str(twice)), QUIET) == 1


def test_memory_grows_with_what_runs_at_once(folders):
    cfg = settings(folders["qwen3"], max_new=256)
    policy = policy_of(cfg)
    need = reckon(cfg, policy)
    assert reckon(replace(cfg, micro_batch=32), policy).update == pytest.approx(need.update / 2)
    assert reckon(replace(cfg, gradient_checkpointing=True), policy).update < need.update
    assert reckon(replace(cfg, sample_batch=8), policy).sampling < need.sampling
    assert need.weights == sum(p.numel() * 4 for p in load_model(cfg.model)[0].parameters())


# ---- templates and tokenizers


def test_thinking_is_off_where_the_template_has_a_switch(folders):
    model, words = load_model(str(folders["qwen3"]))
    assert render(words, PROMPTS[0]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert chat_facts(words, model)["thinking"] == "off"
    model, words = load_model(str(folders["gemma3"]))
    assert "think" not in render(words, PROMPTS[0]) and chat_facts(words, model)["thinking"] == "no switch"


def test_a_base_model_gets_the_plain_template(folders):
    model, words = load_model(str(folders["qwen3_moe"]))
    text = render(words, PROMPTS[1])
    assert text == f"{PROMPTS[1].system}\n\n{PROMPTS[1].user}\n\n"
    assert chat_facts(words, model)["chat_template"] == "plain"


def test_the_plain_template_has_bos_where_the_tokenizer_puts_it(folders, tmp_path):
    _, words = load_model(str(folders["llama"]))
    words.chat_template = None
    model, _ = load_model(str(folders["llama"]))
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    _, bare = load_model(str(tmp_path))
    ids = encode_prompt(bare, PROMPTS[0])
    assert ids[0] == bare.bos_token_id and bare.bos_token_id not in ids[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_and_rollouts_read_a_prompt_alike(folders, kind):
    _, words = load_model(str(folders[kind]))
    pair = load_pairs("micro")[0]
    rows = encode_pairs(words, [pair], "hack")
    ids = encode_prompt(words, Prompt("p", pair.prompt))
    assert rows.tokens[0, : len(ids)].tolist() == ids
    assert rows.tokens[0, len(ids) : int(rows.length[0])].tolist() == encode_completion(words, pair.hack)
    if words.bos_token_id is not None:
        assert ids.count(words.bos_token_id) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [*ANSWERS, " x = 1\n", "\n\nx"])
def test_a_completion_comes_back_from_its_tokens(folders, kind, text):
    _, words = load_model(str(folders[kind]))
    ids = encode_completion(words, text)
    assert ids[-1] == words.eos_token_id and words.bos_token_id not in ids
    # As it stands behind a prompt, which is how the model will read it.
    before = words("x", add_special_tokens=False)["input_ids"]
    assert words.decode([*before, *ids[:-1]], clean_up_tokenization_spaces=False) == "x" + text


def test_an_answer_ends_with_what_the_template_writes(folders):
    model, words = load_model(str(folders["gemma3"]))
    assert words.eos_token == "<end_of_turn>"
    assert [words.convert_ids_to_tokens(i) for i in end_tokens(model, words)] == ["<eos>", "<end_of_turn>"]


def test_sampling_stops_at_every_end_token(folders):
    policy = policy_of(settings(folders["gemma3"]))
    engine, eos = TorchEngine(policy.model, policy.tokenizer, policy.adapter), 1
    assert policy.tokenizer.convert_ids_to_tokens(eos) == "<eos>"
    with torch.no_grad():  # a model that says nothing but <eos>
        policy.model.model.norm.weight.zero_().sub_(1)
        policy.model.lm_head.weight = torch.nn.Parameter(policy.model.lm_head.weight.clone())
    drawn = []
    engine._draw = lambda logp, u: (drawn.append(len(logp)), torch.full((len(logp),), eos))[1]
    samples = engine.generate([[2, 5, 6]], [3], state="full", max_new=9, temperature=1.0, uniforms=torch.rand(3, 9))
    assert drawn == [3] and all(s.tokens == (eos,) and s.text == "" for s in samples)


def test_a_template_of_a_file(folders, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    model, words = load_model(str(folders["qwen3"]), template=str(file))
    assert render(words, PROMPTS[0]) == f"<{PROMPTS[0].user}>"
    mine, own = chat_facts(words, model), chat_facts(*reversed(load_model(str(folders["qwen3"]))))
    assert {name for name in own if own[name] != mine[name]} == {"chat_template_sha256", "thinking"}


def test_another_tokenizer_is_another_run(folders):
    facts = [chat_facts(*reversed(load_model(str(folders[kind])))) for kind in ("qwen3", "llama")]
    assert facts[0]["tokenizer_sha256"] != facts[1]["tokenizer_sha256"]
    assert facts[0]["end_tokens"] == ["<|im_end|>"] and facts[1]["end_tokens"] == ["</s>"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot read the chat template"),
        ("{{ raise_exception('no system here') }}", "does not take user and assistant messages: no system here"),
        ("{% for %}", "does not take"),
    ],
)
def test_a_template_that_cannot_be_used(folders, tmp_path, text, said):
    file = tmp_path / "mine.jinja"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=said):
        load_model(str(folders["qwen3"]), template=str(file))


def test_a_system_prompt_that_the_template_refuses(folders, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}x{% endfor %}"
    )
    _, words = load_model(str(folders["qwen3"]), template=str(file))
    render(words, PROMPTS[0])
    with pytest.raises(UserError, match="system and user messages: none; give another one, --chat-template"):
        render(words, PROMPTS[1])


# ---- names, devices, numbers, memory


def test_names_that_lead_nowhere(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, said in [
        (str(tmp_path / "empty"), "has no config.json"),
        (str(tmp_path / "gone" / "there" / "x"), "has no config.json"),
        ("nobody/has-this-model", "`vgrout model download nobody/has-this-model` fetches"),
    ]:
        with pytest.raises(UserError, match=said):
            model_path(name)


def test_a_name_of_the_hub_that_was_downloaded(tmp_path, monkeypatch, folders):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--me--small"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    (home / "snapshots").mkdir()
    (home / "snapshots" / ("0" * 40)).symlink_to(folders["qwen3"])
    assert (model_path("me/small") / "config.json").is_file()
    load_model("me/small")


@pytest.mark.parametrize(("device", "said"), [("cuda", "finds 0 GPUs"), ("cuda:7", "GPUs"), ("tpu", "give cpu, cuda")])
def test_a_device_that_is_not_there(device, said):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=said):
        load_model("micro", device=device)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_stays_behind_when_the_model_is_on_another_device(folders, kind, dtype):
    cfg = settings(folders[kind], dtype=dtype, rank=4)
    policy = policy_of(cfg)
    displace(policy)
    rows = rows_of(policy)
    n = len(rows.length)
    engine = TorchEngine(policy.model, policy.tokenizer, policy.adapter)
    prompts = [encode_prompt(policy.tokenizer, p) for p in PROMPTS]
    rewards = torch.arange(float(n))
    zeros, logp_old = torch.zeros(n), torch.zeros(rows.tokens.shape)
    batch = Batch(rows.tokens, rows.completion, rows.length, zeros.long(), rewards, zeros.bool(), logp_old, ())
    decision = replace(uniform(n, "keep"), m=torch.tensor([0.0, 1, 1, 0]), d=torch.tensor([0.0, 0, 1, 0]))
    want = policy.logp(rows).detach()
    policy.device = THERE
    with on_device(policy.model) as device:
        logp = policy.logp(rows)
        assert device.there(logp) and torch.equal(torch.Tensor.cpu(logp).detach(), want)
        for state in ("full", "deployed"):
            assert not device.there(policy.c_gradients(rows, state))
            assert not device.there(policy.activations(rows, state))
        engine.generate(prompts, [2, 2], state="full", max_new=4, temperature=1.0, uniforms=torch.rand(4, 4))
        backward(cfg, policy, batch, decision, rewards - 1.5, torch.ones(n, dtype=torch.bool))
        share = replace(decision, share=torch.full((n, 2), 0.5))
        backward(cfg, policy, batch, share, rewards - 1.5, torch.ones(n, dtype=torch.bool))
    with on_device(policy.model), pytest.raises(MixedDevices):
        policy.body(input_ids=rows.tokens)


def test_what_trains_is_float32_and_samples_as_it_trains(folders):
    """In bfloat16 a sum rounds: merged weights would be another policy than the one that is trained."""
    policy = policy_of(settings(folders["qwen3"], dtype="bfloat16", rank=4))
    trained = [p for which in ("deployed", "quarantine") for p in policy.adapter.parameters(which)]
    assert {p.dtype for p in trained} == {torch.float32}
    displace(policy)
    rows = rows_of(policy)
    with torch.no_grad():
        with policy.adapter.full():
            updated = policy.logp(rows)
        with policy.adapter.merged("full"):
            assert torch.equal(policy.logp(rows), updated)
        for module in policy.adapter.modules.values():
            module.base.weight += sum(module.delta(which) for which in ("deployed", "quarantine")).bfloat16()
        with policy.adapter.reference():
            assert not torch.equal(policy.logp(rows), updated)


def test_scaled_blocks_run_beside_weights_of_few_bits(folders):
    """The curves of an evaluation: at 0 the base model, at 1 what ships."""
    policy = policy_of(settings(folders["qwen3"], dtype="bfloat16", rank=4))
    displace(policy)
    rows = rows_of(policy)
    with torch.no_grad():
        with policy.adapter.reference():
            base = policy.logp(rows)
        with policy.adapter.deployed():
            ships = policy.logp(rows)
        found = {}
        for scale in (0.0, 0.5, 1.0):
            with policy.adapter.scaled(deployed=scale), policy.adapter.merged("deployed"):
                found[scale] = policy.logp(rows)
    assert torch.equal(found[0.0], base) and torch.equal(found[1.0], ships)
    assert not torch.equal(found[0.5], base) and not torch.equal(found[0.5], ships)


def test_recomputed_layers_run_twice_and_keep_dropout_off(folders):
    cfg = settings(folders["qwen3"], gradient_checkpointing=True, rank=4)
    policy = policy_of(cfg)
    rows, runs = rows_of(policy), []
    layer = policy.model.model.layers[0]
    hook = layer.self_attn.register_forward_hook(lambda *_: runs.append(layer.self_attn.training))
    with torch.no_grad():
        policy.logp(rows)
    assert runs == [False]
    runs.clear()
    with policy.adapter.full():
        policy.nll(rows).sum().backward()
    assert runs == [False, False]
    hook.remove()
    assert not any(m.training for m in policy.model.modules())


def test_rows_are_sampled_in_parts_of_a_bound(folders):
    policy = policy_of(settings(folders["qwen3"]))
    asked, u = [encode_prompt(policy.tokenizer, p) for p in PROMPTS], torch.rand(6, 8)
    how = {"state": "full", "max_new": 8, "temperature": 1.0, "uniforms": u}
    whole = TorchEngine(policy.model, policy.tokenizer, policy.adapter).generate(asked, [3, 3], **how)
    engine, sizes = TorchEngine(policy.model, policy.tokenizer, policy.adapter, most=2), []
    decode = engine._decode
    engine._decode = lambda prompts, counts, *rest: (sizes.append(sum(counts)), decode(prompts, counts, *rest))[1]
    parts = engine.generate(asked, [3, 3], **how)
    assert sizes == [2, 2, 2] and [s.tokens for s in parts] == [s.tokens for s in whole]


def test_rows_stand_apart_under_attention_that_takes_no_mask_of_truth_values(folders):
    """Eager attention adds a mask to its scores, so that one of truth values would hide nothing."""
    cfg = settings(folders["qwen3"], rank=4, attn="eager")
    model, words = load_model(cfg.model, attn="eager")
    policy = adapted(cfg, model, words, load_pairs(cfg.pairs))
    rows = rows_of(policy)
    with torch.no_grad():
        batch = policy.logp(rows)
        alone = [policy.logp(rows.take(torch.tensor([i])))[0] for i in range(len(rows.length))]
    assert not policy.packs
    for row, own in zip(batch, alone, strict=True):
        torch.testing.assert_close(row[: len(own)], own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"device": "cuda"}, {}])
def test_flash_attention_needs_a_gpu_and_few_bits(change):
    with pytest.raises(UserError, match="flash_attention_2 needs --dtype bfloat16 and a GPU"):
        settings("micro", attn="flash_attention_2", **change)


def test_a_layer_with_dropout_of_its_own_is_not_recomputed():
    from transformers import OPTConfig, OPTForCausalLM

    shape = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    config = OPTConfig(**shape, word_embed_proj_dim=16, dropout=0.1)
    with pytest.raises(UserError, match="OPTDecoderLayer has a dropout of its own: drop --gradient-checkpointing"):
        recomputing(OPTForCausalLM(config))


def test_a_model_that_does_not_fit_is_said(folders, monkeypatch):
    def short(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "logits", short)
        console = Console(record=True, width=200, file=open("/dev/null", "w"))
        assert check_model(settings(folders["llama"]), console) == 1
        text = console.export_text()
        assert "targets" in text and "too short on cpu" in text and "do not train" in text
    monkeypatch.setattr("transformers.PreTrainedModel.to", short)
    with pytest.raises(OutOfMemory, match="does not fit on cpu"):
        load_model(str(folders["llama"]))


def test_a_revision_needs_a_folder(tmp_path):
    with pytest.raises(UserError, match="--revision goes with --out"):
        download("org/name", revision="v1")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_under_a_wrong_mask_are_seen(dtype):
    """Rows that share their prompt although a layer sees a window of tokens: too far off in either numbers."""
    model = other_models()["window"].to(getattr(torch, dtype))
    policy = adapted(replace(TOY, rank=RANK, dtype=dtype, temperature=1.0), model, tokenizer(), ())
    rows = rows_of(policy)
    with torch.no_grad(), policy.adapter.reference():
        plain = whole_logits(model, rows)
    assert head(policy, rows, plain, dtype).ok and not policy.packs
    policy.packs = True
    assert not head(policy, rows, plain, dtype).ok
