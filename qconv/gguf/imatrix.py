"""llama.cpp's importance matrix: what llama-quantize weighs errors of K-quants with.

Layout source: llama.cpp, tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp. A GGUF file without an architecture
whose ``general.type`` is ``imatrix``; for each tensor of the model ``NAME.in_sum2``, float32 ``[1, K]``, the sum over
tokens of the square of each input, and ``NAME.counts``, float32 ``[1, 1]``, the number of tokens. Rows of calibration
text are its chunks.

Left out: the older layout without GGUF (``.dat``), experts, and the output head, which llama-imatrix leaves out, too.

Legend: K = in features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from qconv.gguf.package import gguf_package
from qconv.gguf.plan import GgufPlan

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
    for name, found in squares.items():
        stored = plan.tensors[name].stored
        writer.add_tensor(f"{stored}.in_sum2", found.sums_K.float().numpy()[None])
        writer.add_tensor(f"{stored}.counts", np.array([[found.num_tokens]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
