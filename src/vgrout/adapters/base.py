"""What every adapter is: two blocks beside each frozen Linear, and the contexts that say which of them runs.

    deployed block      what ships
    quarantine block    reset before deployment

Per rollout i a mask (m_i, d_i):   y = W x + ((1-d) dep + d stopgrad(dep)) + m quar
    keep (0,0)   absorb (1,0)   route (1,1)
`detach` says what stopgrad stops: `output`, the whole of dep, so that lower layers get no gradient through the deployed
block either; `params`, its parameters only (SGTM, Shilov et al. 2025), with the Jacobian towards x kept.
The state of all modules lives in one `Switch`; only the context managers of `Adapter` change it. Row i of a batch
is x[i], so the first dimension of a module's input is the rollout; a module that gets the tokens of all rows end to end
(the shared expert of a mixture) takes them apart again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from vgrout.types import RunFailed, State, UserError

TARGETS = frozenset(
    "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj in_proj_qkv in_proj_z in_proj_a in_proj_b out_proj".split()
)
BLOCKS = ("deployed", "quarantine")
Detach = Literal["output", "params"]


@dataclass(frozen=True)
class Flow:
    """How a forward pass runs. `cut`: no gradient for the deployed block; `detach`: how it is cut, here and in rows
    with d = 1. `m`, `d` None: no row mask, one state for all rows. `share`: multiplies each row's gradient for the
    parameters of a block, deployed and quarantine. `probes`: module name -> c [N, R]. `weights`: module name -> the
    weight [o, i] that stands for the base and its live blocks together; the products are in its dtype. `scale`: the
    blocks run times a number each, deployed and quarantine, and their parameters get no gradient."""

    deployed: bool = True
    quarantine: bool = True
    cut: bool = False
    detach: Detach = "output"
    m: Float[Tensor, N] | None = None
    d: Float[Tensor, N] | None = None
    share: Float[Tensor, "N 2"] | None = None
    probes: Mapping[str, Tensor] | None = None
    weights: Mapping[str, Tensor] | None = None
    scale: tuple[float, float] | None = None

    @property
    def rowwise(self) -> bool:
        """Whether rows differ, so that each needs a place of its own in the batch."""
        return self.m is not None or self.probes is not None


FLOWS: dict[State | str, Flow] = {
    "full": Flow(),
    "deployed": Flow(quarantine=False),
    "reference": Flow(deployed=False, quarantine=False),
}


class Switch:
    """The one mutable cell that all modules of an adapter read: how they run, and the size of the model's batch."""

    def __init__(self) -> None:
        self.flow = FLOWS["full"]
        self.shape: tuple[int, ...] = ()  # rows and tokens

    def given(self, embeddings: nn.Module, args: tuple) -> None:
        """Hook of the input embeddings: note the size of the batch."""
        self.shape = tuple(args[0].shape)


class Probe(torch.autograd.Function):
    """y, unchanged to the bit, with dL/dc [N, R] = sum_t (A x_t) (B^T delta_t) for the scale c = 1 of B diag(c) A x.

    Nothing flows to x, A or B through it: at c = 1 the term B diag(c - 1) A x that carries c is zero.
    """

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, c: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(linear(x, a), b)
        ctx.dtype = c.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx, delta: Tensor):
        ax, b = ctx.saved_tensors
        return delta, None, (ax * (delta @ b)).sum(1, dtype=ctx.dtype), None, None


