"""frozen_b: a trained encoder before a frozen random decoder.

    y = W x + B ((A_deployed + A_quarantine) x)
    B [o, r] ~ N(0, 1/r) frozen, shared; A_deployed, A_quarantine [r, i] zero at init
The score is sum_t (R x_t) (B^T delta_t) with R [r, i] ~ N(0, 1/i) frozen: A x is 0 at init and would give no score.

Both blocks see the same gradient. `frozen_b_split` gives the quarantine a decoder of its own, B_quarantine. It is drawn
by both kinds, so that the twins share B and R. Source: METHOD.md section 1.

Delta from canon: LoRA (Hu et al. 2021) trains both factors and starts with B = 0; here B is random and never trained.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vgrout.adapters.base import BLOCKS, BlockLinear, Switch


class FrozenB(BlockLinear):
    split = False

    def __init__(self, base: nn.Linear, name: str, switch: Switch, rank: int, generator: torch.Generator) -> None:
        super().__init__(base, name, switch)
        o, i = base.weight.shape
        self.register_buffer("B", torch.randn(o, rank, generator=generator) * rank**-0.5)
        self.register_buffer("R", torch.randn(rank, i, generator=generator) * i**-0.5)
        own = torch.randn(o, rank, generator=generator) * rank**-0.5
        if self.split:
            self.register_buffer("B_quarantine", own)
        for which in BLOCKS:
            self.register_parameter(f"A_{which}", nn.Parameter(torch.zeros(rank, i)))

    def factors(self, which: str) -> tuple[Float[Tensor, "K i"], Float[Tensor, "o K"]]:
        own = self.split and which == "quarantine"
        return self.get_parameter(f"A_{which}"), self.B_quarantine if own else self.B

    def bottleneck(self) -> tuple[Float[Tensor, "R i"], Float[Tensor, "o R"]]:
        return self.R, self.B


class FrozenBSplit(FrozenB):
    split = True
