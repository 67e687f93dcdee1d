"""Trusted subspace: gradients may only use directions that a short fine-tuning on clean completions used.

    begin   SFT on the pairs' clean sides, `sft_steps` steps; per module the SVD of the deployed block's weight change,
            U S V^T [o, i], of which k = `subspace_axes` axes stay; then the adapter goes back to where it was
    edit    L = diag(s_1..s_k / sum s)      dB [o, R] <- U_k L U_k^T dB      dA [R, i] <- dA V_k L V_k^T
Source: Deng et al. 2026, trusted-direction projection (TDGA). Deltas from canon: the trained matrices are the factors
of a low-rank block, so the input side is held to V as the output side is to U; the clean data are hand-written pairs.

All rollouts train the deployed block, nothing is ablated. Weighted by L, an edited gradient is shorter; AdamW does not
care, and its update leaves the span again, entry by entry. Records: `subspace_gradient` = share of the gradient's norm
inside the span before the edit, `subspace_update_outside` = share of the *previous* step's update outside of it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vgrout.arms.base import part
from vgrout.arms.edits import Edits, charged, norm, noted, share
from vgrout.method.sft import sft
from vgrout.types import UserError


def spectrum(
    change: Float[Tensor, "o i"], k: int
) -> tuple[Float[Tensor, "o k"], Float[Tensor, k], Float[Tensor, "i k"]]:
    """U, weights s / sum s and V of the top k singular axes; fewer where the matrix has fewer. Weights of a matrix of
    zeros are zeros."""
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    s = s[:k]
    return u[:, :k].contiguous(), s / s.sum().clamp(min=torch.finfo(s.dtype).tiny), vh[:k].T.contiguous()


def sides(named: list[tuple[str, Tensor]]) -> dict[str, tuple[str, str]]:
    """For each factor of a low-rank block the module it is of, and which of its spectra edits it. Raises UserError
    where the block has anything but factors."""
    of = {"dA": "v", "A": "v", "dB": "u", "B": "u"}
    found = {}
    for name, _ in named:
        module, _, key = name.rpartition(".")
        factor = key.partition("_")[0]
        if factor not in of:
            raise UserError(f"trusted_subspace edits the factors A and B of a low-rank adapter, and {key} is neither")
        found[name] = (module, of[factor])
    return found


def through(
    g: Float[Tensor, "a b"], basis: Float[Tensor, "n k"], weights: Float[Tensor, k], side: str
) -> Float[Tensor, "a b"]:
    """basis diag(weights) basis^T, applied to the rows' space (`u`, from the left) or the columns' (`v`)."""
    return basis @ (weights[:, None] * (basis.T @ g)) if side == "u" else ((g @ basis) * weights) @ basis.T


class TrustedSubspace(Edits):
    name = "trusted_subspace"
    claim = "keeps every gradient in the subspace of a short fine-tuning on clean completions"
    paper = "Deng et al. 2026"
    signal, action = "clean sides", "project"
    access = "L1"
    ablates = False

    def __init__(self, bench):
        super().__init__(bench)
        self.side = sides(bench.policy.adapter.named("deployed"))
        self.basis: dict[str, Tensor] = {}  # of each module: `MODULE.u` [o, k], `MODULE.v` [i, k], `MODULE.weights` [k]

    def begin(self):
        super().begin()
        cfg, adapter = self.cfg, self.bench.policy.adapter
        init = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
        betas = (cfg.beta1, cfg.beta2)
        sft(self.bench.policy, self.bench.clean, "deployed", steps=cfg.sft_steps, lr=cfg.sft_lr, betas=betas)
        with torch.no_grad():
            for name, module in adapter.modules.items():
                u, weights, v = spectrum(module.delta("deployed").float(), cfg.subspace_axes)
                self.basis |= {f"{name}.u": u, f"{name}.v": v, f"{name}.weights": weights}
            for name, tensor in adapter.tensors().items():
                tensor.copy_(init[name])

    def route(self, step, batch, oracle):
        moved, said = self.update(), {}
        if moved is not None:
            outside = {name: d - self.held(name, d, weighted=False) for name, d in moved.items()}
            said = {"subspace_update_outside": share(norm(outside), norm(moved))}
        decision = noted(super().route(step, batch, oracle), said)
        return charged(decision, 0 if step else self.cfg.sft_steps * len(self.bench.clean.length))

    def held(self, name: str, g: Tensor, *, weighted: bool) -> Tensor:
        """What the subspace leaves of a tensor in the shape of parameter `name`; weighted, or as plain projection."""
        module, side = self.side[name]
        weights = self.basis[f"{module}.weights"]
        return through(g, self.basis[f"{module}.{side}"], weights if weighted else (weights > 0).to(g.dtype), side)

    def edit(self, adapter):
        said = super().edit(adapter)
        before = {name: p.grad.clone() for name, p in adapter.named("deployed") if p.grad is not None}
        inside = {name: self.held(name, g, weighted=False) for name, g in before.items()}
        for name, p in adapter.named("deployed"):
            if p.grad is not None:
                p.grad.copy_(self.held(name, before[name], weighted=True))
        self.remember()
        return {**said, "subspace_gradient": share(norm(inside), norm(before))} if before else said

    def state(self):
        return {**super().state(), **{f"basis.{key}": tensor for key, tensor in self.basis.items()}}

    def restore(self, state):
        super().restore(state)
        self.basis = part(state, "basis.", self.bench.policy.device)
