"""A linear probe for hacks: logit = <h, w> + b, with h [H] the base model's mean residual over a completion.

A probe is fitted outside of the run that it watches (`vgrout probe fit`), on labels of mechanisms that the run does not
train on. Its file says so, in safetensors: `weight` [H] and `bias`, and as metadata the provenance. A file is refused
where the provenance lacks a field, names a mode that is trained on, or another model.

Delta from the common form: h is the base model's, adapter skipped, throughout training. So the features stay those that
the probe was fitted on, and what the policy learns can change its score by its tokens alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vgrout.method.policy import Policy, Rows
from vgrout.method.residual import decoder_layers, residuals
from vgrout.types import UserError

FIELDS = ("modes", "problems", "model_sha256", "layers", "t_lo", "t_hi", "threshold", "auroc_heldout")
BUNDLED = "micro"


def _list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(type(v) is kind for v in value)


TYPES: dict[str, Callable[[Any], bool]] = {
    "modes": _list_of(str),
    "layers": _list_of(int),
    "model_sha256": lambda value: isinstance(value, str),
    "t_lo": lambda value: type(value) is float and math.isfinite(value),
    "t_hi": lambda value: type(value) is float and math.isfinite(value),
}


@dataclass(frozen=True)
class LinearProbe:
    """`provenance` has FIELDS: the `modes` that it was fitted on, where its `problems` are from, the digest of the base
    model, the `layers` whose outputs are averaged, the cuts (absorb above t_lo, route above t_hi) in units of the logit
    and how they were chosen, AUROC on held-out programs."""

    weight: Float[Tensor, H]
    bias: float
    provenance: Mapping[str, Any]

    @property
    def cuts(self) -> tuple[float, float]:
        return self.provenance["t_lo"], self.provenance["t_hi"]

    def logits(self, h: Float[Tensor, "N H"]) -> Float[Tensor, N]:
        return h @ self.weight + self.bias

    def read(self, policy: Policy, rows: Rows) -> Float[Tensor, N]:
        """Logits of some rows: positive where they look like hacks. One forward pass of the base model a row."""
        return self.logits(features(policy, rows, self.provenance["layers"]))

    def check(self, live: Sequence[str], model_sha256: str | None = None) -> None:
        """Raises UserError where the probe knows a mode that is trained on, or belongs to another model."""
        if known := sorted(set(self.provenance["modes"]) & set(live)):
            raise UserError(
                f"the probe was fitted on {', '.join(known)}, which the run trains on: that is no probe but labels"
            )
        own = self.provenance["model_sha256"]
        if model_sha256 is not None and own != model_sha256:
            raise UserError(
                f"the probe belongs to a model {own[:12]}, not to {model_sha256[:12]}: see `vgrout probe fit`"
            )

    def fits(self, policy: Policy) -> None:
        """Raises UserError where the model has no such layers, or their outputs are of another size."""
        depth, width = len(decoder_layers(policy.model)), policy.model.config.hidden_size
        if max(self.provenance["layers"]) > depth or len(self.weight) != width:
            asked = f"{len(self.weight)} numbers of layers {self.provenance['layers']}"
            raise UserError(f"the probe reads {asked}: the model has {depth} layers of {width}")

    def digest(self) -> str:
        """SHA-256 of what it holds."""
        whole = [self.weight.tolist(), self.bias, dict(self.provenance)]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        tensors = {"weight": self.weight.float().contiguous(), "bias": torch.tensor(self.bias, dtype=torch.float64)}
        save_file(tensors, path, {"vgrout": json.dumps(dict(self.provenance))})


def features(policy: Policy, rows: Rows, layers: Sequence[int]) -> Float[Tensor, "N H"]:
    """What a probe reads: the base model's residual, mean over completion tokens and then over layers."""
    return residuals(policy, rows, "resp_mean", state=None, layers=layers).mean(1)


def load_probe(name: str) -> LinearProbe:
    """`micro`, the bundled probe, or a file. Raises UserError for one that is damaged or without provenance."""
    path = Path(str(files("vgrout") / "data" / "probe_micro.safetensors")) if name == BUNDLED else Path(name)
    if not path.is_file():
        raise UserError(f"no probe at {path}: `vgrout probe fit` makes one")
    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get("vgrout", "{}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        provenance = json.loads(said)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or no probe: {error}") from None
    said = provenance if isinstance(provenance, dict) else {}
    if missing := [field for field in FIELDS if field not in said]:
        raise UserError(f"{path} does not say where it is from: {', '.join(missing)} missing")
    if wrong := [field for field, fits in TYPES.items() if not fits(said[field])]:
        raise UserError(f"{path}: {', '.join(wrong)} of its provenance cannot be read")
    if set(tensors) != {"weight", "bias"} or tensors["weight"].ndim != 1 or tensors["bias"].ndim:
        raise UserError(f"{path} is no probe: it holds {', '.join(sorted(tensors)) or 'nothing'}")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise UserError(f"{path}: weights that are not finite")
    if min(said["layers"]) < 1 or len(set(said["layers"])) < len(said["layers"]):
        raise UserError(f"{path}: layers = {said['layers']}: give each once, the first is 1")
    if said["t_lo"] > said["t_hi"]:
        raise UserError(f"{path}: t_lo = {said['t_lo']} exceeds t_hi = {said['t_hi']}")
    return LinearProbe(tensors["weight"].float(), float(tensors["bias"]), provenance)
