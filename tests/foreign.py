"""Quantized checkpoints as other tools leave them, written in numpy from the published layouts.

Nothing here uses `qconv.convert`: a weight's codes are drawn, laid out word by word, and its decoded value is kept as
what a reader must find.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import TINY_LLAMA

Write = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
"""From a module's name and its weight to the tensors that are stored, and the weight that they decode to."""


def make(
    folder: Path,
    write: Callable[[str], Write | None],
    quantization: Mapping[str, Any] | None,
    files: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Tensor]:
    """tiny-llama with each linear of its blocks as ``write(module)`` stores it (None = left alone), in ``folder``.

    Returns:
        What every tensor of the model decodes to.
    """
    shutil.copytree(TINY_LLAMA, folder)
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        writer = write(module) if module.endswith("_proj") else None
        if writer is None:
            stored[name] = expected[name] = tensor
        else:
            tensors, expected[name] = writer(module, tensor.float())
            stored |= {f"{module}.{key}": value.contiguous() for key, value in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    for file, content in (files or {}).items():
        (folder / file).write_text(json.dumps(content))
    return expected


@dataclass(frozen=True)
class Grid:
    """Codes of a weight [N, K], with scale [N, G] and zero point [N, G] of each group, as numpy arrays."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    group: np.ndarray  # [K]

    @property
    def weight(self) -> Tensor:
        centred = (self.codes - self.zeros[:, self.group]).astype(np.float32)
        return torch.from_numpy(centred * self.scales[:, self.group].astype(np.float32))


def grid_of(
    weight: Tensor, bits: int, group_size: int, symmetric: bool, shuffled: bool = False, lowest: int = 1
) -> Grid:
    """Round-to-nearest with float16 scales; ``shuffled`` gives columns to groups in another order (act-order)."""
    w = weight.numpy().astype(np.float64)
    n, k = w.shape
    size = k if group_size == -1 else group_size
    group = np.arange(k) // size
    if shuffled:
        group = np.random.default_rng(k).permutation(group)
    top = 2**bits - 1
    scales, zeros = np.empty((n, k // size), np.float16), np.empty((n, k // size), np.int64)
    for g in range(k // size):
        part = w[:, group == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            scales[:, g], zeros[:, g] = np.maximum(-low, high) / (top / 2), 2 ** (bits - 1)
        else:
            scales[:, g] = (high - low) / (top - 1)
            zeros[:, g] = np.clip(np.round(-low / scales[:, g].astype(np.float64)), lowest, top)
    codes = np.clip(np.round(w / scales.astype(np.float64)[:, group]) + zeros[:, group], 0, top).astype(np.int64)
    return Grid(codes, scales, zeros, group)


def words(values: np.ndarray, bits: int) -> Tensor:
    """int32 words along the last axis: number i takes bits i * bits and up of the row, low bits first."""
    row_bits = (values[..., None] >> np.arange(bits)) & 1
    stream = row_bits.reshape(*values.shape[:-1], -1).astype(np.uint8)
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % 32)])
    return torch.from_numpy(np.packbits(stream, axis=-1, bitorder="little").view(np.int32).copy())


def gptq(bits: int, group_size: int, symmetric: bool, desc_act: bool = False, minus: int = 1) -> Write:
    """AutoGPTQ's `QuantLinear.pack`; ``minus=0`` is GPTQModel's version 2."""

    def write(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        grid = grid_of(weight, bits, group_size, symmetric, desc_act, lowest=minus)
        tensors = {
            "qweight": words(grid.codes, bits).T,
            "qzeros": words(grid.zeros.T - minus, bits),
            "scales": torch.from_numpy(grid.scales.T.copy()),
            "g_idx": torch.from_numpy(grid.group.astype(np.int32)),
        }
        return tensors, grid.weight

    return write


def awq(group_size: int) -> Write:
    """AutoAWQ's `WQLinear_GEMM.from_linear`: columns 0, 2, 4, 6, 1, 3, 5, 7 of eight from the lowest nibble up."""

    def write(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        grid = grid_of(weight, 4, group_size, symmetric=False, lowest=0)
        order = [0, 2, 4, 6, 1, 3, 5, 7]

        def columns(values: np.ndarray) -> Tensor:
            return words(values.reshape(len(values), -1, 8)[..., order].reshape(len(values), -1), 4)

        scales = torch.from_numpy(grid.scales.T.copy())
        return {"qweight": columns(grid.codes.T), "qzeros": columns(grid.zeros.T), "scales": scales}, grid.weight

    return write


def pack_quantized(bits: int, group_size: int, symmetric: bool) -> Write:
    """compressed-tensors: words along K, zero points along N, scales [N, G]."""

    def write(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        grid = grid_of(weight, bits, group_size, symmetric, lowest=0)
        tensors = {
            "weight_packed": words(grid.codes, bits),
            "weight_scale": torch.from_numpy(grid.scales),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = words(grid.zeros.T, bits).T
        return tensors, grid.weight

    return write


def float8(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """compressed-tensors' FP8_DYNAMIC: one scale for each row."""
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (weight / scale.float()).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def float8_blocks(module: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """DeepSeek's layout: a float32 scale for each 128 x 128, which multiplies."""
    n, k = weight.shape
    blocks = weight.view(n // 128, 128, k // 128, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    decoded = (codes.float() * scale[:, None, :, None]).view(n, k)
    return {"weight": codes.view(n, k), "weight_scale_inv": scale}, decoded
