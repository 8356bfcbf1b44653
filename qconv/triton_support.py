"""Whether Triton kernels can take the place of plain PyTorch; imports no Triton."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor


def available(tensor: Tensor) -> bool:
    """Whether Triton is installed and runs on this tensor's device: CUDA since Ampere, or any when it interprets."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _is_installed()
    is_ours = tensor.is_cuda and torch.version.hip is None
    return is_ours and torch.cuda.get_device_capability(tensor.device) >= (8, 0) and _is_installed()


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
