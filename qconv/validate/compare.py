"""Runs two or three models in lockstep, block by block, and measures how far apart they are.

All models see the same tokens. After each block their hidden states are compared; after the last
one, their logits. Only one block per model is in memory at a time, so neither model has to fit.

Dimension legend: B = rows in a batch, S = tokens per row, V = vocabulary, T = positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qconv.errors import NumericsError
from qconv.progress import QUIET, Progress
from qconv.streaming import BlockModel
from qconv.validate.statistics import PairStatistics, ReferenceRow, log_probabilities


@dataclass(frozen=True, kw_only=True)
class BlockError:
    """Distance of the candidate's hidden states from the reference's after one block.

    Attributes:
        relative_error: ||candidate - reference|| / ||reference|| over all positions (Frobenius).
        sqnr_db: signal-to-quantization-noise ratio, -20 log10(relative_error), in dB.
    """

    index: int
    relative_error: float

    @property
    def sqnr_db(self) -> float:
        if self.relative_error == 0:
            return float("inf")
        return -20 * float(torch.tensor(self.relative_error, dtype=torch.float64).log10())


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` measured.

    Attributes:
        pairs: statistics of the reference against each other model, by its name.
        blocks: error per block, by model name.
        reference_perplexity: of the reference on the evaluated tokens.
        num_positions: next-token predictions that were compared.
        num_rows: independent rows they come from.
    """

    pairs: Mapping[str, PairStatistics]
    blocks: Mapping[str, list[BlockError]]
    reference_perplexity: float
    num_positions: int
    num_rows: int


@dataclass
class _Runner:
    name: str
    model: BlockModel
    hidden: list[Tensor] = field(default_factory=list)


def compare(
    reference: BlockModel,
    others: Mapping[str, BlockModel],
    ids_TS: Tensor,
    *,
    rows_per_batch: int,
    progress: Progress = QUIET,
) -> Comparison:
    """Compares ``others`` with ``reference`` on the rows of ``ids_TS`` (int64 ``[rows, S]``).

    Every model must have the same number of blocks and vocabulary. Positions 0..S-2 of each row
    are evaluated (position S-1 has no next token).

    Raises:
        NumericsError: hidden states or logits of a model contain NaN or infinity; names the block.
    """
    batches = torch.split(ids_TS, rows_per_batch)
    runners = [_Runner("reference", reference), *(_Runner(name, model) for name, model in others.items())]
    for runner in runners:
        runner.hidden = runner.model.embed(batches)
    blocks: dict[str, list[BlockError]] = {name: [] for name in others}
    for index in progress.track(range(reference.num_blocks), "validate", reference.num_blocks):
        for runner in runners:
            block = runner.model.load_block(index)
            runner.hidden = [runner.model.run_block(index, block, h_BSH) for h_BSH in runner.hidden]
            del block
        signal = _square_sum(runners[0].hidden)
        for runner in runners[1:]:
            error = _relative_error(runners[0].hidden, runner.hidden, signal)
            if not error < float("inf"):
                raise NumericsError(
                    f"the hidden states after block {index} are not finite ({runner.name} or reference)"
                )
            blocks[runner.name].append(BlockError(index=index, relative_error=error))
    return _compare_logits(runners, batches, blocks)


def _square_sum(tensors: Iterable[Tensor]) -> float:
    return sum(float(t.float().square().sum(dtype=torch.float64)) for t in tensors)


def _relative_error(reference: list[Tensor], candidate: list[Tensor], signal: float) -> float:
    """||candidate - reference|| / ||reference||; ``signal`` is the square sum of the reference."""
    noise = _square_sum(c.float() - r.float() for r, c in zip(reference, candidate, strict=True))
    return float((noise / signal) ** 0.5) if signal > 0 else float("nan")


def _compare_logits(
    runners: list[_Runner], batches: tuple[Tensor, ...], blocks: dict[str, list[BlockError]]
) -> Comparison:
    first, *others = runners
    pairs = {runner.name: PairStatistics(runner.name) for runner in others}
    heads = {runner.name: runner.model.head() for runner in runners}

    def log_p(runner: _Runner, batch: int, row: int) -> Tensor:
        logits_TV = heads[runner.name](runner.hidden[batch][row : row + 1])[0, :-1]
        return log_probabilities(logits_TV, runner.name)

    nll_sum = 0.0
    for batch, ids_BS in enumerate(batches):
        for row in range(len(ids_BS)):
            reference = ReferenceRow(log_p(first, batch, row))
            targets_T = ids_BS[row, 1:].to(reference.logp_TV.device)
            nll_sum -= float(reference.logp_TV.gather(1, targets_T[:, None]).sum(dtype=torch.float64))
            for runner in others:
                pairs[runner.name].add(reference, log_p(runner, batch, row).to(targets_T.device), targets_T)
    num_rows = sum(len(ids_BS) for ids_BS in batches)
    num_positions = num_rows * (batches[0].shape[1] - 1)
    return Comparison(
        pairs=pairs,
        blocks=blocks,
        reference_perplexity=float(torch.tensor(nll_sum / num_positions, dtype=torch.float64).exp()),
        num_positions=num_positions,
        num_rows=num_rows,
    )
