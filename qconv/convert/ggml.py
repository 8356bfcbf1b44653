"""Decoding weights in any of ggml's blocks, K-quants among them, with the gguf package's own decoders.

Nothing here shares code with what writes blocks, so that a mistake there shows in a validation.

Rounding points: none but the package's, which computes in float32 as llama.cpp does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qconv.errors import CheckpointError, NumericsError
from qconv.gguf import gguf_package
from qconv.types import Checkpoint, TensorSpec


def weights_in_blocks(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Weight -> kind, of the tensors ``WEIGHT.KIND`` that `GgufCheckpoint` has."""
    blocks = [name for name, spec in specs.items() if spec.dtype == torch.uint8]
    return {name.rpartition(".")[0]: name.rpartition(".")[2] for name in blocks}


def bits_of(kind: str) -> int:
    """Bits of a code, which the name of each kind has for its first digit."""
    return int(next(letter for letter in kind if letter.isdecimal()))


def logical_spec(specs: Mapping[str, TensorSpec], weight: str, kind: str) -> TensorSpec:
    gguf = gguf_package()
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    n, row = specs[f"{weight}.{kind}"].shape
    return TensorSpec(name=weight, shape=(n, row // block_bytes * block), dtype=torch.float32)


def decode(source: Checkpoint, weight: str, kind: str, device: str) -> Tensor:
    """float32 ``[N, K]``.

    Raises:
        CheckpointError: a kind that the package does not decode.
        NumericsError: a scale is NaN or infinite.
    """
    gguf = gguf_package()
    blocks = source.read(f"{weight}.{kind}").numpy()
    try:
        values = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.upper()]))
    except NotImplementedError as error:
        raise CheckpointError(f"{source.location}: tensor {weight!r}: {kind} is not read ({error})") from error
    if not bool(torch.isfinite(values).all()):
        raise NumericsError(f"{source.location}: tensor {weight!r} has NaN or infinity; a scale is damaged")
    return values.to(device)
