"""Lays out an output folder and fills it: which tensors there will be, in which dtype and format.

Everything is known from names and shapes alone, before any weight is read: packing runs on meta
tensors, so a scheme that does not fit a linear is refused before any work.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qconv.config import QuantizationConfig
from qconv.convert import FORMATS
from qconv.errors import CheckpointError, NumericsError, SchemeError
from qconv.progress import Progress
from qconv.quantize.blocks import QuantizedBlock
from qconv.skeleton import build_skeleton
from qconv.targets import TARGETS
from qconv.types import Checkpoint, QuantizedLinear, Scheme, TensorSpec
from qconv.writer import CheckpointWriter

PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A dtype under its old name, the source's quantization, and code files that do not travel.
_DROPPED = ("torch_dtype", "quantization_config", "auto_map")
_CONFIG_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What will be written.

    Attributes:
        specs: all output tensors, in order.
        storage: dtype of unquantized floating-point tensors.
        quantized: full names of the weights that are quantized, empty for a plain checkpoint.
        scheme: their scheme, or None.
        config: the content of ``config.json``.
        extra_files: further JSON files, by name.
    """

    specs: list[TensorSpec]
    storage: torch.dtype
    quantized: frozenset[str]
    scheme: Scheme | None
    format: str | None
    config: Mapping[str, Any]
    extra_files: Mapping[str, Mapping[str, Any]]


def config_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype a model is stored and run in; `open_checkpoint` fills it in where config.json does not say."""
    name = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(name)
    if dtype is None:
        raise CheckpointError(f"config.json: expected dtype bfloat16, float16 or float32, found {name!r}")
    return dtype


def plan_layout(
    view: Checkpoint, dtype: str | None, quantization: QuantizationConfig | None, linears: Collection[str]
) -> Layout:
    """Plans the output for a merged (or plain) view; ``linears`` may be quantized.

    Raises:
        SchemeError: the scheme fits not every linear; names the first and the sizes that would fit.
    """
    storage = PLAIN[dtype] if dtype else config_dtype(view.config)
    config = {key: value for key, value in view.config.items() if key not in _DROPPED}
    config["dtype"] = _CONFIG_NAMES[storage]
    if quantization is None:
        specs = [_stored_spec(spec, storage) for spec in view.specs().values()]
        return Layout(
            specs=specs,
            storage=storage,
            quantized=frozenset(),
            scheme=None,
            format=None,
            config=config,
            extra_files={},
        )
    return _plan_quantized(view, quantization, linears, storage, config)


def _plan_quantized(
    view: Checkpoint,
    quantization: QuantizationConfig,
    linears: Collection[str],
    storage: torch.dtype,
    config: dict[str, Any],
) -> Layout:
    if not linears:
        raise SchemeError(f"{view.location}: the model has no linear layer in its decoder blocks that can be quantized")
    target = TARGETS[quantization.target]
    format_ = FORMATS[target.format]
    specs_in = view.specs()
    scheme = quantization.scheme_for([specs_in[name].shape[1] for name in linears], view.location)
    format_.check_scheme(scheme)
    specs: list[TensorSpec] = []
    for name, spec in specs_in.items():
        if name not in linears:
            specs.append(_stored_spec(spec, storage))
            continue
        module = name.removesuffix(".weight")
        n, k = spec.shape
        format_.check_shapes(module, n, k, scheme)
        packed = format_.pack(_meta_linear(n, k, scheme, quantization.desc_act), module, storage)
        specs += [TensorSpec(name=key, shape=tuple(t.shape), dtype=t.dtype) for key, t in packed.items()]
    config["quantization_config"] = format_.quantization_config(
        scheme,
        quantized_modules=[name.removesuffix(".weight") for name in linears],
        ignored_modules=_other_linears(view, linears),
        has_group_index=quantization.desc_act,
    )
    return Layout(
        specs=specs,
        storage=storage,
        quantized=frozenset(linears),
        scheme=scheme,
        format=target.format,
        config=config,
        extra_files=format_.extra_files(config["quantization_config"]),
    )


def _other_linears(view: Checkpoint, linears: Collection[str]) -> list[str]:
    """Linears that stay unquantized: readers would otherwise expect packed tensors for them."""
    modules = build_skeleton(view, torch.bfloat16).named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear) and f"{name}.weight" not in linears]


def write_tensors(
    writer: CheckpointWriter,
    view: Checkpoint,
    layout: Layout,
    blocks: Iterable[QuantizedBlock],
    progress: Progress,
) -> None:
    """Writes quantized blocks as they come, then every tensor of the view that they did not cover."""
    written: set[str] = set()
    for block in blocks:
        assert layout.format is not None  # a layout without a format has no blocks
        format_ = FORMATS[layout.format]
        for name, linear in block.linears.items():
            module = name.removesuffix(".weight")
            format_.check(linear, module, layout.storage)
            for key, tensor in format_.pack(linear, module, layout.storage).items():
                writer.write(key, tensor)
        for name, tensor in block.plain.items():
            writer.write(name, to_storage(f"{view.location}: tensor {name!r}", tensor, layout.storage))
        written |= block.linears.keys() | block.plain.keys()
    rest = [name for name in view.specs() if name not in written]
    for name in progress.track(rest, "write", len(rest)):
        writer.write(name, to_storage(f"{view.location}: tensor {name!r}", view.read(name), layout.storage))


def to_storage(where: str, tensor: Tensor, storage: torch.dtype) -> Tensor:
    """One rounding to the storage dtype; ``where`` names folder and tensor, for messages.

    Raises:
        NumericsError: a value overflows the storage dtype or is not finite.
    """
    if not _is_plain_float(tensor.dtype):
        return tensor
    stored = tensor.to(storage)
    if not torch.isfinite(stored).all():
        num_bad = int((~torch.isfinite(tensor)).sum())
        if num_bad:
            raise NumericsError(
                f"{where} has NaN or infinity in {num_bad} of {tensor.numel()} values, in the base or after the merge; "
                "the file is damaged or training diverged: fetch or save it again"
            )
        raise NumericsError(
            f"{where} does not fit {storage}: largest magnitude {float(tensor.abs().max()):g}; "
            "choose --dtype bf16 or fp32"
        )
    return stored


def _stored_spec(spec: TensorSpec, storage: torch.dtype) -> TensorSpec:
    dtype = storage if _is_plain_float(spec.dtype) else spec.dtype
    return TensorSpec(name=spec.name, shape=spec.shape, dtype=dtype)


def _is_plain_float(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _meta_linear(n: int, k: int, scheme: Scheme, desc_act: bool) -> QuantizedLinear:
    groups = scheme.num_groups(k)
    code_dtype = torch.float8_e4m3fn if scheme.kind == "float" else torch.uint8
    return QuantizedLinear(
        codes_NK=torch.empty(n, k, dtype=code_dtype, device="meta"),
        scales_NG=torch.empty(n, groups, device="meta"),
        zeros_NG=None if scheme.symmetric else torch.empty(n, groups, dtype=torch.uint8, device="meta"),
        group_index_K=torch.empty(k, dtype=torch.int32, device="meta") if desc_act else None,
        scheme=scheme,
    )
