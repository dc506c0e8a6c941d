"""Devices that are not there: tensors that compute on the CPU, say that they are on "xla:0" or "xla:1", and refuse to
meet each other as those on two graphics cards do.

Only what runs without gradients is supported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

#: What may meet tensors of another device: copies; and what is indexed, with indices on the CPU.
_COPIES = ("_to_copy", "copy_")
_NO_DRIVER = ("not linked with support", "not supported for tensor subclasses")
_INDEXED = ("index", "index_put_", "index_put", "__getitem__")


class Pretend(Tensor):
    """A tensor on the CPU that says it is elsewhere."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Pretend:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"{self.device}: {self.inner!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, func._schema.name.removeprefix("aten::"), args, kwargs or {})


@contextmanager
def pretended_devices() -> Iterator[None]:
    """Within it, tensors that are made on, or sent to, "xla:0" and "xla:1" pretend to be there."""
    with torch.no_grad(), _Operations(), _Calls():
        yield


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Pretend.__torch_dispatch__(func, types, args, kwargs)


class _Calls(TorchFunctionMode):
    """What never becomes an operation: tensors from numbers, and calls that ask for a driver first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and (device := kwargs.get("device")) is not None:
            return func(*args, **{**kwargs, "device": None}).to(device)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if not any(reason in str(error) for reason in _NO_DRIVER):
                raise
        return _run(func, func.__name__, args, kwargs)


def _run(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    # a number from the CPU may meet anything
    places = {t.device for t in tensors if isinstance(t, Pretend) or t.dim()}
    if name in _INDEXED:
        places = {args[0].device} | {place for place in places if place.type != "cpu"}
    if len(places) > 1 and name not in _COPIES:
        raise RuntimeError(f"{name}: expected all tensors on one device, got {sorted(map(str, places))}")
    device = args[0].device if name in _COPIES else next(iter(places), torch.device("cpu"))
    if (wanted := kwargs.get("device")) is not None:
        device = torch.device(wanted)
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*_plain(args), **_plain(kwargs))
    if device.type == "cpu":
        return out
    if name.endswith("_") and not name.endswith("__"):
        return args[0]
    return tree_map(lambda t: Pretend(t, device) if isinstance(t, Tensor) else t, out)


def _plain(value: Any) -> Any:
    return tree_map(lambda t: t.inner if isinstance(t, Pretend) else t, value)
