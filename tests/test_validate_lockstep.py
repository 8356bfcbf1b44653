"""Comparing logits of models in lockstep: which positions, of which models, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qconv.corpus import TokenRows
from qconv.errors import NumericsError
from qconv.streaming import BlockModel
from qconv.validate import logit_chunks
from qconv.validate.compare import Comparison, Entrant, Observe, Pair, compare

ROWS, LENGTH, VOCABULARY = 4, 24, 300


class Table(BlockModel):
    """A model without blocks, whose logits are given."""

    def __init__(self, logits_BSV: Tensor):
        super().__init__()
        self.device, self.num_blocks, self._logits_BSV = "cpu", 0, logits_BSV

    def embed(self, batches: Iterable[Tensor]) -> list[Tensor]:
        return list(torch.split(self._logits_BSV, [len(batch) for batch in batches]))

    def head(self) -> Callable[[Tensor], Tensor]:
        return lambda hidden_BSH: hidden_BSH

    def load_block(self, index: int) -> nn.Module:
        raise AssertionError("it has none")

    def _load_outer(self, with_embedding: bool, with_head: bool) -> nn.Module:
        raise AssertionError("it has none")

    def whole(self) -> nn.Module:
        raise AssertionError("it has none")

    @property
    def head_bytes(self) -> int:
        return 0


@pytest.fixture
def logits() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(ROWS, LENGTH, VOCABULARY, generator=generator) * 2
    return {
        "reference": reference,
        "candidate": reference + torch.randn(reference.shape, generator=generator) * 0.1,
        "base": (reference + torch.randn(reference.shape, generator=generator))[:2],  # a control sees two rows
    }


@pytest.fixture
def rows() -> TokenRows:
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    return TokenRows(ids, torch.arange(ROWS * LENGTH, dtype=torch.int32).view(ROWS, LENGTH) // 10)


def run(logits: dict[str, Tensor], rows: TokenRows, observe: Observe | None = None) -> Comparison:
    entrants = [
        Entrant(name=name, model=Table(values), num_rows=len(values), rows_per_batch=3)
        for name, values in logits.items()
    ]
    pairs = [Pair(name=name, reference="reference", other=name) for name in logits if name != "reference"]
    return compare(entrants, pairs, rows, observe=observe)


def log_softmax(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("positions", [5, LENGTH - 1, 100])
def test_every_position_with_a_next_token_counts_once_and_in_order(
    logits: dict[str, Tensor], rows: TokenRows, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logit_chunks._CHUNK_BYTES, "cpu", 4 * VOCABULARY * positions)
    found = run(logits, rows).pairs
    assert found.keys() == {"candidate", "base"}
    for name, pair in found.items():
        num_rows = len(logits[name])
        log_p, log_q = (log_softmax(logits[each][:num_rows, :-1]) for each in ("reference", name))
        targets = rows.ids_TS[:num_rows, 1:]
        wanted = {
            "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
            "reverse_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
            "reference_logp": log_p.gather(2, targets[..., None])[..., 0],
            "candidate_logp": log_q.gather(2, targets[..., None])[..., 0],
            "confidence": log_p.amax(-1).exp(),
        }
        for column, values in wanted.items():
            np.testing.assert_allclose(pair[column].numpy(), values.flatten().numpy(), rtol=1e-6, atol=1e-6)
        assert torch.equal(pair["candidate_correct"], (log_q.argmax(-1) == targets).flatten())
        assert torch.equal(pair["reference_top_ids"], log_p.topk(3).indices.flatten(0, 1))
        assert torch.equal(pair.documents, rows.documents_TS[:num_rows, 1:].flatten())
        assert torch.equal(pair.rows, torch.arange(num_rows).repeat_interleave(LENGTH - 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["reference", "candidate", "base"])
def test_the_model_whose_logits_are_not_finite_is_named(
    logits: dict[str, Tensor], rows: TokenRows, name: str, bad: float
) -> None:
    logits[name][1, 7, 3] = bad
    with pytest.raises(NumericsError, match=f"logits of {name} contain NaN or infinity"):
        run(logits, rows)


def test_minus_infinity_names_both_models_of_the_pair(logits: dict[str, Tensor], rows: TokenRows) -> None:
    logits["base"][1, 7, 3] = float("-inf")
    with pytest.raises(NumericsError, match="logits of reference or base contain"):
        run(logits, rows)


def test_the_last_position_is_not_looked_at(logits: dict[str, Tensor], rows: TokenRows) -> None:
    logits["candidate"][1, -1, 3] = float("nan")
    assert run(logits, rows).pairs["candidate"].num_positions == ROWS * (LENGTH - 1)


def test_observers_see_every_row_and_nothing_that_is_not_finite(
    logits: dict[str, Tensor], rows: TokenRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logit_chunks._CHUNK_BYTES, "cpu", 4 * VOCABULARY * 5)
    seen: list[Tensor] = []

    def observe(distributions: object, targets_T: Tensor) -> None:
        assert isinstance(distributions, dict)
        assert all(each.max_T.isfinite().all() for each in distributions.values())
        seen.append(targets_T)

    run(logits, rows, observe)
    assert torch.equal(torch.cat(seen), rows.ids_TS[:, 1:].flatten())
    seen.clear()
    logits["candidate"][1, 12, 3] = float("nan")
    with pytest.raises(NumericsError, match="candidate"):
        run(logits, rows, observe)
    assert torch.equal(torch.cat(seen), rows.ids_TS[:2, 1:].flatten()[: LENGTH - 1 + 10])  # two chunks of five


def test_pieces_of_a_row_are_about_equal() -> None:
    hidden = torch.randn(1, 1024, 8)
    present = {"a": (lambda h: h * 2, hidden)}
    parts = list(logit_chunks.logit_chunks(present, "cpu", 500))
    assert [part for part, _ in parts] == [slice(0, 341), slice(341, 682), slice(682, 1023)]
    assert torch.equal(torch.cat([logits["a"] for _, logits in parts]), hidden[0, :-1] * 2)


@pytest.mark.parametrize("num_models", range(2, 9))
@pytest.mark.parametrize("vocabulary", [32000, 128256, 262144])
def test_kernels_take_no_more_memory_than_plain_pytorch(
    num_models: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qconv.validate.distribution import _PIECE_ELEMENTS

    logits = torch.empty(1, vocabulary, dtype=torch.bfloat16)
    plain = logit_chunks.positions_at_once(logits, num_models, False)
    monkeypatch.setattr(logit_chunks, "is_fused", lambda logits: True)
    fused = logit_chunks.positions_at_once(logits, num_models, False)
    temporaries = 5 * 4 * min(plain * vocabulary, _PIECE_ELEMENTS["cuda"])
    assert plain < fused
    assert fused * vocabulary * 2 * num_models < plain * vocabulary * 2 * num_models + temporaries
