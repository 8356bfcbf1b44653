"""How weights lie in bytes: one module per on-disk format, and views that present logical weights.

This room never chooses a number. `dequantize` reads, `FORMATS` writes what algorithms chose.
"""

from qconv.convert.bnb import BnbState
from qconv.convert.bnb_kernels import quant_map
from qconv.convert.bnb_kernels import simulate as simulate_weight
from qconv.convert.dequantize import FORMATS, DequantizedCheckpoint, dequantize
from qconv.convert.format import Format
from qconv.convert.simulate import simulate_training_base

__all__ = [
    "FORMATS",
    "BnbState",
    "DequantizedCheckpoint",
    "Format",
    "dequantize",
    "quant_map",
    "simulate_training_base",
    "simulate_weight",
]
