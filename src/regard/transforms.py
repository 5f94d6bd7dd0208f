"""What torch is doing with a call: private questions, asked in one place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transforming() -> bool:
    """Whether a torch.func transform or forward-mode AD is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def may_look_at(values: Tensor) -> bool:
    """Whether reading the values costs nothing: a plain CPU tensor, outside torch.compile and transforms."""
    return (
        not torch.compiler.is_compiling()
        and type(values) is Tensor
        and values.device.type == "cpu"
        and not transforming()
    )


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)


def versions(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """How often each was written to; () while torch.compile traces, which sees to that itself."""
    if torch.compiler.is_compiling():
        return ()
    return tuple(0 if x.is_inference() else x._version for x in tensors)
