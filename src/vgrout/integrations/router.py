"""Routing for a training loop that is not ours.

    attach     two blocks on every target Linear of the model; nothing else of it can train
    decide     rollouts -> keep, absorb or route for each, from its c-gradient along the pairs' direction
    routed     the context of the loss's forward and backward passes: the rows' masks
    sampling   the context of sampling and of evaluation: the block that ships, in merged weights
    ship       the plain model that ships, in place; or `export`, a PEFT folder of it

What decides is an arm of ours, so that a control differs from routeV by one word. It reads token ids, never a reward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vgrout.adapters import attach, check_kind, targets
from vgrout.adapters.base import BlockLinear
from vgrout.arms import ARMS, Arm, Bench, hooks
from vgrout.config import Config
from vgrout.engines.torch_engine import encode_completion, encode_prompt
from vgrout.lab.export import Dtype, export_adapter, merge
from vgrout.lab.run import check_pairs
from vgrout.lab.tensorfile import read_file, write_file
from vgrout.method.policy import Policy, Rows, stack
from vgrout.models.load import PLAIN_HEAD
from vgrout.pairs import digest, load
from vgrout.types import Batch, Decision, Prompt, State, UserError

Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]  # the pairs' prompts -> token ids

WEIGHTS, MEMORY = "adapter.safetensors", "routing.safetensors"  # of a saved router
KIND, FORMAT = "vgrout routing", 1


@dataclass(frozen=True)
class Routing:
    """What routes, and by what. Each field is the one of that name in `vgrout.config.Config`, with its default;
    `vgrout train --help` says what they mean."""

    pairs: str
    arm: str = Config.arm
    seed: int = Config.seed

    adapter: str = Config.adapter
    rank: int = Config.rank
    detach: str = Config.detach

    direction: str = Config.direction
    direction_axes: int = Config.direction_axes
    refresh_every: int = Config.refresh_every
    score_state: str = Config.score_state
    score_batch: int = Config.score_batch

    policy: str = Config.policy
    t_lo: float = Config.t_lo
    t_hi: float = Config.t_hi
    k_mid: float = Config.k_mid
    k_route: float = Config.k_route
    q: float = Config.q
    buffer: int = Config.buffer
    half_life: float = Config.half_life
    p_absorb: float = Config.p_absorb
    p_route: float = Config.p_route
    coin_route: float = Config.coin_route
    coin_absorb: float = Config.coin_absorb

    # RoutedGRPOTrainer alone: a loop of your own samples, and weighs what it sampled, as it likes.
    deploy_gen_frac: float = Config.deploy_gen_frac
    ratio: str = Config.ratio

    def config(self, *, group: int, temperature: float) -> Config:
        """As a configuration. Raises UserError for what it refuses, and for an arm that does more than route."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        cfg = Config(**own, group=group, temperature=temperature, teacher_n=0)
        if cfg.arm not in ARMS:
            raise UserError(f"unknown arm {cfg.arm!r}: choose one of {', '.join(routing_arms())}")
        if cfg.arm not in routing_arms():
            raise UserError(
                f"{cfg.arm} does more than route, or ships both blocks, or needs what a loop of another kind does not "
                f"have: choose one of {', '.join(routing_arms())}"
            )
        check_kind(cfg.adapter, cfg.init)
        check_pairs(cfg)
        return cfg


def routing_arms() -> list[str]:
    """Arms that another loop can run: they override `route` and no other hook, and read tokens alone."""
    return [name for name, arm in ARMS.items() if _only_routes(arm)]


