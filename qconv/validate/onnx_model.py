"""A model that ONNX Runtime runs whole, behind the interface of one that is run block by block.

Its blocks cannot be run apart, so nothing is between embedding and head: what stands for hidden states names row and
position, and the head runs the whole graph on the row. Dimension legend: B = rows, S = tokens per row, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from qconv.errors import UsageError
from qconv.onnx import OnnxSession
from qconv.streaming import BlockModel


class OnnxModel(BlockModel):
    """A loaded session, for `compare`.

    Args:
        num_blocks: that the graph has inside.
        layers_name: of its decoder layers in transformers.
        device: where logits are wanted.
    """

    shows_hidden_states = False

    def __init__(self, session: OnnxSession, num_blocks: int, layers_name: str, device: str):
        super().__init__()
        self.session, self.num_blocks, self.layers_name, self.device = session, num_blocks, layers_name, device
        self._rows: list[Tensor] = []
        self._last: tuple[int, Tensor] | None = None

    def embed_each(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Row and position of each token, int64 ``[B, S, 2]``; keeps the tokens."""
        self._rows, self._last = [], None
        for ids_BS in batches:
            rows, length = ids_BS.shape
            places = torch.empty(rows, length, 2, dtype=torch.int64)
            places[..., 0] = torch.arange(len(self._rows), len(self._rows) + rows)[:, None]
            places[..., 1] = torch.arange(length)
            self._rows += list(ids_BS.cpu())
            yield places

    def run_block(self, index: int, block: nn.Module, hidden_BSH: Tensor) -> Tensor:
        return hidden_BSH

    def load_block(self, index: int) -> nn.Module:
        return nn.Identity()

    def head(self) -> Callable[[Tensor], Tensor]:
        """Logits ``[B, S, V]`` of positions that `embed_each` has named; a row is run once for all of its positions."""

        def logits(places_BSH: Tensor) -> Tensor:
            found = [self._row(int(row[0, 0]))[row[:, 1]] for row in places_BSH]
            return torch.stack(found).to(self.device)

        return logits

    def _row(self, row: int) -> Tensor:
        if self._last is None or self._last[0] != row:
            self._last = (row, self.session.logits(self._rows[row][None])[0])
        return self._last[1]

    @property
    def head_bytes(self) -> int:
        return 0

    def whole(self) -> nn.Module:
        raise UsageError("an ONNX graph is no module of torch; give --engine qconv, which decodes its weights")

    def _load_outer(self, with_embedding: bool, with_head: bool) -> nn.Module:
        return self.whole()
