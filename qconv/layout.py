"""What an output folder will hold: which tensors, in which dtype, format and order, and its config.

Everything is known from names and shapes alone, before any weight is read: packing runs on meta
tensors, so a scheme that does not fit a linear is refused before any work.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qconv.cached_attentions import cache_use
from qconv.convert import (
    CACHE_SCHEME,
    FORMATS,
    Bnb4bit,
    FusedPlan,
    cache_specs,
    format_for,
    meta_linear,
    mixed_config,
    plan_fused,
)
from qconv.decoder_shape import DecoderShape
from qconv.errors import CheckpointError, SchemeError
from qconv.experts import stays_float32
from qconv.gguf import GgufPlan, plan_gguf
from qconv.onnx import OnnxPlan, plan_onnx, without_window
from qconv.plain_tensors import is_plain_float
from qconv.quantization_config import QuantizationConfig
from qconv.selection import chosen_linears, kept_linears, schemes_of
from qconv.size_budget import before_measuring, meta_quantized
from qconv.skeleton import other_linears
from qconv.targets import TARGETS
from qconv.types import Checkpoint, Scheme, TensorSpec

PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A dtype under its old name, the source's quantization, and code files that do not travel.
_DROPPED = ("torch_dtype", "quantization_config", "auto_map")
BNB_FORMATS = {fmt.name: fmt for fmt in (Bnb4bit("nf4-dq"),)}
_CONFIG_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What will be written.

    Attributes:
        specs: all output tensors, in order.
        storage: dtype of unquantized floating-point tensors.
        quantized: full names of the weights that are quantized, empty for a plain checkpoint.
        scheme: of those that no override is about, or None.
        schemes: of each of them, by name; empty where there is no scheme.
        format: of them, but for those whose scheme has another one: see `layout_of`.
        config: the content of ``config.json``.
        extra_files: further JSON files, by name.
        gguf: of a GGUF file, what lies in it under which name; ``specs`` are then those of the file.
        fused: of a family whose files hold experts fused, what lies where in them; ``specs`` likewise.
        onnx: what is built of the folder when it is written; all else here is then of the folder before.
        cached: attentions whose keys and values get scales for an FP8 cache.
    """

    specs: list[TensorSpec]
    storage: torch.dtype
    quantized: frozenset[str]
    scheme: Scheme | None
    schemes: Mapping[str, Scheme]
    format: str | None
    config: Mapping[str, Any]
    extra_files: Mapping[str, Mapping[str, Any]]
    gguf: GgufPlan | None = None
    fused: FusedPlan | None = None
    onnx: OnnxPlan | None = None
    cached: tuple[str, ...] = ()

    def layout_of(self, weight: str) -> str:
        """Of a quantized weight."""
        assert self.format is not None  # something is quantized
        if self.format not in FORMATS or weight not in self.schemes:
            return self.format
        return format_for(FORMATS[self.format], self.schemes[weight]).name

    @property
    def layouts(self) -> tuple[str, ...]:
        """All that quantized weights have."""
        return tuple(dict.fromkeys(self.layout_of(name) for name in self.schemes))

    @property
    def handed_over(self) -> torch.dtype | None:
        """The dtype that unquantized tensors are handed over in; None: as they come, to be rounded in a GGUF file."""
        return self.storage if self.gguf is None else None

    @property
    def built_bytes(self) -> int:
        """Room for what is built of the tensors: an ONNX graph has no more than they, rounded to its dtype."""
        return 0 if self.onnx is None else sum(spec.num_bytes for spec in self.specs)

    @property
    def head(self) -> str | None:
        """The weight of the output head, when it is quantized: the only one outside of the blocks."""
        return next((name for name in self.schemes if block_number(name) is None), None)


