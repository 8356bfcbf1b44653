"""Fills output folders: quantized blocks as they come, and everything else beside them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

from torch import Tensor

from qconv.convert import FORMATS, GGML_FORMATS, FusedOutput, cache_specs, encode_linear
from qconv.gguf import GgufOutput
from qconv.layout import BNB_FORMATS, Layout, block_number, in_order
from qconv.plain_tensors import TensorWriter, to_storage, write_plain
from qconv.progress import Progress
from qconv.quantize.blocks import QuantizedBlock
from qconv.read_ahead import read_ahead
from qconv.timeline import TIMELINE
from qconv.types import Checkpoint
from qconv.writer import CheckpointWriter

CPU_WINDOW_BYTES, GPU_WINDOW_BYTES = 32 << 20, 512 << 20  # of stored tensors that are read ahead


@dataclass(frozen=True, kw_only=True)
class Filling:
    """An output folder that is being filled."""

    writer: CheckpointWriter
    layout: Layout

    @cached_property
    def tensors(self) -> TensorWriter:
        """Takes tensors by their name in the model."""
        if self.layout.fused is not None:
            return FusedOutput(self.writer, self.layout.fused)
        return self.writer if self.layout.gguf is None else GgufOutput(self.writer, self.layout.gguf)


@dataclass(frozen=True)
class _All:
    """Hands each tensor to several writers."""

    writers: Sequence[TensorWriter]

    def write(self, name: str, tensor: Tensor) -> None:
        for writer in self.writers:
            writer.write(name, tensor)


def write_tensors(
    fillings: Sequence[Filling],
    view: Checkpoint,
    blocks: Iterable[QuantizedBlock],
    progress: Progress,
    device: str = "cpu",
) -> None:
    """Writes all tensors of all outputs.

    Outputs in formats that are made block by block are filled in lockstep from one reading of the view. A plain or
    bitsandbytes output reads the view for itself.

    Reading, computing and writing overlap: tensors are read ahead, computed on ``device`` (on a CPU several at a time)
    and written in the background.

    Args:
        blocks: of the fillings whose layout has a scheme, each block's ``request`` being its number among these.

    Raises:
        NumericsError: a value of a tensor that is not quantized overflows the storage dtype or is not finite.
        CheckpointError: a tensor cannot be read or written.
    """
    in_blocks = [filling for filling in fillings if filling.layout.scheme is not None]
    if in_blocks:
        _write_in_lockstep(in_blocks, view, blocks, device)
    for filling in fillings:
        if filling.layout.scheme is None:
            _write_alone(filling, view, progress, device)
        if filling.layout.gguf is not None:
            filling.layout.gguf.write_constants(filling.writer)


def _read_ahead(view: Checkpoint, names: Iterable[str], device: str) -> None:
    is_gpu = device.startswith("cuda")
    read_ahead(view, names, is_gpu, GPU_WINDOW_BYTES if is_gpu else CPU_WINDOW_BYTES)


def _write_alone(filling: Filling, view: Checkpoint, progress: Progress, device: str) -> None:
    writer, layout = filling.tensors, filling.layout
    names = in_order(view)
    if layout.format is None or layout.gguf is not None:
        _read_ahead(view, names, device)
        write_plain(writer, view, layout.handed_over, progress.track(names, "write", len(names)), device)
        return
    names.sort(key=lambda name: name in layout.quantized)
    _read_ahead(view, names, device)
    fmt = BNB_FORMATS[layout.format]
    write_plain(writer, view, layout.storage, [name for name in names if name not in layout.quantized], device)
    for name in [name for name in names if name in layout.quantized]:
        # Each linear is encoded as it is written: nothing has to be chosen.
        # Rules of the library's CUDA kernels: the model is served there.
        linear = encode_linear(view.read(name, device), fmt.kind, layout.storage, f"{view.location}: {name}", "cuda")
        module = name.removesuffix(".weight")
        fmt.check(linear, module)
        for key, tensor in fmt.pack(linear, module).items():
            writer.write(key, tensor)


def _write_in_lockstep(
    fillings: Sequence[Filling], view: Checkpoint, blocks: Iterable[QuantizedBlock], device: str
) -> None:
    """Block by block, what is not quantized too: a file of weights is then complete soon after it was begun."""
    names = in_order(view)
    heads = {filling.layout.head for filling in fillings}  # come after the blocks, as one more
    inside = [name for name in names if block_number(name) is not None]
    inside += [name for name in names if name in heads]
    outside = [name for name in names if block_number(name) is None and name not in heads]
    if not device.startswith("cuda"):
        _write_to_all(fillings, view, outside, device)
        outside = []
    _read_ahead(view, inside, device)
    with _alongside(outside, lambda some: _write_to_all(fillings, view, some, "cpu")) as check:
        left = dict.fromkeys(inside)
        for block in blocks:
            with TIMELINE.stage("pack"):
                _write_block(fillings[block.request], view, block)
            for name in [*block.linears, *block.plain]:
                left.pop(name, None)
            del block  # its memory is free while the next one is computed
            check()
        _write_to_all(fillings, view, left, device)  # what no block has a parameter for


def _write_to_all(fillings: Sequence[Filling], view: Checkpoint, names: Iterable[str], device: str) -> None:
    """Writes the same tensors to all outputs, read once for all that store them alike."""
    names = names if len({filling.layout.handed_over for filling in fillings}) == 1 else list(names)
    for dtype in dict.fromkeys(filling.layout.handed_over for filling in fillings):
        alike = [filling.tensors for filling in fillings if filling.layout.handed_over == dtype]
        write_plain(_All(alike), view, dtype, names, device)


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


def _write_block(filling: Filling, view: Checkpoint, block: QuantizedBlock) -> None:
    writer, layout = filling.tensors, filling.layout
    formats = FORMATS if layout.gguf is None else GGML_FORMATS
    for name, linear in block.linears.items():
        module, format_ = name.removesuffix(".weight"), formats[layout.layout_of(name)]
        format_.check(linear, module, layout.storage)
        for key, tensor in format_.pack(linear, module, layout.storage).items():
            writer.write(key, tensor)
    for attention, scales in block.cache_scales.items():
        for spec, scale in zip(cache_specs(attention, layout.storage), scales, strict=True):
            writer.write(spec.name, scale.to(spec.dtype))
    for name, tensor in block.plain.items():
        writer.write(name, to_storage(view, name, tensor, layout.handed_over))
