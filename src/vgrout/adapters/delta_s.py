"""delta_s: a trained shift of each singular value of the frozen weight.

    W = U diag(S) Vh, frozen, the reduced SVD       U [o, k], Vh [k, i], k = min(o, i)
    y = W x + U ((Vh x) * (S_deployed + S_quarantine))       both [k], zero at init
The score is dL/dS_deployed of a rollout, sum_t (Vh x_t) (U^T delta_t). `rank` says nothing here: k is the weight's.

Both blocks see the same gradient, so that routing only splits a magnitude: the shrinkage null (METHOD.md section 1).
`delta_s_split` gives the quarantine an encoder and a decoder of its own, Vh2 and U2: frozen random matrices with
orthonormal rows and columns.

Delta from canon: PiSSA (Meng et al. 2024) trains the singular vectors' factors; here they are frozen and the values
alone move, in two blocks.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vgrout.adapters.base import BLOCKS, BlockLinear, Switch
from vgrout.adapters.svd import svd


class DeltaS(BlockLinear):
    def __init__(self, base: nn.Linear, name: str, switch: Switch, rank: int, generator: torch.Generator) -> None:
        super().__init__(base, name, switch)
        u, s, vh = svd(base.weight)
        # Not saved: they follow from the base weight, and are as large as it.
        self.register_buffer("U", u, persistent=False)
        self.register_buffer("Vh", vh, persistent=False)
        for which in BLOCKS:
            self.register_parameter(f"S_{which}", nn.Parameter(torch.zeros_like(s)))

    def factors(self, which: str) -> tuple[Float[Tensor, "K i"], Float[Tensor, "o K"]]:
        return self.Vh, self.U * self.get_parameter(f"S_{which}")

    def bottleneck(self) -> tuple[Float[Tensor, "R i"], Float[Tensor, "o R"]]:
        return self.Vh, self.U


class DeltaSSplit(DeltaS):
    def __init__(self, base: nn.Linear, name: str, switch: Switch, rank: int, generator: torch.Generator) -> None:
        super().__init__(base, name, switch, rank, generator)
        for key, size in (("U2", self.U.shape), ("Vh2", self.Vh.T.shape)):
            q = torch.linalg.qr(torch.randn(size, generator=generator)).Q
            self.register_buffer(key, (q if key == "U2" else q.T).contiguous())

    def factors(self, which: str) -> tuple[Float[Tensor, "K i"], Float[Tensor, "o K"]]:
        if which == "deployed":
            return super().factors(which)
        return self.Vh2, self.U2 * self.S_quarantine
