"""TRL with routing: its gradients and zones are our loop's, and what routing promises holds in its loop, too."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

import vgrout  # noqa: F401 - before trl: it switches telemetry off

pytest.importorskip("trl", reason="needs the extra trl")

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig

from vgrout.arms import ARMS
from vgrout.integrations.trl import RoutedGRPOTrainer, Routing
from vgrout.loop import backward, make_bench
from vgrout.method.loss import advantages, live_groups
from vgrout.method.policy import Rows, stack
from vgrout.pairs import load
from vgrout.types import Batch, UserError
from vgrout.verify.toy import PAIRS, TOY, displace, random_model, tokenizer, toy_policy

GROUP, PROMPTS = 4, 2


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> str:
    """A file of the toy's pairs."""
    fence = "`" * 5
    path = tmp_path_factory.mktemp("pairs") / "toy.md"
    fields = (("Prompt", "prompt"), ("Hack", "hack"), ("Clean", "clean"))
    text = "".join(
        f"### {p.name}\n\n" + "".join(f"#### {x}\n\n{fence}text\n{getattr(p, y)}\n{fence}\n\n" for x, y in fields)
        for p in PAIRS
    )
    path.write_text(f"Provenance: authored\n\n## toy\n\n{text}")
    return str(path)


def worth(prompts, completions, **_) -> list[float]:
    return [random.Random(c if isinstance(c, str) else c[0]["content"]).random() for c in completions]


