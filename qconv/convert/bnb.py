"""bitsandbytes 4-bit weights: NF4 and FP4, with or without double quantization.

Method: blockwise absmax quantization to a 16-value table (NF4: Dettmers et al. 2023, "QLoRA",
section 3; double quantization: same section; the 8-bit dynamic map: Dettmers et al. 2022,
"8-bit Optimizers via Block-wise Quantization", section 2). On disk, as transformers saves it, the
weight ``P`` is packed two codes a byte (element 2i in the high nibble) over the row-major flattened
tensor, in any storage dtype, with companions ``P.absmax``, ``P.quant_map``,
``P.quant_state.bitsandbytes__nf4`` (or ``__fp4``; bytes of JSON) and, when the absmax values are
themselves quantized, ``P.nested_absmax`` and ``P.nested_quant_map``.

Rounding points of decoding: table[code] * absmax in float32, then one rounding to the dtype of the
quant state. A nested absmax is ``nested_quant_map[u8] * nested_absmax[block] + nested_offset``,
product and sum each rounded in float32. This equals the library's own dequantization bit for bit
(up to the sign of an FP4 zero), which is what training multiplied with. The one exception: version
0.50 on an AVX512 CPU takes the wrong absmax for rows that are no multiple of the block size; blocks
run over the flattened tensor here, as its quantizer and its CUDA kernels have it.

IR-QLoRA (Qin et al. 2024, section 3.2; ``utils.py`` of its repository) quantizes ``W - tau``, tau of each block of 64,
and quantizes tau itself: ``dynamic_map[u8] * absmax`` of 256 blocks. Its layers have both as ``tau_quant`` uint8
``[B, 256]`` and ``tau_absmax`` ``[B, 1]``, read here as tensors of those names beside the weight. tau is added in
float32 to the decoded weight, and the sum rounded once more to its dtype, as the layer's forward pass does.

The arithmetic of both directions, and where the library's CPU and CUDA kernels differ, is in
`bnb_kernels.py`. Left out: blocks of 8-bit weights (LLM.int8), the AVX512 repacked layout that lives only in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qconv.checkpoint import parse_json_object
from qconv.convert.bnb_kernels import (
    BLOCK_SIZES,
    DTYPES,
    decode_absmax,
    decode_codes,
    dynamic_map,
    encode,
    quant_map,
    simulate,
)
from qconv.errors import CheckpointError, NumericsError
from qconv.finite import all_finite
from qconv.types import BnbKind, Checkpoint, TensorSpec

__all__ = ["BnbState", "decode", "encode", "packed_weights", "read_state", "simulate"]

STATE_INFIX = ".quant_state.bitsandbytes__"
TABLE_TOLERANCE = 1e-5
TAU_BLOCKS = 256  # that share an absmax of tau


@dataclass(frozen=True, kw_only=True)
class BnbState:
    """The JSON of one packed weight, checked.

    Attributes:
        name: the weight, e.g. ``model.layers.0.mlp.up_proj.weight``.
        quant_type: ``"nf4"`` or ``"fp4"``.
        block_size: elements that share an absmax.
        dtype: dtype that the weight had, and is decoded to.
        shape: shape that the weight had.
        nested_block_size: absmax values that share a nested absmax, or None without double quantization.
        nested_offset: added to every decoded absmax.
        has_tau: codes are those of W - tau (IR-QLoRA).
    """

    name: str
    quant_type: Literal["nf4", "fp4"]
    block_size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    nested_block_size: int | None
    nested_offset: float
    has_tau: bool = False

    @property
    def kind(self) -> BnbKind:
        nested = self.nested_block_size is not None
        if self.quant_type == "nf4":
            return "nf4-dq" if nested else "nf4"
        return "fp4-dq" if nested else "fp4"

    @property
    def num_blocks(self) -> int:
        return -(-math.prod(self.shape) // self.block_size)

    @property
    def companions(self) -> tuple[str, ...]:
        """The tensors that belong to the weight, all but the JSON state."""
        nested = () if self.nested_block_size is None else (".nested_absmax", ".nested_quant_map")
        tau = self.tau_names if self.has_tau else ()
        return (*(self.name + suffix for suffix in (".absmax", ".quant_map", *nested)), *tau)

    @property
    def tau_names(self) -> tuple[str, str]:
        module = self.name.removesuffix(".weight")
        return module + ".tau_quant", module + ".tau_absmax"


def packed_weights(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Packed weight -> its JSON state tensor, for every state that the checkpoint holds."""
    return {name.split(STATE_INFIX)[0]: name for name in specs if STATE_INFIX in name}


