"""A second device that is none: tensors that were sent there stay on the CPU and are marked, and an operation on
tensors of both devices is an error, as it is on a GPU.

As on a GPU, a tensor without dimensions may go along with any other, and a tensor of the device may be indexed by one
of the CPU. What the device would compute differently (kernels, rounding) is not simulated.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

THERE = torch.device("cuda:0")
HERE = torch.device("cpu")
GET = Tensor.__getitem__
ACROSS = {Tensor.copy_, Tensor.__setitem__, torch.Tensor.copy_}  # may read from the other device


class MixedDevices(AssertionError):
    """One operation on tensors of both devices."""


class TwoDevices(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self._there: dict[int, weakref.ref] = {}

    def mark(self, tensor: Tensor) -> Tensor:
        self._there[id(tensor)] = weakref.ref(tensor)
        return tensor

    def there(self, tensor: Tensor) -> bool:
        found = self._there.get(id(tensor))
        return found is not None and found() is tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return THERE if self.there(args[0]) else HERE
        if func == Tensor.is_cuda.__get__:
            return self.there(args[0])
        if func in (Tensor.numpy, Tensor.__array__) and self.there(args[0]):
            raise MixedDevices("numpy() of a tensor of the device")
        goes = self._asked(func, args, kwargs)
        if goes is not None and func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._sent(func, args, kwargs, goes)
        if "device" in kwargs:
            kwargs["device"] = HERE
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        marked = any(map(self.there, inputs))
        if marked and func not in ACROSS:
            checked = inputs[:1] if func is GET else inputs
            strange = [t for t in checked if not self.there(t) and t.ndim > 0]
            if strange:
                raise MixedDevices(f"{func}: a tensor of the CPU {tuple(strange[0].shape)} among those of the device")
        out = func(*args, **kwargs)
        lands = goes == THERE if goes is not None else marked
        if lands:
            for t in tree_leaves(out):
                if isinstance(t, Tensor):
                    self.mark(t)
        return out

    @staticmethod
    def _asked(func, args, kwargs) -> torch.device | None:
        """The device that a call names; None where it names none."""
        if func is Tensor.cpu:
            return HERE
        if func is Tensor.cuda:
            return THERE
        named = kwargs.get("device")
        if named is None and func is Tensor.to:
            named = next((a for a in args[1:] if isinstance(a, str | torch.device)), None)
        return None if named is None else torch.device(named) if isinstance(named, str) else named

    def _sent(self, func, args, kwargs, goes: torch.device) -> Tensor:
        tensor = args[0]
        if func is Tensor.to:
            rest = [a for a in args[1:] if not isinstance(a, str | torch.device)]
            others = {k: v for k, v in kwargs.items() if k != "device"}
            out = tensor.to(*rest, **others) if rest or others else tensor
        else:
            out = tensor
        if (goes.type == THERE.type) == self.there(out):
            return out
        out = out.view_as(out)  # another tensor, with its gradient
        return self.mark(out) if goes.type == THERE.type else out


@contextmanager
def on_device(*modules: nn.Module) -> Iterator[TwoDevices]:
    """With all parameters and buffers of `modules` on the device."""
    mode = TwoDevices()
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            mode.mark(tensor)
    with mode:
        yield mode