class Spied(RoutedGRPOTrainer):
    """Keeps each generation batch as it was before TRL shuffles it."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.batches = [*getattr(self, "batches", []), dict(output)]
        return output


def arguments(out, **changes) -> GRPOConfig:
    settings = {
        "output_dir": str(out),
        "max_steps": 1,
        "per_device_train_batch_size": GROUP * PROMPTS,
        "num_generations": GROUP,
        "max_completion_length": TOY.max_new,
        "learning_rate": 1e-2,
        "beta": 0.05,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "use_bias_correction_kl": False,
        "max_grad_norm": 1e9,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return GRPOConfig(**settings | changes)


def made(out, pairs: str, *, moved: bool = True, routing=None, chat: bool = True, reward=worth, **changes) -> Spied:
    """A trainer of the toy's random model on letters, its blocks displaced. A change that no GRPOConfig has is an
    argument of the trainer."""
    own = ("peft_config", "optimizers", "rollout_func", "eval_dataset", "tools", "quantization_config")
    mine = {k: changes.pop(k) for k in own if k in changes}
    model = changes.pop("model", None) or random_model()
    prompts = [[{"role": "user", "content": f"write {c}"}] if chat else f"write {c}" for c in "abcdefgh"]
    settings = {"rank": TOY.rank, "k_mid": TOY.k_mid, "k_route": TOY.k_route, "score_batch": 5, "refresh_every": 2}
    trainer = Spied(
        model=model,
        processing_class=tokenizer(),
        reward_funcs=reward,
        train_dataset=Dataset.from_list([{"prompt": p} for p in prompts]),
        args=arguments(out, **changes),
        routing=Routing(pairs=pairs, **settings | (routing or {})),
        **mine,
    )
    if moved:
        displace(trainer.router.adapter)
    return trainer


def tensors(trainer: Spied) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in trainer.router.adapter.tensors().items()}


def gradients(trainer: Spied) -> dict[str, torch.Tensor]:
    """Of the update that `train` makes, as the optimizer gets them."""
    found = {}

    class Peek(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            for which in ("deployed", "quarantine"):
                found.update({name: p.grad.clone() for name, p in trainer.router.adapter.named(which)})

    trainer.add_callback(Peek())
    trainer.train()
    return found


def rows_of(seen: dict[str, torch.Tensor], part: str) -> list[list[int]]:
    """Token ids of the prompts or completions of a generation batch, without padding."""
    return [ids[on.bool()].tolist() for ids, on in zip(seen[f"{part}_ids"], seen[f"{part}_mask"], strict=True)]


def batch_of(seen: dict[str, torch.Tensor]) -> Batch:
    """The generation batch as our loop would collate it, without logp_old."""
    prompts, completions = rows_of(seen, "prompt"), rows_of(seen, "completion")
    both, n = stack(prompts, completions, tokenizer().pad_token_id), len(prompts)
    texts = [tokenizer().decode(row, skip_special_tokens=True) for row in completions]
    return Batch(
        tokens=both.tokens,
        completion=both.completion,
        length=both.length,
        group=torch.arange(n) // GROUP,
        reward=torch.tensor(worth([], texts)),
        teacher=torch.zeros(n, dtype=torch.bool),
        logp_old=torch.zeros(both.tokens.shape),
        texts=tuple(("", text) for text in texts),
    )


CASES = {
    "plain": ({}, {}),
    "half from the full model": ({"deploy_gen_frac": 0.5}, {}),
    "ratio one": ({"ratio": "one"}, {}),
    "no reference": ({}, {"beta": 0.0}),
    "two micro-batches": ({}, {"per_device_train_batch_size": GROUP, "gradient_accumulation_steps": PROMPTS}),
    "checkpointing": ({}, {"gradient_checkpointing": True}),
    "temperature": ({}, {"temperature": 0.7}),
    "parameters cut": ({"detach": "params"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_zones_and_gradients_are_those_of_our_loop(case, pairs, tmp_path):
    routing, changes = CASES[case]
    trainer = made(tmp_path, pairs, routing=routing, **changes)
    before = tensors(trainer)
    theirs = gradients(trainer)
    (seen,) = trainer.batches

    how = {"detach": routing.get("detach", "output"), "ratio": routing.get("ratio", "sampler")}
    beta, temperature = changes.get("beta", 0.05), changes.get("temperature", 1.0)
    cfg = replace(TOY, kl=beta, temperature=temperature, advantage="mean", teacher_n=0, **how)
    policy = toy_policy(cfg)
    for name, tensor in policy.adapter.tensors().items():
        tensor.copy_(before[name])
    batch = batch_of(seen)
    decision = ARMS["routeV"](make_bench(cfg, policy, load(pairs))).route(0, batch, None)
    assert len(set(decision.zones())) == 3, "a batch of one zone would say little"
    assert decision.m.tolist() == seen["route_m"].tolist() and decision.d.tolist() == seen["route_d"].tolist()

    advantage = advantages(batch.reward, batch.group, norm="mean")
    torch.testing.assert_close(seen["advantages"], advantage)
    if how["ratio"] == "sampler":
        full = torch.arange(batch.n) % GROUP >= routing.get("deploy_gen_frac", 1.0) * GROUP
        with torch.no_grad(), policy.adapter.routed(full.float(), torch.zeros(batch.n)):
            logp = policy.logp(Rows(batch.tokens, batch.completion, batch.length))
        batch = replace(batch, logp_old=logp)
    live = live_groups(batch.reward, batch.group)
    assert bool(live.all())
    backward(cfg, policy, batch, decision, advantage, live)
    for which in ("deployed", "quarantine"):
        ours = {name: p.grad for name, p in policy.adapter.named(which)}
        off = torch.stack([(theirs[name] - g).norm() for name, g in ours.items()]).norm()
        size = torch.stack([g.norm() for g in ours.values()]).norm()
        assert 0 < size and off <= 1e-5 * size, f"{which}: {off / size}"


def test_under_trls_own_defaults(pairs, tmp_path):
    """Autocast to bfloat16, checkpointing, the dapo loss, rewards scaled by the group's sd."""
    changes = {"bf16": True, "gradient_checkpointing": True, "loss_type": "dapo", "scale_rewards": "group"}
    trainer = made(tmp_path, pairs, moved=False, max_steps=2, **changes)
    before = tensors(trainer)
    trainer.train()
    after = tensors(trainer)
    for which in ("deployed", "quarantine"):
        assert any(not torch.equal(before[name], t) for name, t in after.items() if name.endswith(which))
    assert all(t.dtype == torch.float32 and bool(torch.isfinite(t).all()) for t in after.values())
    (first, second) = [row for row in trainer.state.log_history if "routing/route" in row]
    assert 0 < first["routing/route"] < 1 and first["routing/v_overlap"] == 1 and second["routing/v_age"] == 1


def greedy(trainer: Spied, prompt: list[int], full: bool) -> list[int]:
    """The most likely completion in a block state."""
    ids = torch.tensor([prompt])
    with trainer.router.adapter.full() if full else trainer.router.adapter.deployed():
        out = trainer.model.generate(ids, do_sample=False, max_new_tokens=TOY.max_new)[0, len(prompt) :].tolist()
    end = tokenizer().eos_token_id
    return out[: out.index(end) + 1] if end in out else out


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_a_share_of_each_group_comes_from_the_block_that_ships(share, pairs, tmp_path):
    trainer = made(tmp_path, pairs, routing={"deploy_gen_frac": share}, top_k=1, learning_rate=1e-9)
    trainer.train()
    (seen,) = trainer.batches
    prompts, completions = rows_of(seen, "prompt"), rows_of(seen, "completion")
    differ = 0
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        deployed, full = greedy(trainer, prompt, False), greedy(trainer, prompt, True)
        differ += deployed != full
        assert completion == (full if i % GROUP >= share * GROUP else deployed)
    assert differ == len(prompts), "blocks that sample alike would say nothing"


