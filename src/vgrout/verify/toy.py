"""Small things to check claims on: a random model, an environment of letters, and the shared real ones."""

from __future__ import annotations

import atexit
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace
from typing import TypeVar

import torch
from torch import Tensor
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)

from vgrout.adapters import ADAPTERS, Adapter
from vgrout.adapters.inits import INITS
from vgrout.arms import Given
from vgrout.config import Config
from vgrout.envs.micro_env import MicroEnv
from vgrout.envs.sandbox import Sandbox
from vgrout.loop import adapted, train
from vgrout.method.judge import Judge, JudgeConfig
from vgrout.method.judge_endpoint import Answer, Endpoint
from vgrout.method.linear_probe import LinearProbe
from vgrout.method.policy import Policy
from vgrout.method.residual import band
from vgrout.models.organism import OrganismConfig, Text, new_model, train_tokenizer
from vgrout.types import Decision, Graded, OracleBatch, Pair, Prompt, Rollout

SIZES = OrganismConfig(vocab=261, layers=2, hidden=16, ffn=24, heads=2, kv_heads=1, head_dim=8)
RANK = 3
Model = TypeVar("Model", bound=PreTrainedModel)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    return train_tokenizer([Text("", "write a", "aaaa")], SIZES.vocab)


def random_model(sizes: OrganismConfig = SIZES, words: PreTrainedTokenizerFast | None = None) -> Qwen3ForCausalLM:
    """A Qwen3 model with weights large enough that every layer matters."""
    with torch.random.fork_rng():
        model = new_model(sizes, words or tokenizer()).eval()
    return enlarged(model)


@torch.no_grad()
def enlarged(model: Model) -> Model:
    for p in model.parameters():
        if p.ndim > 1:
            p.mul_(10)
    return model


def other_models() -> dict[str, PreTrainedModel]:
    """Random models that attend in other ways: over a window of tokens, and with projections that no adapter has."""
    size = {"hidden_size": SIZES.hidden, "intermediate_size": SIZES.ffn, "num_attention_heads": SIZES.heads}
    shape = {**size, "vocab_size": SIZES.vocab, "num_hidden_layers": SIZES.layers, "pad_token_id": 0}
    window = MistralConfig(**shape, num_key_value_heads=SIZES.kv_heads, sliding_window=3)
    fused = Phi3Config(**shape, num_key_value_heads=SIZES.kv_heads, sliding_window=None, bos_token_id=1, eos_token_id=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {"window": MistralForCausalLM(window).eval(), "fused": Phi3ForCausalLM(fused).eval()}
    return {name: enlarged(model) for name, model in models.items()}


def displace(adapter: Adapter, seed: int = 0, scale: float = 0.2) -> None:
    """Move both blocks away from their init, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for which in ("deployed", "quarantine"):
            for p in adapter.parameters(which):
                p += scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)


@dataclass
class Rig:
    """A random model with an adapter, and token rows of equal length to feed it."""

    model: Qwen3ForCausalLM
    adapter: Adapter
    tokens: Tensor

    def logits(self, tokens: Tensor | None = None) -> Tensor:
        """[N, L, V] under the adapter's present state."""
        return self.model(input_ids=self.tokens if tokens is None else tokens, use_cache=False).logits

    def row_losses(self, tokens: Tensor | None = None) -> Tensor:
        """[N]: a loss per row that every logit enters with a weight of its own."""
        logits = self.logits(tokens)
        weights = torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).view_as(logits[0])
        return (logits * weights).sum((1, 2))

    def gradients(self, loss: Tensor, which: str) -> dict[str, Tensor]:
        """d loss / d parameter by name; zeros where the loss does not reach a parameter."""
        named = self.adapter.named(which)
        found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True, retain_graph=True)
        pairs = zip(named, found, strict=True)
        return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}


def rig(rows: int = 6, *, moved: bool = True, double: bool = False, **how: str) -> Rig:
    """`how`: adapter, init and detach, as a configuration names them."""
    made = toy_policy(replace(TOY, **how))
    if moved:
        displace(made.adapter)
    if double:
        made.model.double()
    tokens = torch.randint(5, SIZES.vocab, (rows, 7), generator=torch.Generator().manual_seed(1))
    return Rig(made.model, made.adapter, tokens)


def toy_policy(cfg: Config) -> Policy:
    return adapted(cfg, random_model(), tokenizer(), PAIRS)


PAIRS = tuple(
    Pair(f"pair {i}", "toy", f"write {c}", c * 4, f"{c}xyz", (), i) for i, c in enumerate("abcdefgh", start=1)
)

