"""An accelerator without hardware: its tensors refuse those of the CPU, and who waits for it is counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
"""A type of device that PyTorch needs no hardware for; here, its tensors have values all the same."""

_aten = torch.ops.aten
_TRANSFERS = {_aten._to_copy.default, _aten.copy_.default}
_WAITS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.equal.default}


class _OnDevice(torch.Tensor):
    """A tensor on the accelerator; `inner` has its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> _OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, device=DEVICE,
            storage_offset=inner.storage_offset(), requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"_OnDevice({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} outside of the block of its accelerator")


class Accelerator(TorchDispatchMode):
    """Within the block there is an accelerator, `DEVICE`.

    Attributes
    ----------
    waits : Counter
        Operations for which the processor waits until the accelerator has finished all work so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with self:  # in inference mode, operations made of others arrive whole
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        flat, _ = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, torch.Tensor)]
        here = [value for value in tensors if isinstance(value, _OnDevice)]
        others = [value for value in tensors if not isinstance(value, _OnDevice) and value.dim()]
        if here and others and function not in _TRANSFERS:
            raise AssertionError(f"{function} of tensors on two devices")
        to = kwargs.get("device")
        on_device = bool(here) if to is None else torch.device(to) == DEVICE
        if function is _aten.copy_.default:
            on_device = isinstance(args[0], _OnDevice)
        masks = function is _aten.index.Tensor and any(t.dtype == torch.bool for t in here[1:])
        if here and (function in _WAITS or masks or (function in _TRANSFERS and not on_device)):
            self.waits[str(function)] += 1
        if on_device and to is not None:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map(lambda value: value.inner if isinstance(value, _OnDevice) else value, (args, kwargs))
        result = function(*args, **kwargs)
        if function._schema.is_mutable and here and result is not None and isinstance(result, torch.Tensor):
            return next(value for value in here if value.inner is result)
        return tree_map(lambda v: _OnDevice(v) if isinstance(v, torch.Tensor) else v, result) if on_device else result


def move(model: torch.nn.Module) -> None:
    """Move a model's weights to the accelerator."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(_OnDevice(weight.detach()), requires_grad=False)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = _OnDevice(value.detach())