class BlockLinear(nn.Module):
    """A frozen Linear with two blocks, each a product of two factors.

    A subclass gives `factors` and `bottleneck`. What it trains are parameters whose names end in `_deployed` and
    `_quarantine`; both blocks are zero at init. Frozen tensors are buffers: persistent, unless they follow from the
    base weight alone.
    """

    inits: ClassVar[tuple[str, ...]] = ("random",)  # the values of `init` that the kind has

    def __init__(self, base: nn.Linear, name: str, switch: Switch) -> None:
        super().__init__()
        self.base, self.name, self.switch = base, name, switch
        base.weight.requires_grad_(False)
        if base.bias is not None:
            base.bias.requires_grad_(False)

    def factors(self, which: str) -> tuple[Float[Tensor, "K i"], Float[Tensor, "o K"]]:
        """(A, B) of a block, which gives B A x."""
        raise NotImplementedError

    def bottleneck(self) -> tuple[Float[Tensor, "R i"], Float[Tensor, "o R"]]:
        """(A, B) of the deployed block's c-probe, both non-zero at init: a score is sum_t (A x_t) (B^T delta_t)."""
        raise NotImplementedError

    def block(self, x: Float[Tensor, "*N L i"], which: str, *, fixed: bool = False) -> Float[Tensor, "*N L o"]:
        """A block's output, in the dtype of x; `fixed`: with a gradient for x and none for the parameters."""
        a, b = (factor.to(x.dtype) for factor in self.factors(which))
        if fixed:
            a, b = a.detach(), b.detach()
        return linear(linear(x, a), b)

    def delta(self, which: str) -> Float[Tensor, "o i"]:
        a, b = self.factors(which)
        return b @ a

    def _shared(self, x: Tensor, flow: Flow, which: str) -> Tensor:
        """A block's output, with each row's share of the gradient for its parameters and all of it for x."""
        own = self.block(x.detach(), which)
        share = flow.share[:, BLOCKS.index(which), None, None]
        return self.block(x, which, fixed=True) + share * (own - own.detach())

    def _deployed(self, x: Tensor, flow: Flow) -> Tensor:
        """The deployed block's output. It gets no gradient where it is cut."""
        if flow.share is not None:
            return self._shared(x, flow, "deployed")
        jacobian = flow.detach == "params"
        if flow.cut and jacobian:
            return self.block(x, "deployed", fixed=True)
        dep = self.block(x, "deployed")
        if flow.cut:
            return dep.detach()
        if flow.d is None:
            return dep
        stopped = self.block(x, "deployed", fixed=True) if jacobian else dep.detach()
        return torch.where(flow.d[:, None, None] > 0, stopped, dep)

    def forward(self, x: Tensor) -> Tensor:
        flow, own = self.switch.flow, x.dtype
        if flow.rowwise and x.ndim == 2:
            if len(x) != math.prod(self.switch.shape):
                raise RunFailed(f"{self.name} gets {len(x)} tokens of a batch {self.switch.shape}: whose is unknown")
            return self.forward(x.unflatten(0, self.switch.shape)).flatten(0, 1)
        weight = flow.weights[self.name] if flow.weights else self.base.weight
        x, bias = x.to(weight.dtype), None if self.base.bias is None else self.base.bias.to(weight.dtype)
        y = linear(x, weight, bias)
        if flow.scale is not None:
            for which, runs, scale in zip(BLOCKS, (flow.deployed, flow.quarantine), flow.scale, strict=True):
                y = y + scale * self.block(x, which, fixed=True) if runs else y
            return self._probed(y, x, flow).to(own)
        if flow.deployed:
            y = y + self._deployed(x, flow)
        if flow.quarantine:
            quar = self.block(x, "quarantine") if flow.share is None else self._shared(x, flow, "quarantine")
            y = y + (quar if flow.m is None else quar * flow.m[:, None, None])
        return self._probed(y, x, flow).to(own)

    def _probed(self, y: Tensor, x: Tensor, flow: Flow) -> Tensor:
        if flow.probes is None:
            return y
        return Probe.apply(y, x, flow.probes[self.name], *(factor.to(x.dtype) for factor in self.bottleneck()))


