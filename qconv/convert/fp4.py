"""4-bit floats of the compressed-tensors package: ``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``.

Layout source: compressed-tensors 0.20, `compressors/nvfp4` and `compressors/mxfp4`; vLLM's `CompressedTensorsW4A4Fp4`
and `CompressedTensorsW4A4Mxfp4` read them. ``weight_packed`` uint8 [N, K / 2], two codes of `e2m1.py` in a byte, the
first in the low nibble. NVFP4: ``weight_scale`` float8_e4m3fn [N, K / 16] and ``weight_global_scale`` float32 [1],
which divides these scales; where inputs are rounded, too, ``input_global_scale`` float32 [1], by which scales of inputs
are multiplied before they become float8. MXFP4: ``weight_scale`` uint8 [N, K / 32], an exponent of two plus 127.

Rounding points: none in what is stored. Readers divide the scales by the global scale in float32: exact here, where
it is a power of two; files of other tools are read with the same one rounding.

gpt-oss' own layout of the same numbers is in `gpt_oss.py`. Left out: MXFP6 and MXFP8, MXFP4 beside float8 inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qconv.convert.compressed_tensors import config_of, only_group
from qconv.convert.format import TensorReader, check_group_size
from qconv.errors import CheckpointError, NumericsError, SchemeError
from qconv.types import QuantizedLinear, Scheme, TensorSpec

PACKED, SCALE, GLOBAL_SCALE = ".weight_packed", ".weight_scale", ".weight_global_scale"
INPUT_GLOBAL_SCALE = ".input_global_scale"
BIAS, NAN = 127, 255  # of e8m0
_KEYS = ("type", "num_bits", "symmetric", "strategy", "group_size")


@dataclass(frozen=True)
class Fp4Packed:
    """Codes in nibbles, scales of groups in 8 bits.

    Attributes:
        scheme: of 16-bit activations.
        args: the package's ``QuantizationArgs`` of the weights.
        dynamic: what these say of inputs that are rounded, too, alike.
    """

    name: str
    scheme: Scheme
    args: tuple[tuple[str, Any], ...]
    dynamic: str | bool
    suffixes = (PACKED, SCALE, GLOBAL_SCALE, INPUT_GLOBAL_SCALE)

    def check_scheme(self, scheme: Scheme) -> None:
        own = self.scheme
        if replace(scheme, dynamic_activations=False, activation_order=False) != own:
            raise SchemeError(
                f"{self.name} holds 4-bit floats in groups of {own.group_size} with {own.scale_format} scales, got "
                f"{scheme.bits}-bit {scheme.kind}, group size {scheme.group_size}, {scheme.scale_format} scales"
            )

    def check_shapes(self, module: str, n: int, k: int, scheme: Scheme) -> None:
        self.check_scheme(scheme)
        check_group_size(self.name, module, k, scheme)

    def check(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> None:
        n, k = q.codes_NK.shape
        self.check_shapes(module, n, k, q.scheme)
        if q.group_index_K is not None:
            raise SchemeError(f"{module}: {self.name} stores no group index")
        if q.codes_NK.numel() and int(q.codes_NK.max()) > q.scheme.max_code:
            raise NumericsError(f"{module}: a code exceeds {q.scheme.max_code}, the largest of 4 bits")
        for what, scale, is_wanted in (
            ("a global scale", q.global_scale, q.scheme.has_global_scale),
            ("a global scale of inputs", q.input_scale, q.scheme.stores_input_scale),
        ):
            if (scale is not None) != is_wanted or (scale is not None and not _is_positive(scale)):
                found = "none" if scale is None else f"{float(scale):g}"
                wanted = "that is finite and positive" if is_wanted else "not at all"
                raise NumericsError(f"{module}: {self.name} stores {what} {wanted}, found {found}")
        if not torch.equal(_scales(_stored_scales(q), q.global_scale), q.scales_NG):
            raise NumericsError(
                f"{module}: a scale is no {q.scheme.scale_format} number"
                f"{'' if q.global_scale is None else f' divided by the global scale {float(q.global_scale):g}'}; the "
                "stored model would differ from the validated one"
            )

    def pack(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = {
            module + PACKED: q.codes_NK[:, ::2] | q.codes_NK[:, 1::2] << 4,
            module + SCALE: _stored_scales(q),
        }
        if q.global_scale is not None:
            tensors[module + GLOBAL_SCALE] = q.global_scale.to(torch.float32)
        if q.input_scale is not None:
            tensors[module + INPUT_GLOBAL_SCALE] = q.input_scale.to(torch.float32)
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], module: str, scheme: Scheme, location: str = "checkpoint"
    ) -> QuantizedLinear:
        reader = TensorReader(tensors, module, location)
        packed = reader.take(PACKED, (torch.uint8,), (None, None))
        shape = scheme.scales_shape(packed.shape[0], 2 * packed.shape[1])
        global_scale = take_positive(reader, GLOBAL_SCALE) if scheme.has_global_scale else None
        stored = reader.take(SCALE, (torch.uint8 if global_scale is None else torch.float8_e4m3fn,), shape)
        scales = _scales(stored, global_scale)
        reader.check_scales(scales)
        return QuantizedLinear(
            codes_NK=torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1),
            scales_NG=scales,
            zeros_NG=None,
            group_index_K=None,
            scheme=scheme,
            input_scale=take_positive(reader, INPUT_GLOBAL_SCALE) if scheme.stores_input_scale else None,
            global_scale=global_scale,
        )

    def read_input_scale(self, tensors: Mapping[str, Tensor], module: str, location: str) -> Tensor:
        """The stored global scale of a module's inputs, ``[1]`` float32.

        Raises:
            CheckpointError: it is missing, of another shape or dtype, or not positive.
            NumericsError: it is NaN or infinite.
        """
        return take_positive(TensorReader(tensors, module, location), INPUT_GLOBAL_SCALE)

    def logical_shape(self, specs: Mapping[str, TensorSpec], module: str, scheme: Scheme) -> tuple[int, int] | None:
        spec = specs.get(module + PACKED)
        return None if spec is None or len(spec.shape) != 2 else (spec.shape[0], 2 * spec.shape[1])

    def quantization_config(
        self,
        scheme: Scheme,
        quantized_modules: Collection[str],
        ignored_modules: Collection[str],
        has_group_index: bool = False,
    ) -> dict[str, Any]:
        self.check_scheme(scheme)
        weights = dict(self.args)
        activations = weights | {"dynamic": self.dynamic} if scheme.dynamic_activations else None
        return config_of(self.name, weights, activations, ignored_modules)

    def scheme_of(self, config: Mapping[str, Any], location: str) -> Scheme:
        weights, activations = only_group(config, location)
        self._check_args(weights, False, "weights", location)
        if activations is None:
            return self.scheme
        self._check_args(activations, self.dynamic, "input activations", location)
        return replace(self.scheme, dynamic_activations=True)

    def _check_args(self, args: Mapping[str, Any], dynamic: str | bool, what: str, location: str) -> None:
        """Raises CheckpointError where the configuration says other numbers than the layout has."""
        expected = [dict(self.args)[key] for key in _KEYS] + [dynamic]
        found = [args.get(key, True if key == "symmetric" else None) for key in _KEYS] + [args.get("dynamic", False)]
        if found != expected:
            raise CheckpointError(
                f"{location}: quantization_config: of {self.name} are read {what} with {', '.join(_KEYS)}, dynamic of "
                f"{expected}, found {found}"
            )

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {}


def _args(strategy: str, group_size: int, scale_dtype: str) -> tuple[tuple[str, Any], ...]:
    numbers = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": strategy, "group_size": group_size}
    return tuple((numbers | {"dynamic": False, "scale_dtype": scale_dtype}).items())


NVFP4 = Fp4Packed(
    name="nvfp4-pack-quantized",
    scheme=Scheme(kind="float", bits=4, group_size=16, scale_format="e4m3"),
    args=_args("tensor_group", 16, "torch.float8_e4m3fn"),
    dynamic="local",
)
MXFP4 = Fp4Packed(
    name="mxfp4-pack-quantized",
    scheme=Scheme(kind="float", bits=4, group_size=32, scale_format="e8m0"),
    args=_args("group", 32, "torch.uint8"),
    dynamic=True,
)


def _stored_scales(q: QuantizedLinear) -> Tensor:
    """float8: the nearest to scale times global scale, which is off by the rounding of one division; or exponents."""
    if q.global_scale is not None:
        return (q.scales_NG * q.global_scale).to(torch.float8_e4m3fn)
    _, exponent = torch.frexp(q.scales_NG)  # of a mantissa of 0.5
    return (exponent + (BIAS - 1)).to(torch.uint8)


def _scales(stored: Tensor, global_scale: Tensor | None) -> Tensor:
    """What is multiplied by, float32; NaN where the exponent is reserved for it."""
    if global_scale is not None:
        return stored.float() / global_scale
    scales = torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.int() - BIAS)
    return torch.where(stored == NAN, torch.nan, scales)


def _is_positive(scale: Tensor) -> bool:
    return bool(torch.isfinite(scale) & (scale > 0))


def take_positive(reader: TensorReader, suffix: str) -> Tensor:
    """A global scale, ``[1]`` float32."""
    scale = reader.take_scales(suffix, (1,))
    if not bool(scale > 0):
        raise reader.error(suffix, f"is {float(scale):g}; a global scale is positive")
    return scale
