"""Writing and reading in the background: bytes against the safetensors library, bounds, and what failures leave."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qconv import assemble, plain_tensors, read_bytes, write_behind
from qconv.assemble import Filling, write_tensors
from qconv.checkpoint import SafetensorsCheckpoint, open_checkpoint
from qconv.convert import bnb_kernels, dequantize
from qconv.errors import CheckpointError, NumericsError
from qconv.layout import plan_layout
from qconv.merge import load_adapter, merge
from qconv.progress import QUIET
from qconv.read_ahead import ReadAhead, read_ahead
from qconv.types import Checkpoint, TensorSpec
from qconv.write_behind import WriteBehind
from qconv.writer import CheckpointWriter

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def specs_of(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in tensors.items()]


def some_tensors(device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}.weight": torch.randn(37 * i + 1, 61, generator=generator).bfloat16() for i in range(12)}
    tensors |= {"f32": torch.randn(1000, generator=generator), "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    tensors |= {"turned": torch.randn(30, 50, generator=generator).T, "f8": torch.randn(9, 9).to(torch.float8_e4m3fn)}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.cpu().contiguous().reshape(-1), b.cpu().contiguous().reshape(-1)
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def read_by_library(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    return found


def check_what_is_written(tmp_path: Path, tensors: dict[str, torch.Tensor], shard: int) -> None:
    with CheckpointWriter(tmp_path / "out", specs_of(tensors), shard, with_digests=True) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor.clone() if tensor.is_cuda else tensor)
        writer.finish_tensors()
        files = writer.partial.glob("*.safetensors")
        assert writer.digests == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        assert writer.digests
        writer.commit()
    found = read_by_library(tmp_path / "out")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        assert same_bytes(found[name], tensor), name


@pytest.mark.parametrize("shard", [20_000, 10**9])
@pytest.mark.parametrize("has_system_call", [True, False])
def test_the_library_reads_what_threads_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int, has_system_call: bool
) -> None:
    monkeypatch.setattr(write_behind, "PIECE_BYTES", 1000)  # tensors go in several pieces
    synced = []
    if not has_system_call:
        monkeypatch.setattr(write_behind, "_sync_file_range", lambda: None)
        monkeypatch.setattr(write_behind, "_FALLBACK_SYNC_BYTES", 30_000)
        monkeypatch.setattr(os, "fdatasync", synced.append)
    check_what_is_written(tmp_path, some_tensors(), shard)
    assert bool(synced) is not has_system_call


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("shard", [20_000, 10**9])
def test_the_library_reads_what_came_from_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int) -> None:
    monkeypatch.setattr(write_behind, "PIECE_BYTES", 4096)
    check_what_is_written(tmp_path, some_tensors("cuda"), shard)


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_tensor_may_be_overwritten_once_it_was_handed_over(tmp_path: Path) -> None:
    x = torch.zeros(64, 1 << 20, device="cuda")
    with CheckpointWriter(
        tmp_path / "out", [TensorSpec(name="x", shape=(64, 1 << 20), dtype=x.dtype)], 10**9
    ) as writer:
        x.fill_(3.0)
        writer.write("x", x)
        x.fill_(7.0)
        writer.commit()
    assert bool((load_file(tmp_path / "out" / "model.safetensors")["x"] == 3.0).all())


@pytest.mark.gpu
@needs_gpu
def test_large_tensors_reach_a_gpu_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_bytes, "PART_BYTES", 100_000)
    tensors = {"large": torch.randn(700, 1001), "small": torch.randn(5, 7).half()}
    source = folder_of(tmp_path / "m", tensors)
    for pinned in (False, True):
        if pinned:
            source.read_ahead(tensors, pin=True, max_bytes=10**7)
        for name, tensor in tensors.items():
            assert torch.equal(source.read(name, "cuda").cpu(), tensor)


def test_no_more_waits_than_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing is slow here, so that what is handed over piles up; the bound counts all that is not on its way out."""
    waiting, most = Counter[str](), []
    write = os.pwrite

    def slow(handle: int, data: memoryview, offset: int) -> int:
        time.sleep(0.002)
        count = write(handle, data, offset)
        waiting["bytes"] -= count
        return count

    monkeypatch.setattr(os, "pwrite", slow)
    handle = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    behind = WriteBehind(host_bytes=10_000, num_threads=3)
    for i in range(40):
        behind.write(handle, i * 3000, torch.full((3000,), i, dtype=torch.uint8))
        waiting["bytes"] += 3000
        most.append(waiting["bytes"])
    behind.write(handle, 120_000, torch.zeros(50_000, dtype=torch.uint8))  # more than the bound: alone
    assert waiting["bytes"] == -50_000  # and written when `write` returns
    behind.flush()
    assert 3000 < max(most) <= 10_000
    assert behind.peak_bytes <= 50_000
    behind.close()
    os.close(handle)
    data = (tmp_path / "file").read_bytes()
    assert [data[i * 3000] for i in range(40)] == list(range(40))


