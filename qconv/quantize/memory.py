"""How quantizing a model block by block fits a device: where activations live, how many tokens a forward pass takes.

An estimate from shapes, made before any work. The steps of a block are added up one by one (what they hold at the same
time), the largest is the peak:

- embed: the embedding, beside the first batch.
- gather: weights as they were read and in the compute dtype, statistics of inputs, one forward pass.
- solve: float32 weights, statistics, codes, the solver's workspace.
- advance: codes, weights in the compute dtype, one forward pass.
- head: an output head that is quantized, alone, after the blocks.

Several outputs of one pass solve one after the other (`solving_order`): until the last one, what was read and gathered
stays. Beside it are copies where an output scales weights and statistics, or where weights are not float32 as they were
read. Where several are calibrated, the forward pass of `gather` also makes the next block's input, and there is no
advance; unless one of them looks at keys and values, which takes the inputs again: then what was read stays.

On top come the activations (all of them, or the buffers of `activations.py`), the codes of the block before, which may
still be on their way to disk, and what the libraries take for themselves.

Legend: N = out features, K = in features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from qconv.errors import CapacityError
from qconv.experts import expert_of
from qconv.quantization_config import QuantizationConfig, Statistic
from qconv.quantize.activations import NUM_LEAVING, NUM_SLOTS, Placement
from qconv.quantize.sample import SAMPLE_TOKENS
from qconv.streaming import StreamedModel

CPU_TOKENS = 4096  # tokens of a forward pass: temporaries stay small, and nothing gets faster beyond
GPU_TOKENS = 16384
MIN_TOKENS_ON_DEVICE = 4096  # below, activations in host memory with larger batches are faster
LIBRARIES = 600_000_000  # CUDA context, cuBLAS workspaces, compiled kernels
# float32 [N, K] and [K, K] temporaries
SOLVERS: Mapping[str, tuple[int, int]] = dict.fromkeys(("gptq", "awq", "awq+gptq", "smoothquant+gptq"), (4, 2))
OTHERS = (4, 0)
HEAD_BYTES = 12  # of an element of the output head: float32, codes, and what searching and packing hold (measured)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a memory plan needs to know of a model; sizes of the largest of its blocks.

    Attributes:
        location: for messages.
        hidden_size: H.
        itemsize: bytes of a weight or activation while a block runs.
        parameters: elements of all tensors of a block.
        source_bytes: the same as the view gives them.
        stacks: ``(N, K)`` of the linears to quantize that may share an input, stacked.
        grams: K of each Gram matrix.
        widest: most features that a linear takes or gives.
        outer_bytes: of what lies outside the blocks and runs before them.
        score_heads: heads whose attention scores are kept ``[S, S]``; 0 with fused attention.
        head: elements of an output head to quantize, and its bytes as the view gives them; 0 = none.
    """

    location: str
    hidden_size: int
    itemsize: int
    parameters: int
    source_bytes: int
    stacks: tuple[tuple[int, int], ...]
    grams: tuple[int, ...]
    widest: int
    outer_bytes: int
    score_heads: int = 0
    head: tuple[int, int] = (0, 0)

    @property
    def is_float32(self) -> bool:
        """Whether the weights to quantize are float32 as they are read, as a merge gives them."""
        return self.source_bytes >= 4 * sum(n * k for n, k in self.stacks)

    def statistics_bytes(self, outputs: Iterable[QuantizationConfig]) -> tuple[int, int]:
        """Gram matrices, and sampled inputs with what was just put together of them."""
        wanted = frozenset[Statistic]().union(*(output.statistics for output in outputs))
        grams = sum(4 * k * k for k in self.grams) if "gram" in wanted else 0
        return grams, sum(2 * 4 * SAMPLE_TOKENS * k for k in self.grams) if "sample" in wanted else 0

    def copies_bytes(self, output: QuantizationConfig) -> tuple[int, int]:
        """Weights, and scaled statistics, that an output has beside those that stay for another one."""
        weights = 4 * sum(n * k for n, k in self.stacks)
        if output.folding is not None:
            return weights, sum(self.statistics_bytes([output]))
        stacked = max((4 * n * k for n, k in self.stacks), default=0) if output.solves else 0
        return stacked if self.is_float32 else weights + stacked, 0

    @classmethod
    def of(cls, model: StreamedModel, weights: Collection[str]) -> ModelShape:
        """Reads names and shapes only. ``weights``: full names of those to quantize."""
        config = model.text_config
        hidden_size = int(config.hidden_size)
        is_eager = getattr(config, "_attn_implementation", None) == "eager"
        blocks = [model.block_specs(index) for index in range(model.num_blocks)]
        largest = max(blocks, key=lambda specs: sum(spec.num_bytes for spec in specs))
        shared: dict[tuple[str, int], list[int]] = defaultdict(list)
        for spec in largest:
            if spec.name in weights:
                n, k = spec.shape
                shared[(spec.name.rsplit(".", 2)[0], k)].append(n)  # same parent module, same input features
        grams = [each for (parent, k), rows in shared.items() for each in _grams(parent, k, rows)]
        if any(expert_of(f"{parent}.x") for parent, _ in shared):
            grams.append(hidden_size)  # of all tokens that experts are given
        matrices = [spec.shape for spec in largest if len(spec.shape) == 2]
        return cls(
            location=model.view.location,
            hidden_size=hidden_size,
            itemsize=model.compute_dtype.itemsize,
            parameters=sum(torch.Size(spec.shape).numel() for spec in largest),
            source_bytes=sum(spec.num_bytes for spec in largest),
            stacks=tuple((sum(rows), k) for (_, k), rows in shared.items()),
            grams=tuple(grams),
            widest=max((max(shape) for shape in matrices), default=hidden_size),
            outer_bytes=model.outer_bytes,
            score_heads=config.num_attention_heads if is_eager else 0,
            head=_head(model, weights),
        )


