"""The policy's forward passes: distributions and log-probabilities of completions, c-gradients and activations.

c-probe (METHOD.md section 2): a virtual scale c = 1 between A and B of each module's `bottleneck`, one row per rollout.
Its gradient is dL/dc_j = sum_t (A x_t)_j (B^T delta_t)_j with delta_t the gradient at the module's output. R is the
widest bottleneck of the model; a narrower one has zeros behind its own entries, which change no cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from vgrout.adapters.base import Adapter
from vgrout.dist import ALONE, Ranks
from vgrout.method.prefix import by_prompt, shared_c_gradients, stacked
from vgrout.models.attention import SHARED_HEADS
from vgrout.types import State


@dataclass(frozen=True)
class Rows:
    """Token rows to run through the model: prompt + completion, right-padded."""

    tokens: Int[Tensor, "N L"]
    completion: Bool[Tensor, "N L"]
    length: Int[Tensor, N]

    def take(self, index: Int[Tensor, K]) -> Rows:
        """The rows at `index`, without the padding that they do not need."""
        width = int(self.length[index].max())
        return Rows(self.tokens[index, :width], self.completion[index, :width], self.length[index])

    def at(self, index: Int[Tensor, K]) -> Rows:
        """The rows at `index`, as wide as they are."""
        return Rows(self.tokens[index], self.completion[index], self.length[index])

    @property
    def drawn(self) -> Int[Tensor, T]:
        """The completion tokens, row by row."""
        return self.tokens[self.completion]

    def place(self, values: Float[Tensor, T]) -> Float[Tensor, "N L"]:
        """One value per completion token, row by row, where those tokens stand; 0 elsewhere."""
        blank = torch.zeros(self.tokens.shape, dtype=values.dtype, device=values.device)
        return blank.masked_scatter(self.completion.to(values.device), values)

    def to(self, device: torch.device) -> Rows:
        return Rows(self.tokens.to(device), self.completion.to(device), self.length.to(device))


def stack(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad: int) -> Rows:
    length = torch.tensor([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)])
    tokens = torch.full((len(length), int(length.max())), pad)
    completion = torch.zeros_like(tokens, dtype=torch.bool)
    for i, (p, c) in enumerate(zip(prompts, completions, strict=True)):
        tokens[i, : len(p) + len(c)] = torch.tensor([*p, *c])
        completion[i, len(p) : len(p) + len(c)] = True
    return Rows(tokens, completion, length)


MASKED = ("sdpa", SHARED_HEADS)  # attention that takes a mask of its own for every row
PACK = 512  # completion tokens that share one copy of their prompt


@dataclass(frozen=True)
class Packed:
    """Rows of one prompt end to end behind one copy of it, a block; each completion sees the prompt and itself. Short
    blocks share a sequence.

    `source` is where, in the flattened sequences, the token stands that predicts each completion token, row by row.
    """

    tokens: Int[Tensor, "S W"]
    position: Int[Tensor, "S W"]
    visible: Bool[Tensor, "S 1 W W"]
    source: Int[Tensor, T]

    def to(self, device: torch.device) -> Packed:
        return Packed(*(t.to(device) for t in (self.tokens, self.position, self.visible, self.source)))


def pack(rows: Rows) -> Packed:
    """The rows with every prompt stored once for up to `PACK` completion tokens."""
    sizes = rows.completion.sum(1).tolist()
    starts = [n - c for n, c in zip(rows.length.tolist(), sizes, strict=True)]
    blocks = _blocks(rows, starts, sizes)
    lengths = [starts[block[0]] + sum(sizes[i] for i in block) for block in blocks]
    sequences, width = _sequences(lengths), max(lengths)
    tokens = torch.zeros(len(sequences), width, dtype=rows.tokens.dtype)
    position, owner, part = torch.zeros_like(tokens), torch.full_like(tokens, -1), torch.full_like(tokens, -1)
    source: list[list[int]] = [[] for _ in sizes]
    for s, members in enumerate(sequences):
        end = 0
        for b in members:
            prompt = starts[blocks[b][0]]
            here, end = end, end + prompt
            owner[s, here : here + lengths[b]] = b
            tokens[s, here:end] = rows.tokens[blocks[b][0], :prompt]
            position[s, here:end], part[s, here:end] = torch.arange(prompt), 0
            last = s * width + end - 1
            for k, i in enumerate(blocks[b], 1):
                here, end = end, end + sizes[i]
                tokens[s, here:end] = rows.tokens[i, prompt : prompt + sizes[i]]
                position[s, here:end], part[s, here:end] = torch.arange(prompt, prompt + sizes[i]), k
                source[i] = [last, *range(s * width + here, s * width + end - 1)]
    mine = owner[:, :, None] == owner[:, None, :]
    seen = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
    visible = (mine & seen).tril()
    return Packed(tokens, position, visible[:, None], torch.tensor([t for row in source for t in row]))


def _blocks(rows: Rows, starts: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Row indices, those of one prompt together, at most `PACK` completion tokens in a block of several rows."""
    flat = rows.tokens.tolist()
    blocks: list[list[int]] = []
    last: dict[tuple[int, ...], int] = {}  # prompt -> its block with room
    room: list[int] = []
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        prompt = tuple(flat[i][:start])
        at = last.get(prompt)
        if at is None or room[at] < size:
            at = last[prompt] = len(blocks)
            blocks.append([])
            room.append(PACK)
        blocks[at].append(i)
        room[at] -= size
    return blocks