def threads_left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("qconv-write")]


@pytest.mark.parametrize("failing", ["pwrite", "fsync"])
def test_a_disk_that_fails_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    open_files = len(os.listdir("/proc/self/fd"))
    tensors = some_tensors()
    with (
        pytest.raises(CheckpointError, match=r"out\.partial: cannot be written.*Input/output error"),
        CheckpointWriter(tmp_path / "out", specs_of(tensors), 20_000) as writer,
    ):
        monkeypatch.setattr(os, failing, fail)
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish_tensors()
    assert list(tmp_path.iterdir()) == []
    assert threads_left() == []
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_after_an_error_no_more_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    accepted = 0
    specs = [TensorSpec(name=f"t{i}", shape=(1000,), dtype=torch.float32) for i in range(5000)]
    with (
        pytest.raises(CheckpointError, match="disk is full"),
        CheckpointWriter(tmp_path / "out", specs, 10**9) as writer,
    ):
        monkeypatch.setattr(os, "pwrite", full)
        for spec in specs:
            writer.write(spec.name, torch.zeros(1000))
            accepted += 1
            time.sleep(0.001)
    assert accepted < 5000


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = some_tensors()
    write = os.pwrite

    def slow(*args: object) -> int:
        time.sleep(0.01)
        return write(*args)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt), CheckpointWriter(tmp_path / "out", specs_of(tensors), 20_000) as writer:
        monkeypatch.setattr(os, "pwrite", slow)
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    assert threads_left() == []


def folder_of(folder: Path, tensors: dict[str, torch.Tensor]) -> SafetensorsCheckpoint:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16"}')
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return open_checkpoint(folder)


def test_a_window_moves_with_its_reader() -> None:
    """No more than the bound is read and not yet taken; tensors above the bound are left to the reader."""
    sizes = {f"n{i}": 10 for i in range(50)} | {"huge": 1000}
    begun: list[str] = []
    taken = 0
    most = []

    def read(name: str) -> torch.Tensor:
        begun.append(name)
        most.append((len(begun) - taken) * 10)
        return torch.tensor(float(name[1:]))

    ahead = ReadAhead()
    ahead.start(sizes, read, lambda name: sizes[name], max_bytes=45)
    for i in range(50):
        # The one in hand was counted as long as it waited.
        tensor = ahead.take(f"n{i}")
        taken += 1
        assert tensor is not None
        assert tensor.item() == i
        assert ahead.take(f"n{i}") is None  # each once
    assert ahead.take("huge") is None
    assert sorted(begun) == sorted(name for name in sizes if name != "huge")
    assert 20 <= max(most) <= 50


def test_reading_ahead_out_of_order_and_twice() -> None:
    reads = Counter[str]()

    def read(name: str) -> torch.Tensor:
        reads[name] += 1
        return torch.zeros(1)

    ahead = ReadAhead()
    ahead.start("abcdef", read, lambda _: 1, max_bytes=2)
    assert ahead.take("f") is None  # not begun: its reader reads it, and it is not read again here
    assert ahead.take("a") is not None
    ahead.start("xy", read)  # drops the others
    assert ahead.take("c") is None
    assert ahead.take("x") is not None
    assert ahead.take("y") is not None
    assert reads["f"] == 0
    assert set(reads.values()) == {1}


def test_an_error_while_reading_ahead_reaches_the_reader(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "m", {"a": torch.zeros(1000), "b": torch.ones(1000)})
    with open(tmp_path / "m" / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    source.read_ahead(["a", "b"], max_bytes=10**6)
    assert torch.equal(source.read("a"), torch.zeros(1000))
    with pytest.raises(CheckpointError, match="truncated while it was read"):
        source.read("b")


def test_large_tensors_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_bytes, "PART_BYTES", 1000)
    tensors = {"a": torch.randn(1234, 7), "b": torch.randn(250)}
    source = folder_of(tmp_path / "m", tensors)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())


def test_views_read_ahead_what_they_are_made_of(tiny_nf4: Path, tiny_adapter: Path) -> None:
    """A merged tensor takes codes, maxima and tables of the base, and the factors of the adapter, in that order."""
    source = open_checkpoint(tiny_nf4)
    base = dequantize(source)
    adapter = load_adapter(str(tiny_adapter), base)
    view = merge(base, [adapter])
    name = "model.layers.1.mlp.up_proj.weight"
    expected = view.read(name)
    begun: list[str] = []
    read: list[str] = []
    read_host = SafetensorsCheckpoint._read_host

    def listen(checkpoint: SafetensorsCheckpoint, name: str, *, pin: bool = False) -> torch.Tensor:
        read.append(name)
        return read_host(checkpoint, name, pin=pin)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsCheckpoint, "_read_host", listen)
        patch.setattr(ReadAhead, "start", lambda self, names, *_: begun.extend(names))
        read_ahead(view, [name])
        assert torch.equal(view.read(name), expected)
    assert sorted(begun) == sorted(read)
    assert len(begun) == 7