def config_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype a model is stored and run in; `open_checkpoint` fills it in where config.json does not say."""
    name = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(name)
    if dtype is None:
        raise CheckpointError(f"config.json: expected dtype bfloat16, float16 or float32, found {name!r}")
    return dtype


def plan_layout(
    view: Checkpoint,
    dtype: str | None,
    quantization: QuantizationConfig | None,
    linears: Collection[str],
    kept: Mapping[str, Scheme] | None = None,
) -> Layout:
    """Plans the output for a merged (or plain) view; ``linears`` may be quantized.

    Args:
        kept: schemes of the modules that the base has quantized, for an output that keeps their codes.

    Raises:
        SchemeError: the scheme fits not every linear; names the first and the sizes that would fit.
        UsageError: a budget that is out of reach, or a pattern that matches nothing.
    """
    if quantization is not None and TARGETS[quantization.target].is_onnx:
        return _plan_onnx(view, dtype or "fp32", quantization, linears)
    storage = PLAIN[dtype] if dtype else config_dtype(view.config)
    return _plan(view, storage, quantization, linears, kept or {})


def _plan_onnx(view: Checkpoint, dtype: str, quantization: QuantizationConfig, linears: Collection[str]) -> Layout:
    """A plain folder, or one in the GPTQ layout, for the model builder to read.

    Beside codes all is written in float32, since the builder computes with the scales before it stores codes.
    """
    bits = None if quantization.resolved_algorithm == "plain" else TARGETS[quantization.target].bits[0]
    plan = plan_onnx(view.config, view.location, dtype, bits)
    if bits is None:
        layout = _plan(view, PLAIN[dtype], None, linears, {})
    else:
        layout = _plan(view, torch.float32, quantization, linears, {})
    return replace(layout, config=without_window(layout.config), onnx=plan)


def _plan(
    view: Checkpoint,
    storage: torch.dtype,
    quantization: QuantizationConfig | None,
    linears: Collection[str],
    kept: Mapping[str, Scheme],
) -> Layout:
    config = {key: value for key, value in view.config.items() if key not in _DROPPED}
    config["dtype"] = _CONFIG_NAMES[storage]
    if quantization is None:
        layout = Layout(
            specs=_specs(view, (), storage, lambda module, n, k: {}),
            storage=storage,
            quantized=frozenset(),
            scheme=None,
            schemes={},
            format=None,
            config=config,
            extra_files={},
        )
    else:
        layout = _plan_quantized(view, quantization, linears, storage, config, kept)
    fused = plan_fused(view.config, layout.specs)
    return layout if fused is None else replace(layout, specs=fused.specs, fused=fused)


def _plan_quantized(
    view: Checkpoint,
    quantization: QuantizationConfig,
    linears: Collection[str],
    storage: torch.dtype,
    config: dict[str, Any],
    kept: Mapping[str, Scheme],
) -> Layout:
    if not linears:
        raise SchemeError(f"{view.location}: the model has no linear layer in its decoder blocks that can be quantized")
    schemes: Mapping[str, Scheme]
    if quantization.keeps_codes:
        default, schemes = kept_linears(view, linears, quantization, kept)
        linears = list(schemes)
    else:
        linears = chosen_linears(view, linears, quantization)
    target = TARGETS[quantization.target]
    if target.format in BNB_FORMATS:
        return _plan_bnb(view, BNB_FORMATS[target.format], linears, storage, config)
    if target.gguf_kind is not None:
        if quantization.resolved_algorithm == "ggml":
            return _plan_gguf(view, target.gguf_kind, linears, storage, config, None, {})
        if not quantization.keeps_codes:
            default, schemes = schemes_of(view, linears, quantization)
        return _plan_gguf(view, target.gguf_kind, linears, storage, config, default, schemes)
    format_ = FORMATS["gptq" if target.is_onnx else target.format]
    if quantization.budget is not None:
        quantization = before_measuring(view, linears, quantization, format_, storage)
    if not quantization.keeps_codes:
        default, schemes = schemes_of(view, linears, quantization)
    for scheme in dict.fromkeys(schemes.values()):
        format_for(format_, scheme).check_scheme(scheme)

    def packed(module: str, n: int, k: int) -> Mapping[str, Tensor]:
        scheme = schemes[f"{module}.weight"]
        own = format_for(format_, scheme)
        own.check_shapes(module, n, k, scheme)
        return own.pack(meta_quantized(n, k, scheme, quantization.desc_act), module, storage)

    cached = _cached_attentions(view) if quantization.kv_cache else []
    config["quantization_config"] = mixed_config(
        format_,
        default,
        {name.removesuffix(".weight"): scheme for name, scheme in schemes.items()},
        other_linears(view, linears),
        quantization.desc_act,
    )
    if cached:
        config["quantization_config"]["kv_cache_scheme"] = dict(CACHE_SCHEME)
    return Layout(
        specs=_specs(view, linears, storage, packed, cached),
        storage=storage,
        quantized=frozenset(linears),
        scheme=default,
        schemes=schemes,
        format=format_.name,
        config=config,
        extra_files=format_.extra_files(config["quantization_config"]),
        cached=tuple(cached),
    )


def _cached_attentions(view: Checkpoint) -> list[str]:
    """Raises `SchemeError` for a model whose engines keep something else than keys and values of heads."""
    if DecoderShape.of(view.config, view.location).latent is not None:
        raise SchemeError(
            f"{view.location}: --kv-cache: keys and values are kept as one latent (MLA), for which no scale of "
            "keys and none of values is defined; leave it out"
        )
    found = cache_use(view)
    for attention, instead in found.others.items():
        raise SchemeError(f"{view.location}: --kv-cache: {attention}: {instead}")
    if not found.handing:
        raise SchemeError(
            f"{view.location}: --kv-cache: no attention of this family has projections of keys and values under the "
            "names that compressed-tensors' readers give scales to (k_proj, v_proj, qkv_proj); leave it out"
        )
    return list(found.handing)


def _plan_bnb(
    view: Checkpoint, fmt: Bnb4bit, linears: Collection[str], storage: torch.dtype, config: dict[str, Any]
) -> Layout:
    def packed(module: str, n: int, k: int) -> Mapping[str, Tensor]:
        fmt.check_shapes(module, n, k)
        return fmt.pack(meta_linear(n, k, fmt.kind, storage), module)

    config["quantization_config"] = fmt.quantization_config(storage, other_linears(view, linears))
    return Layout(
        specs=_specs(view, linears, storage, packed),
        storage=storage,
        quantized=frozenset(linears),
        scheme=None,
        schemes={},
        format=fmt.name,
        config=config,
        extra_files={},
    )


def _plan_gguf(
    view: Checkpoint,
    kind: str,
    linears: Collection[str],
    storage: torch.dtype,
    config: dict[str, Any],
    scheme: Scheme | None,
    schemes: Mapping[str, Scheme],
) -> Layout:
    """Linears whose codes are chosen here have a scheme; where llama.cpp's rule chooses there is none."""
    plan = plan_gguf(view, kind, linears, storage)
    return Layout(
        specs=plan.specs,
        storage=storage,
        quantized=frozenset(linears),
        scheme=scheme,
        schemes=schemes,
        format=f"gguf-{kind}",
        config=config,
        extra_files={},
        gguf=plan,
    )