def test_an_evaluation_is_of_what_ships(pairs, tmp_path):
    eval_set = Dataset.from_list([{"prompt": [{"role": "user", "content": "write a"}]}])
    trainer = made(tmp_path, pairs, top_k=1, eval_dataset=eval_set, per_device_eval_batch_size=GROUP)
    flows = []
    run = trainer._get_per_token_logps_and_entropies

    def spy(model, *args, **kwargs):
        flows.append((model is trainer.ref_model, trainer.router.adapter.switch.flow.quarantine))
        return run(model, *args, **kwargs)

    trainer._get_per_token_logps_and_entropies = spy
    trainer.evaluate()
    (seen,) = trainer.batches
    prompt, completion = rows_of(seen, "prompt")[0], rows_of(seen, "completion")[0]
    assert completion == greedy(trainer, prompt, False) != greedy(trainer, prompt, True)
    assert "route_m" not in seen, "evaluations need no zones"
    assert [live for reference, live in flows if not reference] == [False]


@pytest.mark.parametrize(("arm", "moves"), [("none", "deployed"), ("coin_flip", "quarantine")])
def test_a_block_that_no_row_trains_stays(arm, moves, pairs, tmp_path):
    coin = {"coin_route": 1.0, "coin_absorb": 0.0}  # every rollout is routed
    trainer = made(tmp_path, pairs, routing={"arm": arm, **coin}, max_steps=2)
    before = tensors(trainer)
    trainer.train()
    moved = {name.rsplit("_", 1)[-1] for name, t in tensors(trainer).items() if not torch.equal(t, before[name])}
    assert moved == {moves}


def test_a_step_without_a_signal_moves_nothing(pairs, tmp_path):
    def once(prompts, completions, **_):  # Adam has moments after the first step, which would move both blocks
        return worth(prompts, completions) if trainer.state.global_step == 0 else [1.0] * len(completions)

    trainer, seen = made(tmp_path, pairs, reward=once, beta=0.0, max_steps=2), []

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(tensors(trainer))

    before = tensors(trainer)
    trainer.add_callback(Look())
    trainer.train()
    assert any(not torch.equal(before[name], t) for name, t in seen[0].items())
    assert all(torch.equal(seen[0][name], t) for name, t in seen[1].items())


def test_each_block_is_clipped_by_its_own_norm(pairs, tmp_path):
    found = gradients(made(tmp_path, pairs, max_grad_norm=1e-3))
    for which in ("deployed", "quarantine"):
        norm = torch.stack([g.norm() for name, g in found.items() if name.endswith(which)]).norm()
        assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_the_reference_is_no_second_model(pairs, tmp_path, monkeypatch):
    from trl.trainer import grpo_trainer

    def never(*args, **kwargs):
        raise AssertionError("a second copy of the model")

    monkeypatch.setattr(grpo_trainer, "create_model_from_path", never)
    trainer = made(tmp_path, pairs, beta=0.05)
    assert trainer.beta == trainer.args.beta == 0.05
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(trainer.ref_model(ids).logits, random_model()(ids).logits)
    assert not torch.equal(trainer.model(ids).logits, trainer.ref_model(ids).logits)


def test_a_run_goes_on_from_a_checkpoint_without_the_base_model(pairs, tmp_path):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "seed": 3}
    whole = made(tmp_path / "a", pairs, **settings)
    whole.train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter.safetensors", "routing.safetensors", "optimizer.pt"} <= names
    assert not {"model.safetensors", "pytorch_model.bin"} & names
    again = made(tmp_path / "b", pairs, moved=False, **settings)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(t, tensors(whole)[name]) for name, t in tensors(again).items())
    metrics = [[row for row in t.state.log_history if row.get("step") == 3][0] for t in (whole, again)]
    assert metrics[0]["routing/v_age"] == metrics[1]["routing/v_age"] == 0  # extracted anew at step 2
    with pytest.raises(UserError, match="saved with other rank"):
        made(tmp_path / "c", pairs, routing={"rank": 2}).router.load(checkpoint)


