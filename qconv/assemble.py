"""Lays out an output folder and fills it: which tensors there will be, in which dtype and format.

Everything is known from names and shapes alone, before any weight is read: packing runs on meta
tensors, so a scheme that does not fit a linear is refused before any work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from qconv.config import QuantizationConfig
from qconv.convert import FORMATS, Bnb4bit, encode_linear, meta_linear
from qconv.errors import CheckpointError, SchemeError
from qconv.plain_tensors import is_plain_float, to_storage, write_plain
from qconv.progress import Progress
from qconv.quantize.blocks import QuantizedBlock
from qconv.read_ahead import read_ahead
from qconv.skeleton import other_linears
from qconv.targets import TARGETS
from qconv.timeline import TIMELINE
from qconv.types import Checkpoint, QuantizedLinear, Scheme, TensorSpec
from qconv.writer import CheckpointWriter

PLAIN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A dtype under its old name, the source's quantization, and code files that do not travel.
_DROPPED = ("torch_dtype", "quantization_config", "auto_map")
CPU_WINDOW_BYTES, GPU_WINDOW_BYTES = 32 << 20, 512 << 20  # of stored tensors that are read ahead
BNB_FORMATS = {fmt.name: fmt for fmt in (Bnb4bit("nf4-dq"),)}
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
        specs = [_stored_spec(view.specs()[name], storage) for name in _in_order(view)]
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
    if target.format in BNB_FORMATS:
        return _plan_bnb(view, BNB_FORMATS[target.format], linears, storage, config)
    format_ = FORMATS[target.format]
    specs_in = view.specs()
    scheme = quantization.scheme_for([specs_in[name].shape[1] for name in linears], view.location)
    format_.check_scheme(scheme)
    specs: list[TensorSpec] = []
    for name in _in_order(view):
        spec = specs_in[name]
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
        ignored_modules=other_linears(view, linears),
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


def _plan_bnb(
    view: Checkpoint, fmt: Bnb4bit, linears: Collection[str], storage: torch.dtype, config: dict[str, Any]
) -> Layout:
    specs: list[TensorSpec] = []
    for name in _in_order(view):
        spec = view.specs()[name]
        if name not in linears:
            specs.append(_stored_spec(spec, storage))
            continue
        module = name.removesuffix(".weight")
        n, k = spec.shape
        fmt.check_shapes(module, n, k)
        packed = fmt.pack(meta_linear(n, k, fmt.kind, storage), module)
        specs += [TensorSpec(name=key, shape=tuple(t.shape), dtype=t.dtype) for key, t in packed.items()]
    config["quantization_config"] = fmt.quantization_config(storage, other_linears(view, linears))
    return Layout(
        specs=specs,
        storage=storage,
        quantized=frozenset(linears),
        scheme=None,
        format=fmt.name,
        config=config,
        extra_files={},
    )


def write_tensors(
    writer: CheckpointWriter,
    view: Checkpoint,
    layout: Layout,
    blocks: Iterable[QuantizedBlock],
    progress: Progress,
    device: str = "cpu",
) -> None:
    """Writes quantized blocks as they come, then every tensor of the view that they did not cover.

    Reading, computing and writing overlap: tensors are read ahead, computed on ``device`` (on a CPU several at a time)
    and written in the background.

    Raises:
        NumericsError: a value of a tensor that is not quantized overflows the storage dtype or is not finite.
        CheckpointError: a tensor cannot be read or written.
    """
    is_gpu = device.startswith("cuda")
    window = GPU_WINDOW_BYTES if is_gpu else CPU_WINDOW_BYTES
    names = _in_order(view)
    if layout.format is None:
        read_ahead(view, names, is_gpu, window)
        write_plain(writer, view, layout.storage, progress.track(names, "write", len(names)), device)
        return
    if layout.format in BNB_FORMATS:
        read_ahead(view, names, is_gpu, window)
        _write_bnb(writer, view, layout, progress.track(names, "write", len(names)), device)
        return
    # Block by block, what is not quantized too: a file of weights is then complete soon after it was begun.
    numbers = {name: number for name in names if (number := _block_number(name)) is not None}
    outside = [name for name in names if name not in numbers]
    if not is_gpu:
        write_plain(writer, view, layout.storage, outside, device)
        outside = []
    read_ahead(view, list(numbers), is_gpu, window)
    with _alongside(outside, lambda some: write_plain(writer, view, layout.storage, some, "cpu")) as check:
        _write_blocks(writer, view, layout, blocks, numbers, device, check)


def _write_bnb(writer: CheckpointWriter, view: Checkpoint, layout: Layout, names: Iterable[str], device: str) -> None:
    """Each linear is encoded as it is written: nothing has to be chosen."""
    assert layout.format is not None
    fmt = BNB_FORMATS[layout.format]
    for name in names:
        if name not in layout.quantized:
            write_plain(writer, view, layout.storage, [name], device)
            continue
        module = name.removesuffix(".weight")
        # Rules of the library's CUDA kernels: the model is served there.
        linear = encode_linear(view.read(name, device), fmt.kind, layout.storage, f"{view.location}: {name}", "cuda")
        fmt.check(linear, module)
        for key, tensor in fmt.pack(linear, module).items():
            writer.write(key, tensor)


def _write_blocks(
    writer: CheckpointWriter,
    view: Checkpoint,
    layout: Layout,
    blocks: Iterable[QuantizedBlock],
    numbers: dict[str, int],
    device: str,
    check: Callable[[], None],
) -> None:
    """Writes the tensors in ``numbers`` (name -> block) block by block as they come, and calls ``check`` after each."""
    for block in blocks:
        with TIMELINE.stage("pack"):
            _write_block(writer, view, layout, block)
        covered = [*block.linears, *block.plain]
        done = {numbers[name] for name in covered}
        for name in covered:
            del numbers[name]
        for name in [name for name in numbers if numbers[name] in done]:
            writer.write(name, to_storage(view, name, view.read(name, device), layout.storage))
            del numbers[name]
        del block  # its memory is free while the next one is computed
        check()
    write_plain(writer, view, layout.storage, numbers, device)


@contextmanager
def _alongside(names: Iterable[str], task: Callable[[Iterable[str]], None]) -> Iterator[Callable[[], None]]:
    """Runs a task in a thread beside the body, which gets a function that raises what the task has raised so far.

    When the body fails, the task gets no further names.
    """
    stop = threading.Event()
    pool = ThreadPoolExecutor(1, "qconv-outside")
    try:
        future = pool.submit(task, takewhile(lambda _: not stop.is_set(), names))
        yield lambda: future.result() if future.done() else None
        with TIMELINE.stage("wait for tensors outside the blocks"):
            future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _write_block(writer: CheckpointWriter, view: Checkpoint, layout: Layout, block: QuantizedBlock) -> None:
    assert layout.format is not None  # a layout without a format has no blocks
    format_ = FORMATS[layout.format]
    for name, linear in block.linears.items():
        module = name.removesuffix(".weight")
        format_.check(linear, module, layout.storage)
        for key, tensor in format_.pack(linear, module, layout.storage).items():
            writer.write(key, tensor)
    for name, tensor in block.plain.items():
        writer.write(name, to_storage(view, name, tensor, layout.storage))


def _in_order(view: Checkpoint) -> list[str]:
    """All tensors as they are written, and lie in the files: outside of blocks, then block by block."""
    numbers = {name: _block_number(name) for name in view.specs()}
    return sorted(numbers, key=lambda name: -1 if (number := numbers[name]) is None else number)


def _block_number(name: str) -> int | None:
    """Of the block a tensor lies in; None outside of all blocks."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _stored_spec(spec: TensorSpec, storage: torch.dtype) -> TensorSpec:
    dtype = storage if is_plain_float(spec.dtype) else spec.dtype
    return TensorSpec(name=spec.name, shape=spec.shape, dtype=dtype)


def _meta_linear(n: int, k: int, scheme: Scheme, desc_act: bool) -> QuantizedLinear:
    scales_shape = scheme.scales_shape(n, k)
    code_dtype = torch.float8_e4m3fn if scheme.kind == "float" else torch.uint8
    return QuantizedLinear(
        codes_NK=torch.empty(n, k, dtype=code_dtype, device="meta"),
        scales_NG=torch.empty(scales_shape, device="meta"),
        zeros_NG=None if scheme.symmetric else torch.empty(scales_shape, dtype=torch.uint8, device="meta"),
        group_index_K=torch.empty(k, dtype=torch.int32, device="meta") if desc_act else None,
        scheme=scheme,
    )
