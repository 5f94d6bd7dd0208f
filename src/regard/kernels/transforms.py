"""What torch is doing with a call: the private questions, asked in one place."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transforming() -> bool:
    """Whether a torch.func transform or forward-mode AD is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
