"""The layouts of the compressed-tensors package: ``pack-quantized`` and ``float-quantized``.

Layout source: compressed-tensors 0.20, `compressors/pack_quantized` and `compressors/naive_quantized`.

``pack-quantized``, integer codes of a weight [N, K] with b bits in G groups: ``weight_packed`` int32
[N, ceil(K*b/32)] along K, ``weight_scale`` [N, G] in the model's dtype, ``weight_shape`` int64 [2],
for asymmetric schemes ``weight_zero_point`` int32 [ceil(N*b/32), G] packed along N, and with a group
index ``weight_g_idx`` int32 [K]. Symmetric weights must not store a zero point (vLLM rejects it).
The package speaks of signed codes; what it stores is the signed code + 2**(b-1), our unsigned code.

``float-quantized``: ``weight`` float8_e4m3fn [N, K], ``weight_scale`` [N, 1] in the model's dtype;
activations are quantized per token at run time and store nothing. With static activations (the package's
"FP8" preset) ``weight_scale`` is [1], of the whole weight, and ``input_scale`` [1] of all its inputs.
Both shapes of ``weight_scale`` are read with either kind of activations.

Rounding points: none; scales must be exact in the model's dtype. Readers multiply in that dtype,
which rounds once more. Left out: block scales, nvfp4, mixed schemes; ``int-quantized`` is in
`int_quantized.py`. Group indices (``actorder: group``) are read by vLLM and by compressed-tensors up to
0.19; version 0.20 dropped them, so prefer static groups.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qconv.convert.bitpack import num_words, pack_last, unpack_last
from qconv.convert.format import TensorReader, check_group_size, check_values, shape_of_weight
from qconv.errors import CheckpointError, NumericsError, SchemeError
from qconv.experts import expert_of
from qconv.types import QuantizedLinear, Scheme, TensorSpec

INPUT_SCALE = ".input_scale"
PACKED_BITS = (3, 4, 5, 6, 8)
"""Of pack-quantized. The package packs widths that divide no word densely since release 0.18, and otherwise before."""
_TOKEN_KEYS = (("type", "int"), ("num_bits", 8), ("strategy", None), ("symmetric", True), ("dynamic", False))


@dataclass(frozen=True)
class PackQuantized:
    """Integer codes of 3, 4, 5, 6 or 8 bits, by group or by channel."""

    name = "pack-quantized"
    suffixes = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx")

    def check_scheme(self, scheme: Scheme) -> None:
        if scheme.kind != "int" or scheme.bits not in PACKED_BITS:
            raise SchemeError(
                f"pack-quantized holds integer codes of {_words(PACKED_BITS)} bits, got {scheme.bits}-bit {scheme.kind}"
            )
        if scheme.dynamic_activations and (scheme.bits != 4 or not scheme.symmetric):
            raise SchemeError(
                "pack-quantized has dynamic activations beside symmetric 4-bit weights alone; int-quantized and "
                "float-quantized have them beside 8-bit ones"
            )

    def check_shapes(self, module: str, n: int, k: int, scheme: Scheme) -> None:
        self.check_scheme(scheme)
        check_group_size(self.name, module, k, scheme)

    def check(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> None:
        n, k = q.codes_NK.shape
        self.check_shapes(module, n, k, q.scheme)
        check_values(q, module, scale_dtype)

    def pack(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        bits, codes = q.scheme.bits, q.codes_NK
        tensors = {
            module + ".weight_packed": pack_last(codes, bits),
            module + ".weight_scale": q.scales_NG.to(scale_dtype),
            module + ".weight_shape": torch.tensor(codes.shape, dtype=torch.int64, device=codes.device),
        }
        if q.zeros_NG is not None:
            tensors[module + ".weight_zero_point"] = pack_last(q.zeros_NG.T, bits).T.contiguous()
        if q.group_index_K is not None:
            tensors[module + ".weight_g_idx"] = q.group_index_K.to(torch.int32)
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], module: str, scheme: Scheme, location: str = "checkpoint"
    ) -> QuantizedLinear:
        reader = TensorReader(tensors, module, location)
        n, k = (int(size) for size in reader.take(".weight_shape", (torch.int64, torch.int32), (2,)))
        if n <= 0 or k <= 0:
            raise reader.error(".weight_shape", f"says ({n}, {k})")
        groups = scheme.num_groups(k)
        packed = reader.take(".weight_packed", (torch.int32,), (n, num_words(k, scheme.bits)))
        scales = reader.take_scales(".weight_scale", (n, groups))
        zeros = None
        if not scheme.symmetric:
            words = reader.take(".weight_zero_point", (torch.int32,), (num_words(n, scheme.bits), groups))
            zeros = unpack_last(words.T, scheme.bits, n).T.contiguous()
        elif reader.has(".weight_zero_point"):
            raise reader.error(".weight_zero_point", "is stored though the configuration says symmetric")
        index = None
        if reader.has(".weight_g_idx"):
            index = reader.take_group_index(".weight_g_idx", k, groups, scheme)
        return QuantizedLinear(
            codes_NK=unpack_last(packed, scheme.bits, k),
            scales_NG=scales,
            zeros_NG=zeros,
            group_index_K=index,
            scheme=scheme,
        )

    def logical_shape(self, specs: Mapping[str, TensorSpec], module: str, scheme: Scheme) -> tuple[int, int] | None:
        return None  # rows may end inside a word: only weight_shape tells

    def quantization_config(
        self,
        scheme: Scheme,
        quantized_modules: Collection[str],
        ignored_modules: Collection[str],
        has_group_index: bool = False,
    ) -> dict[str, Any]:
        self.check_scheme(scheme)
        order = "group" if has_group_index else "weight" if scheme.activation_order else None
        weights = weight_args(scheme)
        if order is not None:
            weights["actorder"] = order
        if not scheme.dynamic_activations:
            return config_of(self.name, weights, None, ignored_modules)
        kind = "float" if scheme.float8_activations else "int"
        config = config_of(self.name, weights, per_token(kind), ignored_modules)
        # The package takes integers beside rounded inputs for int-quantized unless the group itself says otherwise.
        config["config_groups"]["group_0"]["format"] = self.name
        return config

    def scheme_of(self, config: Mapping[str, Any], location: str) -> Scheme:
        weights, activations = only_group(config, location)
        rounded = None if activations is None else tuple(activations.get(key, d) for key, d in _TOKEN_KEYS)
        if rounded not in (None, ("int", 8, "token", True, True), ("float", 8, "token", True, True)):
            raise CheckpointError(
                f"{location}: quantization_config: beside pack-quantized weights are read activations of 8 bits that "
                f"are symmetric and dynamic by token, found {activations}"
            )
        strategy, bits = weights.get("strategy"), weights.get("num_bits")
        if weights.get("type", "int") != "int" or strategy not in ("group", "channel") or bits not in PACKED_BITS:
            raise CheckpointError(
                f"{location}: quantization_config: read are integer weights of {_words(PACKED_BITS)} bits by group or "
                f"channel, found num_bits {bits!r}, type {weights.get('type')!r}, strategy {strategy!r}"
            )
        group_size = weights.get("group_size") if strategy == "group" else -1
        if type(group_size) is not int:
            raise CheckpointError(f"{location}: quantization_config: group_size is {group_size!r}")
        return Scheme(
            bits=bits,
            group_size=group_size,
            symmetric=bool(weights.get("symmetric", True)),
            activation_order=bool(weights.get("actorder")),
            dynamic_activations=rounded is not None,
            float8_activations=activations is not None and activations.get("type") == "float",
        )

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {}


@dataclass(frozen=True)
class FloatQuantized:
    """float8_e4m3fn weights: a scale per output channel and dynamic activations per token, or one and static ones."""

    name = "float-quantized"
    suffixes = (".weight_scale", ".weight", INPUT_SCALE)

    def check_scheme(self, scheme: Scheme) -> None:
        if scheme.kind != "float" or scheme.group_size != -1 or not scheme.rounds_activations:
            raise SchemeError(
                "float-quantized holds float8 weights with one scale per channel or tensor (group size -1) and dynamic "
                f"or static activations, got {scheme.kind}, group size {scheme.group_size}, "
                f"dynamic activations {scheme.dynamic_activations}, static ones {scheme.static_activations}"
            )

    def check_shapes(self, module: str, n: int, k: int, scheme: Scheme) -> None:
        self.check_scheme(scheme)

    def check(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> None:
        self.check_scheme(q.scheme)
        check_values(q, module, scale_dtype)
        scale = q.input_scale
        if (scale is not None) != q.scheme.static_activations:
            raise SchemeError(f"{module}: an input scale belongs to static activations, and they to it")
        if scale is None:
            return
        if not torch.equal(q.scales_NG, q.scales_NG[:1].expand_as(q.scales_NG)):
            raise SchemeError(f"{module}: beside static activations a weight has one scale, found several")
        if not torch.equal(scale.to(scale_dtype).to(torch.float32), scale) or not bool(scale > 0):
            raise NumericsError(
                f"{module}: the input scale {float(scale):g} is not positive and exact in {scale_dtype}"
            )

    def pack(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        scales = q.scales_NG.to(scale_dtype)
        if q.input_scale is None:
            return {module + ".weight": q.codes_NK, module + ".weight_scale": scales}
        return {
            module + ".weight": q.codes_NK,
            module + ".weight_scale": scales[0].clone(),
            module + INPUT_SCALE: q.input_scale.to(scale_dtype),
        }

    def unpack(
        self, tensors: Mapping[str, Tensor], module: str, scheme: Scheme, location: str = "checkpoint"
    ) -> QuantizedLinear:
        reader = TensorReader(tensors, module, location)
        codes = reader.take(".weight", (torch.float8_e4m3fn,), (None, None))
        n = codes.shape[0]
        if reader.has(".weight_scale") and tensors[module + ".weight_scale"].ndim == 1:
            scales = reader.take_scales(".weight_scale", (1,)).expand(n, 1).contiguous()
        else:
            scales = reader.take_scales(".weight_scale", (n, 1))
        return QuantizedLinear(
            codes_NK=codes,
            scales_NG=scales,
            zeros_NG=None,
            group_index_K=None,
            scheme=scheme,
            input_scale=self.read_input_scale(tensors, module, location) if scheme.static_activations else None,
        )

    def read_input_scale(self, tensors: Mapping[str, Tensor], module: str, location: str) -> Tensor:
        """The stored scale of a module's inputs, ``[1]`` float32.

        Raises:
            CheckpointError: it is missing, of another shape or dtype, or not positive.
            NumericsError: it is NaN or infinite.
        """
        reader = TensorReader(tensors, module, location)
        scale = reader.take_scales(INPUT_SCALE, (1,))
        if not bool(scale > 0):
            raise reader.error(INPUT_SCALE, f"is {float(scale):g}; a scale is positive")
        return scale

    def logical_shape(self, specs: Mapping[str, TensorSpec], module: str, scheme: Scheme) -> tuple[int, int] | None:
        return shape_of_weight(specs, module)

    def quantization_config(
        self,
        scheme: Scheme,
        quantized_modules: Collection[str],
        ignored_modules: Collection[str],
        has_group_index: bool = False,
    ) -> dict[str, Any]:
        self.check_scheme(scheme)
        weights, is_static = weight_args(scheme), scheme.static_activations
        if is_static:
            weights["strategy"] = "tensor"
        activations = {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "tensor" if is_static else "token",
            "dynamic": not is_static,
        }
        return config_of(self.name, weights, activations, ignored_modules)

    def scheme_of(self, config: Mapping[str, Any], location: str) -> Scheme:
        weights, activations = only_group(config, location)
        found = (weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
        inputs = (activations or {}).get("strategy"), (activations or {}).get("dynamic")
        is_static = inputs == ("tensor", False)
        if found not in (("float", 8, "channel"), ("float", 8, "tensor")) or not (is_static or inputs[1] is True):
            raise CheckpointError(
                f"{location}: quantization_config: read are float 8-bit weights by channel or tensor with activations "
                "that are dynamic, or static by tensor, "
                f"found type, bits and strategy {found}, activations {activations}"
            )
        return Scheme(
            kind="float", bits=8, group_size=-1, dynamic_activations=not is_static, static_activations=is_static
        )

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {}


def _words(numbers: Collection[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}"


def weight_args(scheme: Scheme) -> dict[str, Any]:
    """The package's ``QuantizationArgs`` of the weights."""
    args: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size == -1 else "group",
        "dynamic": False,
    }
    if scheme.group_size != -1:
        args["group_size"] = scheme.group_size
    return args


def per_token(kind: str) -> dict[str, Any]:
    """The package's ``QuantizationArgs`` of dynamic 8-bit inputs."""
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}


def config_of(
    name: str, weights: dict[str, Any], activations: dict[str, Any] | None, ignored_modules: Collection[str]
) -> dict[str, Any]:
    """The ``quantization_config`` of one scheme for all linears but the ignored ones."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(dict.fromkeys(_ignored(module) for module in ignored_modules)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def only_group(config: Mapping[str, Any], location: str) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """Weight and activation arguments of the one config group that we read."""
    groups = config.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise CheckpointError(
            f"{location}: quantization_config: expected exactly one config group with weight arguments, "
            f"found {sorted(groups) if isinstance(groups, dict) else groups!r}"
        )
    return group["weights"], group.get("input_activations")


def _ignored(module: str) -> str:
    """How ``ignore`` names a module; the experts of a layer all at once, whatever an engine calls their linears."""
    expert = expert_of(module)
    return module if expert is None else rf"re:{re.escape(expert.experts)}\..*"
