"""c-gradients of rows that share their prompts: a prompt runs forward once, and backward for each of its rows.

    prompts       all tokens but the last of each distinct prompt -> keys and values of every layer
    completions   the last token of its prompt and the completion of each row, behind copies of its prompt's keys and
                  values -> what its c-gradient has from these tokens, and the gradients of the copies
    prompts       back from the gradients of the copies, those of many rows as one batch -> what it has from the others
A c-gradient is a sum over the tokens of its row, so the parts add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

if TYPE_CHECKING:
    from vgrout.method.policy import Policy, Rows

SHARED = 2  # rows of a prompt, on average, from which on sharing pays
ROOM = 2  # rows that go back through prompts at once, per row of a whole pass: they keep no activations

Groups = Mapping[tuple[int, ...], Sequence[int]]  # prompt -> its rows


def by_prompt(rows: Rows) -> Groups | None:
    """The rows of each prompt, the shortest prompt first; None where few share one, or a prompt has no two tokens."""
    start = (rows.length - rows.completion.sum(1)).tolist()
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, tokens in enumerate(rows.tokens.tolist()):
        groups.setdefault(tuple(tokens[: start[i]]), []).append(i)
    if SHARED * len(groups) > len(start) or min(start) < 2:
        return None
    return dict(sorted(groups.items(), key=lambda group: len(group[0])))


def stacked(grads: Sequence[Tensor], width: int) -> Float[Tensor, "*N M R"]:
    """The c-gradients of all modules, with zeros behind those of a narrower one."""
    return torch.stack([F.pad(g, (0, width - g.shape[-1])) for g in grads], dim=-2)


def shared_c_gradients(policy: Policy, rows: Rows, groups: Groups, size: int) -> Float[Tensor, "N M R"]:
    """c-gradients of each row's mean completion NLL on the adapter's present merged weights, `size` rows at a time."""
    width = max(policy.adapter.widths.values())
    out = torch.zeros(len(rows.length), len(policy.adapter.modules), width)
    most = max(map(len, groups.values()))
    prompts, at_once = list(groups), max(1, ROOM * size // most)
    for first in range(0, len(prompts), at_once):
        chunk = prompts[first : first + at_once]
        members = [(p, k, i) for p, prompt in enumerate(chunk) for k, i in enumerate(groups[prompt])]
        owner, place, index = (torch.tensor(column) for column in zip(*members, strict=True))
        front = run_prompts(policy, chunk)
        copied = [torch.zeros(most, *state.shape, dtype=state.dtype) for state in front.states]
        for some in torch.argsort(rows.length[index] - front.length[owner], stable=True).split(size):
            own, copies = run_completions(policy, rows, index[some], front, owner[some])
            out[index[some]] = stacked(own, width)
            for total, grad in zip(copied, copies, strict=True):
                total[place[some], owner[some]] = grad
        some_rows = zip(*(grad.split(max(1, ROOM * size // len(chunk))) for grad in copied), strict=True)
        back = torch.cat([stacked(front.back(grads), width) for grads in some_rows])
        out[index] += back[place, owner]
    return out


@dataclass(frozen=True)
class Front:
    """Prompts that have run forward, without their last tokens."""

    length: Int[Tensor, P]
    states: Sequence[Float[Tensor, "P _ L _"]]  # keys and values of each layer
    probes: Sequence[Float[Tensor, "P _"]]  # c of each module

    def back(self, grads: Sequence[Float[Tensor, "K P _ L _"]]) -> list[Float[Tensor, "K P _"]]:
        """K c-gradients of each prompt, from as many gradients of its keys and values."""
        found = torch.autograd.grad(
            self.states, self.probes, grads, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
        # In the last layer what is behind keys and values reaches no other token: its modules have no gradient.
        count = len(grads[0])
        return [torch.zeros(count, *c.shape) if g is None else g for g, c in zip(found, self.probes, strict=True)]


def run_prompts(policy: Policy, prompts: Sequence[Sequence[int]]) -> Front:
    length = torch.tensor([len(prompt) - 1 for prompt in prompts])
    tokens = torch.zeros(len(prompts), int(length.max()), dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt) - 1] = torch.tensor(prompt[:-1])
    cache = DynamicCache(config=policy.model.config)
    with policy.adapter.probe(len(prompts)) as probes:
        policy.model.model(input_ids=tokens, past_key_values=cache)
    return Front(length, [state for layer in cache.layers for state in (layer.keys, layer.values)], [*probes.values()])


def run_completions(
    policy: Policy, rows: Rows, index: Int[Tensor, K], front: Front, owner: Int[Tensor, K]
) -> tuple[Sequence[Float[Tensor, "K _"]], Sequence[Float[Tensor, "K _ L _"]]]:
    """Gradients of the mean completion NLL of the rows at `index`, whose prompts are `owner`: for each module's c, and
    for the row's copies of its prompt's keys and values."""
    seen, count = front.length[owner], rows.completion[index].sum(1)
    step = torch.arange(int(count.max()))
    real = step < count[:, None]
    position = seen[:, None] + torch.where(real, step, 0)
    tokens, drawn = (rows.tokens[index].gather(1, position + ahead) for ahead in (0, 1))
    prompt = torch.arange(front.states[0].shape[2]) < seen[:, None]
    causal = torch.ones(len(step), len(step), dtype=torch.bool).tril()
    visible = torch.cat((prompt[:, None].expand(-1, len(step), -1), causal.expand(len(index), -1, -1)), dim=2)
    copies = [state.detach()[owner].requires_grad_() for state in front.states]
    cache = DynamicCache(config=policy.model.config)
    for layer, (keys, values) in enumerate(zip(copies[::2], copies[1::2], strict=True)):
        cache.update(keys, values, layer)
    with policy.adapter.probe(len(index)) as probes:
        hidden = policy.model.model(
            input_ids=tokens, attention_mask=visible[:, None], position_ids=position, past_key_values=cache
        ).last_hidden_state[real]
        logits = policy.model.lm_head(hidden).float() / policy.temperature
        share = (1 / count)[:, None].expand(real.shape)[real]
        nll = (share * F.cross_entropy(logits, drawn[real], reduction="none")).sum()
        grads = torch.autograd.grad(nll, [*probes.values(), *copies])
    return grads[: len(probes)], grads[len(probes) :]