def merged_view(base: Path, adapter: Path) -> Checkpoint:
    view = dequantize(open_checkpoint(base))
    return merge(view, [load_adapter(str(adapter), view)])


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_write_what_one_after_the_other_gives(
    tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = merged_view(tiny_nf4, tiny_adapter)
    expected = {name: view.read(name).to(torch.bfloat16) for name in view.specs()}
    layout = plan_layout(view, None, None, [])
    before = torch.get_num_threads()
    monkeypatch.setattr(plain_tensors, "TRIM_ELEMENTS", 100_000)
    monkeypatch.setattr(assemble, "CPU_WINDOW_BYTES", 200_000)
    torch.set_num_threads(threads)
    try:
        with CheckpointWriter(tmp_path / "out", layout.specs, 10**6) as writer:
            write_tensors([Filling(writer=writer, layout=layout)], view, [], QUIET)
            assert torch.get_num_threads() == threads
            writer.write_json("config.json", {})
            writer.commit()
    finally:
        torch.set_num_threads(before)
    found = read_by_library(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(same_bytes(found[name], expected[name]) for name in expected)


def write_with_bad_value(tmp_path: Path, value: float, dtype: str, device: str) -> None:
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(40, 30) for i in range(9)}
    tensors["model.layers.4.mlp.up_proj.weight"][3, 5] = value
    view = dequantize(folder_of(tmp_path / "m", tensors))
    layout = plan_layout(view, dtype, None, [])
    with CheckpointWriter(tmp_path / "out", layout.specs, 10**6) as writer:
        write_tensors([Filling(writer=writer, layout=layout)], view, [], QUIET, device)
        writer.commit()


BAD_VALUES = [
    (float("nan"), "bf16", r"layers\.4\.mlp\.up_proj\.weight' has NaN or infinity in 1 of 1200 values"),
    (float("-inf"), "bf16", r"layers\.4\.mlp\.up_proj\.weight' has NaN or infinity in 1 of 1200 values"),
    (1e30, "fp16", r"layers\.4\.mlp\.up_proj\.weight' does not fit torch\.float16: largest magnitude 1e\+30"),
]


@pytest.mark.parametrize(("value", "dtype", "message"), BAD_VALUES)
def test_a_value_that_cannot_be_stored_leaves_nothing(tmp_path: Path, value: float, dtype: str, message: str) -> None:
    with pytest.raises(NumericsError, match=message):
        write_with_bad_value(tmp_path, value, dtype, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("value", "dtype", "message"), BAD_VALUES)
def test_a_gpu_tells_of_such_a_value_before_anything_is_kept(
    tmp_path: Path, value: float, dtype: str, message: str
) -> None:
    with pytest.raises(NumericsError, match=message):
        write_with_bad_value(tmp_path, value, dtype, "cuda")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_finite_numbers_whose_sum_overflows_are_fine(tmp_path: Path) -> None:
    write_with_bad_value(tmp_path, 3e38, "fp32", "cpu")
    view = dequantize(folder_of(tmp_path / "n", {"x": torch.full((4, 8), 3e38)}))
    layout = plan_layout(view, "fp32", None, [])
    with CheckpointWriter(tmp_path / "out2", layout.specs, 10**6) as writer:
        write_tensors([Filling(writer=writer, layout=layout)], view, [], QUIET)
        writer.commit()
    assert torch.equal(load_file(tmp_path / "out2" / "model.safetensors")["x"], torch.full((4, 8), 3e38))


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_merges_what_the_cpu_merges(tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        view = merged_view(tiny_nf4, tiny_adapter)
        layout = plan_layout(view, None, None, [])
        with CheckpointWriter(tmp_path / device, layout.specs, 10**6) as writer:
            write_tensors([Filling(writer=writer, layout=layout)], view, [], QUIET, device)
            writer.commit()
        found[device] = read_by_library(tmp_path / device)
    for name, expected in found["cpu"].items():
        # Sums of products in another order: the last bit of bfloat16 may fall to the other side.
        torch.testing.assert_close(found["cuda"][name].float(), expected.float(), rtol=2.0**-7, atol=1e-6)


def test_slices_are_decoded_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    packed = torch.randint(0, 256, (37 * 448 // 2 + 5,), dtype=torch.uint8, generator=generator)
    numel = 2 * len(packed) - 1  # a last, half byte, and a partial block
    absmax = torch.rand(-(-numel // 64), generator=generator)
    table = bnb_kernels.quant_map("nf4", "cpu")
    whole = bnb_kernels.decode_codes(packed, absmax, table, 64, (numel,), torch.bfloat16)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[:numel].long()
    expected = (table[codes] * absmax.repeat_interleave(64)[:numel]).bfloat16()
    monkeypatch.setattr(bnb_kernels, "CPU_SLICE_PER_THREAD", 4096)
    sliced = bnb_kernels.decode_codes(packed, absmax, table, 64, (numel,), torch.bfloat16)
    assert torch.equal(whole, expected)
    assert torch.equal(sliced, expected)
