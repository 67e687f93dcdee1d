"""What the target Linears read on the pairs' rows, for inits of the adapter that come from it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from vgrout.adapters import targets
from vgrout.adapters.inits import Moments
from vgrout.method.policy import Rows


@torch.no_grad()
def input_moments(model: PreTrainedModel, hack: Rows, clean: Rows, score_batch: int) -> dict[str, Moments]:
    """Moments of each target's inputs in the base model, by name. `hack` and `clean` are sides of the same pairs.

    Holds d_in^2 numbers of eight bytes a module. Call it before `attach`.
    """
    linears, seen = targets(model), {}
    second = {name: torch.zeros(m.in_features, m.in_features).double() for name, m in linears.items()}
    difference = {name: torch.zeros(m.in_features).double() for name, m in linears.items()}

    def keep(name: str):
        return lambda module, args: seen.update({name: args[0].double().cpu()})

    hooks = [linear.register_forward_pre_hook(keep(name)) for name, linear in linears.items()]
    try:
        for sign, rows in ((1, hack), (-1, clean)):
            for index in torch.arange(len(rows.length)).split(score_batch):
                part = rows.take(index)
                model.base_model(input_ids=part.tokens.to(model.device), use_cache=False)
                real = torch.arange(part.tokens.shape[1]) < part.length[:, None]
                share = part.completion / part.completion.sum(1, keepdim=True)  # of a row's mean
                for name, x in seen.items():
                    x = x.view(*part.tokens.shape, -1)  # a module may get the tokens of all rows end to end
                    second[name] += x[real].T @ x[real]
                    difference[name] += sign * torch.einsum("nl,nli->i", share.double(), x)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = int(hack.length.sum() + clean.length.sum())
    return {name: Moments(second[name] / tokens, difference[name] / len(hack.length)) for name in linears}
