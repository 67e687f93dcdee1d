"""Arms that edit the residual stream in training, and ship without the edit.

    suppress   h - max(<h, d>, 0) d / |d|^2      while rollouts are sampled
    steer      h + c d                           in the forward passes of the update, the reference's included
At every token, of the prompt too, in the outputs of the layers of `concept.py`, each with its own d [H]; d is the mean
difference itself, so that c = 1 moves a token as far as a hack lies from a clean side.

suppress: the sampler's log-probabilities are those of the edited model. With `ratio = one` the update ignores the
edit; with `ratio = sampler`, the default, its rho is pi of the plain model over pi_old of the edited one.
steer: with c > 0 the update finds the model moved towards the hacks already. Both sides of the KL term, and of the
recorded `kl`, are edited: it measures what was learnt and not the edit.

Source: one-sided suppression in generation is the baseline of Wu and Tang 2026; steering towards the unwanted in
training is from Chen et al. 2025 (persona vectors). Deltas from canon: d follows the present model.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from vgrout.arms.concept import Concept
from vgrout.method.residual import edited


def without(h: Float[Tensor, "*N H"], d: Float[Tensor, H]) -> Float[Tensor, "*N H"]:
    """h less what of it points along d; what points against it stays."""
    d = d.to(h)
    return h - ((h @ d).clamp(min=0) / (d @ d))[..., None] * d


class Steering(Concept):
    action = "edit activations"
    phase: ClassVar[str]  # of `around`, in which the edit is on

    def changed(self, h: Float[Tensor, "*N H"], d: Float[Tensor, H]) -> Float[Tensor, "*N H"]:
        raise NotImplementedError

    def around(self, phase):
        super().around(phase)
        on = zip(self.layers, self.d, strict=True) if phase == self.phase else ()
        return edited(self.bench.policy.model, {layer: partial(self.changed, d=d) for layer, d in on})


class Suppress(Steering):
    name = "suppress"
    claim = "takes the pairs' direction out of the residual stream while it samples"
    paper = "Wu and Tang 2026 (baseline)"
    phase = "sample"

    def changed(self, h, d):
        return without(h, d)


class Steer(Steering):
    name = "steer"
    claim = "adds the pairs' direction to the residual stream while it updates"
    paper = "Chen et al. 2025"
    phase = "update"

    def changed(self, h, d):
        return h + self.cfg.steer_strength * d.to(h)
