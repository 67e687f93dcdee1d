"""GRAFT: how much of a row's parameter gradient each block gets, by the row's label.

    l in [0, 1] the strength, k_R = N / n_R, k_F = N / n_F; N rows, n_R of them unflagged, n_F flagged
    (w_deployed, w_quarantine)    unflagged                      flagged
    classic                       (1, 1)                         (1 - l, 1 + l (k_F - 1))
    exclusive                     (1 + l (k_R - 1), 1 - l)       (1 - l, 1 + l (k_F - 1))
Exclusive conserves pressure: the weights of either block average to 1 over the rows, so that a block is not pressed
less because few rows are its own. At l = 1 each row trains one block alone, at l = 0 every row both. The weights
multiply gradients of a block's parameters and nothing that flows on to lower layers; values do not change. Source:
ARMS.md, after gradient routing (Cloud et al. 2024).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Kind = Literal["classic", "exclusive"]


def graft_weights(flagged: Bool[Tensor, N], strength: float, kind: Kind) -> Float[Tensor, "N 2"]:
    """(w_deployed, w_quarantine) of each row. A step with one kind of row alone has k = 1 for it."""
    n, marked = len(flagged), int(flagged.sum())
    k_r, k_f = n / max(1, n - marked), n / max(1, marked)
    plain = (1 + strength * (k_r - 1), 1 - strength) if kind == "exclusive" else (1.0, 1.0)
    own = torch.tensor([plain, (1 - strength, 1 + strength * (k_f - 1))])
    return own[flagged.long()]
