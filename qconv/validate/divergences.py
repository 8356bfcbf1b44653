"""KL of next-token distributions from hidden states behind the last block, for many models beside one reference.

Dimension legend: B = rows, S = tokens per row, H = hidden size, V = vocabulary, T = positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qconv.validate.distribution import Distribution
from qconv.validate.logit_chunks import Head, position_chunks


def divergences(head: Head, reference_BSH: Tensor, others: Mapping[str, tuple[Head, Tensor]]) -> dict[str, float]:
    """Mean KL(reference || other) in nats per token, by name; the last position of a row has no next token.

    Args:
        head: what makes logits of the reference's hidden states ``[B, S, H]``.
        others: the same of each other model; hidden states may lie on another device.
    """
    totals = dict.fromkeys(others, 0.0)
    for row in range(len(reference_BSH)):
        p_TV = head(reference_BSH[row : row + 1])[0, :-1]
        parts = [(part, Distribution(p_TV[part], "reference")) for part in position_chunks(p_TV)]
        for name, (other_head, other_BSH) in others.items():
            q_TV = other_head(other_BSH[row : row + 1].to(reference_BSH.device))[0, :-1]
            for part, reference in parts:
                kl_T, _ = reference.divergences(Distribution(q_TV[part].to(p_TV.device), name))
                totals[name] += float(kl_T.sum(dtype=torch.float64))
    count = reference_BSH.shape[0] * (reference_BSH.shape[1] - 1)
    return {name: total / count for name, total in totals.items()}
