"""Sums of the squares of what every linear is given, for llama.cpp's importance matrix.

The unquantized model runs over the calibration rows block by block. Squares are added in float32 within
a batch, and batches in float64.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from qconv.errors import NumericsError
from qconv.gguf import InputSquares
from qconv.progress import Progress
from qconv.quantize.activations import Activations
from qconv.skeleton import block_linears
from qconv.streaming import StreamedModel
from qconv.types import Checkpoint

BATCH_TOKENS = 2048


def input_squares(
    view: Checkpoint, rows_RS: Tensor, storage: torch.dtype, device: str, progress: Progress
) -> dict[str, InputSquares]:
    """Of all linears of the decoder blocks, by the full name of their weight.

    Args:
        rows_RS: int64 token rows.
        storage: dtype that blocks compute in.

    Raises:
        NumericsError: an input is NaN or infinite; names the linear.
    """
    model = StreamedModel(view, device, storage)
    batches = torch.split(rows_RS, max(1, BATCH_TOKENS // rows_RS.shape[1]))
    hidden = Activations.embed(model, batches, "host" if device.startswith("cuda") else "device")
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    for index in progress.track(range(model.num_blocks), "importance", model.num_blocks):
        block, prefix = model.load_block(index), model.block_prefix(index)
        handles = [
            linear.register_forward_pre_hook(_adding(sums, counts, f"{prefix}{name}.weight"))
            for name, linear in block_linears(block).items()
        ]
        for number, h_BSH in hidden.each():
            hidden.replace(number, model.run_block(index, block, h_BSH))
        for handle in handles:
            handle.remove()
    bad = next((name for name, sums_K in sums.items() if not bool(sums_K.isfinite().all())), None)
    if bad is not None:
        raise NumericsError(f"{view.location}: {bad}: expected finite inputs, found NaN or infinity among them")
    return {name: InputSquares(sums_K=sums_K.cpu(), num_tokens=counts[name]) for name, sums_K in sums.items()}


def _adding(sums: dict[str, Tensor], counts: Counter[str], name: str) -> Any:
    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_TK = args[0].detach().reshape(-1, args[0].shape[-1])
        found_K = x_TK.float().square().sum(0).double()
        counts[name] += len(x_TK)
        sums[name] = sums[name] + found_K if name in sums else found_K

    return add
