"""New zero points under the codes and scales that a base has already: an artifact of its width, without a search.

Method: QA-LoRA (Xu et al. 2023, section 3.3): inputs are pooled in the groups of the quantized weight, so that the
update of a group is one number, and ``(code - zero) * scale + update`` is ``(code - zero') * scale`` with
``zero' = zero - update / scale``. Here zero' is read off the merged weight, as the mean of ``code - w / scale`` in each
group; what is left beside it has to be rounding, so that any other update is refused.

Rounding points: none where a format makes the weight of float32 zero points (ggml's q4_1 holds ``-zero' * scale`` in
float16); one to the dtype of scales where zero points are floats of it (HQQ), or to whole numbers where the format has
integers. Whole steps are large beside most updates, and so are bfloat16's of a 16th: `ZeroMoves` measures what is left.

Left out: bases whose groups are made by a group index (they are no neighbours, which QA-LoRA pools).

Legend: N = out features, K = in features, G = groups, g = features of a group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qconv.errors import SchemeError
from qconv.quantize.grid import check_finite, groups_of
from qconv.types import QuantizedLinear, Scheme

TOLERANCE = 0.01  # of a step: float32 products leave 1e-5 of it beside an update that is constant in its groups


@dataclass(kw_only=True)
class ZeroMoves:
    """What was asked of zero points and what is stored, summed over all groups.

    Attributes:
        groups, moved: all, and those whose stored zero point is another one.
        clipped: wanted a zero point beyond those that the format has.
        wanted, lost: sums of squares of the updates, and of what rounding leaves out; each with its group's weights.
    """

    groups: int = 0
    moved: int = 0
    clipped: int = 0
    wanted: float = 0.0
    lost: float = 0.0

    def facts(self) -> dict[str, Any]:
        """For the report."""
        return {
            "groups": self.groups,
            "groups whose zero point moved": self.moved,
            "groups beyond the range of zero points": self.clipped,
            "relative error of the update by rounding zero points": self.error,
        }

    def line(self) -> str:
        """For the terminal."""
        clipped = f", {self.clipped} of them not as far as wanted" if self.clipped else ""
        return (
            f"{self.moved} of {self.groups} zero points moved{clipped}; their rounding takes {self.error:.1%} of the "
            "update (relative error in the Frobenius norm)"
        )

    @property
    def error(self) -> float:
        """``||stored - wanted|| / ||wanted||`` of all updates; 1 = as if there were no adapter."""
        return float((self.lost / self.wanted) ** 0.5) if self.wanted else 0.0


def moved_zeros(
    w_NK: Tensor,
    stored: QuantizedLinear,
    scheme: Scheme,
    zeros_in: torch.dtype,
    name: str,
    moves: ZeroMoves,
    computed_in: torch.dtype | None = None,
) -> QuantizedLinear:
    """The base's codes and scales with the zero points that make them ``w_NK``.

    Args:
        w_NK: the merged weight, float32.
        stored: the base's.
        scheme: of the result; its group size divides that of ``stored``, whose groups are then repeated.
        zeros_in: what zero points are rounded to, which is handed over as float32; uint8 = whole numbers of the scheme.
        name: the weight, for messages.
        moves: what happens is added to it.
        computed_in: see `QuantizedLinear`, of the result.

    Raises:
        SchemeError: the update of a group is more than one number, or the base's groups are no neighbours.
        NumericsError: NaN or infinity in the weight.
    """
    check_finite(w_NK, name)
    if stored.group_index_K is not None:
        raise SchemeError(
            f"{name}: its groups are made by a group index (desc_act), and QA-LoRA pools neighbouring inputs; merge "
            "with another --algorithm"
        )
    size, k = stored.scheme.group_size, w_NK.shape[1]
    scales = stored.scales_NG.float()
    before = torch.full_like(scales, stored.scheme.mid_code) if stored.zeros_NG is None else stored.zeros_NG.float()
    steps_NGg = groups_of(w_NK.float() - stored.dequantize(), size)
    steps_NGg = torch.where(scales.unsqueeze(-1) == 0, steps_NGg * torch.inf, steps_NGg / scales.unsqueeze(-1))
    steps_NGg = steps_NGg.nan_to_num(0.0)  # no update in a group without a scale
    wanted = steps_NGg.mean(-1)
    uneven = (steps_NGg - wanted.unsqueeze(-1)).abs().amax(-1)
    if not bool((uneven <= TOLERANCE).all()):
        raise SchemeError(
            f"{name}: the update differs by {float(uneven.max()):.3g} steps inside a group of "
            f"{k if size == -1 else size} inputs, so no zero point makes it; --algorithm zeros is for QA-LoRA trained "
            "with the groups of this base (--qa-lora). Merge with another --algorithm"
        )
    zeros = before - wanted
    if zeros_in == torch.uint8:
        exact, zeros = zeros, zeros.round().clamp(scheme.min_zero, scheme.max_code)
        moves.clipped += int(((exact - zeros).abs() > 0.5 + TOLERANCE).sum())
    else:
        zeros = zeros.to(zeros_in).float()
    members = k // scales.shape[1]
    moves.groups += zeros.numel()
    moves.moved += int((zeros != before).sum())
    moves.wanted += members * float((wanted * scales).square().sum(dtype=torch.float64))
    moves.lost += members * float(((before - zeros - wanted) * scales).square().sum(dtype=torch.float64))
    times = 1 if scheme.group_size == size else members // scheme.group_size
    return replace(
        stored,
        scales_NG=scales.repeat_interleave(times, dim=1),
        zeros_NG=(zeros.to(torch.uint8) if zeros_in == torch.uint8 else zeros).repeat_interleave(times, dim=1),
        scheme=scheme,
        computed_in=computed_in,
    )
