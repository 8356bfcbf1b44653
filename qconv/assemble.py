"""Fills an output folder: quantized blocks as they come, and everything else beside them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import takewhile

from qconv.convert import FORMATS, encode_linear
from qconv.layout import BNB_FORMATS, Layout, block_number, in_order
from qconv.plain_tensors import to_storage, write_plain
from qconv.progress import Progress
from qconv.quantize.blocks import QuantizedBlock
from qconv.read_ahead import read_ahead
from qconv.timeline import TIMELINE
from qconv.types import Checkpoint
from qconv.writer import CheckpointWriter

CPU_WINDOW_BYTES, GPU_WINDOW_BYTES = 32 << 20, 512 << 20  # of stored tensors that are read ahead


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
    names = in_order(view)
    if layout.format is None:
        read_ahead(view, names, is_gpu, window)
        write_plain(writer, view, layout.storage, progress.track(names, "write", len(names)), device)
        return
    if layout.format in BNB_FORMATS:
        names.sort(key=lambda name: name in layout.quantized)
        read_ahead(view, names, is_gpu, window)
        _write_bnb(writer, view, layout, names, device)
        return
    # Block by block, what is not quantized too: a file of weights is then complete soon after it was begun.
    numbers = {name: number for name in names if (number := block_number(name)) is not None}
    outside = [name for name in names if name not in numbers]
    if not is_gpu:
        write_plain(writer, view, layout.storage, outside, device)
        outside = []
    read_ahead(view, list(numbers), is_gpu, window)
    with _alongside(outside, lambda some: write_plain(writer, view, layout.storage, some, "cpu")) as check:
        _write_blocks(writer, view, layout, blocks, numbers, device, check)


def _write_bnb(writer: CheckpointWriter, view: Checkpoint, layout: Layout, names: list[str], device: str) -> None:
    """Each linear is encoded as it is written: nothing has to be chosen."""
    assert layout.format is not None
    fmt = BNB_FORMATS[layout.format]
    write_plain(writer, view, layout.storage, [name for name in names if name not in layout.quantized], device)
    for name in [name for name in names if name in layout.quantized]:
        # Rules of the library's CUDA kernels: the model is served there.
        linear = encode_linear(view.read(name, device), fmt.kind, layout.storage, f"{view.location}: {name}", "cuda")
        module = name.removesuffix(".weight")
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
