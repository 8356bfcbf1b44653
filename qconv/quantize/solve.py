"""From the weights of one block to quantized linears, by the algorithm that was asked for.

Linears that share an input share a Gram matrix; GPTQ stacks their rows and solves them at once. After folds weights and
Gram matrices are those of the scaled inputs (``awq+gptq``: W s, and G / s s^T): GPTQ solves them like any others.

Dimension legend: N = out features, K = in features, G = groups.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate

import torch
from torch import Tensor

from qconv.progress import QUIET, Progress
from qconv.quantization_config import QuantizationConfig
from qconv.quantize import int8
from qconv.quantize.awq import search_block_grid
from qconv.quantize.fold_block import Statistics
from qconv.quantize.fp4_inputs import input_global_scales
from qconv.quantize.fp8 import quantize_per_block, quantize_per_channel
from qconv.quantize.fp8_static import choose_input_scale, quantize_per_tensor
from qconv.quantize.global_scale import divided, global_scales
from qconv.quantize.gptq import DAMPING, gptq
from qconv.quantize.rtn import rtn
from qconv.quantize.sample import InputSample
from qconv.types import QuantizedLinear, Scheme

FP8_CANDIDATES = 16  # scales tried per channel: 8% less KL on SmolLM2-135M than the largest magnitude alone


def solve(
    weights: dict[str, Tensor],
    statistics: dict[str, Statistics],
    where: str,
    config: QuantizationConfig,
    scheme: Scheme,
    counts: Counter[str],
    progress: Progress = QUIET,
) -> dict[str, QuantizedLinear]:
    """Quantizes the float32 weights ``[N, K]`` of one block; names are local, ``where`` completes them in messages.

    Weights and statistics are taken out of their dictionaries, whose memory is free as soon as it can be.

    Raises:
        NumericsError: NaN or infinity, or a Gram matrix that no damping makes positive definite.
    """
    if not scheme.has_global_scale:
        return _solve(weights, statistics, where, config, scheme, counts, progress)
    order = list(weights)
    scales = global_scales(weights, where)
    input_scales = {}
    if scheme.stores_input_scale:
        input_scales = input_global_scales({name: _sample_of(statistics, name, where) for name in order})
    multiplied = {name: weights.pop(name) * scales[name] for name in order}  # exact: powers of two
    found = _solve(multiplied, statistics, where, config, scheme, counts, progress)
    return {name: divided(found.pop(name), scales[name], input_scales.get(name)) for name in order}


def round_searched(w_NK: Tensor, scheme: Scheme, name: str) -> QuantizedLinear:
    """A weight whose inputs nobody saw: each group's grid searched, then round-to-nearest.

    Raises:
        NumericsError: NaN or infinity in the weight.
    """
    if not scheme.has_global_scale:
        return rtn(w_NK, scheme, name, mse=True)
    scale = global_scales({name: w_NK}, "")[name]
    return divided(rtn(w_NK * scale, scheme, name, mse=True), scale, None)


def _sample_of(statistics: Mapping[str, Statistics], name: str, where: str) -> InputSample:
    sample = statistics[name].sample
    if sample is None:
        raise ValueError(f"{where}{name}: no tokens of the inputs were gathered")
    return sample


def _solve(
    weights: dict[str, Tensor],
    statistics: dict[str, Statistics],
    where: str,
    config: QuantizationConfig,
    scheme: Scheme,
    counts: Counter[str],
    progress: Progress,
) -> dict[str, QuantizedLinear]:
    match config.resolved_algorithm:
        case "fp8" if scheme.static_activations:
            return _static_fp8(weights, statistics, where, scheme)
        case "fp8":
            quantize = quantize_per_channel if scheme.group_size == -1 else quantize_per_block
            return {
                name: quantize(weights.pop(name), scheme, where + name, num_candidates=FP8_CANDIDATES)
                for name in list(weights)
            }
        case "bnb" | "ggml" | "plain" | "zeros":
            raise AssertionError("weights without a choice are encoded as they are written, and kept codes not solved")
        case "int8" | "smoothquant":
            return {name: int8.quantize_per_channel(weights.pop(name), scheme, where + name) for name in list(weights)}
        case "rtn":
            # 4-bit floats have no range that all writers agree on: their scales are always searched.
            return {name: rtn(weights.pop(name), scheme, where + name, mse=scheme.is_fp4) for name in list(weights)}
        case "awq":
            return {
                name: _clipped(weights.pop(name), statistics.pop(name), where + name, scheme) for name in list(weights)
            }
        case "gptq" | "awq+gptq" | "smoothquant+gptq":
            return _gptq(weights, statistics, where, config, scheme, counts, progress)


def _static_fp8(
    weights: dict[str, Tensor], statistics: dict[str, Statistics], where: str, scheme: Scheme
) -> dict[str, QuantizedLinear]:
    """Linears that share an input share both scales: engines that fuse them keep one of each."""
    order = list(weights)
    result: dict[str, QuantizedLinear] = {}
    for names in _sharing(statistics, order):
        label = where + " + ".join(names)
        input_scale = choose_input_scale(_sample_of(statistics, names[0], where))
        for name in names:
            del statistics[name]
        linears = quantize_per_tensor(
            [weights.pop(name) for name in names], input_scale, scheme, label, num_candidates=FP8_CANDIDATES
        )
        result |= dict(zip(names, linears, strict=True))
    return {name: result[name] for name in order}


def _sharing(statistics: Mapping[str, Statistics], names: Iterable[str]) -> Collection[list[str]]:
    """The names of linears, those together that have one input."""
    shared: dict[int, list[str]] = {}
    for name in names:
        shared.setdefault(id(statistics[name]), []).append(name)
    return shared.values()


def _clipped(w_NK: Tensor, statistics: Statistics, name: str, scheme: Scheme) -> QuantizedLinear:
    signed = not scheme.dynamic_activations
    return rtn(w_NK, scheme, name, grid=search_block_grid(w_NK, _gram_of(statistics, name), scheme, signed))


def _gram_of(statistics: Statistics, name: str) -> Tensor:
    if statistics.gram_KK is None:
        raise ValueError(f"{name}: the Gram matrix of its inputs was not gathered")
    return statistics.gram_KK


def _gptq(
    weights: dict[str, Tensor],
    statistics: dict[str, Statistics],
    where: str,
    config: QuantizationConfig,
    scheme: Scheme,
    counts: Counter[str],
    progress: Progress,
) -> dict[str, QuantizedLinear]:
    order = list(weights)
    result: dict[str, QuantizedLinear] = {}
    for names in _sharing(statistics, order):
        label = where + " + ".join(names)
        rows = [len(weights[name]) for name in names]
        parts = [weights.pop(name) for name in names]
        stacked_NK = parts[0] if len(parts) == 1 else torch.cat(parts)
        del parts
        gram_KK, *_ = [_gram_of(statistics.pop(name), where + name) for name in names]
        order_K = torch.argsort(gram_KK.diagonal(), descending=True, stable=True) if config.desc_act else None
        if order_K is not None:
            stacked_NK, gram_KK = stacked_NK[:, order_K], gram_KK[order_K][:, order_K]
        # Engines' integer kernels were not tried with negative scales.
        signed = not scheme.dynamic_activations
        solved = gptq(stacked_NK, gram_KK, scheme, label, damping=config.damping or DAMPING, signed_scales=signed)
        linear = solved.linear if order_K is None else regrouped(solved.linear, order_K)
        progress.detail(
            f"{label}: relative output error {solved.stats.relative_error:.2e}, damping {solved.stats.damping:g}"
        )
        if scheme.is_fp4 and stacked_NK.is_cuda:
            counts["4-bit float solves without fused kernels"] += 1
        counts["gptq solves with damping raised"] += solved.stats.attempts > 1
        counts["dead input channels"] += solved.stats.dead_columns
        result |= dict(zip(names, split_rows(linear, rows), strict=True))
        del stacked_NK, gram_KK, solved, linear
    return {name: result[name] for name in order}


def regrouped(linear: QuantizedLinear, order_K: Tensor) -> QuantizedLinear:
    """Puts columns that were quantized in ``order_K`` back in place, with the group that each belongs to."""
    k = len(order_K)
    size = k if linear.scheme.group_size == -1 else linear.scheme.group_size
    group_index_K = torch.empty(k, dtype=torch.int32, device=order_K.device)
    group_index_K[order_K] = (torch.arange(k, device=order_K.device) // size).to(torch.int32)
    codes_NK = torch.empty_like(linear.codes_NK)
    codes_NK[:, order_K] = linear.codes_NK
    return dataclasses.replace(linear, codes_NK=codes_NK, group_index_K=group_index_K)


def split_rows(linear: QuantizedLinear, sizes: list[int]) -> list[QuantizedLinear]:
    """Undoes the stacking of rows."""
    ends = list(accumulate(sizes))
    return [linear.rows(slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
