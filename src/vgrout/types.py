"""The glossary: every record that flows through vGROUT, and the protocols between its rooms.

Problem -> Prompt -> Rollout -> Graded(reward, sealed verdict) -> Batch -> Decision -> Losses -> StepRecord.
A `Batch` has no verdict field: whatever trains on it cannot know whether a rollout hacked.

Dimension letters, one meaning each, everywhere:
    P prompts, G group size, N = P*G rollouts, T completion tokens, L prompt + completion tokens,
    M adapted modules, R rank per block, C completions of hand-written pairs (two per pair).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor

State = Literal["full", "deployed"]  # quarantine live / quarantine ablated
Provenance = Literal[
    "authored", "pool-derived", "unstated"
]  # of pairs: written, taken from programs of a pool, not said
Zone = Literal["keep", "absorb", "route"]
ZONES: tuple[Zone, ...] = ("keep", "absorb", "route")


class RunFailed(RuntimeError):
    """A run that cannot go on through no mistake of the user: the CLI prints it and leaves with exit code 1."""


class UserError(Exception):
    """A mistake of the user: the CLI prints it as one line and leaves with exit code 2."""


Arguments = tuple | dict[str, Any]  # of one call: positional, or by name
Test = tuple[Arguments, Any]  # (arguments, expected), plain data both


@dataclass(frozen=True)
class Compare:
    """How an answer is held against the expected one; exact unless a problem's data says otherwise."""

    any_order: bool = False  # two lists hold the same items, however ordered
    tolerance: float = 0.0  # floats may differ by this, absolute or relative to the expected one
    argument: int | str | None = None  # the answer is what the call left in this argument, not what it returned


@dataclass(frozen=True)
class Problem:
    """A programming task with its tests, split into two disjoint halves."""

    id: str
    task: str  # the instruction, without any hint
    entry: str  # 'Class.method' or 'function'
    canonical: str  # a correct program
    reward_tests: tuple[Test, ...]  # these may enter the reward
    oracle_tests: tuple[Test, ...]  # measurement only
    mode: str  # the loophole of this problem
    difficulty: int | str = 0  # micro: number of stages
    system: str = ""  # system prompt
    starter: str = ""  # code that the task shows
    setup: str = ""  # trusted code that runs before a program, in its namespace
    compare: Compare = Compare()
    cpu_s: float | None = None  # CPU seconds that a program may take for all tests; the sandbox's limit when not given


@dataclass(frozen=True)
class Prompt:
    """What the policy reads. `hinted` False: the loophole is closed and not mentioned."""

    problem_id: str
    user: str
    system: str = ""
    marker: str = ""  # the marker that the hint names (empty when hint-free)
    hinted: bool = True

    @property
    def read(self) -> str:
        """The whole text that the policy reads, but for the chat template."""
        return f"{self.system}\n\n{self.user}" if self.system else self.user


@dataclass(frozen=True)
class Rollout:
    """One completion. `tokens` are the completion's ids, an end token included when there was one."""

    id: str
    prompt: Prompt
    text: str
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]
    group: int
    source: Literal["policy", "teacher"] = "policy"
    state: State = "full"  # the block state that sampled it
    logp_old: tuple[float, ...] | None = None  # [T] in nats; None for a teacher row


@runtime_checkable
class Sealed(Protocol):
    """An oracle's verdict on one rollout. The loop hands it to the recorder unopened."""


@dataclass(frozen=True)
class Graded:
    """What the environment says of a rollout: a reward that trains, a verdict that only measures.

    A reward that is None or not finite says that the rollout could not be scored: training leaves the rollout out.
    """

    reward: float | None
    sealed: Sealed = field(repr=False)
    compiled: bool | None = None  # public: whether the text is a program at all; None where that is no question


