"""What each linear costs when it alone is quantized: KL(16-bit model || that model with this one quantized).

Method: measured, as attribution does it (`validate/attribution.py`): every unit (linears that get one choice) in turn
takes the numbers that the output's own algorithm chooses at one width, the difference runs through the later blocks,
and the next-token distributions are compared. Costs of single units add up to that of all of them: to 0.060 of 0.063
nats on SmolLM2-135M, to 0.001705 of 0.001706 on the tests' model. That is what lets a budget be spent by a sum
(`allocation.py`).

Why not something cheaper: weight or output errors (exllamav2, SliM-LLM, GPTQ's own) are not comparable between linears
of different depth and role; the trace of the Hessian (HAWQ-V2, Dong et al. 2020) and gradient times error (LLM-MQ,
AutoScheme's delta loss) need a backward pass through the whole model, which is never in memory here, and
are the expansion of what is measured here in full.

Other widths and group sizes are not measured so: the KL is quadratic in the error of the weights, so that within one
unit it goes like their squared error. That is taken from a sample of rows, rounded to nearest on searched grids: GPTQ's
error of the output goes the same way (choices by the one or the other differ by 1% in the sum of costs on the tests'
model). With every bit it falls to about a quarter (Bennett 1948).

Blocks compute in float32, since rounding to bfloat16 alone costs as much as a linear in 4 bits. AWQ's scales are not
folded, since a folded linear cannot be swapped alone: what AWQ targets cost is measured with GPTQ.

Dimension legend: R = calibration rows, B = rows that are compared, S = tokens per row, H = hidden size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn

from qconv.corpus import calibration_digest
from qconv.progress import Progress
from qconv.quantization_config import QuantizationConfig
from qconv.quantize.blocks import QuantizedBlock, QuantizeRequest, quantize_blocks
from qconv.quantize.global_scale import power_of_two
from qconv.quantize.memory import LIBRARIES, free_memory
from qconv.quantize.rtn import rtn
from qconv.size_budget import Choice, Unit
from qconv.skeleton import block_linears
from qconv.streaming import StreamedModel
from qconv.timeline import TIMELINE
from qconv.types import Checkpoint, Scheme
from qconv.validate.divergences import divergences

COMPARED_TOKENS, COMPARED_LENGTH = 2048, 256
"""In all, and of a row. Half as many: 2% worse choices on the tests' model, 5% better ones on SmolLM2-135M: noise."""
SAMPLED_WEIGHTS, SAMPLED_ROWS = 1 << 16, 16
"""Of a unit, and rows of it at least, that are rounded to see what its choices do."""
EXACT = 2.0**-40
"""Squared error relative to the weights, from which on down all choices are as good."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Attributes:
    costs: in nats per token, by the unit's name, at the choice that was measured.
    measured: that choice.
    errors: squared error of rounding a sample of its weights, by the unit's name and choice.
    num_positions: that were compared.
    tokens: SHA-256 of these rows.
    algorithm: that chose the codes.
    """

    costs: Mapping[str, float]
    measured: Choice
    errors: Mapping[str, Mapping[Choice, float]]
    num_positions: int
    tokens: str
    algorithm: str

    def at(self, unit: str, choice: Choice) -> float:
        """The cost of a unit with another choice."""
        errors = self.errors[unit]
        return self.costs[unit] * errors[choice] / errors[self.measured]


def measured_by(config: QuantizationConfig) -> QuantizationConfig:
    """The same with an algorithm that folds no scales, and without looking at keys and values."""
    config = replace(config, kv_cache=None)
    return config if config.folding is None else replace(config, algorithm="gptq")