class Adapter:
    """All adapted Linears of a model, and the contexts that run them. Built by `attach`."""

    def __init__(
        self, model: nn.Module, modules: dict[str, BlockLinear], switch: Switch, detach: Detach = "output"
    ) -> None:
        self.model, self.modules, self.switch, self.detach = model, modules, switch, detach
        self.scale = dict.fromkeys(BLOCKS, 1.0)  # of each block in merged weights
        self.merges = True  # False: no process has whole base weights to add blocks to
        self.widths = {name: module.bottleneck()[0].shape[0] for name, module in modules.items()}  # of c, per module

    @property
    def device(self) -> torch.device:
        return next(iter(self.modules.values())).base.weight.device

    def parameters(self, which: str) -> list[nn.Parameter]:
        """The trainable tensors of a block: those whose name ends in `_deployed` or `_quarantine`."""
        return [p for _, p in self.named(which)]

    def named(self, which: str) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"{name}.{key}", p)
            for name, module in self.modules.items()
            for key, p in module.named_parameters(recurse=False)
            if key.endswith(f"_{which}")
        ]

    @contextmanager
    def _as(self, flow: Flow) -> Iterator[None]:
        before = self.switch.flow
        self.switch.flow = flow
        try:
            yield
        finally:
            self.switch.flow = before

    def state(self, state: State):
        """`full` or `deployed` as a context."""
        return self._as(FLOWS[state])

    def full(self):
        return self.state("full")

    def deployed(self):
        """The model that ships: the quarantine does not run."""
        return self.state("deployed")

    def reference(self):
        """The base model: no block runs."""
        return self._as(FLOWS["reference"])

    def routed(self, m: Float[Tensor, N], d: Float[Tensor, N], share: Float[Tensor, "N 2"] | None = None):
        """Row masks. Rows that all have the same one run in one state, and the quarantine only where it is in it.

        `share` [N, 2] instead of d: what part of each row's gradient the parameters of either block get.
        """
        if share is not None:
            there = self.device
            return self._as(Flow(quarantine=bool((m != 0).any()), m=m.to(there), share=share.to(there)))
        masks = set(zip(m.tolist(), d.tolist(), strict=True))
        if len(masks) == 1 and masks <= {(0, 0), (1, 0), (1, 1)}:
            ((runs, cuts),) = masks
            return self._as(Flow(quarantine=runs == 1, cut=cuts == 1, detach=self.detach))
        runs, m, d = bool((m != 0).any()), m.to(self.device), d.to(self.device) if bool((d != 0).any()) else None
        return self._as(Flow(quarantine=runs, detach=self.detach, m=m, d=d))

    @contextmanager
    def probe(self, n: int) -> Iterator[dict[str, Float[Tensor, "N R"]]]:
        """Virtual scales c = 1 between A and B of each module's `bottleneck`, one row per rollout.

        Values do not change; gradients with respect to c are those of METHOD.md section 2. Nests in any state.
        """
        there = self.device
        probes = {name: torch.ones(n, r, device=there, requires_grad=True) for name, r in self.widths.items()}
        with self._as(replace(self.switch.flow, probes=probes)):
            yield probes

    def merged(self, state: State, dtype: torch.dtype | None = None):
        """`state` on merged weights, without gradients for the parameters. `dtype` is that of the products with them;
        None: the model's.

        Into weights of fewer bits than float32 a delta would round otherwise than in the update: beside them the blocks
        run as they are, at the cost of two thin products a module. So they do beside weights that are spread over
        processes.
        """
        if not self.merges or any(module.base.weight.dtype.itemsize < 4 for module in self.modules.values()):
            return self._as(replace(FLOWS[state], scale=tuple(self.scale[which] for which in BLOCKS)))
        with torch.no_grad():
            weights = {name: weight.to(dtype or weight.dtype) for name, weight in self._weights(state)}
        return self._as(Flow(deployed=False, quarantine=False, weights=weights))

    @contextmanager
    def scaled(self, deployed: float = 1.0, quarantine: float = 1.0) -> Iterator[None]:
        """Both blocks times a number each, in merged weights: what is sampled here has shrunk blocks."""
        before = self.scale
        self.scale = {"deployed": deployed, "quarantine": quarantine}
        try:
            yield
        finally:
            self.scale = before

    def _weights(self, state: State) -> Iterator[tuple[str, Tensor]]:
        for name, module in self.modules.items():
            delta = module.delta("deployed") * self.scale["deployed"]
            if FLOWS[state].quarantine:
                delta = delta + module.delta("quarantine") * self.scale["quarantine"]
            yield name, module.base.weight + delta.to(module.base.weight.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """What makes the adapter: trainable tensors and persistent buffers. All else follows from the base model."""
        return {
            f"{name}.{key}": value.detach()
            for name, module in self.modules.items()
            for key, value in module.state_dict().items()
            if not key.startswith("base.")
        }

    def save(self, path: Path, meta: Mapping[str, object]) -> None:
        save_file({k: v.contiguous() for k, v in self.tensors().items()}, path, {"vgrout": json.dumps(dict(meta))})

    def load(self, path: Path) -> dict:
        """Fill in saved tensors and return their meta data. Raises UserError when names or shapes differ."""
        if not path.is_file():
            raise UserError(f"no adapter at {path}")
        mine = self.tensors()
        try:
            opened = safe_open(path, "pt")
        except SafetensorError as error:
            raise UserError(f"{path} is damaged or no adapter: {error}") from None
        with opened as file, torch.no_grad():
            if set(file.keys()) != set(mine):
                raise UserError(f"{path} holds an adapter of another shape than this model's")
            for key, tensor in mine.items():
                if (shape := tuple(file.get_slice(key).get_shape())) != tuple(tensor.shape):
                    raise UserError(f"{path}: {key} is {shape}, the model needs {tuple(tensor.shape)}")
            for key, tensor in mine.items():
                tensor.copy_(file.get_tensor(key))
            return json.loads(file.metadata()["vgrout"])
