"""c-gradients of rows that share their prompts: a prompt runs forward once, and backward for each of its rows.

    prompts       all tokens but the last of each distinct prompt -> keys and values of every layer
    completions   the last token of its prompt and the completion of each row, behind copies of its prompt's keys and
                  values -> what its c-gradient has from these tokens, and the gradients of the copies
    prompts       back from the gradients of the copies, those of many rows as one batch -> what it has from the others
A c-gradient is a sum over the tokens of its row, so the parts add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

if TYPE_CHECKING:
    from vgrout.method.policy import Policy, Rows

Group = tuple[Sequence[int], Sequence[int]]  # the tokens of a prompt, and its rows


def by_prompt(rows: Rows) -> tuple[list[int], list[list[Group]]]:
    """The rows that are alone with their prompt, or whose prompt has no two tokens; the other prompts with their rows,
    the shorter ones first, those together that have equally many. Prompts stand from the shortest to the longest."""
    start = (rows.length - rows.completion.sum(1)).tolist()
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in torch.argsort(rows.length, stable=True).tolist():
        groups.setdefault(tuple(rows.tokens[i, : start[i]].tolist()), []).append(i)
    alone: list[int] = []
    equal: dict[int, list[Group]] = {}
    for prompt, members in sorted(groups.items(), key=lambda group: len(group[0])):
        if len(members) == 1 or len(prompt) < 2:
            alone += members
        else:
            equal.setdefault(len(members), []).append((prompt, members))
    return alone, list(equal.values())


def stacked(grads: Sequence[Tensor], width: int) -> Float[Tensor, "*N M R"]:
    """The c-gradients of all modules, with zeros behind those of a narrower one."""
    return torch.stack([F.pad(g, (0, width - g.shape[-1])) for g in grads], dim=-2)


def shared_c_gradients(
    policy: Policy, rows: Rows, groups: Sequence[Group], size: int
) -> tuple[Int[Tensor, "P G"], Float[Tensor, "P G M R"]]:
    """c-gradients of each row's mean completion NLL on the adapter's present merged weights, and where its rows stand.

    `groups` are prompts with equally many rows, at most `size` of them. About `size` rows run at once.
    """
    prompts, members = zip(*groups, strict=True)
    index, width = torch.tensor(members), max(policy.adapter.widths.values())
    front, out = run_prompts(policy, prompts), []
    for some in index.split(max(1, size // len(prompts)), dim=1):
        own, copies = run_completions(policy, rows, some.flatten(), front, some.shape[1])
        back = front.back([grad.unflatten(0, some.shape).transpose(0, 1) for grad in copies])
        out.append(stacked(own, width).unflatten(0, some.shape) + stacked(back, width).transpose(0, 1))
    return index, torch.cat(out, dim=1)


@dataclass(frozen=True)
class PromptPass:
    """Prompts that have run forward, without their last tokens."""

    length: Int[Tensor, P]
    states: Sequence[Float[Tensor, "P _ L _"]]  # keys and values of each layer
    probes: Sequence[Float[Tensor, "P _"]]  # c of each module

    def back(self, grads: Sequence[Float[Tensor, "K P _ L _"]]) -> list[Float[Tensor, "K P _"]]:
        """K c-gradients of each prompt, from as many gradients of its keys and values."""
        # Keys and values of a first layer whose projections carry no probe depend on none.
        states, grads = zip(*((s, g) for s, g in zip(self.states, grads, strict=True) if s.requires_grad), strict=True)
        found = torch.autograd.grad(
            states, self.probes, grads, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
        # What stands behind keys and values in the last layer reaches no other token: there c has no gradient.
        count = len(grads[0])
        return [c.new_zeros(count, *c.shape) if g is None else g for g, c in zip(found, self.probes, strict=True)]


def run_prompts(policy: Policy, prompts: Sequence[Sequence[int]]) -> PromptPass:
    device = policy.device
    length = torch.tensor([len(prompt) - 1 for prompt in prompts])
    tokens = torch.zeros(len(prompts), int(length.max()), dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt) - 1] = torch.tensor(prompt[:-1])
    cache = DynamicCache(config=policy.model.config)
    with policy.adapter.probe(len(prompts)) as probes:
        policy.body(input_ids=tokens.to(device), past_key_values=cache)
    return PromptPass(
        length.to(device), [state for layer in cache.layers for state in (layer.keys, layer.values)], [*probes.values()]
    )


def run_completions(
    policy: Policy, rows: Rows, index: Int[Tensor, K], front: PromptPass, each: int
) -> tuple[Sequence[Float[Tensor, "K _"]], Sequence[Float[Tensor, "K _ L _"]]]:
    """Gradients of the mean completion NLL of the rows at `index`, `each` of every prompt: for each module's c, and for
    the row's copies of its prompt's keys and values."""
    device, rows = policy.device, rows.at(index).to(policy.device)
    seen, count = front.length.repeat_interleave(each), rows.completion.sum(1)
    step = torch.arange(int(count.max()), device=device)
    real = step < count[:, None]
    position = seen[:, None] + torch.where(real, step, 0)
    tokens, drawn = (rows.tokens.gather(1, position + ahead) for ahead in (0, 1))
    prompt = torch.arange(front.states[0].shape[2], device=device) < seen[:, None]
    causal = torch.ones(len(step), len(step), dtype=torch.bool, device=device).tril()
    visible = torch.cat((prompt[:, None].expand(-1, len(step), -1), causal.expand(len(index), -1, -1)), dim=2)
    copies = [state.detach().repeat_interleave(each, dim=0).requires_grad_() for state in front.states]
    cache = DynamicCache(config=policy.model.config)
    for layer, (keys, values) in enumerate(zip(copies[::2], copies[1::2], strict=True)):
        cache.update(keys, values, layer)
    with policy.adapter.probe(len(index)) as probes:
        hidden = policy.body(
            input_ids=tokens, attention_mask=visible[:, None], position_ids=position, past_key_values=cache
        ).last_hidden_state[real]
        share = (1 / count)[:, None].expand(real.shape)[real]
        nll = (share * F.cross_entropy(policy.head(hidden), drawn[real], reduction="none")).sum()
        grads = torch.autograd.grad(nll, [*probes.values(), *copies])
    return grads[: len(probes)], grads[len(probes) :]
