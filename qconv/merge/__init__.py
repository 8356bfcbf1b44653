"""Adapters: reading every kind, the update of one weight, adding it. Touches no on-disk weight format."""

from qconv.merge.adapter import load_adapter
from qconv.merge.combine import CombinedCheckpoint, combine_adapters
from qconv.merge.dampen import DampenedCheckpoint, Dampening
from qconv.merge.delta import delta_weight, merged_weight
from qconv.merge.dropped import WithoutSmallest
from qconv.merge.expert_adapter import trained_experts
from qconv.merge.merged import MergedCheckpoint, merge
from qconv.merge.variants import truncated

__all__ = [
    "CombinedCheckpoint",
    "DampenedCheckpoint",
    "Dampening",
    "MergedCheckpoint",
    "WithoutSmallest",
    "combine_adapters",
    "delta_weight",
    "load_adapter",
    "merge",
    "merged_weight",
    "trained_experts",
    "truncated",
]
