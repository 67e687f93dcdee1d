"""GRAFT: how much of a row's parameter gradient each block gets, by the row's label.

    l in [0, 1] the strength, k_b = (width of both blocks) / (width of block b); R deployed, F quarantine
                 unflagged                      flagged
    classic      (1, 1)                         (1 - l, 1 + l (k_F - 1))
    exclusive    (1 + l (k_R - 1), 1 - l)       (1 - l, 1 + l (k_F - 1))
Each row keeps its pressure, sum_b (width of b) w_b: what one block loses the other gets. At l = 1 an exclusive row
trains one block alone, at l = 0 every row both. Source: ARMS.md, after gradient routing (Cloud et al. 2024).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def graft_weights(
    flagged: Bool[Tensor, N],
    strength: float,
    kind: Literal["classic", "exclusive"],
    width: tuple[float, float] = (1.0, 1.0),
) -> tuple[Float[Tensor, N], Float[Tensor, N]]:
    """(w_deployed, w_quarantine): multipliers of each row's gradient for the parameters of a block.

    `width` is what the two blocks weigh against each other, equal ranks by default. They multiply gradients of
    parameters and nothing that flows on to lower layers; values do not change. Raises ValueError for a strength outside
    [0, 1], another kind or a width that is not positive.
    """
    if not 0 <= strength <= 1 or kind not in ("classic", "exclusive") or min(width) <= 0:
        raise ValueError(f"strength {strength}, kind {kind!r}, width {width}")
    k_r, k_f = (sum(width) / w for w in width)
    less = 1 - strength
    plain = (1.0, 1.0) if kind == "classic" else (1 + strength * (k_r - 1), less)
    marked = (less, 1 + strength * (k_f - 1))
    return tuple(torch.where(flagged, torch.tensor(m), torch.tensor(p)) for m, p in zip(marked, plain, strict=True))
