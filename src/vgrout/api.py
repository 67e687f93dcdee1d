"""What a training loop of your own needs, in one place: attach, score, route, ablate (docs/integrations.md).

    router = Router(model, tokenizer, Routing(pairs="my.md"))       two blocks on every Linear, the base frozen
    with router.sampling(): ...                                     sample from the block that ships
    decision = router.decide(step, prompts, completions)            keep, absorb or route each rollout
    with router.routed(decision): loss = ...; loss.backward()       each one trains what its zone says
    router.ship(), or router.export("out")                          the quarantine is gone

Nothing that a run of ours executes imports this module, so that it may change without making older runs stale.
"""

from __future__ import annotations

from vgrout.adapters import ADAPTERS, attach
from vgrout.adapters.base import Adapter
from vgrout.integrations.router import Router, Routing, routing_arms
from vgrout.models.load import load_model
from vgrout.pairs import load as load_pairs
from vgrout.types import Decision, Pair, RunFailed, UserError

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Decision",
    "Pair",
    "Router",
    "Routing",
    "RunFailed",
    "UserError",
    "attach",
    "load_model",
    "load_pairs",
    "routing_arms",
]
