"""Whether a rollout engine says of its samples what the trainer says of them: log-probabilities, token by token.

Prompts are sampled in both block states in one call, and the trainer's own forward pass reads each sample under the
state that drew it:

    gap of a token = | logp of the engine - Policy.logp |     in nats, of logits / temperature

and, as a check of the check, under the other state: there the gap must be far larger wherever the blocks have moved,
or the comparison could not have noticed an engine that samples from the wrong weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vgrout.config import Config, stream
from vgrout.engines import Engine, Sample
from vgrout.engines.torch_engine import encode_prompt
from vgrout.method.policy import Policy, stack
from vgrout.types import Prompt, State

STATES: tuple[State, State] = ("deployed", "full")
Bars = tuple[float, float]  # most that the mean gap, and the largest, may be
SAME, ROUNDED, HALF = (1e-5, 1e-4), (1e-4, 1e-3), (0.05, 1.0)
TOLD_APART = 3.0  # how much larger the mean gap under the other state is, where states can be told apart


@dataclass(frozen=True)
class Gap:
    """Of the samples of one state: rollouts, tokens, the mean and the largest gap, and the mean under the other
    state."""

    state: State
    rollouts: int
    tokens: int
    mean: float
    largest: float
    other: float


def bars(cfg: Config) -> Bars:
    """What an engine may be off by: nothing but rounding where the numbers are the trainer's own, and what 16 bits do
    (docs/engines.md) elsewhere."""
    if cfg.engine == "torch":
        return SAME if cfg.dtype == "float32" else HALF
    return ROUNDED if cfg.vllm_dtype == "float32" else HALF


@dataclass(frozen=True)
class Parity:
    """What the comparison found."""

    engine: str
    bars: Bars
    gaps: tuple[Gap, ...]

    @property
    def ok(self) -> bool:
        """Every gap is below the bars, and no state looks like the other one."""
        mean, largest = self.bars
        low = all(gap.mean <= mean and gap.largest <= largest for gap in self.gaps)
        return low and not any(gap.mean > TOLD_APART * gap.other for gap in self.gaps)

    @property
    def told_apart(self) -> bool:
        """Whether samples of the wrong state would have stood out."""
        return all(gap.other > TOLD_APART * gap.mean for gap in self.gaps)

    def lines(self) -> list[str]:
        """What a person reads."""
        out = [
            f"{gap.state}: {gap.tokens} tokens of {gap.rollouts} rollouts: logp of {self.engine} and the "
            f"trainer differ by {gap.mean:.2g} on average and {gap.largest:.2g} at most; read in the other state, by "
            f"{gap.other:.2g} on average"
            for gap in self.gaps
        ]
        bars = "bars: {:g} on average, {:g} at most".format(*self.bars)
        seen = "" if self.told_apart else "; the states are too alike for this to tell one from the other"
        return [*out, f"{'ok' if self.ok else 'FAILED'}, {bars}{seen}"]


def logp_parity(cfg: Config, policy: Policy, engine: Engine, prompts: Sequence[Prompt], each: int) -> Parity:
    """Sample every prompt `each` times in either state and compare. The weights are those that the policy has now.

    Raises what the engine raises.
    """
    ids = [encode_prompt(policy.tokenizer, p) for p in prompts] * len(STATES)
    states = [state for state in STATES for _ in prompts]
    generator = torch.Generator().manual_seed(stream(cfg.sample_seed, "parity"))
    uniforms = torch.rand((each * len(ids), cfg.max_new), generator=generator)
    how = {"max_new": cfg.max_new, "temperature": policy.temperature, "uniforms": uniforms}
    samples = engine.generate(ids, [each] * len(ids), state=states, **how)
    half = len(samples) // 2
    asked = [p for p in ids for _ in range(each)]
    rows = {"deployed": slice(0, half), "full": slice(half, None)}
    gaps = []
    for state, other in zip(STATES, reversed(STATES), strict=True):
        own, read = samples[rows[state]], asked[rows[state]]
        here, there = (_gaps(policy, read, own, live) for live in (state, other))
        gaps.append(Gap(state, len(own), len(here), float(here.mean()), float(here.max()), float(there.mean())))
    return Parity(cfg.engine, bars(cfg), tuple(gaps))


@torch.no_grad()
def _gaps(policy: Policy, prompts: Sequence[Sequence[int]], samples: Sequence[Sample], state: State) -> Tensor:
    """The gap of every token, row by row, with the trainer's pass in `state`."""
    found = []
    for first in range(0, len(samples), policy.score_batch):
        part = slice(first, first + policy.score_batch)
        rows = stack(prompts[part], [s.tokens for s in samples[part]], policy.tokenizer.pad_token_id)
        with policy.adapter.state(state):
            logp = policy.logp(rows)
        said = torch.tensor([lp for s in samples[part] for lp in s.logp], dtype=logp.dtype, device=logp.device)
        found.append((logp[rows.completion] - said).abs())
    return torch.cat(found)
