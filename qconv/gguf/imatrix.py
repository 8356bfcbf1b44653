"""llama.cpp's importance matrix: what llama-quantize weighs errors of K-quants with.

Layout source: llama.cpp, tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp. A GGUF file without an architecture
whose ``general.type`` is ``imatrix``; for each tensor of the model ``NAME.in_sum2``, float32 ``[1, K]``, the sum over
tokens of the square of each input, and ``NAME.counts``, float32 ``[1, 1]``, the number of tokens; for a tensor of
experts ``[E, K]`` and ``[E, 1]``, of the tokens that chose each; of an expert that none chose llama.cpp weighs all
inputs alike. Rows of calibration text are its chunks.

Left out: the older layout without GGUF (``.dat``), and the output head, which llama-imatrix leaves out, too.

Legend: K = in features, E = experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qconv.gguf.package import gguf_package
from qconv.gguf.plan import GgufPlan, GgufTensor

IMATRIX_NAME = "model.imatrix"
"""Not ``.gguf``: readers of a folder take such a file for the model."""


@dataclass(frozen=True, kw_only=True)
class InputSquares:
    """Attributes:
    sums_K: over tokens, of the square of each input, float64.
    num_tokens: that reached the linear.
    """

    sums_K: Tensor
    num_tokens: int


def write_imatrix(
    file: Path, plan: GgufPlan, squares: Mapping[str, InputSquares], sources: Iterable[str], rows: int, row_tokens: int
) -> None:
    """Writes the file.

    Args:
        squares: by the name of the weight in the model.
        sources: of the text, in words.
        rows: of text, each of ``row_tokens``.

    Raises:
        OSError: it cannot be written.
    """
    writer: Any = gguf_package().GGUFWriter(path=file, arch="")
    for keys in writer.kv_data:  # llama.cpp writes none
        keys.pop("general.architecture", None)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(sources))
    writer.add_uint32("imatrix.chunk_count", rows)
    writer.add_uint32("imatrix.chunk_size", row_tokens)
    for stored, names in _tensors(plan, squares).items():
        num_inputs = plan.tensors[names[0]].shape[1]
        none = InputSquares(sums_K=torch.zeros(num_inputs), num_tokens=0)
        found = [squares.get(name, none) for name in names]
        writer.add_tensor(f"{stored}.in_sum2", torch.stack([own.sums_K.float() for own in found]).numpy())
        writer.add_tensor(f"{stored}.counts", np.array([[own.num_tokens] for own in found], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(plan: GgufPlan, squares: Mapping[str, InputSquares]) -> dict[str, list[str]]:
    """Tensor of the file -> the weights that it is made of, by their numbers, for all that inputs were seen of."""
    wanted = {plan.tensors[name].stored for name in squares}
    found: dict[str, list[GgufTensor]] = {}
    for tensor in plan.tensors.values():
        if tensor.stored in wanted and len(tensor.shape) == 2:
            found.setdefault(tensor.stored, []).append(tensor)
    return {stored: [t.name for t in sorted(own, key=lambda t: t.expert or 0)] for stored, own in found.items()}