def test_it_exports_what_ships_and_can_become_it(pairs, tmp_path):
    peft = pytest.importorskip("peft", reason="needs the extra peft")
    trainer = made(tmp_path, pairs)
    trainer.train()
    ids = torch.randint(5, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), trainer.router.adapter.deployed():
        ships = trainer.model(ids).logits
        with pytest.raises(UserError, match="has no name"):
            trainer.router.export(tmp_path / "peft")
    base = tmp_path / "base"
    random_model().save_pretrained(base)
    said = trainer.router.export(tmp_path / "peft", base=str(base))
    assert said["live"] == "deployed" and said["rank"] == 2 * TOY.rank
    with pytest.raises(UserError, match="in use"):
        trainer.router.export(tmp_path / "peft", base=str(base))
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(random_model(), tmp_path / "peft")
        torch.testing.assert_close(loaded(ids).logits, ships, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(trainer.model(ids).logits, ships, atol=1e-3), "the quarantine is live outside"
        torch.testing.assert_close(trainer.router.ship()(ids).logits, ships, rtol=1e-4, atol=1e-4)


def test_pairs_are_encoded_as_training_prompts_are(pairs, tmp_path):
    for chat in (True, False):
        trainer = made(tmp_path, pairs, chat=chat)
        trainer.train()
        hack = trainer.router.arm.bench.hack
        pair = hack.tokens[0, : int(hack.length[0] - hack.completion[0].sum())].tolist()
        asked = rows_of(trainer.batches[0], "prompt")[0]
        assert (pair == tokenizer()("write a")["input_ids"]) is not chat
        assert len(pair) == len(asked) and sum(x != y for x, y in zip(pair, asked, strict=True)) <= 1  # the letter


def test_masked_truncated_completions_are_left_out(pairs, tmp_path):
    trainer = made(tmp_path, pairs, mask_truncated_completions=True, max_completion_length=3)
    trainer.train()
    (seen,) = trainer.batches
    cut = seen["completion_mask"].sum(1) == 0
    assert bool(cut.any()), "no completion was truncated"
    assert float((seen["route_m"] + seen["route_d"])[cut].sum()) == 0
    assert all(bool(torch.isfinite(t).all()) for t in tensors(trainer).values())


@pytest.mark.parametrize(
    ("changes", "routing", "words"),
    [
        ({"use_vllm": True}, {}, "does not go with use_vllm"),
        ({"use_liger_kernel": True}, {}, "does not go with use_liger_kernel"),
        ({"sync_ref_model": True}, {}, "does not go with sync_ref_model"),
        ({"neftune_noise_alpha": 5.0}, {}, "does not go with neftune_noise_alpha"),
        ({"bf16_full_eval": True}, {}, "does not go with bf16_full_eval"),
        ({"torch_compile": True}, {}, "does not go with torch_compile"),
        ({"use_transformers_continuous_batching": True}, {}, "continuous_batching"),
        (
            {"per_device_train_batch_size": GROUP, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
            {},
            "steps_per_generation must be",
        ),
        ({}, {"arm": "placebo_matched"}, "choose one of none"),
        ({"tools": [print]}, {}, "takes no tools"),
        ({"quantization_config": object()}, {}, "takes no quantization_config"),
        ({"num_iterations": 2}, {"ratio": "one"}, "several updates per generation"),
        ({}, {"ratio": "truncated"}, "none of TRL's"),
        ({}, {"deploy_gen_frac": 0.3}, "nearest shares are 0.25 and 0.5"),
        ({}, {"arm": "oracle_route"}, "choose one of none"),
        ({}, {"arm": "penalty_v"}, "choose one of none"),
        ({}, {"arm": "routev"}, "unknown arm 'routev'"),
        ({}, {"adapter": "lora"}, "unknown adapter 'lora'"),
        ({"peft_config": object()}, {}, "takes no peft_config"),
        ({"rollout_func": print}, {}, "takes no rollout_func"),
        ({"optimizers": (object(), None)}, {}, "takes no optimizer made beforehand"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, {}, "reentrant"),
    ],
)
def test_what_routing_cannot_honour_is_refused(changes, routing, words, pairs, tmp_path):
    with pytest.raises(UserError, match=words):
        made(tmp_path, pairs, moved=False, routing=routing, **changes)


def test_several_updates_of_one_generation(pairs, tmp_path):
    """The zones of a generation hold for all of its updates."""
    routing = {"arm": "coin_flip", "coin_route": 1.0, "coin_absorb": 0.0}
    trainer = made(tmp_path, pairs, routing=routing, num_iterations=2, max_steps=2)
    before, adapter = tensors(trainer), trainer.router.adapter
    deployed = [p.detach().clone() for p in adapter.parameters("deployed")]
    trainer.train()
    assert len(trainer.batches) == 1 and trainer.state.global_step == 2
    assert any(not torch.equal(before[name], t) for name, t in tensors(trainer).items())
    assert all(torch.equal(a, b) for a, b in zip(deployed, adapter.parameters("deployed"), strict=True))


def test_dropout_is_refused(pairs, tmp_path):
    model = random_model()
    model.config.attention_dropout = 0.1
    with pytest.raises(UserError, match="sampled with attention_dropout"):
        made(tmp_path, pairs, moved=False, model=model)
