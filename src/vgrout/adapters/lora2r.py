"""lora2r: two LoRA blocks of rank R whose displacement from a random init is trained.

    delta_b(x) = B_b (A_b x) - B0_b (A0_b x) = dB_b ((A0_b + dA_b) x) + B0_b (dA_b x)
    A0 [2R, i] ~ N(0, 1/i), B0 [o, 2R] ~ N(0, 1/(2R)) frozen; dA, dB start at 0 and are trained.
The other inits of A0, B0 are those of inits.py.

Deltas from canon: LoRA (Hu et al. 2021) has B = 0 at init; here both factors start random and the init's product is
subtracted, so that the bottleneck has a gradient from the first step. dA, dB are stored instead of A, B: the
difference of two large products would lose most of the delta in bfloat16, weight decay is decay towards the init,
and ablating a block means zeroing its dA, dB.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vgrout.adapters.base import BLOCKS, BlockLinear, Switch
from vgrout.adapters.inits import INITS


class Lora2r(BlockLinear):
    inits = ("random", *INITS)

    def __init__(self, base: nn.Linear, name: str, switch: Switch, rank: int, generator: torch.Generator) -> None:
        super().__init__(base, name, switch)
        o, i = base.weight.shape
        a0 = torch.randn(2 * rank, i, generator=generator) * i**-0.5
        b0 = torch.randn(o, 2 * rank, generator=generator) * (2 * rank) ** -0.5
        for k, which in enumerate(BLOCKS):
            half = slice(k * rank, (k + 1) * rank)
            self.register_buffer(f"A0_{which}", a0[half].clone())
            self.register_buffer(f"B0_{which}", b0[:, half].clone())
            self.register_parameter(f"dA_{which}", nn.Parameter(torch.zeros(rank, i)))
            self.register_parameter(f"dB_{which}", nn.Parameter(torch.zeros(o, rank)))

    @torch.no_grad()
    def start(self, a0: Float[Tensor, "K i"], b0: Float[Tensor, "o K"]) -> None:
        """Replace the random init: K = 2R axes, the deployed block's first."""
        for which, a, b in zip(BLOCKS, a0.chunk(2), b0.chunk(2, dim=1), strict=True):
            self.get_buffer(f"A0_{which}").copy_(a)
            self.get_buffer(f"B0_{which}").copy_(b)

    def _parts(self, which: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return tuple(self.get_parameter(f"{n}_{which}") for n in ("dA", "dB")) + tuple(
            self.get_buffer(f"{n}_{which}") for n in ("A0", "B0")
        )

    def factors(self, which: str) -> tuple[Float[Tensor, "K i"], Float[Tensor, "o K"]]:
        # One product per side: [ (A0+dA) x ; dA x ] then [ dB , B0 ].
        dA, dB, A0, B0 = self._parts(which)
        return torch.cat((A0 + dA, dA)), torch.cat((dB, B0), dim=1)

    def bottleneck(self) -> tuple[Float[Tensor, "R i"], Float[Tensor, "o R"]]:
        dA, dB, A0, B0 = self._parts("deployed")
        return A0 + dA, B0 + dB

    def delta(self, which: str) -> Float[Tensor, "o i"]:
        # Two products of rank R: the one of rank 2R costs as much, and rounds otherwise.
        dA, dB, A0, B0 = self._parts(which)
        return dB @ (A0 + dA) + B0 @ dA
