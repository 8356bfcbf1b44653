"""Runs two or three models in lockstep, block by block, and measures how far apart they are.

All models see the same tokens. After each block their hidden states are compared; after the last
one, their logits. Only one block per model is in memory at a time, so neither model has to fit.

Dimension legend: B = rows in a batch, S = tokens per row, V = vocabulary, T = positions.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        for runner in runners[1:]:
            error = _relative_error(runners[0].hidden, runner.hidden)
            if not error < float("inf"):
                raise NumericsError(
                    f"the hidden states after block {index} are not finite ({runner.name} or reference)"
                )
            blocks[runner.name].append(BlockError(index=index, relative_error=error))
    return _compare_logits(runners, batches, blocks)


def _relative_error(reference: list[Tensor], candidate: list[Tensor]) -> float:
    noise = sum(
        float((c.float() - r.float()).square().sum(dtype=torch.float64))
        for r, c in zip(reference, candidate, strict=True)
    )
    signal = sum(float(r.float().square().sum(dtype=torch.float64)) for r in reference)
    return float((noise / signal) ** 0.5) if signal > 0 else float("nan")


def _compare_logits(
    runners: list[_Runner], batches: tuple[Tensor, ...], blocks: dict[str, list[BlockError]]
) -> Comparison:
    pairs = {runner.name: PairStatistics(runner.name) for runner in runners}
    heads = [runner.model.head() for runner in runners]
    for number, ids_BS in enumerate(batches):
        for row in range(len(ids_BS)):
            reference = None
            for runner, head in zip(runners, heads, strict=True):
                logits_TV = head(runner.hidden[number][row : row + 1])[0, :-1]
                logp_TV = log_probabilities(logits_TV, runner.name)
                if reference is None:
                    reference = ReferenceRow(logp_TV)
                logp_TV = logp_TV.to(reference.logp_TV.device)
                pairs[runner.name].add(reference, logp_TV, ids_BS[row, 1:].to(logp_TV.device))
    self_pair = pairs.pop("reference")
    return Comparison(
        pairs=pairs,
        blocks=blocks,
        reference_perplexity=self_pair.perplexity,
        num_positions=self_pair.num_positions,
        num_rows=len(self_pair.kl_rows),
    )