def read_state(checkpoint: Checkpoint, weight: str, state_name: str) -> BnbState:
    """Parses and checks the JSON state of one weight and the sizes of all its companions.

    Raises:
        CheckpointError: malformed JSON, an unknown or impossible value, a missing companion, or a
            companion whose dtype or size does not fit.
    """
    where = f"{checkpoint.location}: tensor {state_name!r}"
    raw = checkpoint.read(state_name)
    if raw.dtype != torch.uint8 or raw.ndim != 1:
        raise CheckpointError(
            f"{where}: expected bytes of JSON (uint8, one dimension), found {raw.dtype} {tuple(raw.shape)}"
        )
    fields = parse_json_object(raw.numpy().tobytes(), where)
    quant_type = fields.get("quant_type")
    if quant_type not in ("nf4", "fp4") or not state_name.endswith("__" + quant_type):
        raise CheckpointError(f"{where}: quant_type is {quant_type!r}; expected the nf4 or fp4 of the tensor's name")
    block_size = fields.get("blocksize")
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise CheckpointError(f"{where}: blocksize is {block_size!r}; expected one of {BLOCK_SIZES}")
    dtype = fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    shape = fields.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
        raise CheckpointError(f"{where}: shape is {shape!r}; expected a list of positive whole numbers")
    nested = any(key.startswith("nested_") for key in fields)
    if nested:
        _check_nested_fields(where, fields)
    state = BnbState(
        name=weight,
        quant_type="nf4" if quant_type == "nf4" else "fp4",
        block_size=block_size,
        dtype=DTYPES[dtype],
        shape=tuple(shape),
        nested_block_size=fields["nested_blocksize"] if nested else None,
        nested_offset=float(fields["nested_offset"]) if nested else 0.0,
    )
    state = replace(state, has_tau=any(name in checkpoint.specs() for name in state.tau_names))
    _check_companions(checkpoint, state)
    if state.has_tau:
        _check_tau(checkpoint, state)
    return state


def _check_tau(checkpoint: Checkpoint, state: BnbState) -> None:
    specs, numel = checkpoint.specs(), math.prod(state.shape)
    for name in state.tau_names:
        if name not in specs:
            raise CheckpointError(
                f"{checkpoint.location}: weight {state.name!r} has no tensor {name!r} beside its other"
            )
    codes, absmax = (specs[name] for name in state.tau_names)
    runs = numel // (TAU_BLOCKS * state.block_size)
    if (
        state.block_size * TAU_BLOCKS * runs != numel
        or (codes.shape, codes.dtype) != ((runs, TAU_BLOCKS), torch.uint8)
        or absmax.shape != (runs, 1)
        or not absmax.dtype.is_floating_point
    ):
        raise CheckpointError(
            f"{checkpoint.location}: tensors {codes.name!r} {codes.dtype} {list(codes.shape)} and {absmax.name!r} "
            f"{absmax.dtype} {list(absmax.shape)}: expected uint8 [B, {TAU_BLOCKS}] and floats [B, 1] for {numel} "
            f"weights in B runs of {TAU_BLOCKS} blocks of {state.block_size}"
        )


def _check_nested_fields(where: str, fields: Mapping[str, object]) -> None:
    block_size, offset, dtype = (fields.get("nested_" + key) for key in ("blocksize", "offset", "dtype"))
    if type(block_size) is not int or block_size <= 0:
        raise CheckpointError(f"{where}: nested_blocksize is {block_size!r}; expected a positive whole number")
    if not isinstance(offset, int | float) or isinstance(offset, bool) or not math.isfinite(offset):
        raise CheckpointError(f"{where}: nested_offset is {offset!r}; expected a finite number")
    if dtype != "float32":
        raise CheckpointError(f"{where}: nested_dtype is {dtype!r}; expected 'float32'")