def _head(model: StreamedModel, weights: Collection[str]) -> tuple[int, int]:
    """Elements and bytes of the only weight to quantize that lies in no block."""
    inside = {spec.name for index in range(model.num_blocks) for spec in model.block_specs(index)}
    specs = [model.view.specs()[name] for name in set(weights) - inside]
    return sum(torch.Size(spec.shape).numel() for spec in specs), sum(spec.num_bytes for spec in specs)


def head_bytes(elements: int, source_bytes: int) -> int:
    """What rounding an output head holds: as read, in float32, codes, and temporaries of the search."""
    return source_bytes + HEAD_BYTES * elements


def solving_order(outputs: Sequence[QuantizationConfig]) -> list[int]:
    """The numbers of outputs of one pass as they solve: those that copy least come first."""
    return sorted(range(len(outputs)), key=lambda i: (outputs[i].needs_calibration, outputs[i].folding is not None))


def _grams(parent: str, k: int, rows: list[int]) -> list[int]:
    """K of each Gram matrix of the linears of one module that take K features.

    An attention has two inputs of one width at most (queries, keys and values share one), an MLP as well. An expert's
    gate and up projection share one; its down projection has its own tokens' and, if these are few, that of all.
    """
    if expert_of(f"{parent}.x") is None:
        return [k for _ in rows[:2]]
    return [k] if len(rows) > 1 else [k, k]


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How to run.

    Attributes:
        placement: where the activations of all batches live.
        rows_per_batch: calibration rows in one forward pass.
        peak_bytes: estimate of the device memory of the whole process.
        host_bytes: page-locked host memory for activations.
        steps: estimate for each step without libraries, for messages.
    """

    placement: Placement
    rows_per_batch: int
    peak_bytes: int
    host_bytes: int
    steps: Mapping[str, int]

    def __str__(self) -> str:
        place = "on the device" if self.placement == "device" else f"in host memory ({_gb(self.host_bytes)})"
        return (
            f"activations {place}, {self.rows_per_batch} rows in a forward pass, estimated peak {_gb(self.peak_bytes)}"
        )


def plan_memory(
    shape: ModelShape,
    num_rows: int,
    seq_len: int,
    outputs: Sequence[QuantizationConfig],
    device: str,
    free_bytes: int | None = None,
    limit: int | None = None,
) -> MemoryPlan:
    """The fastest way to run that fits.

    Args:
        num_rows: calibration rows of ``seq_len`` tokens each.
        outputs: all that are made block by block in this pass, one of them calibrated at least.
        device: ``"cpu"`` always keeps activations in place and is never refused.
        free_bytes: what the process may still allocate there; None = not known.
        limit: bytes that the whole process may take on the device.

    Raises:
        CapacityError: not even the smallest way fits; says how much is missing where.
    """
    if torch.device(device).type == "cpu":
        rows = max(1, min(num_rows, CPU_TOKENS // seq_len))
        return _plan(shape, num_rows, seq_len, outputs, ("device", rows))
    plans = [_plan(shape, num_rows, seq_len, outputs, way) for way in _ways(num_rows, seq_len)]
    for plan in plans:
        # The libraries had taken theirs before free memory was looked at.
        is_free = free_bytes is None or plan.peak_bytes - LIBRARIES <= free_bytes
        if is_free and (limit is None or plan.peak_bytes <= limit):
            return plan
    smallest = min(plans, key=lambda plan: plan.peak_bytes)
    steps = ", ".join(f"{step} {_gb(size)}" for step, size in smallest.steps.items())
    found = [] if free_bytes is None else [f"{_gb(free_bytes)} is free"]
    found += [] if limit is None else [f"{_gb(limit)} is the limit"]
    algorithms = " + ".join(output.resolved_algorithm for output in outputs)
    raise CapacityError(
        f"{shape.location}: quantizing it with {algorithms} needs about {_gb(smallest.peak_bytes)} of GPU "
        f"memory, even with activations in host memory and {smallest.rows_per_batch * seq_len} tokens at a time "
        f"(a block's steps: {steps}); {' and '.join(found)}; free or allow more of it, shorten the calibration rows "
        "(--seq-len) where gather or advance is the largest, or run with --device cpu"
    )


def free_memory(device: str) -> int | None:
    """What this process may still allocate on a CUDA device; None for a CPU."""
    if torch.device(device).type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _ways(num_rows: int, seq_len: int) -> list[tuple[Placement, int]]:
    """Placements with rows per batch, from fast to frugal."""
    rows = max(1, min(num_rows, GPU_TOKENS // seq_len))
    sizes = [rows]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    on_device: list[tuple[Placement, int]] = [
        ("device", size) for size in sizes if size == rows or size * seq_len >= MIN_TOKENS_ON_DEVICE
    ]
    return on_device + [("host", size) for size in sizes]


def _plan(
    shape: ModelShape, num_rows: int, seq_len: int, outputs: Sequence[QuantizationConfig], way: tuple[Placement, int]
) -> MemoryPlan:
    placement, rows = way
    token = shape.hidden_size * shape.itemsize
    batch, everything = rows * seq_len * token, num_rows * seq_len * token
    held, leaving = (everything, 0) if placement == "device" else (NUM_SLOTS * batch, (NUM_LEAVING + 1) * batch)
    # Beside the largest linear's input and output there is one more of that size, and a few of the hidden size.
    forward = rows * seq_len * shape.itemsize * 3 * (shape.widest + shape.hidden_size)
    forward += rows * shape.score_heads * seq_len**2 * (4 + 2 * shape.itemsize)
    running = shape.parameters * shape.itemsize
    codes = shape.parameters
    statistics = sum(shape.statistics_bytes(outputs))
    largest = max((4 * n * k for n, k in shape.stacks), default=0)
    steps = {
        "embed": (held if placement == "device" else leaving) + shape.outer_bytes + batch,
        "gather": held
        + (leaving if advances_while_gathering(outputs) else 0)
        + codes
        + shape.source_bytes
        + running
        + statistics
        + forward,
        "solve": held + 2 * codes + statistics + _solving(shape, outputs),
    }
    if not advances_while_gathering(outputs):
        steps["advance"] = held + leaving + codes + running + max(forward, 2 * largest)
        steps["advance"] += shape.source_bytes + statistics if is_shared_pass(outputs) else 0
    if shape.head[0]:
        steps["head"] = codes + head_bytes(*shape.head)
    return MemoryPlan(
        placement=placement,
        rows_per_batch=rows,
        peak_bytes=max(steps.values()) + LIBRARIES,
        # The allocator of page-locked memory rounds each buffer up to a power of two.
        host_bytes=0 if placement == "device" else -(-num_rows // rows) * (1 << (batch - 1).bit_length()),
        steps=steps,
    )


def is_shared_pass(outputs: Iterable[QuantizationConfig]) -> bool:
    """Whether several outputs are calibrated together: then statistics and the next block's input come of one pass."""
    return sum(output.needs_calibration for output in outputs) > 1


def advances_while_gathering(outputs: Collection[QuantizationConfig]) -> bool:
    """Whether that pass makes it: keys and values are looked at later, and take the inputs once more."""
    return is_shared_pass(outputs) and not any(output.kv_cache for output in outputs)


def _solving(shape: ModelShape, outputs: Sequence[QuantizationConfig]) -> int:
    """Weights, copies and workspace while the output solves that needs most of them."""
    most = 0
    *before, last = [outputs[number] for number in solving_order(outputs)]
    for output in (*before, last):
        weights = max(shape.source_bytes, 4 * shape.parameters)
        if output is not last:
            weights = shape.source_bytes + sum(shape.copies_bytes(output))
        per_weight, per_gram = SOLVERS.get(output.resolved_algorithm, OTHERS)
        workspace = max((4 * (per_weight * n * k + per_gram * k * k) for n, k in shape.stacks), default=0)
        most = max(most, weights + workspace)
    return most


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
