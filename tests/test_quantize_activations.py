"""Where hidden states live, what fits a device, and what one pass over them gathers."""

from __future__ import annotations

import gc
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qconv.checkpoint import open_checkpoint
from qconv.errors import CalibrationError, CapacityError, NumericsError
from qconv.quantization_config import QuantizationConfig
from qconv.quantize import activations
from qconv.quantize.activations import Activations
from qconv.quantize.blocks import QuantizeRequest, quantize_blocks
from qconv.quantize.gather import gather
from qconv.quantize.memory import LIBRARIES, ModelShape, free_memory, plan_memory
from qconv.skeleton import block_linears, linear_weights
from qconv.streaming import StreamedModel
from qconv.types import Scheme, TensorSpec

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


# Streams that a test can run in any order that their events allow.


class Machine:
    """Streams as queues of work. `run` takes the next piece of any queue that need not wait, at random."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.compute = Stream(self)
        self.streams = [self.compute]
        self.current = self.compute

    def enqueue(self, work: Callable[[], Any]) -> None:
        self.current.queue.append(work)

    def run(self) -> None:
        while busy := [stream for stream in self.streams if stream.queue]:
            ready = [stream for stream in busy if getattr(stream.queue[0], "is_ready", lambda: True)()]
            assert ready, "streams wait for one another"
            self.random.choice(ready).queue.popleft()()

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def new_stream(self, _: object) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    def empty(self, shape: Any, *, dtype: object, device: object = None, pin_memory: bool = False) -> Memory:
        assert pin_memory != (device is not None)
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        data = torch.full(shape, torch.nan)
        if device is not None:  # what had this memory before may have work left
            self.compute.queue.append(lambda: data.fill_(torch.nan))
        return Memory(self, data, is_pooled=device is not None)

    def as_torch(self) -> Any:
        cuda = SimpleNamespace(Stream=self.new_stream, stream=self.use, current_stream=lambda _: self.compute)
        return SimpleNamespace(cuda=cuda, empty=self.empty, device=str)


class Stream:
    def __init__(self, machine: Machine):
        self.machine = machine
        self.queue: deque[Any] = deque()

    def record_event(self) -> Event:
        event = Event()
        self.queue.append(event.happen)
        return event

    def wait_event(self, event: Event) -> None:
        self.queue.append(Wait(event))


class Event:
    done = False

    def happen(self) -> None:
        self.done = True


class Wait:
    def __init__(self, event: Event):
        self.event = event

    def is_ready(self) -> bool:
        return self.event.done

    def __call__(self) -> None:
        pass


class Memory:
    """A tensor whose values change when the machine runs. Memory of the pool is overwritten by what comes next on the
    compute stream, as soon as nothing refers to it."""

    def __init__(self, machine: Machine, data: Tensor, is_pooled: bool = False):
        self.machine, self.data, self.shape, self.dtype = machine, data, data.shape, data.dtype
        if is_pooled:
            weakref.finalize(self, machine.compute.queue.append, lambda: data.fill_(torch.nan))

    def numel(self) -> int:
        return self.data.numel()

    def __len__(self) -> int:
        return len(self.data)

    def untyped_storage(self) -> Any:
        return self.data.untyped_storage()

    def record_stream(self, _: object) -> None:
        pass

    def __getitem__(self, part: Any) -> Memory:
        return Memory(self.machine, self.data[part])

    def view(self, shape: Any) -> Memory:
        return Memory(self.machine, self.data.view(shape))

    def copy_(self, other: Memory, non_blocking: bool) -> None:
        assert non_blocking
        to, source = self.data, other.data  # not the objects: a copy on its way keeps no memory alive
        self.machine.enqueue(lambda: to.copy_(source))

    def clone(self) -> Memory:
        return computed(self.machine, self, lambda x: x)


def computed(machine: Machine, x: Memory, function: Callable[[Tensor], Tensor]) -> Memory:
    out = Memory(machine, torch.full(x.shape, torch.nan), is_pooled=True)
    to, source = out.data, x.data
    machine.enqueue(lambda: to.copy_(function(source)))
    return out


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("num_batches", [1, 2, 5])
def test_passes_over_host_memory_have_no_races(monkeypatch: pytest.MonkeyPatch, num_batches: int, seed: int) -> None:
    machine = Machine(seed)
    monkeypatch.setattr(activations, "torch", machine.as_torch())
    batches = [torch.randint(99, (2 if i < num_batches - 1 else 1, 3, 4)).float() for i in range(num_batches)]
    embedded = (computed(machine, Memory(machine, batch), lambda x: x) for batch in batches)
    model = SimpleNamespace(device="cuda", embed_each=lambda _: embedded)
    states = Activations.embed(model, [], "host")  # type: ignore[arg-type]
    seen: list[Tensor] = []

    def look(h: Any) -> None:
        seen.append(torch.full(h.shape, torch.nan))
        to, source = seen[-1], h.data
        machine.enqueue(lambda: to.copy_(source))

    for factor in (2.0, 3.0, 5.0):
        for _, h in states.each():  # a pass that only reads
            look(h)
        for number, h in states.each():
            states.replace(number, computed(machine, h, lambda x, factor=factor: x * factor))  # type: ignore[arg-type]
        for number, h in states.each():  # blocks that return what they were given, in a pass that breaks off
            if number == min(2, num_batches - 1):
                look(h)
                break
            states.replace(number, h)
    machine.run()
    for found, batch in zip(states._states, batches, strict=True):  # type: ignore[attr-defined]
        assert torch.equal(found.data, batch * 30)
    last = batches[min(2, num_batches - 1)]
    expected = [
        x for before, after in ((1, 2), (2, 6), (6, 30)) for x in (*(b * before for b in batches), last * after)
    ]
    assert all(torch.equal(found, want) for found, want in zip(seen, expected, strict=True))


def test_states_on_the_device_are_replaced_one_by_one() -> None:
    batches = [torch.full((1, 2, 3), float(i)) for i in range(3)]
    model = SimpleNamespace(device="cpu", embed_each=lambda ids: (batches[int(i)] for i in ids))
    states = Activations.embed(model, [torch.tensor(i) for i in range(3)], "device")  # type: ignore[arg-type]
    first = weakref.ref(batches[0])
    del batches[:]
    assert [(i, float(h[0, 0, 0])) for i, h in states.each()] == [(0, 0.0), (1, 1.0), (2, 2.0)]
    for number, h_BSH in states.each():
        states.replace(number, h_BSH + 10)
    del h_BSH
    assert first() is None
    assert [float(h[0, 0, 0]) for _, h in states.each()] == [10.0, 11.0, 12.0]
    assert len(states) == 3


@pytest.mark.gpu
@needs_gpu
def test_gpu_states_in_host_memory_equal_those_on_the_device(random_model: Callable[..., Path]) -> None:
    """The device is kept busy before each block, so that a copy which does not wait is seen."""
    model = StreamedModel(open_checkpoint(random_model("llama")), "cuda", torch.bfloat16)
    batches = list(torch.randint(2048, (7, 96), generator=torch.Generator().manual_seed(0)).split(2))
    results = []
    for placement in ("device", "host"):
        states = Activations.embed(model, batches, placement)  # type: ignore[arg-type]
        read = []
        for index in (0, 1, 0, 1):
            block = model.load_block(index)
            for number, h_BSH in states.each():
                torch.cuda._sleep(2_000_000)
                read.append(h_BSH.clone())
                states.replace(number, model.run_block(index, block, h_BSH))
        results.append([*read, *(h_BSH.clone() for _, h_BSH in states.each())])
    assert len(results[0]) == 5 * len(batches)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_gpu_states_in_host_memory_take_two_batches_on_the_device() -> None:
    batch = torch.ones(8, 1024, 1024, device="cuda", dtype=torch.bfloat16)  # 16 MiB
    model = SimpleNamespace(device="cuda", embed_each=lambda ids: (batch * i for i in ids))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    states = Activations.embed(model, range(32), "host")  # type: ignore[arg-type]
    torch.cuda.reset_peak_memory_stats()
    for number, h_BSH in states.each():
        states.replace(number, h_BSH + 1)
    del h_BSH
    # Two slots, two results on their way out, one being made; the embedding left two.
    assert torch.cuda.max_memory_allocated() - before <= 6 * batch.nbytes
    assert torch.cuda.memory_allocated() - before == 2 * batch.nbytes
    assert [float(h[0, 0, 0]) for _, h in states.each()] == [i + 1.0 for i in range(32)]


# What a pass gathers.


def families(random_model: Callable[..., Path], family: str) -> tuple[StreamedModel, list[str], list[Tensor]]:
    view = open_checkpoint(random_model(family))
    model = StreamedModel(view, "cpu", torch.float32)
    names = [
        name.removeprefix("model.layers.1.") for name in linear_weights(view) if name.startswith("model.layers.1.")
    ]
    batches = [torch.randint(2048, (2, 40), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    return model, names, batches


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_a_pass_that_ends_early_gathers_the_same(
    random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model, names, batches = families(random_model, family)
    tensors = model.read_block(1)
    block = model.build_block(1, tensors)
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    for name, linear in block_linears(block).items():
        linear.register_forward_pre_hook(lambda _, args, name=name: inputs[f"{name}.weight"].append(args[0]))
    for h_BSH in model.embed(batches):
        model.run_block(1, block, h_BSH)

    done: list[str] = []
    build = StreamedModel.build_block

    def counted(self: StreamedModel, index: int, tensors: Any) -> nn.Module:
        made = build(self, index, tensors)
        for name, linear in block_linears(made).items():
            linear.register_forward_hook(lambda *_, name=name: done.append(name))
        return made

    monkeypatch.setattr(StreamedModel, "build_block", counted)
    hidden = Activations.embed(model, batches, "device")
    statistics = gather(model, 1, tensors, names, hidden, {"gram", "mean_abs", "sample"})
    assert list(statistics) == names
    for name in names:
        x_TK = torch.cat([x.flatten(0, 1) for x in inputs[name]]).double()
        exact_KK = x_TK.T @ x_TK / len(x_TK)
        norm_K = exact_KK.diagonal().sqrt()
        gram_KK, sample = statistics[name].gram_KK, statistics[name].sample
        assert gram_KK is not None
        assert sample is not None
        assert float(((gram_KK - exact_KK).abs() / torch.outer(norm_K, norm_K)).max()) < 1e-6
        mean_abs_K = statistics[name].mean_abs_K
        assert mean_abs_K is not None
        torch.testing.assert_close(mean_abs_K.double(), x_TK.abs().mean(0), rtol=1e-5, atol=0)
        assert torch.equal(sample.max_abs_K, x_TK.abs().amax(0).float())
        assert torch.equal(sample.x_tK, x_TK.float())  # fewer tokens than are kept at most
    assert done.count("mlp.down_proj") == 1  # the first batch, which tells that it is the last one
    assert all(done.count(name.removesuffix(".weight")) == 3 for name in names if "down" not in name)
    separate = {id(statistics[name]) for name in names}
    assert len(separate) == 4  # attention, its output, MLP, its output


class Switch(nn.Module):
    """Calls its linears in an order that depends on the input, ``"ab"`` by ``"ab"``."""

    def __init__(self, orders: list[str]):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.orders, self.calls = iter(orders), 0

    def forward(self, h_BSH: Tensor) -> Tensor:
        for letter in next(self.orders):
            h_BSH = getattr(self, letter)(h_BSH * 2)
        self.calls += 1
        return h_BSH


@pytest.mark.parametrize(
    ("orders", "num_whole"),
    [
        (["ab", "ab", "ab"], 1),
        (["ab", "ba", "ab"], 2),  # order changes: that batch is heard to its end
        (["ab", "a", "ab"], 2),
        (["aba", "aba", "ab"], 3),  # twice in one batch
        (["a", "ab", "ab"], 3),  # the first batch does not tell
    ],
)
def test_blocks_that_call_linears_in_other_ways(orders: list[str], num_whole: int) -> None:
    block, oracle = Switch(orders), Switch(orders)
    oracle.load_state_dict(block.state_dict())
    inputs: dict[str, list[Tensor]] = {"a": [], "b": []}
    for letter, linear in oracle.named_children():
        linear.register_forward_pre_hook(lambda _, args, letter=letter: inputs[letter].append(args[0].detach()))
    batches = [torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for h_BSH in batches:
        oracle(h_BSH)
    model: Any = SimpleNamespace(
        device="cpu",
        build_block=lambda *_: block,
        block_prefix=lambda _: "layers.0.",
        run_block=lambda _, block, h_BSH: block(h_BSH),
        embed_each=lambda _: batches,
    )
    hidden = Activations.embed(model, [], "device")
    found = gather(model, 0, {}, ["a.weight", "b.weight"], hidden, {"gram"})
    for letter, tensors in inputs.items():
        x_TK = torch.cat([x.flatten(0, 1) for x in tensors])
        torch.testing.assert_close(found[f"{letter}.weight"].gram_KK, x_TK.T @ x_TK / len(x_TK), rtol=1e-5, atol=1e-6)
        assert found[f"{letter}.weight"].mean_abs_K is None
    assert block.calls == num_whole


def test_a_pass_that_ends_early_leaves_nothing_behind(random_model: Callable[..., Path]) -> None:
    """What a forward pass made is freed when it is stopped, not when the garbage collector comes by."""
    model, names, batches = families(random_model, "llama")
    hidden = Activations.embed(model, batches, "device")
    made: list[weakref.ref[Tensor]] = []
    run = model.run_block

    def watched(index: int, block: nn.Module, h_BSH: Tensor) -> Tensor:
        block.get_submodule("mlp.up_proj").register_forward_hook(lambda *call: made.append(weakref.ref(call[2])))
        return run(index, block, h_BSH)

    model.run_block = watched  # type: ignore[method-assign]
    gc.collect()
    gc.disable()
    try:
        gather(model, 0, model.read_block(0), names, hidden, {"gram"})
        assert len(made) >= len(batches)
        assert all(tensor() is None for tensor in made)
    finally:
        gc.enable()


def test_a_linear_that_is_never_called_is_named() -> None:
    model: Any = SimpleNamespace(
        device="cpu",
        build_block=lambda *_: Switch(["a"]),
        block_prefix=lambda _: "layers.7.",
        run_block=lambda _, block, h_BSH: block(h_BSH),
        embed_each=lambda _: [torch.ones(1, 2, 4)],
    )
    with pytest.raises(CalibrationError, match=r"layers\.7\.b\.weight.*none"):
        gather(model, 0, {}, ["a.weight", "b.weight"], Activations.embed(model, [], "device"), {"gram"})


def test_a_bad_activation_names_its_linear(random_model: Callable[..., Path]) -> None:
    model, names, batches = families(random_model, "llama")
    tensors = model.read_block(1)
    tensors["mlp.up_proj.weight"][5, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.down_proj.*1 of 256 input channels \(first: 5\)"):
        gather(model, 1, tensors, names, Activations.embed(model, batches, "device"), {"gram"})


# What fits.


class Shapes:
    """A checkpoint without bytes: the shapes of a Llama, two layers of it."""

    location = "a model"

    def __init__(self, hidden: int, inner: int, heads: int, vocab: int, merged: bool = True):
        self.config = {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "vocab_size": vocab,
        }
        kv = hidden // heads * 8
        linears = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden)}
        linears |= {"self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden)}
        linears |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
        for i in range(2):
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in linears.items()}
            shapes |= {f"model.layers.{i}.{name}.weight": (hidden,) for name in norms}
        shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
        dtype = torch.float32 if merged else torch.bfloat16
        self._specs = {name: TensorSpec(name=name, shape=shape, dtype=dtype) for name, shape in shapes.items()}
        self.weights = {name for name in shapes if "_proj" in name}

    def specs(self) -> dict[str, TensorSpec]:
        return self._specs

    def read(self, name: str, device: str = "cpu") -> Tensor:
        raise AssertionError("a plan is made from shapes")


class RandomWeights(Shapes):
    def read(self, name: str, device: str = "cpu") -> Tensor:
        spec = self._specs[name]
        if len(spec.shape) == 1:
            return torch.ones(spec.shape, dtype=spec.dtype, device=device)
        generator = torch.Generator(device).manual_seed(len(name))
        return torch.randn(spec.shape, dtype=spec.dtype, device=device, generator=generator).mul_(0.02)


def asked(algorithm: str) -> QuantizationConfig:
    return QuantizationConfig(target="awq" if algorithm == "awq" else "gptq")


def shape_of(*sizes: int) -> ModelShape:
    view = Shapes(*sizes)
    return ModelShape.of(StreamedModel(view, "cpu", torch.bfloat16), view.weights)


@pytest.fixture(scope="module")
def llama_8b() -> ModelShape:
    return shape_of(4096, 14336, 32, 128256)


@pytest.fixture(scope="module")
def llama_70b() -> ModelShape:
    return shape_of(8192, 28672, 64, 128256)


def test_shapes_are_those_of_the_largest_block(llama_8b: ModelShape) -> None:
    assert llama_8b.parameters == 218_112_000  # attention 41,943,040 + MLP 176,160,768 + two norms of 4,096
    assert llama_8b.source_bytes == 4 * 218_112_000
    assert llama_8b.stacks == ((10240, 4096), (28672, 4096), (4096, 14336))
    assert sorted(llama_8b.grams) == [4096] * 4 + [14336]
    assert (llama_8b.widest, llama_8b.hidden_size, llama_8b.score_heads) == (14336, 4096, 0)
    assert llama_8b.outer_bytes == 2 * (128256 + 1) * 4096


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
def test_8b_fits_10_gb_with_its_activations_on_the_gpu(llama_8b: ModelShape, algorithm: str) -> None:
    plan = plan_memory(llama_8b, 128, 2048, [asked(algorithm)], "cuda", free_bytes=84_000_000_000)
    assert (plan.placement, plan.rows_per_batch, plan.host_bytes) == ("device", 8, 0)
    assert 6e9 < plan.peak_bytes <= 10e9
    limited = plan_memory(
        llama_8b, 128, 2048, [asked(algorithm)], "cuda", free_bytes=84_000_000_000, limit=10_000_000_000
    )
    assert limited == plan


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
def test_70b_fits_24_gb_with_its_activations_in_host_memory(llama_70b: ModelShape, algorithm: str) -> None:
    plan = plan_memory(
        llama_70b, 128, 2048, [asked(algorithm)], "cuda", free_bytes=84_000_000_000, limit=24_000_000_000
    )
    assert plan.placement == "host"
    assert plan.peak_bytes <= 24e9
    assert plan.rows_per_batch * 2048 >= 4096
    assert plan.host_bytes == 128 * 2048 * 8192 * 2  # a power of two for each batch here
    free = plan_memory(llama_70b, 128, 2048, [asked(algorithm)], "cuda", free_bytes=84_000_000_000)
    assert (free.placement, free.rows_per_batch) == ("device", 8)
    assert free.peak_bytes > 24e9


def test_less_memory_means_smaller_batches_then_host_memory(llama_8b: ModelShape) -> None:
    plans = [
        plan_memory(llama_8b, 128, 2048, [asked("gptq")], "cuda", limit=limit * 100_000_000)
        for limit in range(100, 64, -1)
    ]
    ways = list(dict.fromkeys((plan.placement, plan.rows_per_batch) for plan in plans))
    assert ways[0] == ("device", 8)
    assert ways[-1][0] == "host"
    assert all(plan.peak_bytes <= limit * 100_000_000 for plan, limit in zip(plans, range(100, 64, -1), strict=True))
    assert [plan.peak_bytes for plan in plans] == sorted((plan.peak_bytes for plan in plans), reverse=True)


def test_what_cannot_fit_is_refused_with_numbers(llama_70b: ModelShape) -> None:
    with pytest.raises(CapacityError, match=r"a model: .*gptq needs about 2\d\.\d GB .*solve .* 12\.0 GB is the limit"):
        plan_memory(llama_70b, 128, 2048, [asked("gptq")], "cuda", free_bytes=84_000_000_000, limit=12_000_000_000)
    with pytest.raises(CapacityError, match=r"16\.0 GB is free and 24\.0 GB is the limit"):
        plan_memory(llama_70b, 128, 2048, [asked("gptq")], "cuda", free_bytes=16_000_000_000, limit=24_000_000_000)


def test_libraries_are_part_of_a_limit_and_no_longer_of_what_is_free(llama_8b: ModelShape) -> None:
    peak = plan_memory(llama_8b, 128, 2048, [asked("gptq")], "cuda").peak_bytes
    assert plan_memory(llama_8b, 128, 2048, [asked("gptq")], "cuda", limit=peak).placement == "device"
    assert plan_memory(llama_8b, 128, 2048, [asked("gptq")], "cuda", free_bytes=peak - LIBRARIES).peak_bytes == peak
    assert plan_memory(llama_8b, 128, 2048, [asked("gptq")], "cuda", free_bytes=peak - LIBRARIES - 1).peak_bytes < peak


def test_attention_scores_count_where_they_are_kept(llama_8b: ModelShape) -> None:
    import dataclasses

    eager = dataclasses.replace(llama_8b, score_heads=32)
    assert plan_memory(eager, 128, 2048, [asked("gptq")], "cuda").peak_bytes > 8e9 + 32 * 8 * 2048**2 * 4
    assert plan_memory(eager, 128, 2048, [asked("gptq")], "cuda", limit=10_000_000_000).rows_per_batch < 8


@pytest.mark.parametrize(("num_rows", "seq_len", "rows"), [(128, 512, 8), (3, 512, 3), (128, 8192, 1)])
def test_plans_for_a_cpu(llama_8b: ModelShape, num_rows: int, seq_len: int, rows: int) -> None:
    plan = plan_memory(llama_8b, num_rows, seq_len, [asked("gptq")], "cpu", limit=1)
    assert (plan.placement, plan.rows_per_batch) == ("device", rows)
    assert free_memory("cpu") is None


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_gpu_memory_stays_within_the_plan(algorithm: str, placement: str) -> None:
    view = RandomWeights(2048, 8192, 16, 4096)
    model = StreamedModel(view, "cuda", torch.bfloat16)
    rows_TS = torch.randint(4096, (256, 1024), generator=torch.Generator().manual_seed(0))
    shape = ModelShape.of(model, view.weights)
    plan = plan_memory(shape, 256, 1024, [asked(algorithm)], "cuda")
    limit = None
    if placement == "host":
        limit = plan.peak_bytes - 500_000_000
        plan = plan_memory(shape, 256, 1024, [asked(algorithm)], "cuda", limit=limit)
    assert plan.placement == placement
    request = QuantizeRequest(
        config=asked(algorithm),
        scheme=Scheme(symmetric=algorithm == "gptq"),
        weights=view.weights,
        storage=torch.bfloat16,
        model_type="llama",
        gpu_memory_limit=limit,
    )
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for block in quantize_blocks(model, [request], rows_TS):
        assert len(block.linears) == 7
    used = torch.cuda.max_memory_allocated() - before
    assert 0.5 * (plan.peak_bytes - LIBRARIES) < used < plan.peak_bytes - LIBRARIES + 100_000_000  # cuBLAS workspaces


def test_rows_are_split_into_batches_as_planned(
    random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = open_checkpoint(random_model("llama"))
    rows_TS = torch.randint(2048, (5, 48), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("qconv.quantize.memory.CPU_TOKENS", 100)  # two rows

    def codes(calibration: Any) -> list[Tensor]:
        request = QuantizeRequest(
            config=QuantizationConfig(target="gptq"),
            scheme=Scheme(group_size=64),
            weights=linear_weights(view),
            storage=torch.float32,
            model_type="llama",
        )
        blocks = quantize_blocks(StreamedModel(view, "cpu", torch.float32), [request], calibration)
        return [linear.codes_NK for block in blocks for linear in block.linears.values()]

    planned, given = codes(rows_TS), codes(list(rows_TS.split(2)))
    assert len(planned) == 14
    assert all(torch.equal(a, b) for a, b in zip(planned, given, strict=True))
