"""Views that present logical weights over quantized tensors, read lazily and one weight at a time.

What is quantized is decided by the tensors that are there; ``quantization_config`` only says how to
read integer and float8 layouts. A configuration that announces bitsandbytes over plain weights is
therefore stale, and harmless; packed tensors that nothing here reads are an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from qconv.convert import bnb, ggml
from qconv.convert.awq import Awq
from qconv.convert.compressed_tensors import INPUT_SCALE, FloatQuantized, PackQuantized
from qconv.convert.format import Format
from qconv.convert.fp4 import INPUT_GLOBAL_SCALE, MXFP4, NVFP4, Fp4Packed
from qconv.convert.fp8_block import Fp8Block
from qconv.convert.fused_experts import separate_experts
from qconv.convert.ggml_blocks import GGML_FORMATS, GgmlBlocks
from qconv.convert.gpt_oss import GptOssMxfp4
from qconv.convert.gptq import Gptq
from qconv.convert.hqq import Hqq
from qconv.convert.int_quantized import IntQuantized
from qconv.convert.key_values import CacheReading, read_cache, read_cache_scale
from qconv.convert.matmul_nbits import MatMulNBits
from qconv.convert.module_config import config_for, formats_of
from qconv.decoder_shape import keeps_latents
from qconv.errors import CheckpointError
from qconv.read_ahead import read_ahead
from qconv.types import Checkpoint, QuantizedLinear, Scheme, TensorSpec

FORMATS: Mapping[str, Format] = {
    "gptq": Gptq(1),
    "gptq_v2": Gptq(2),
    "awq": Awq(),
    "pack-quantized": PackQuantized(),
    "float-quantized": FloatQuantized(),
    "int-quantized": IntQuantized(),
    "nvfp4-pack-quantized": NVFP4,
    "mxfp4-pack-quantized": MXFP4,
    "fp8-block": Fp8Block(),
    "gpt-oss-mxfp4": GptOssMxfp4(),
    "hqq": Hqq(),
}

COMPRESSED = ("pack-quantized", "float-quantized", "int-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
READ = (
    "bitsandbytes 4-bit (nf4, fp4), GPTQ, AWQ gemm, HQQ, fp8 with block scales, gpt-oss's mxfp4, "
    f"compressed-tensors {', '.join(COMPRESSED[:-1])} and {COMPRESSED[-1]}"
)

# Tensor suffixes that give a quantized layout away.
SIGNS: Mapping[str, str] = {
    ".SCB": "bitsandbytes int8",
    ".weight_format": "bitsandbytes int8",
    ".weight.absmax": "bitsandbytes 4-bit without its quant_state",
    ".weight.quant_map": "bitsandbytes 4-bit without its quant_state",
    ".weight.nested_absmax": "bitsandbytes 4-bit without its quant_state",
    ".weight_scale_inv": "fp8 with block scales",
    "_blocks": "mxfp4",
    ".W_q": "HQQ",
    ".zero_scale": "HQQ with its scales moved to the CPU",
    ".weight_global_scale": "nvfp4",
    ".input_global_scale": "nvfp4",
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".weight_packed": "compressed-tensors",
    ".weight_shape": "compressed-tensors",
    ".weight_scale": "compressed-tensors or fp8",
    ".weight_zero_point": "compressed-tensors",
    ".input_scale": "compressed-tensors or fp8",
    ".codebooks": "AQLM",
    ".tau_quant": "IR-QLoRA without the weight's quant_state",
}
CODE_DTYPES = (torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt")


class DequantizedCheckpoint:
    """A frozen view: every quantized linear ``X`` appears as its logical tensor ``X.weight``, and so does every linear
    of experts that lie fused.

    Attributes:
        source: the checkpoint, with experts that lie fused taken apart.
        kind: ``"plain"``, ``"bnb-nf4"``, ``"bnb-nf4-dq"``, ``"bnb-fp4"``, ``"bnb-fp4-dq"``, ``"gguf-KIND"`` by the kind
            of most matrices, ``"onnx"`` or ``"onnx-intBITS"`` by the bits of most linears, a key of `FORMATS`, or
            several of them with ``+`` between.
        quantized_modules: names without ``.weight``, in the order of the checkpoint.
        schemes: of the integer or float8 codes of each quantized module; of modules in bitsandbytes' 4 bits and in most
            kinds of ggml's blocks there is none.
        scheme: of the module with the fewest bits, the first of them; None where there are no schemes.
        cache: scales of keys and values that engines keep in float8; its tensors are not among `specs`.
    """

    def __init__(self, source: Checkpoint):
        self.source = source = separate_experts(source)
        self.schemes: dict[str, Scheme] = {}
        self._formats: dict[str, Format | GgmlBlocks | MatMulNBits] = {}  # of each module
        self._states: dict[str, bnb.BnbState] = {}
        self._ggml: dict[str, str] = {}  # kind of each weight in blocks
        config = dict(source.config)
        quantization = config.pop("quantization_config", None)
        self.config: Mapping[str, Any] = MappingProxyType(config)
        self._parts: dict[str, tuple[str, ...]] = {}  # logical weight -> stored tensors
        self.cache = CacheReading()
        self.kind = self._detect(quantization)
        self.scheme = min(self.schemes.values(), key=lambda scheme: scheme.bits, default=None)
        self._specs = MappingProxyType(self._logical_specs())
        _refuse_leftovers(source, self._specs)

    @property
    def location(self) -> str:
        return self.source.location

    @property
    def quantized_modules(self) -> tuple[str, ...]:
        return tuple(weight.removesuffix(".weight") for weight in self._parts)

    @property
    def bits(self) -> Mapping[str, int]:
        """Of a weight of each quantized module."""
        in_blocks = {module: ggml.bits_of(kind) for module, kind in self.block_kinds.items()}
        in_bnb = dict.fromkeys((weight.removesuffix(".weight") for weight in self._states), 4)
        return {module: scheme.bits for module, scheme in self.schemes.items()} | in_blocks | in_bnb

    def layout_of(self, module: str) -> str:
        """The key in `FORMATS` of a quantized module's layout; `kind` where all have one that is none of these."""
        fmt = self._formats.get(module)
        return self.kind if fmt is None else fmt.name

    @property
    def block_kinds(self) -> Mapping[str, str]:
        """ggml's, of each module that is stored in its blocks."""
        return {weight.removesuffix(".weight"): kind for weight, kind in self._ggml.items()}

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str, device: str = "cpu") -> Tensor:
        """The logical tensor: bitsandbytes in the dtype of its quant state, other formats in float32.

        Raises:
            CheckpointError: no such tensor, or stored tensors that do not fit one another.
            NumericsError: a scale or absmax is NaN or infinite.
        """
        if name not in self._specs:
            raise CheckpointError(f"{self.location}: no tensor {name!r}")
        if name in self._states:
            return bnb.decode(self.source, self._states[name], device)
        if name in self._ggml:
            return ggml.decode(self.source, name, self._ggml[name], device)
        if name in self._parts:
            return self.read_quantized(name.removesuffix(".weight"), device).dequantize()
        return self.source.read(name, device)

    def read_ahead(self, names: Iterable[str], pin: bool = False, max_bytes: int | None = None) -> None:
        """Begins to fetch what logical tensors are stored as, see `ReadsAhead`."""
        read_ahead(self.source, [part for name in names for part in self._read_parts(name)], pin, max_bytes)

    def _read_parts(self, name: str) -> tuple[str, ...]:
        """The stored tensors that `read` reads."""
        state = self._states.get(name)
        return self._parts.get(name, (name,)) if state is None else (*state.companions, name)

    def read_quantized(self, module: str, device: str = "cpu") -> QuantizedLinear:
        """The stored codes, scales and zero points of one module (integer and float8 formats).

        Raises:
            CheckpointError: the module is not stored in such a format, or its tensors do not fit.
        """
        parts = self._parts.get(module + ".weight")
        if parts is None or module not in self._formats:
            raise CheckpointError(f"{self.location}: module {module!r} has no integer or float8 codes ({self.kind})")
        tensors = {name: self.source.read(name, device) for name in parts}
        return self._formats[module].unpack(tensors, module, self.schemes[module], self.location)

    def input_scale(self, module: str) -> float:
        """What is stored of a module's inputs: what they are divided by (static activations), or their global scale.

        Raises:
            CheckpointError: it is missing, or no such scale can be.
        """
        fmt = self._formats[module]
        assert isinstance(fmt, FloatQuantized | Fp4Packed)
        name = module + (INPUT_SCALE if isinstance(fmt, FloatQuantized) else INPUT_GLOBAL_SCALE)
        tensors = {name: self.source.read(name)} if name in self.source.specs() else {}
        return float(fmt.read_input_scale(tensors, module, self.location))

    def cache_scales(self, attention: str) -> tuple[Tensor, Tensor]:
        """Of keys and of values, float32 ``[1]`` or ``[heads, 1, 1]``; of an attention in ``cache.scales``.

        Raises:
            CheckpointError: no such scale can be.
        """
        keys, values = (read_cache_scale(self.source, name) for name in self.cache.scales[attention])
        return keys, values

    @property
    def has_tau(self) -> bool:
        """Whether weights were quantized with information calibration (IR-QLoRA)."""
        return any(state.has_tau for state in self._states.values())

    def _detect(self, quantization: Any) -> str:
        """Fills `_parts` and what reads them; returns the kind."""
        packed = bnb.packed_weights(self.source.specs())
        if quantization is not None and not isinstance(quantization, dict):
            raise CheckpointError(f"{self.location}: quantization_config in config.json is not an object")
        method = str((quantization or {}).get("quant_method") or "")
        if packed:
            if method not in ("", "bitsandbytes"):
                raise CheckpointError(
                    f"{self.location}: holds bitsandbytes 4-bit tensors, but config.json says quant_method {method!r}"
                )
            return self._detect_bnb(packed)
        if method in ("", "bitsandbytes"):
            return "plain"
        if method == "gguf" and quantization is not None and "kind" in quantization:
            self._find_ggml()
            return f"gguf-{quantization['kind']}"
        if method == "onnx" and quantization is not None and "modules" in quantization:
            return self._find_nbits(quantization["modules"])
        if method not in ("gptq", "awq", "compressed-tensors", "fp8", "mxfp4", "hqq"):
            raise CheckpointError(f"{self.location}: quantized with {method!r}, which is not read; read are {READ}")
        assert isinstance(quantization, dict)
        self._find_modules(_formats_of(method, quantization, self.location), quantization)
        self.cache = read_cache(self.source.specs(), quantization, self.location, keeps_latents(self.config))
        return "+".join(dict.fromkeys(fmt.name for fmt in self._formats.values()))

    def _detect_bnb(self, packed: Mapping[str, str]) -> str:
        model_type = self.source.config.get("model_type")
        if model_type in CONV1D_MODELS:
            raise CheckpointError(
                f"{self.location}: bitsandbytes stores the Conv1D weights of {model_type} transposed; "
                "such checkpoints are not read"
            )
        for weight, state_name in packed.items():
            state = bnb.read_state(self.source, weight, state_name)
            self._states[weight] = state
            self._parts[weight] = (weight, state_name, *state.companions)
        kinds = {state.kind for state in self._states.values()}
        if len(kinds) > 1:
            raise CheckpointError(f"{self.location}: mixes bitsandbytes kinds {', '.join(sorted(kinds))}")
        return "bnb-" + kinds.pop()

    def _find_ggml(self) -> None:
        """Weights in ggml's blocks. Codes can be read of the kinds that store no minimum."""
        for weight, kind in ggml.weights_in_blocks(self.source.specs()).items():
            self._ggml[weight] = kind
            self._parts[weight] = (f"{weight}.{kind}",)
            fmt = GGML_FORMATS.get(f"gguf-{kind}")
            if fmt is not None and fmt.scheme.symmetric:
                module = weight.removesuffix(".weight")
                self._formats[module], self.schemes[module] = fmt, fmt.scheme

    def _find_nbits(self, nodes: Mapping[str, Mapping[str, Any]]) -> str:
        """Linears of an ONNX graph with codes, by what the attributes of their nodes say."""
        fmt, specs = MatMulNBits(), self.source.specs()
        for module, node in nodes.items():
            self._formats[module], self.schemes[module] = fmt, fmt.scheme_of(node, f"{self.location}: {module}")
            self._parts[f"{module}.weight"] = tuple(
                module + suffix for suffix in fmt.suffixes if module + suffix in specs
            )
        bits = [scheme.bits for scheme in self.schemes.values()]
        return f"onnx-int{max(set(bits), key=bits.count)}" if bits else "onnx"

    def _find_modules(self, formats: list[Format], config: Mapping[str, Any]) -> None:
        """Every quantized module with its format and scheme; ``formats`` are those that the configuration names."""
        specs, marks = self.source.specs(), dict.fromkeys(fmt.suffixes[0] for fmt in formats)
        for name in specs:
            mark = next((mark for mark in marks if name.endswith(mark)), None)
            if mark is None:
                continue
            module = name.removesuffix(mark)
            if module + ".weight" in self._parts:
                continue  # weights of several layouts have scales
            own = config_for(config, module, self.location)
            (fmt,) = _formats_of(str(config["quant_method"]), own, self.location)
            if ".weight" in fmt.suffixes and module + ".weight" not in specs:
                raise CheckpointError(f"{self.location}: a scale {name!r} but no weight {module + '.weight'!r}")
            self._formats[module], self.schemes[module] = fmt, fmt.scheme_of(own, self.location)
            self._parts[module + ".weight"] = tuple(
                module + suffix for suffix in fmt.suffixes if module + suffix in specs
            )
        if not self._parts:
            for fmt in formats:
                fmt.scheme_of(config, self.location)  # what cannot be read at all is said first
            raise CheckpointError(
                f"{self.location}: config.json announces {' and '.join(fmt.name for fmt in formats)}, but no tensor "
                f"ends in {' or '.join(map(repr, marks))}; if the weights are 16-bit, "
                "remove quantization_config from config.json"
            )

    def _logical_specs(self) -> Mapping[str, TensorSpec]:
        """Source specs with every quantized module's tensors replaced, where the first one stood."""
        owner = {part: weight for weight, parts in self._parts.items() for part in parts}
        specs: dict[str, TensorSpec] = {}
        for name, spec in self.source.specs().items():
            weight = owner.get(name)
            if name in self.cache.tensors:
                continue
            if weight is None:
                specs[name] = spec
            elif weight not in specs:
                specs[weight] = self._logical_spec(weight)
        return specs

    def _logical_spec(self, weight: str) -> TensorSpec:
        if weight in self._states:
            state = self._states[weight]
            return TensorSpec(name=weight, shape=state.shape, dtype=state.dtype)
        if weight in self._ggml:
            return ggml.logical_spec(self.source.specs(), weight, self._ggml[weight])
        module = weight.removesuffix(".weight")
        fmt = self._formats[module]
        assert not isinstance(fmt, GgmlBlocks)  # is among those in blocks
        shape = fmt.logical_shape(self.source.specs(), module, self.schemes[module])
        if shape is None:
            shape = self._stored_shape(module)
        return TensorSpec(name=weight, shape=shape, dtype=torch.float32)

    def _stored_shape(self, module: str) -> tuple[int, int]:
        """Reads the two numbers of ``weight_shape``, or ``shape``."""
        fmt = self._formats[module]
        assert not isinstance(fmt, GgmlBlocks)  # tells by its blocks
        name = module + next(suffix for suffix in fmt.suffixes if suffix in (".weight_shape", ".shape"))
        if name not in self.source.specs():
            raise CheckpointError(
                f"{self.location}: quantized module {module!r} has no tensor {name!r}, or its shape is damaged"
            )
        numbers = self.source.read(name).reshape(-1).tolist()
        if len(numbers) != 2 or min(numbers) <= 0:
            raise CheckpointError(f"{self.location}: tensor {name!r}: expected [out, in], found {numbers}")
        return int(numbers[0]), int(numbers[1])