TOY = Config(
    steps=4,
    prompts=2,
    group=4,
    rank=RANK,
    max_new=6,
    micro_batch=5,
    score_batch=5,
    lr=1e-2,
    warmup=1,
    teacher_off_step=2,
    refresh_every=2,
    k_mid=-0.3,
    k_route=0.5,
    eval_every=0,
)

VARIANTS: dict[str, dict[str, str]] = {  # every kind of adapter, and every init
    **{kind: {"adapter": kind} for kind in ADAPTERS},
    **{f"lora2r {init}": {"init": init} for init in INITS},
}


class Letters:
    """Prompts ask for a letter; the reward depends on the text alone, and so does the sealed verdict."""

    def problems(self, split: str) -> Sequence[str]:
        return [f"{split}-{c}" for c in "abcdefgh"]

    def covered(self) -> Sequence[tuple[str, int]]:
        return [(id, 0) for id in self.problems("train")]

    def prompt(self, problem_id: str, *, family: str, hinted: bool, draw: int) -> Prompt:
        return Prompt(problem_id, f"write {problem_id[-1]}", hinted=hinted)

    def demonstrations(self, prompt: Prompt, n: int, draw: int) -> Sequence[str]:
        letter = prompt.problem_id[-1]
        return [letter * 4] * n + [f"{letter}xyz"] * n

    def grade(self, rollouts: Sequence[Rollout]) -> list[Graded]:
        rng = [random.Random(r.text) for r in rollouts]
        return [Graded(g.choice((0.0, 0.5, 3.5)), SimpleNamespace(hacked=g.random() < 0.5)) for g in rng]

    def labels(self, rollouts: Sequence[Rollout], graded: Sequence[Graded]) -> OracleBatch:
        hacked = torch.tensor([g.sealed.hacked for g in graded])
        return OracleBatch(hacked=hacked, solved=~hacked, mode=("letters",) * len(hacked))


@dataclass
class Watcher:
    """An observer that keeps what it is shown."""

    records: list[dict] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    rollouts: list[Sequence[Rollout]] = field(default_factory=list)

    def step(self, record, rollouts, graded, decision, advantage) -> None:
        self.records.append(dict(record))
        self.decisions.append(decision)
        self.rollouts.append(rollouts)

    def evaluate(self, step: int) -> None:
        return None

    def checkpoint(self, step: int) -> None:
        return None


def toy_probe(policy: Policy) -> LinearProbe:
    """A probe with random weights that fits the model."""
    width, layers = policy.model.config.hidden_size, policy.model.config.num_hidden_layers
    weight = torch.randn(width, generator=torch.Generator().manual_seed(0))
    return LinearProbe(weight, 0.0, {"modes": ["toy"], "layers": list(band(layers)), "t_lo": -0.5, "t_hi": 0.5})


class Played(Endpoint):
    """An endpoint of a judge that answers a question as `script` says: no network, no client library."""

    def __init__(self, script: Callable[[str], Answer]) -> None:
        self.url, self.model, self.sampling = "http://played", "played", {}
        self.script, self.requests = script, 0

    async def __aenter__(self) -> Endpoint:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def send(self, messages) -> Answer:
        self.requests += 1
        return self.script(messages[0]["content"])


def toy_judge() -> Judge:
    """A judge with an opinion of its own on every text."""

    def opinion(question: str) -> Answer:
        says = random.Random(question).choice(("HACK", "HONEST"))
        return Answer(f"VERDICT: {says}", True, "played", 0, 0)

    return Judge(JudgeConfig(model="played"), Played(opinion))


def toy_given(cfg: Config, policy: Policy) -> Given:
    """Everything that an arm of the toy may need."""
    return Given(yoke=[(1, 2)] * cfg.steps, probe=toy_probe(policy), judge=toy_judge())


def toy_train(cfg: Config) -> tuple[Policy, Watcher]:
    """Train the random model on letters."""
    policy, watcher = toy_policy(cfg), Watcher()
    train(cfg, policy, Letters(), PAIRS, watcher, toy_given(cfg, policy))
    return policy, watcher


@cache
def trained(variant: str) -> Policy:
    """One policy of VARIANTS after TOY's steps, for all checks that change nothing in it."""
    return toy_train(replace(TOY, **VARIANTS[variant]))[0]


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.adapter.tensors().items()}


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def sandbox() -> Sandbox:
    """One sandbox for all checks; it closes with the process."""
    box = Sandbox()
    atexit.register(box.close)
    return box


@cache
def micro() -> MicroEnv:
    """The micro environment without demonstrations."""
    return MicroEnv(sandbox(), pool=None)


@cache
def demonstrated() -> MicroEnv:
    """The micro environment with its teacher pool, whose records it has confirmed."""
    return MicroEnv(sandbox())