def _only_routes(arm: type[Arm]) -> bool:
    masks = arm.action in ("-", "route")  # and does not screen or penalise
    alone = not arm.needs  # no run to follow, no probe, no judge
    return (
        masks and alone and set(hooks(arm)) <= {"route"} and arm.ablates and arm.loophole and arm.access in ("L0", "L1")
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` without dropout and without gradient checkpointing, which are of training."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


class Router:
    """The adapter of a model, and what decides which of its blocks each rollout trains.

    `temperature` is that of the loop's own log-probabilities. `encode` turns the pairs' prompts into the token ids that
    the loop would give them; without it they are one user message in the tokenizer's chat template. Raises UserError
    for a model, tokenizer, arm or pairs that do not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        routing: Routing,
        *,
        group: int = 1,
        temperature: float = 1.0,
        encode: Encode | None = None,
    ) -> None:
        cfg = routing.config(group=group, temperature=temperature)
        check_model(model, tokenizer)
        self.model, self.tokenizer, self.routing, self.cfg = model, tokenizer, routing, cfg
        pairs = load(cfg.pairs)
        self.pairs_sha256 = digest(pairs)
        prompts = (encode or self.encode)([p.prompt for p in pairs])
        hack = self.rows(prompts, self.completions([p.hack for p in pairs]))
        clean = self.rows(prompts, self.completions([p.clean for p in pairs]))
        self.adapter = attach(model, cfg.adapter, cfg.rank, cfg.init_seed, detach=cfg.detach)
        for module in self.adapter.modules.values():
            module.to(module.base.weight.device)
        self.policy = Policy(model, tokenizer, self.adapter, cfg.temperature, cfg.score_batch)
        self.arm = ARMS[cfg.arm](Bench(cfg, self.policy, hack, clean))
        self.arm.begin()

    @property
    def decides_alone(self) -> bool:
        """Whether a single rollout can be decided on: by a coin, or by thresholds that are not of the batch."""
        return not self.arm.scores or self.cfg.policy != "batch_std"

    def parameters(self) -> list[nn.Parameter]:
        """All that trains: both blocks."""
        return self.adapter.parameters("deployed") + self.adapter.parameters("quarantine")

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts, each one user message in the chat template."""
        if self.tokenizer.chat_template is None:
            raise UserError("the tokenizer has no chat template: give `encode`, which makes token ids of prompts")
        return [encode_prompt(self.tokenizer, Prompt(problem_id="", user=text)) for text in prompts]

    def completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of completions, each with the end token."""
        return [encode_completion(self.tokenizer, text) for text in texts]

    def rows(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Rows:
        return stack(prompts, completions, self.tokenizer.pad_token_id)

    def decide(self, step: int, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Decision:
        """The zone of each of N rollouts, given as token ids without padding: one extra forward and backward pass.

        `step` is the number of updates so far: the direction is extracted anew every `refresh_every` of them. No
        parameter gets a gradient. Raises UserError where a rollout has no tokens, or one rollout is to have the
        thresholds of a batch, and RunFailed where log-probabilities are broken or the pairs do not separate.
        """
        if len(prompts) != len(completions) or not prompts or not all(map(len, (*prompts, *completions))):
            raise UserError(f"{len(prompts)} prompts and {len(completions)} completions: give one of each, none empty")
        if len(prompts) < 2 and not self.decides_alone:
            raise UserError("the thresholds of batch_std need the rollouts of a whole step: give them all at once")
        rows, n = self.rows(prompts, completions), len(prompts)
        batch = Batch(
            tokens=rows.tokens,
            completion=rows.completion,
            length=rows.length,
            group=torch.zeros(n, dtype=torch.long),
            reward=torch.zeros(n),  # no arm that only routes reads it
            teacher=torch.zeros(n, dtype=torch.bool),
            logp_old=torch.zeros(rows.tokens.shape),
            texts=tuple(zip(*map(self._texts, (prompts, completions)), strict=True)),
        )
        with evaluating(self.model), torch.enable_grad():
            return self.arm.route(step, batch, None)

    def _texts(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in ids]

    def routed(self, decision: Decision) -> AbstractContextManager[None]:
        """Forward and backward of the loss run in it. Row i of the batch is rollout i of the decision."""
        return self.masked(decision.m, decision.d)

    def masked(self, m: Tensor, d: Tensor) -> AbstractContextManager[None]:
        """`routed` with the masks of some rollouts alone, `decision.m[rows]` and `decision.d[rows]`."""
        return self.adapter.routed(m, d)

    def sampling(self, state: State = "deployed") -> AbstractContextManager[None]:
        """The model in a block state on merged weights: as fast as a plain one, without gradients."""
        return self.adapter.merged(state)

    def reference(self) -> AbstractContextManager[None]:
        """The base model."""
        return self.adapter.reference()

    def save(self, folder: Path) -> None:
        """Both blocks and what the arm remembers, without the base model. Raises OSError."""
        state = self.arm.state()
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        plain = {key: value for key, value in state.items() if key not in tensors}
        self.adapter.save(folder / WEIGHTS, self._facts())
        write_file(folder / MEMORY, KIND, FORMAT, tensors, {"plain": plain, **self._facts()})

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote. Raises UserError where it was written under other settings, or is damaged."""
        tensors, said = read_file(folder / MEMORY, KIND, FORMAT)
        mine = self._facts()
        if changed := [key for key, value in mine.items() if said.get(key) != value]:
            raise UserError(f"{folder} was saved with other {', '.join(changed)} than this router has")
        self.adapter.load(folder / WEIGHTS)
        self.arm.restore({**tensors, **said["plain"]})

    def _facts(self) -> dict[str, Any]:
        told = asdict(self.routing)
        del told["pairs"]  # wherever they lie
        return {**told, "pairs_sha256": self.pairs_sha256}

    def ship(self) -> PreTrainedModel:
        """Make the model the plain one that ships, in place: the deployed block in its weights, the quarantine gone.
        The router has no more to say about it."""
        merge(self.model, self.adapter, "deployed", self.model.dtype)
        return self.model

    def export(
        self,
        out: Path | str,
        *,
        live: State = "deployed",
        base: str = "",
        dtype: Dtype = "float32",
        force: bool = False,
    ) -> dict[str, Any]:
        """Write what ships as a PEFT LoRA folder, whole or not at all; what its export.json says.

        `live` full: with the quarantine. `base`: the base model's name for those who load it; without it the one that
        it was loaded by. Raises UserError where `out` is in use, the base has no name, or the adapter is no LoRA.
        """
        return export_adapter(
            self.adapter, Path(out), base=base or self.model.name_or_path, live=live, dtype=dtype, force=force
        )


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a model that cannot be scored and masked."""
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"{kind} is no plain transformers model: merge a PEFT adapter first, or load the base model")
    if getattr(model, "peft_config", None):
        raise UserError("the model has a PEFT adapter: merge it first, or load the base model")
    if any(isinstance(module, BlockLinear) for module in model.modules()):
        raise UserError("the model has a router's adapter already: load it again")
    for name, linear in targets(model).items():
        if (dtype := linear.weight.dtype) != torch.float32:
            raise UserError(f'{name} of {kind} is {dtype}: load the model with dtype="float32"; a loop may autocast')
    for what, plain in PLAIN_HEAD.items():
        if (value := getattr(model.config.get_text_config(), what, plain)) not in (plain, None):
            raise UserError(f"{kind} changes its logits ({what} = {value}), which vgrout does not support")
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise UserError("the tokenizer lacks a pad token or an end token")