def dequantize(checkpoint: Checkpoint) -> DequantizedCheckpoint:
    """Logical weights over any checkpoint that qconv reads; reads metadata only.

    Raises:
        CheckpointError: a quantized layout that is not read, or tensors that are missing or do not fit.
    """
    return DequantizedCheckpoint(checkpoint)


def _formats_of(method: str, config: Mapping[str, Any], location: str) -> list[Format]:
    """The layouts that a configuration names: one, but for compressed-tensors with several."""
    if method in ("awq", "fp8", "mxfp4", "hqq"):
        return [FORMATS[{"fp8": "fp8-block", "mxfp4": "gpt-oss-mxfp4"}.get(method, method)]]
    if method == "gptq":
        name = str(config.get("checkpoint_format") or "gptq").lower()
        if config.get("is_marlin_format"):
            name = "marlin"
        if name in ("gptq", "gptq_v2"):
            return [FORMATS[name]]
        raise CheckpointError(
            f"{location}: GPTQ checkpoint_format {name!r} is not read; read are gptq and gptq_v2. Layouts that were "
            "repacked for one kernel lose the order of the codes: take the folder from before, which engines repack "
            "as they load it"
        )
    names = formats_of(config)
    for name in names:
        if name not in COMPRESSED:
            raise CheckpointError(
                f"{location}: compressed-tensors format {name!r} is not read; read are {', '.join(COMPRESSED)}"
            )
    return [FORMATS[name] for name in names]


def _refuse_leftovers(source: Checkpoint, logical: Mapping[str, TensorSpec]) -> None:
    """No tensor may pass as plain that is a piece of some quantized layout."""
    for name, spec in logical.items():
        if name not in source.specs() or source.specs()[name] is not spec:
            continue
        sign = next((what for suffix, what in SIGNS.items() if name.endswith(suffix)), None)
        if sign is None and spec.dtype in CODE_DTYPES and (name.endswith(".weight") or len(spec.shape) > 1):
            sign = f"{spec.dtype} {spec.shape}"
        if sign is not None:
            raise CheckpointError(
                f"{source.location}: tensor {name!r} belongs to a quantized layout ({sign}) that the configuration "
                f"does not explain or that is not read; read are {READ}"
            )
