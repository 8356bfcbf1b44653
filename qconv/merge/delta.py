"""The low-rank update of one weight, and the weight with it; `transform.py` has the other kinds.

Method: ``W' = W + scaling * B @ A`` (LoRA, Hu et al. 2021, section 4.1), and for DoRA (Liu et al.
2024, equation 5) ``W' = m * (W + scaling * B @ A) / ||W + scaling * B @ A||`` with the norm over
each output feature and no epsilon, as peft computes it.

Rounding: stored values are read exactly into float32; products and sums are float32; nothing is
rounded to 16 bits here. The one rounding to the storage dtype is the writer's.

Dimensions: N = out, K = in, R = rank; a base that stores ``[K, N]`` (Conv1D) is handled transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qconv.errors import NumericsError
from qconv.finite import all_finite, put_off
from qconv.types import Adapter, LoraDelta

SLICE_ELEMENTS = 1 << 24  # 64 MiB of float32: bounds every temporary beside the result
GPU_SLICE = 1 << 26
CPU_PART_PER_THREAD = 1 << 18


@torch.no_grad()
def delta_weight(adapter: Adapter, delta: LoraDelta, device: str = "cpu") -> Tensor:
    """``scaling * (B @ A)`` in float32, in the base's own layout: ``[N, K]``, or ``[K, N]`` when transposed.

    For DoRA this is the direction update alone; the magnitude needs the weight, see `merged_weight`.
    """
    a_RK, b_NR = _factors_of(adapter, delta, torch.device(device))
    update_NK = (b_NR @ a_RK).mul_(delta.scaling).float()
    return update_NK.T.contiguous() if delta.transposed else update_NK


@torch.no_grad()
def merged_weight(w: Tensor, adapter: Adapter, delta: LoraDelta, again: Callable[[], object] | None = None) -> Tensor:
    """The base weight with the adapter's update, in float32 on the weight's device.

    Args:
        w: ``[N, K]``, or ``[K, N]`` when the base stores it transposed; any float dtype. Not changed.
        again: makes the same weight once more; with it the check of the result may be put off, see `finite`.

    Raises:
        NumericsError: NaN or infinity in the result; names the tensor and the likely cause.
    """
    a_RK, b_NR = _factors_of(adapter, delta, w.device)
    magnitude_N = None
    if delta.magnitude is not None:
        magnitude_N = adapter.tensors.read(delta.magnitude, str(w.device)).float()
    result = torch.empty(w.shape, dtype=torch.float32, device=w.device)
    w_NK, result_NK = (w.T, result.T) if delta.transposed else (w, result)
    total = torch.zeros((), device=w.device)
    is_in_place = not delta.transposed and a_RK.dtype == torch.float32
    for rows in _row_slices(w_NK, GPU_SLICE if w.is_cuda else SLICE_ELEMENTS):
        update_nK = torch.mm(b_NR[rows], a_RK, out=result_NK[rows]) if is_in_place else b_NR[rows] @ a_RK
        # The product is made at once, the rest in parts that stay in the caches of a CPU.
        for part in _row_slices(update_nK, GPU_SLICE if w.is_cuda else CPU_PART_PER_THREAD * torch.get_num_threads()):
            merged_nK = update_nK[part].mul_(delta.scaling).float().add_(w_NK[rows][part].float())
            if magnitude_N is not None:
                norm_n = torch.linalg.vector_norm(merged_nK, dim=1)
                merged_nK *= (magnitude_N[rows][part] / norm_n)[:, None]
            total += merged_nK.sum()  # finite only when all is, see `finite.py`
            if not is_in_place:
                result_NK[rows][part] = merged_nK
    is_fine = total.isfinite()
    if again is not None and put_off(is_fine, again):
        return result
    if not is_fine and not all_finite(result):
        raise NumericsError(_explain(w, adapter, delta, magnitude_N is not None))
    return result


def _row_slices(x_NK: Tensor, num_elements: int) -> Iterator[slice]:
    """Slices of whole rows, of about so many elements each."""
    step = max(1, num_elements // x_NK.shape[1])
    return (slice(start, start + step) for start in range(0, x_NK.shape[0], step))


def _factors_of(adapter: Adapter, delta: LoraDelta, device: torch.device) -> tuple[Tensor, Tensor]:
    """As `factors`; float64 where products would run in TF32."""
    dtype = torch.float32
    if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        dtype = torch.float64
    return factors(adapter, delta, str(device), dtype)


@torch.no_grad()
def factors(
    adapter: Adapter, delta: LoraDelta, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A ``[R, K]`` and B ``[N, R]`` whose product, scaled, is the update: with all that is no plain LoRA folded in.

    Pooled inputs (QA-LoRA) repeat a column of A for each input of its group. IR-QLoRA's elastic connections add to A
    the means of R equal runs of inputs, and to B the component of each of R equal runs of outputs.
    """

    def read(name: str) -> Tensor:
        return adapter.tensors.read(name, device).to(dtype)

    a_RK, b_NR = read(delta.a)[: delta.rank], read(delta.b)[:, : delta.rank]
    if delta.singular is not None:
        a_RK = a_RK * read(delta.singular).reshape(-1, 1)
    if delta.pooled > 1:
        a_RK = a_RK.repeat_interleave(delta.pooled, dim=1)
    if delta.elastic_a is not None and delta.elastic_b is not None:
        own_RR = torch.eye(delta.rank, device=device, dtype=dtype)
        inputs, outputs = a_RK.shape[1] // delta.rank, len(b_NR) // delta.rank
        a_RK = a_RK + read(delta.elastic_a) * own_RR.repeat_interleave(inputs, dim=1) / inputs
        b_NR = b_NR + read(delta.elastic_b) * own_RR.repeat_interleave(outputs, dim=0)
    return a_RK, b_NR


def _explain(w: Tensor, adapter: Adapter, delta: LoraDelta, has_magnitude: bool) -> str:
    if not w.isfinite().all():
        cause = "the base weight has them already: the base is damaged or was decoded from damaged blocks"
    elif has_magnitude:
        cause = "a row of W + dW has norm 0, by which DoRA divides, or the update overflows"
    else:
        cause = "the update overflows float32: training diverged"
    return f"{adapter.location}: NaN or infinity in the merged weight {delta.weight!r}; {cause}"
