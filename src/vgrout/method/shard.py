"""A policy that several processes share: alike in all of them, with the frozen layers whole in each or in parts.

    whole    data parallel: each process runs its rows, gradients of the adapter are added up (loop.py)
    sharded  the same, and each decoder layer's frozen weights are spread over the processes (FSDP2): a layer's are
             collected before it runs and let go of after
The adapter, the embeddings and the head are whole in each process: only the adapter trains, and it is small.
"""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vgrout.dist import Ranks
from vgrout.method.policy import Policy
from vgrout.method.residual import decoder_layers


def join(policy: Policy, ranks: Ranks, device: str, *, shard: bool) -> None:
    """Make `policy` that of all processes: the adapter is that of the first, and the work on rows is shared.

    `shard` puts the model on `device`, layer by layer. Raises UserError for a model without decoder layers.
    """
    if ranks.world == 1:
        return
    policy.ranks = ranks
    if shard:
        ranks.sharded = True
        policy.adapter.merges = False
        layers = decoder_layers(policy.model)
        frozen = {p for layer in layers for p in layer.parameters() if not p.requires_grad}
        whole = {p for p in policy.model.parameters() if p not in frozen}
        mesh = init_device_mesh(torch.device(device).type, (ranks.world,))
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=whole)
        fully_shard(policy.body, mesh=mesh, ignored_params=whole)  # no weights of its own: it orders the layers
        policy.model.to(device)
        policy.device = policy.model.device
    modules = policy.adapter.modules.values()
    ranks.copy_([t for module in modules for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))])
