"""The base model as QLoRA training saw it, when only the 16-bit checkpoint is at hand.

Method: Dettmers et al. 2023, "QLoRA", section 3: training multiplies with the 4-bit weight decoded to
its 16-bit dtype, so that is what an adapter must be merged into. Rounding points: see `bnb_kernels`.
Left out: quantizing anything but whole weights of linears.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from qconv.convert.bnb_kernels import DTYPES, simulate
from qconv.convert.dequantize import DequantizedCheckpoint
from qconv.errors import CheckpointError
from qconv.read_ahead import read_ahead
from qconv.types import BnbBackend, BnbKind, Checkpoint, TensorSpec


class SimulatedCheckpoint:
    """A frozen view: named weights pass through bitsandbytes 4-bit and back when they are read."""

    def __init__(self, source: Checkpoint, kind: BnbKind, weights: Collection[str], backend: BnbBackend | None):
        self.source = source
        self._kind = kind
        self._weights = frozenset(weights)
        self._backend = backend

    @property
    def location(self) -> str:
        return self.source.location

    @property
    def config(self) -> Mapping[str, Any]:
        return self.source.config

    def specs(self) -> Mapping[str, TensorSpec]:
        return self.source.specs()

    def read(self, name: str, device: str = "cpu") -> Tensor:
        tensor = self.source.read(name, device)
        if name not in self._weights:
            return tensor
        return simulate(tensor, self._kind, self._backend, f"{self.location}: tensor {name!r}")

    def read_ahead(self, names: Iterable[str], pin: bool = False, max_bytes: int | None = None) -> None:
        read_ahead(self.source, names, pin, max_bytes)


def simulate_training_base(
    checkpoint: Checkpoint, kind: BnbKind, weights: Collection[str], backend: BnbBackend | None = None
) -> Checkpoint:
    """A 16-bit checkpoint as QLoRA training saw it: named weights rounded to bitsandbytes 4-bit and back.

    Args:
        checkpoint: unquantized weights in the dtype that training loaded them in.
        kind: ``"16bit"`` gives the checkpoint itself.
        weights: tensors that training quantized, e.g. ``model.layers.0.self_attn.q_proj.weight``.
        backend: where training quantized, ``"cpu"`` or ``"cuda"``; by default where `read` puts the tensor.
            The kernels differ in rare codes and in the 8-bit codes of double quantization (see `bnb_kernels`).

    Raises:
        CheckpointError: an unknown weight, one that is not float, or a checkpoint that is quantized.
    """
    if kind == "16bit":
        return checkpoint
    if isinstance(checkpoint, DequantizedCheckpoint) and checkpoint.kind != "plain":
        raise CheckpointError(
            f"{checkpoint.location}: is quantized already ({checkpoint.kind}); the base is read as it is stored"
        )
    specs = checkpoint.specs()
    for name in weights:
        if name not in specs or specs[name].dtype not in DTYPES.values():
            found = specs[name].dtype if name in specs else "no such tensor"
            raise CheckpointError(
                f"{checkpoint.location}: tensor {name!r}: expected a float16, bfloat16 or float32 weight to simulate "
                f"{kind}, found {found}"
            )
    return SimulatedCheckpoint(checkpoint, kind, weights, backend)
