"""How weights lie in bytes: one module per on-disk format, and views that present logical weights.

This room never chooses a number. `dequantize` reads, `FORMATS` writes what algorithms chose. bitsandbytes 4-bit is
the exception: its rule leaves no choice, and is needed to know what training saw (`encode_linear`, `Bnb4bit`).
"""

from qconv.convert.bnb import BnbState
from qconv.convert.bnb_format import Bnb4bit, BnbLinear, encode_linear, meta_linear, read_linear
from qconv.convert.bnb_kernels import quant_map
from qconv.convert.bnb_kernels import simulate as simulate_weight
from qconv.convert.dequantize import COMPRESSED, FORMATS, DequantizedCheckpoint, dequantize
from qconv.convert.format import Format
from qconv.convert.fused_experts import FusedOutput, FusedPlan, is_fused, plan_fused, separate_experts
from qconv.convert.ggml_blocks import GGML_FORMATS
from qconv.convert.key_values import SCHEME as CACHE_SCHEME
from qconv.convert.key_values import CacheReading, cache_specs
from qconv.convert.mixed import format_for, mixed_config
from qconv.convert.simulate import simulate_training_base

__all__ = [
    "CACHE_SCHEME",
    "COMPRESSED",
    "FORMATS",
    "GGML_FORMATS",
    "Bnb4bit",
    "BnbLinear",
    "BnbState",
    "CacheReading",
    "DequantizedCheckpoint",
    "Format",
    "FusedOutput",
    "FusedPlan",
    "cache_specs",
    "dequantize",
    "encode_linear",
    "format_for",
    "is_fused",
    "meta_linear",
    "mixed_config",
    "plan_fused",
    "quant_map",
    "read_linear",
    "separate_experts",
    "simulate_training_base",
    "simulate_weight",
]
