"""Copies for another thread have the values and the shapes of what they are copies of."""

from __future__ import annotations

import pytest
import torch

from qconv.on_the_way import mark, to_host


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[
        pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    ])],
)  # fmt: skip
def test_values_and_shapes(device: str) -> None:
    tensors = [
        torch.randn(3, 5, dtype=torch.float64, device=device),
        torch.randn(7, device=device),
        torch.zeros(2, 0, device=device),
        torch.ones((), dtype=torch.bool, device=device),
    ]
    found, arrived = to_host(tensors), mark(device)
    arrived()
    for copy, tensor in zip(found, tensors, strict=True):
        assert (copy.shape, copy.dtype, copy.device.type) == (tensor.shape, torch.float64, "cpu")
        assert torch.equal(copy, tensor.cpu().double())