def split_rows(rows_RS: Tensor) -> tuple[Tensor, Tensor]:
    """Calibration rows, and others to compare on: codes fit those that they were chosen by better than text at large.

    A single row is both.
    """
    length = min(COMPARED_LENGTH, rows_RS.shape[1])
    num = min(-(-COMPARED_TOKENS // length), len(rows_RS) // 4) or min(1, len(rows_RS) - 1)
    if num == 0:
        return rows_RS, rows_RS[:, :length]
    return rows_RS[:-num], rows_RS[-num:, :length]


def measure_sensitivity(
    view: Checkpoint,
    units: Sequence[Unit],
    measured: Choice,
    integers: Scheme,
    request: QuantizeRequest,
    rows_RS: Tensor,
    device: str,
    progress: Progress,
) -> Sensitivity:
    """Runs the model twice side by side: one is quantized as ``request`` says, the other lends its blocks.

    Args:
        units: what is swapped.
        measured: what they have in the request.
        integers: what choices of integers are about, but for widths and groups.
        rows_RS: int64 token rows, split by `split_rows`.

    Raises:
        NumericsError: NaN or infinity in weights or activations; names the tensor.
        CapacityError: the model does not fit the GPU, however it is run.
    """
    calibration_RS, compared_BS = split_rows(rows_RS)
    plain = StreamedModel(view, device, torch.float32)
    (plain_BSH,) = plain.embed([compared_BS])
    request = replace(request, gpu_memory_limit=_limit(plain, request, device))
    model = StreamedModel(view, device, request.storage)
    calibration = calibration_RS if request.config.needs_calibration else None
    searched = request.config.resolved_algorithm != "rtn"
    streams: dict[str, Tensor] = {}  # wait in host memory: a model has hundreds of units
    errors: dict[str, Mapping[Choice, float]] = {}
    for quantized in quantize_blocks(model, [request], calibration, progress):
        block = plain.load_block(quantized.index)
        prefix = plain.block_prefix(quantized.index)
        here = [unit for unit in units if unit.modules[0].startswith(prefix)]
        with TIMELINE.stage("sample errors"):
            linears = block_linears(block)
            for unit in here:
                weights = {module: linears[module.removeprefix(prefix)].weight.data for module in unit.modules}
                errors[unit.name] = rounding_errors(weights, unit.num_bytes, integers, searched=searched)
        with TIMELINE.stage("swap"):
            plain_BSH, streams = _carry(plain, block, quantized, here, plain_BSH, streams)
    head = plain.head()
    with TIMELINE.stage("compare swaps"):
        costs = divergences(head, plain_BSH, {name: (head, h_BSH) for name, h_BSH in streams.items()})
    return Sensitivity(
        costs=costs,
        measured=measured,
        errors=errors,
        num_positions=compared_BS.shape[0] * (compared_BS.shape[1] - 1),
        tokens=calibration_digest(compared_BS),
        algorithm=request.config.resolved_algorithm,
    )


def rounding_errors(
    weights: Mapping[str, Tensor], choices: Iterable[Choice], integers: Scheme, *, searched: bool
) -> dict[Choice, float]:
    """Squared error of each choice on evenly spaced rows of a unit's weights (by module), rounded to nearest.

    Args:
        integers: what choices of integers are about.
        searched: search the grids of integers; those of floats always are.
    """
    rows: dict[int, list[Tensor]] = defaultdict(
        list
    )  # by K: rows are independent, and experts have hundreds of linears
    for w_NK in weights.values():
        k = w_NK.shape[1]
        num_rows = max(-(-SAMPLED_ROWS // len(weights)), SAMPLED_WEIGHTS // (len(weights) * k))
        rows[k].append(w_NK[:: -(-len(w_NK) // num_rows)])
    sample = [torch.cat(parts) for parts in rows.values()]
    name, exact = next(iter(weights)), EXACT * sum(float(w_NK.square().sum()) for w_NK in sample)
    largest = max(float(w_NK.abs().max()) for w_NK in weights.values())  # engines fuse them: one global scale

    def error(choice: Choice) -> float:
        own = choice.of(integers)
        by = power_of_two(largest) if own.has_global_scale else 1.0
        scaled = [w_NK * by for w_NK in sample]
        rounded = [rtn(w_NK, own, name, mse=searched or own.is_fp4).dequantize() for w_NK in scaled]
        errors = [float((q_NK - w_NK).square().sum()) for q_NK, w_NK in zip(rounded, scaled, strict=True)]
        return sum(errors) / by**2 + exact

    return {choice: error(choice) for choice in choices}


def _carry(
    model: StreamedModel,
    block: nn.Module,
    quantized: QuantizedBlock,
    units: Sequence[Unit],
    plain_BSH: Tensor,
    streams: dict[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states behind one block: of the model as it is, and with each unit swapped so far.

    Args:
        units: of this block.
    """
    index, prefix = quantized.index, model.block_prefix(quantized.index)
    later = {
        name: model.run_block(index, block, h_BSH.to(plain_BSH.device)).to("cpu") for name, h_BSH in streams.items()
    }
    for unit in units:
        weights = {
            module.removeprefix(prefix): quantized.linears[f"{module}.weight"].dequantize() for module in unit.modules
        }
        with _swapped(block, weights):
            later[unit.name] = model.run_block(index, block, plain_BSH).to("cpu")
    return model.run_block(index, block, plain_BSH), later


@contextmanager
def _swapped(block: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context linears of ``block`` have these weights."""
    linears = block_linears(block)
    own = {name: linears[name].weight.data for name in weights}
    for name, w_NK in weights.items():
        linears[name].weight.data = w_NK
    try:
        yield
    finally:
        for name, w_NK in own.items():
            linears[name].weight.data = w_NK


def _limit(plain: StreamedModel, request: QuantizeRequest, device: str) -> int | None:
    """Of the GPU memory that quantizing may take: a block in float32 and what it computes lie there, too."""
    free = free_memory(device)
    if free is None:
        return request.gpu_memory_limit
    beside = 2 * 4 * sum(prod(spec.shape) for spec in plain.block_specs(0))
    limits = [free + LIBRARIES - beside, request.gpu_memory_limit]
    return min(limit for limit in limits if limit is not None)