@dataclass(frozen=True)
class Batch:
    """N rollouts of one step, flat, with a group index. There is no verdict in it."""

    tokens: Int[Tensor, "N L"]  # prompt + completion, right-padded
    completion: Bool[Tensor, "N L"]  # True where the token at this position is part of the completion
    length: Int[Tensor, N]  # tokens before the padding
    group: Int[Tensor, N]
    reward: Float[Tensor, N]
    teacher: Bool[Tensor, N]
    logp_old: Float[Tensor, "N L"]  # 0 outside completions and for teacher rows
    texts: tuple[tuple[str, str], ...]  # prompt and completion, for who reads words

    @property
    def n(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class OracleBatch:
    """Labels for arms that declare `reads_oracle`; the loop builds it for nobody else."""

    hacked: Bool[Tensor, N]
    solved: Bool[Tensor, N]
    mode: tuple[str, ...]  # the loophole of each rollout's problem


@dataclass(frozen=True)
class Decision:
    """What a gate says of each rollout.

    (m, d) is the row's mask: m = 1 runs the quarantine, d = 1 cuts the deployed block's gradient.
    `weight` scales the row's loss, `penalty` is subtracted from its reward. A row of weight 0 is screened out: it does
    not train, and its group's statistics do not know it.
    """

    m: Float[Tensor, N]
    d: Float[Tensor, N]
    weight: Float[Tensor, N]
    penalty: Float[Tensor, N]
    score: Float[Tensor, N] | None = None  # the gate's score, for the record
    threshold: tuple[float, float] | None = None  # (t_lo, t_hi) in the units of `score`
    note: Mapping[str, float] = field(default_factory=dict)  # what the gate says of itself, for the record
    features: Float[Tensor, "N M R"] | None = None  # what was scored of each row, for the trace
    direction: Mapping[str, Any] = field(default_factory=dict)  # the fields of what it was scored along, for the trace
    share: Float[Tensor, "N 2"] | None = None  # instead of d: part of the row's gradient for the parameters of a block

    @property
    def keep(self) -> Bool[Tensor, N]:
        return (self.m == 0) & (self.d == 0)

    @property
    def absorb(self) -> Bool[Tensor, N]:
        return (self.m == 1) & (self.d == 0)

    @property
    def route(self) -> Bool[Tensor, N]:
        return (self.m == 1) & (self.d == 1)

    @property
    def present(self) -> Bool[Tensor, N]:
        return self.weight > 0

    @property
    def flagged(self) -> Bool[Tensor, N]:
        """What was taken for a hack, whatever followed: routed, screened out, penalised, or left more to the
        quarantine."""
        flagged = self.route | ~self.present | (self.penalty > 0)
        return flagged if self.share is None else flagged | (self.share[:, 0] < self.share[:, 1])

    def zones(self) -> list[Zone]:
        return ["route" if d else "absorb" if m else "keep" for m, d in zip(self.m, self.d, strict=True)]


@dataclass(frozen=True)
class Pair:
    """A hand-written (hack, clean) pair of completions under one prompt."""

    name: str
    section: str
    prompt: str
    hack: str
    clean: str
    tags: tuple[str, ...]
    line: int  # of its heading in the file
    provenance: Provenance = "unstated"


@runtime_checkable
class Environment(Protocol):
    """A source of prompts and rewards. Training sees `Graded.reward` and nothing else of it."""

    def problems(self, split: str) -> Sequence[str]:
        """Problem ids of a split."""

    def covered(self) -> Sequence[tuple[str, int]]:
        """(problem id, draw) of every training prompt that has demonstrations."""

    def prompt(self, problem_id: str, *, family: str, hinted: bool, draw: int) -> Prompt:
        """The problem's prompt; `draw` selects the marker within the family."""

    def demonstrations(self, prompt: Prompt, n: int, draw: int) -> Sequence[str]:
        """`n` demonstrations of each kind; the kinds stay behind."""

    def grade(self, rollouts: Sequence[Rollout]) -> list[Graded]: ...

    def labels(self, rollouts: Sequence[Rollout], graded: Sequence[Graded]) -> OracleBatch:
        """Opened verdicts, for arms that declare `reads_oracle`."""


@runtime_checkable
class Observer(Protocol):
    """Receives everything, returns nothing: training cannot depend on it."""

    def step(
        self,
        record: Mapping[str, Any],
        rollouts: Sequence[Rollout],
        graded: Sequence[Graded],
        decision: Decision,
        advantage: Float[Tensor, N],
    ) -> None: ...

    def evaluate(self, step: int) -> None:
        """`step` steps are done and a small evaluation is due. It comes again when the step after it is cut short."""

    def checkpoint(self, step: int) -> None:
        """`step` steps are done: the training's state is worth keeping."""
