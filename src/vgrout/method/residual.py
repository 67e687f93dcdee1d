"""What the residual stream holds: outputs of decoder layers, pooled over the tokens of each row.

    h_l [N, L, H]   output of decoder layer l, which is the sum of all that layers 1 to l have written
    resp_last       h at the last token of the completion, its end token where there is one
    resp_mean       mean of h over the tokens of the completion
    prompt_last     h at the last token of the prompt: one value for all completions of a prompt
Layers are numbered from 1. Source of the depth: ARMS.md (60 to 75 %).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import one_hot

from vgrout.method.policy import Policy, Rows, prompt_keys, stack
from vgrout.types import State, UserError

Pool = Literal["resp_last", "resp_mean", "prompt_last"]
POOLS: tuple[Pool, ...] = get_args(Pool)


def band(layers: int) -> tuple[int, ...]:
    """The layers l of a model of `layers` with .6 <= l / layers <= .75; the next deeper one where there is none."""
    low = -(-3 * layers // 5)
    return tuple(range(low, max(low, 3 * layers // 4) + 1))


def decoder_layers(model: nn.Module) -> Sequence[nn.Module]:
    """Raises UserError for a model that does not keep them where causal language models of transformers do."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UserError(f"{type(model).__name__} has no decoder layers at model.layers")
    return list(layers)


@contextmanager
def edited(model: nn.Module, edits: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside, the output [N, L, H] of layer l is what `edits[l]` makes of it, in every forward pass of the model."""
    layers = decoder_layers(model)

    def hook(edit: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def replaced(module: nn.Module, args: Any, output: Any) -> Any:
            return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

        return replaced

    with ExitStack() as hooks:
        for number, edit in edits.items():
            hooks.callback(layers[number - 1].register_forward_hook(hook(edit)).remove)
        yield


def residuals(
    policy: Policy, rows: Rows, pool: Pool, *, state: State | None, layers: Sequence[int]
) -> Float[Tensor, "N K H"]:
    """Pooled outputs of the layers in a block state (None: the base model), without gradients.

    With `prompt_last` every prompt runs once, so that its rows have the same value to the bit. Raises OutOfMemory where
    not even one row fits.
    """
    if pool == "prompt_last":
        prompts, owner = prompts_of(rows)
        return _residuals(policy, prompts, _last, state, layers)[owner]
    return _residuals(policy, rows, _response if pool == "resp_mean" else _last, state, layers)


def prompts_of(rows: Rows) -> tuple[Rows, Int[Tensor, N]]:
    """The distinct prompts of some rows, without completions, and the index of each row's prompt among them."""
    keys = prompt_keys(rows)
    index = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return stack(list(index), [()] * len(index), 0), torch.tensor([index[key] for key in keys])


def _response(part: Rows) -> Float[Tensor, "N L"]:
    return part.completion / part.completion.sum(1, keepdim=True)


def _last(part: Rows) -> Float[Tensor, "N L"]:
    return one_hot(part.length - 1, part.tokens.shape[1]).float()


def _residuals(
    policy: Policy, rows: Rows, share: Callable[[Rows], Tensor], state: State | None, layers: Sequence[int]
) -> Float[Tensor, "N K H"]:
    """`share` says what part [N, L] each token has in a row's value."""

    def in_batches(own: Rows, size: int) -> Tensor:
        out: Tensor | None = None
        context = policy.adapter.reference() if state is None else policy.adapter.merged(state)
        with torch.no_grad(), context:
            batches = torch.argsort(own.length, stable=True).split(size)
            for index, _ in policy.ranks.level(batches, torch.tensor([0])):
                part, seen = own.take(index), {}

                def keep(number: int, seen=seen) -> Callable[[Tensor], Tensor]:
                    return lambda h: seen.setdefault(number, h)

                with edited(policy.model, {number: keep(number) for number in layers}):
                    policy.body(input_ids=part.tokens.to(policy.device), use_cache=False)
                pooled = torch.stack([share(part)[:, None] @ seen[n].float().cpu() for n in layers], 1)[:, :, 0]
                out = pooled.new_zeros(len(own.length), *pooled.shape[1:]) if out is None else out
                out[index] = pooled
        return out

    return policy.shared(rows, "reading activations", in_batches)