def _sequences(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of blocks, in few sequences that are no longer than the longest block: the long ones first, each into the
    first sequence that has room."""
    sequences: list[list[int]] = []
    room: list[int] = []
    for b in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        at = next((s for s, left in enumerate(room) if left >= lengths[b]), len(sequences))
        if at == len(sequences):
            sequences.append([])
            room.append(max(lengths))
        sequences[at].append(b)
        room[at] -= lengths[b]
    return sorted(sequences)


def prompt_keys(rows: Rows) -> list[tuple[int, ...]]:
    """The tokens before each row's completion."""
    starts = (rows.length - rows.completion.sum(1)).tolist()
    return [tuple(row[:start]) for row, start in zip(rows.tokens.tolist(), starts, strict=True)]


def fitting_rows(ranks: Ranks, rows: Rows, most: int, what: str, work: Callable[[Rows, int], Tensor]) -> Tensor:
    return ranks.fitting(min(most, len(rows.length)), what, lambda size: work(rows, size))


class Policy:
    """Model, tokenizer and adapter as one thing that training and measuring share.

    Rows come and scores leave on the CPU; logits, and the log-probabilities that have a gradient, are on the model's
    device. `recomputed` are layers that run again in the backward pass instead of keeping what it needs
    (`models.load.recomputing`). `ranks` are the processes that share the work on rows (`method/shard.py`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        adapter: Adapter,
        temperature: float,
        score_batch: int,
        score_dtype: torch.dtype | None = None,
        recomputed: Sequence[nn.Module] = (),
    ) -> None:
        self.model, self.tokenizer, self.adapter = model, tokenizer, adapter
        self.body, self.output, self.device = model.base_model, model.get_output_embeddings(), model.device
        self.recomputed, self.ranks = tuple(recomputed), ALONE
        self.temperature, self.score_batch = temperature, score_batch
        self.score_dtype = score_dtype  # of the products with merged weights in c-gradients and activations
        text = model.config.get_text_config()
        kinds = getattr(text, "layer_types", None) or ()
        # A layer that sees a window or keeps a running state needs its rows apart; so does attention that takes no mask
        # of truth values: rows that share a prompt see each other but for that mask.
        whole = set(kinds) <= {"full_attention"} and not getattr(text, "sliding_window", None)
        self.packs = whole and model.config._attn_implementation in MASKED

    def logits(self, rows: Rows) -> Float[Tensor, "T V"]:
        """What every completion token of `rows`, row by row, was drawn from: logits / temperature."""
        if self.adapter.switch.flow.rowwise or not self.packs:
            rows = rows.to(self.device)
            with self._recomputing():
                hidden = self.body(input_ids=rows.tokens, use_cache=False).last_hidden_state
            hidden = hidden[:, :-1][rows.completion[:, 1:]]
        else:
            packed = pack(rows).to(self.device)
            with self._recomputing():
                out = self.body(
                    input_ids=packed.tokens,
                    attention_mask=packed.visible,
                    position_ids=packed.position,
                    use_cache=False,
                )
            hidden = out.last_hidden_state.flatten(0, 1)[packed.source]
        return self.head(hidden)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Layers in `recomputed` keep only their inputs for the backward pass, which must run under the same flow."""
        for layer in self.recomputed:
            layer.training = torch.is_grad_enabled()
        try:
            yield
        finally:
            for layer in self.recomputed:
                layer.training = False

    def head(self, hidden: Float[Tensor, "T H"]) -> Float[Tensor, "T V"]:
        """logits / temperature, in float32."""
        return self.output(hidden).float() / self.temperature

    def logp(self, rows: Rows) -> Float[Tensor, "N L"]:
        """Log-probability in nats of every completion token under the adapter's present state, 0 elsewhere."""
        return rows.place(-F.cross_entropy(self.logits(rows), rows.drawn.to(self.device), reduction="none"))

    def c_gradients(self, rows: Rows, state: State) -> Float[Tensor, "N M R"]:
        """c-gradients of each row's mean completion NLL in a block state. Parameters get none.

        Runs on merged weights: forward and backward cost those of the base model and two thin products a module. Rows
        of one prompt share its forward pass (`prefix`), unless they run one by one. Where memory is short the
        micro-batches are smaller, and the result is the same up to rounding. Raises OutOfMemory where not even one row
        fits.
        """
        return self.shared(rows, "scoring", lambda own, size: self._c_gradients(own, state, size))

    def _c_gradients(self, rows: Rows, state: State, size: int) -> Float[Tensor, "N M R"]:
        width = max(self.adapter.widths.values())
        out = torch.zeros(len(rows.length), len(self.adapter.modules), width)
        # One row behind its own prompt takes the least memory, and layers that run again keep no states to share.
        shares = self.packs and size > 1 and not self.recomputed and not self.ranks.sharded
        alone, classes = by_prompt(rows) if shares else (range(len(rows.length)), [])
        with self.adapter.merged(state, self.score_dtype):
            for groups in classes:
                for first in range(0, len(groups), size):
                    index, grads = shared_c_gradients(self, rows, groups[first : first + size], size)
                    out[index] = grads.cpu()
            alone = torch.tensor(alone, dtype=torch.long)
            parts = alone[torch.argsort(rows.length[alone], stable=True)].split(size) if len(alone) else ()
            for part, _ in self.ranks.level(parts, torch.tensor([0])):  # a row's value is the same a second time
                with self.adapter.probe(len(part)) as probes:
                    grads = torch.autograd.grad(self.nll(rows.take(part)).sum(), list(probes.values()))
                out[part] = stacked(grads, width).cpu()
        return out

    def activations(self, rows: Rows, state: State) -> Float[Tensor, "N M R"]:
        """A x of each module's deployed block, the A of its c-probe, averaged over each row's completion tokens, in a
        block state. x is what the module reads where a completion token is the input; no backward pass.

        Where memory is short the micro-batches are smaller. Raises OutOfMemory where not even one row fits.
        """
        return self.shared(rows, "scoring", lambda own, size: self._activations(own, state, size))

    def shared(
        self, rows: Rows, what: str, work: Callable[[Rows, int], Float[Tensor, "K *S"]]
    ) -> Float[Tensor, "N *S"]:
        """One value a row. `work` gives them for some rows, so many at a time; each process does those of its prompts.

        Where memory is short that many are fewer. Raises OutOfMemory, which says `what`, where one row does not fit.
        """
        ranks = self.ranks
        if ranks.world == 1:
            return fitting_rows(ranks, rows, self.score_batch, what, work)
        owner = ranks.owners(prompt_keys(rows))
        own, found = (owner == ranks.rank).nonzero()[:, 0], None
        if len(own):
            found = fitting_rows(ranks, rows.take(own), self.score_batch, what, work)
        elif ranks.sharded:
            fitting_rows(ranks, rows.take(torch.tensor([0])), self.score_batch, what, work)
        parts = ranks.gather(found)
        shape, dtype = next((part.shape[1:], part.dtype) for part in parts if part is not None)
        out = torch.zeros(len(owner), *shape, dtype=dtype)
        for k, part in enumerate(parts):
            if part is not None:
                out[owner == k] = part
        return out

    @torch.no_grad()
    def _activations(self, rows: Rows, state: State, size: int) -> Float[Tensor, "N M R"]:
        """In micro-batches of `size` rows of similar length."""
        factors = [(module, module.bottleneck()[0]) for module in self.adapter.modules.values()]
        out = torch.zeros(len(rows.length), len(factors), max(len(a) for _, a in factors))
        with self.adapter.merged(state, self.score_dtype), ExitStack() as hooks:
            seen: dict[int, Tensor] = {}
            for m, (module, _) in enumerate(factors):
                read = partial(lambda m, module, args: seen.update({m: args[0]}), m)
                hooks.callback(module.register_forward_pre_hook(read).remove)
            batches = torch.argsort(rows.length, stable=True).split(size)
            for index, _ in self.ranks.level(batches, torch.tensor([0])):
                part = rows.take(index)
                share = (part.completion / part.completion.sum(1, keepdim=True))[:, None].to(self.device)
                self.body(input_ids=part.tokens.to(self.device), use_cache=False)
                for m, (_, a) in enumerate(factors):
                    x = seen[m].view(*part.tokens.shape, -1)  # a module may get the tokens of all rows end to end
                    out[index, m, : len(a)] = F.linear((share @ x.float())[:, 0], a.float()).cpu()
        return out

    def nll(self, rows: Rows) -> Float[Tensor, N]:
        """Mean NLL in nats of each row's completion tokens under the adapter's present state."""
        return -self.logp(rows).sum(1) / rows.completion.sum(1).to(self.device)

    def nll_gradients(
        self, rows: Rows, weight: Float[Tensor, N], which: str
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """sum_i weight_i (mean completion NLL of row i), and its gradient for each tensor of a block, by name.

        For the deployed block the quarantine is ablated; for the quarantine both blocks run and the deployed one is
        cut. `grad` of the parameters is left alone. Where memory is short the micro-batches are smaller. Raises
        OutOfMemory where not even one row fits.
        """
        owner = self.ranks.owners(prompt_keys(rows))
        own = (owner == self.ranks.rank).nonzero()[:, 0]
        names, parameters = zip(*self.adapter.named(which), strict=True)
        one, weight = torch.ones(1), weight.to(self.device)

        def in_batches(size: int) -> tuple[Tensor, list[Tensor]]:
            value, total = torch.zeros((), device=self.device), [torch.zeros_like(p) for p in parameters]
            batches = own[torch.argsort(rows.length[own], stable=True)].split(size) if len(own) else ()
            for index, real in self.ranks.level(batches, torch.tensor([0])):
                with self.adapter.deployed() if which == "deployed" else self.adapter.routed(one, one):
                    loss = (weight[index] * self.nll(rows.take(index))).sum()
                    found = torch.autograd.grad(loss, parameters)
                if real:
                    value = value + loss.detach()
                    total = [t + g for t, g in zip(total, found, strict=True)]
            return value, total

        size = max(1, min(self.score_batch, len(own)))
        value, total = self.ranks.fitting(size, "the pairs' gradients", in_batches)
        self.ranks.sum_([value, *total])
        return value, dict(zip(names, total, strict=True))