def _check_companions(checkpoint: Checkpoint, state: BnbState) -> None:
    numel, specs = math.prod(state.shape), checkpoint.specs()
    expected: dict[str, tuple[torch.dtype, int]] = {state.name + ".quant_map": (torch.float32, 16)}
    if state.nested_block_size is None:
        expected[state.name + ".absmax"] = (torch.float32, state.num_blocks)
    else:
        expected[state.name + ".absmax"] = (torch.uint8, state.num_blocks)
        num_nested = -(-state.num_blocks // state.nested_block_size)
        expected[state.name + ".nested_absmax"] = (torch.float32, num_nested)
        expected[state.name + ".nested_quant_map"] = (torch.float32, 256)
    for name, (dtype, count) in expected.items():
        if name not in specs:
            raise CheckpointError(
                f"{checkpoint.location}: 4-bit weight {state.name!r} has no tensor {name!r}; "
                "the checkpoint is incomplete: save or fetch it again"
            )
        spec = specs[name]
        if spec.dtype != dtype or math.prod(spec.shape) != count:
            raise CheckpointError(
                f"{checkpoint.location}: tensor {name!r}: expected {dtype} with {count} elements for a weight of shape "
                f"{state.shape} in blocks of {state.block_size}, found {spec.dtype} {spec.shape}"
            )
    if state.name not in specs:
        raise CheckpointError(f"{checkpoint.location}: a quantization state but no weight {state.name!r}")
    packed = specs[state.name]
    if packed.num_bytes != -(-numel // 2):
        raise CheckpointError(
            f"{checkpoint.location}: tensor {state.name!r}: expected {-(-numel // 2)} bytes of 4-bit codes for shape "
            f"{state.shape}, found {packed.num_bytes} ({packed.dtype} {packed.shape})"
        )


def decode(checkpoint: Checkpoint, state: BnbState, device: str = "cpu") -> Tensor:
    """The weight, ``state.shape`` in ``state.dtype``; reads only this weight's tensors.

    Raises:
        NumericsError: an absmax or a table holds NaN or infinity.
        CheckpointError: the quantization table is not that of the state's quant_type.
    """

    def read(suffix: str) -> Tensor:
        """A companion in host memory, where it is checked without waiting for a GPU."""
        tensor = checkpoint.read(state.name + suffix).reshape(-1)
        if tensor.dtype == torch.float32 and not all_finite(tensor):
            raise NumericsError(f"{checkpoint.location}: tensor {state.name + suffix!r} holds NaN or infinity")
        return tensor

    table, absmax = read(".quant_map"), read(".absmax")
    if (table - quant_map(state.quant_type, "cpu")).abs().max() > TABLE_TOLERANCE:
        raise CheckpointError(
            f"{checkpoint.location}: tensor {state.name + '.quant_map'!r} is not the {state.quant_type} table, "
            "which bitsandbytes has built in; the checkpoint is damaged"
        )
    absmax = absmax.to(device, non_blocking=True)
    if state.nested_block_size is not None:
        nested_map = read(".nested_quant_map").to(device, non_blocking=True)
        nested_absmax = read(".nested_absmax").to(device, non_blocking=True)
        absmax = decode_absmax(absmax, nested_map, nested_absmax, state.nested_offset, state.nested_block_size)
    packed = checkpoint.read(state.name, device).reshape(-1).view(torch.uint8)
    table = table.to(device, non_blocking=True)
    w = decode_codes(packed, absmax, table, state.block_size, state.shape, state.dtype)
    return _plus_tau(checkpoint, w, state) if state.has_tau else w


def _plus_tau(checkpoint: Checkpoint, w: Tensor, state: BnbState) -> Tensor:
    codes_BT, absmax_B1 = (checkpoint.read(name, str(w.device)) for name in state.tau_names)
    if not all_finite(absmax_B1):
        raise NumericsError(f"{checkpoint.location}: tensor {state.tau_names[1]!r} holds NaN or infinity")
    tau_BT = dynamic_map(w.device)[codes_BT.long()] * absmax_B1
    blocks = w.reshape(-1, state.block_size) + tau_BT.reshape(-1, 1)
    return blocks.to(state.dtype).view(state.shape)