def in_order(view: Checkpoint) -> list[str]:
    """All tensors as they are written, and lie in the files: outside of blocks, then block by block."""
    numbers = {name: block_number(name) for name in view.specs()}
    return sorted(numbers, key=lambda name: -1 if (number := numbers[name]) is None else number)


def block_number(name: str) -> int | None:
    """Of the block a tensor lies in; None outside of all blocks."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _specs(
    view: Checkpoint,
    linears: Collection[str],
    storage: torch.dtype,
    packed: Callable[[str, int, int], Mapping[str, Tensor]],
    cached: Iterable[str] = (),
) -> list[TensorSpec]:
    """Of all output tensors in order; ``packed`` gives those of a linear in ``linears``, without data.

    Scales of keys and values lie before the block that they are of.
    """
    specs: list[TensorSpec] = []
    scales: dict[int | None, list[str]] = {}
    for attention in cached:
        scales.setdefault(block_number(attention), []).append(attention)
    for name in in_order(view):
        for attention in scales.pop(block_number(name), ()):
            specs += cache_specs(attention, storage)
        spec = view.specs()[name]
        if name in linears:
            tensors = packed(name.removesuffix(".weight"), *spec.shape)
            specs += [TensorSpec(name=key, shape=tuple(t.shape), dtype=t.dtype) for key, t in tensors.items()]
        else:
            specs.append(_stored_spec(view, spec, storage))
    return specs


def _stored_spec(view: Checkpoint, spec: TensorSpec, storage: torch.dtype) -> TensorSpec:
    is_kept = not is_plain_float(spec.dtype) or stays_float32(spec.name, view.config)
    return TensorSpec(name=spec.name, shape=spec.shape, dtype=spec.dtype if is_kept else storage)
