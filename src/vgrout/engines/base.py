"""What a rollout engine is: prompts in, samples with the sampler's log-probabilities out.

The contract, which `lab/parity.py` checks for every engine:
- token t of a sample was drawn from softmax(logits / temperature) of the present weights in the asked block state, with
  no top-p, top-k or penalty, and `logp` is its log-probability there;
- a sample ends with one of the model's end tokens, which it then holds, or after `max_new` tokens;
- what is drawn depends on the weights and on the sample's own `uniforms`, as far as the engine can see to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from vgrout.adapters.base import Adapter
from vgrout.config import Config
from vgrout.dist import ALONE, Ranks
from vgrout.models.chat import end_tokens
from vgrout.types import State


@dataclass(frozen=True)
class Sample:
    """A sampled completion: token ids with the end token if it came, log-probabilities in nats, decoded text."""

    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    text: str


class Engine:
    """Prompts -> samples, from a model whose adapter may change between calls."""

    runs_hooks: ClassVar[bool] = True  # forward hooks on the model's modules change what is sampled

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, adapter: Adapter) -> None:
        self.model, self.tokenizer, self.adapter = model, tokenizer, adapter
        self.ends = end_tokens(model, tokenizer)

    @classmethod
    def of(
        cls,
        cfg: Config,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        adapter: Adapter,
        ranks: Ranks = ALONE,
    ) -> Engine:
        """The engine that a configuration asks for. Raises UserError where it cannot run this adapter."""
        return cls(model, tokenizer, adapter)

    @staticmethod
    def check(cfg: Config) -> None:
        """Raises UserError for what a configuration alone shows to be impossible."""

    def start(self) -> None:
        """Do what takes long, or can fail, before the first sample. Raises UserError or RunFailed."""

    def facts(self) -> dict[str, Any]:
        """What provenance.json says of the engine: what its samples depend on, beside the run's settings."""
        return {}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        counts: Sequence[int],
        *,
        state: State | Sequence[State],
        max_new: int,
        temperature: float,
        uniforms: Float[Tensor, "N T"],
    ) -> list[Sample]:
        """`counts[p]` samples of prompt p, in order; N = sum(counts), and uniforms[i] drives row i. `state`: one for
        all prompts, or one for each.

        Raises OutOfMemory where not even one row fits.
        """
        raise NotImplementedError


def states_of(state: State | Sequence[State], prompts: int) -> list[State]:
    """The block state of every prompt."""
    states = [state] * prompts if isinstance(state, str) else list(state)
    if len(states) != prompts:
        raise ValueError(f"{len(states)} states for {prompts} prompts")
    return states


def by_state(state: State | Sequence[State], counts: Sequence[int]) -> Iterator[tuple[State, slice, slice]]:
    """(state, its prompts, their rows) of every run of prompts in one state."""
    prompt = row = 0
    for live, run in groupby(states_of(state, len(counts))):
        asked = slice(prompt, prompt + len(list(run)))
        rows = slice(row, row + sum(counts[asked]))
        yield live, asked, rows
        prompt, row = asked.stop, rows.stop
