"""Runs models in lockstep, block by block, and compares their hidden states and their logits.

All models see the same tokens. After each block the candidate's hidden states are compared with the
reference's; after the last one, the logits of every pair that was asked for. Only one block of each
model is in memory at a time, so no model has to fit. Controls may run on the first rows only.

Dimension legend: B = rows in a batch, S = tokens per row, V = vocabulary, T = positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import inf, log10
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qconv.corpus import TokenRows
from qconv.errors import NumericsError
from qconv.finite import settle, settle_before
from qconv.on_the_way import mark, to_host
from qconv.progress import QUIET, Progress
from qconv.streaming import BlockModel
from qconv.timeline import TIMELINE
from qconv.validate.distribution import Distribution, FiniteChecks
from qconv.validate.logit_chunks import logit_chunks, positions_at_once, slices
from qconv.validate.statistics import Kept, PairStatistics, pair_columns
from qconv.validate.workers import workers

_HEAD_BYTES = 1_000_000_000  # output embeddings that may be in memory together

Observe = Callable[[Mapping[str, Distribution], Tensor], None]
"""Called with all distributions of some positions by entrant, and the actual next tokens, in order."""
AfterBlock = Callable[[int], None]
_Coming: TypeAlias = "Callable[[], BlockError]"
REFERENCE, CANDIDATE = "reference", "candidate"
WHOLE = {REFERENCE, CANDIDATE}  # see all rows; controls may see fewer


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One model in the comparison.

    Attributes:
        num_rows: how many of the evaluated rows it sees, from the first.
        rows_per_batch: rows that run together.
    """

    name: str
    model: BlockModel
    num_rows: int
    rows_per_batch: int


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two entrants whose logits are compared, by name: KL(reference || other)."""

    name: str
    reference: str
    other: str


@dataclass(frozen=True, kw_only=True)
class BlockError:
    """Distance of the candidate's hidden states from the reference's after one block, all positions (Frobenius).

    Attributes:
        relative_error: ||candidate - reference|| / ||reference||.
        cosine: of the two, as vectors of all positions and features.
    """

    index: int
    relative_error: float
    cosine: float

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio, -20 log10(relative error), in dB."""
        return inf if self.relative_error == 0 else -20 * log10(self.relative_error)

    def as_dict(self) -> dict[str, Any]:
        return {
            "block": self.index,
            "relative_error": self.relative_error,
            "sqnr_db": self.sqnr_db,
            "cosine": self.cosine,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` measured.

    Attributes:
        pairs: statistics by the name of the pair.
        blocks: error of the second entrant against the first, per block, when it is the candidate and shows hidden
            states.
    """

    pairs: Mapping[str, PairStatistics]
    blocks: Sequence[BlockError]


@dataclass
class _Runner:
    entrant: Entrant
    hidden: list[Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.entrant.name

    def begin(self, ids_TS: Tensor) -> None:
        batches = torch.split(ids_TS[: self.entrant.num_rows], self.entrant.rows_per_batch)
        self.hidden = self.entrant.model.embed(batches)

    def step(self, index: int) -> None:
        block = self.entrant.model.load_block(index)
        for place, h_BSH in enumerate(self.hidden):  # one by one, so that the batches before are free
            self.hidden[place] = self.entrant.model.run_block(index, block, h_BSH)

    def keep(self, num_rows: int) -> None:
        """Frees the hidden states of later rows."""
        self.hidden = self.hidden[: -(-num_rows // self.entrant.rows_per_batch)]

    def row(self, row: int) -> Tensor:
        batch, place = divmod(row, self.entrant.rows_per_batch)
        return self.hidden[batch][place : place + 1]


def compare(
    entrants: Sequence[Entrant],
    pairs: Sequence[Pair],
    rows: TokenRows,
    *,
    observe: Observe | None = None,
    after_embedding: Callable[[], None] | None = None,
    before_blocks: Callable[[], None] | None = None,
    after_block: AfterBlock | None = None,
    progress: Progress = QUIET,
) -> Comparison:
    """Runs ``entrants`` (the reference first, the candidate second) over ``rows`` and compares ``pairs`` of them.

    Every model must have the same number of blocks and vocabulary. Positions 0..S-2 of each row
    are evaluated (position S-1 has no next token).

    Args:
        observe: see `Observe`; sees the entrants of the first pair (and more where memory allows).
        after_embedding, after_block: called while the weights that were read may still be at hand; models that are
            in memory as a whole are run after the former.
        before_blocks: called when all have embedded.

    Raises:
        NumericsError: hidden states or logits of a model contain NaN or infinity; names the block.
    """
    runners = [_Runner(entrant) for entrant in entrants]
    # Models that hold their own embedding come last: until then those of the others are in memory, which are large.
    for is_whole in (False, True):
        for runner in runners:
            if (runner.entrant.model.head_bytes == 0) is is_whole:
                with TIMELINE.stage("embed"):
                    runner.begin(rows.ids_TS)
        if after_embedding is not None and not is_whole:
            after_embedding()
    if before_blocks is not None:
        before_blocks()
    num_blocks = entrants[0].model.num_blocks
    blocks: list[BlockError] = []
    coming: _Coming | None = None
    for index in progress.track(range(num_blocks), "validate", num_blocks):
        for runner in runners:
            with TIMELINE.stage(f"blocks: {runner.name}"):
                runner.step(index)
        is_shown = len(runners) > 1 and runners[1].name == CANDIDATE and entrants[1].model.shows_hidden_states
        begun = _begin_block_error(index, runners[0], runners[1]) if is_shown else None
        # What a GPU answers is read one block later: it has work meanwhile.
        settle_before()
        if coming is not None:
            with TIMELINE.stage("block errors"):
                blocks.append(coming())
        coming = begun
        if after_block is not None:
            after_block(index)
    settle()
    if coming is not None:
        blocks.append(coming())
    by_name = {runner.name: runner for runner in runners}
    tables = {pair.name: PairStatistics(pair.name) for pair in pairs}
    for group in _groups(pairs, by_name):
        with TIMELINE.stage("logits"):
            _compare_logits(group, by_name, rows, tables, observe if pairs[0] in group else None)
        later = {name for pair in pairs[len(group) :] for name in (pair.reference, pair.other)}
        num_rows = max((by_name[name].entrant.num_rows for name in later if name not in WHOLE), default=0)
        for name in WHOLE & by_name.keys():
            by_name[name].keep(num_rows)
    return Comparison(pairs=tables, blocks=blocks)


def run_candidate(
    entrant: Entrant, rows: TokenRows, visit: Callable[[int, Tensor], None], progress: Progress = QUIET
) -> None:
    """Runs one model alone; ``visit(row, logits_TV)`` sees each row's logits for positions 0..S-2."""
    runner = _Runner(entrant)
    runner.begin(rows.ids_TS)
    num_blocks = entrant.model.num_blocks
    for index in progress.track(range(num_blocks), "validate", num_blocks):
        with TIMELINE.stage(f"blocks: {runner.name}"):
            runner.step(index)
    head = entrant.model.head()
    with TIMELINE.stage("logits"):
        for row in range(entrant.num_rows):
            visit(row, head(runner.row(row))[0, :-1])


def _begin_block_error(index: int, reference: _Runner, candidate: _Runner) -> _Coming:
    """Begins to measure; the result raises NumericsError where hidden states are not finite."""
    parts = []  # norms of each row: noise, signal, the candidate's own
    for r_BSH, c_BSH in zip(reference.hidden, candidate.hidden, strict=True):
        if r_BSH.is_cuda:  # all rows of a batch at once: every call costs time
            r, c = r_BSH.float(), c_BSH.to(r_BSH.device).float()
            parts.append(torch.stack([torch.linalg.vector_norm(x, dim=(1, 2)) for x in (c - r, r, c)], dim=1))
            continue
        for r_SH, c_SH in zip(r_BSH, c_BSH, strict=True):
            r, c = r_SH.float(), c_SH.float()
            parts.append(torch.stack([torch.linalg.vector_norm(x) for x in (c - r, r, c)])[None])
    [sums] = to_host([torch.cat(parts).double().square().sum(0)])
    arrived = mark(reference.hidden[0].device)

    def finish() -> BlockError:
        arrived()
        noise, signal, own = sums.tolist()
        return _block_error(index, noise, signal, own, culprits=(reference.name, candidate.name))

    return finish


def _block_error(index: int, noise: float, signal: float, own: float, culprits: tuple[str, str]) -> BlockError:
    if not noise < inf or not signal < inf:
        culprit = culprits[0] if not signal < inf else culprits[1]
        raise NumericsError(f"the hidden states of the {culprit} after block {index} are not finite")
    # A model whose hidden states are all zero has no direction and no signal: anything else is infinitely far.
    relative = (noise / signal) ** 0.5 if signal > 0 else (0.0 if noise == 0 else inf)
    product = (signal + own - noise) / 2
    cosine = product / (signal * own) ** 0.5 if signal > 0 and own > 0 else 0.0
    return BlockError(index=index, relative_error=relative, cosine=min(1.0, cosine))


def _groups(pairs: Sequence[Pair], runners: Mapping[str, _Runner]) -> list[Sequence[Pair]]:
    """All pairs at once, or the first one apart where output embeddings would fill the memory."""
    models = {runners[name].entrant.model for pair in pairs for name in (pair.reference, pair.other)}
    if sum(model.head_bytes for model in models) <= _HEAD_BYTES:
        return [pairs]
    return [group for group in (pairs[:1], pairs[1:]) if group]


def _compare_logits(
    pairs: Sequence[Pair],
    runners: Mapping[str, _Runner],
    rows: TokenRows,
    tables: Mapping[str, PairStatistics],
    observe: Observe | None,
) -> None:
    names = list(dict.fromkeys(name for pair in pairs for name in (pair.reference, pair.other)))
    models = {runners[name].entrant.model for name in names}
    head_of = {model: model.head() for model in models}
    heads = {name: head_of[runners[name].entrant.model] for name in names}
    device = next(iter(models)).device
    seen = {name: runners[name].entrant.num_rows for name in names}
    rows_of = {pair.name: min(seen[pair.reference], seen[pair.other]) for pair in pairs}
    size = None  # a whole row: on CPU that is fastest, and memory is not what is short
    if device.startswith("cuda"):
        some_TV = heads[names[0]](runners[names[0]].row(0)[:, :1])[0].to(device)
        size = positions_at_once(some_TV, len(names), observe is not None)
    parts: dict[str, list[tuple[Kept, Kept, Tensor]]] = {pair.name: [] for pair in pairs}
    checks = FiniteChecks()
    with workers() if device.startswith("cpu") else nullcontext(map) as pool:
        for row in range(max(seen.values()) if observe is not None else max(rows_of.values())):
            present = {name: (heads[name], runners[name].row(row)) for name in names if row < seen[name]}
            targets_T = rows.ids_TS[row, 1:].to(device)
            measured = pool(partial(_measure_chunk, targets_T, pairs), logit_chunks(present, device, size))
            for part, distributions, found, to_check in measured:
                checks.take(to_check)
                if observe is not None:
                    checks.settle()
                    observe(distributions, targets_T[part])
                for name, values in found.items():
                    parts[name].append(values)
                del distributions  # before those of the next positions are made
            checks.settle()
    for pair in pairs:
        _add_columns(tables[pair.name], parts[pair.name], rows, rows_of[pair.name])


def _measure_chunk(
    targets_T: Tensor, pairs: Sequence[Pair], chunk: tuple[slice, Mapping[str, Tensor]]
) -> tuple[slice, dict[str, Distribution], dict[str, tuple[Kept, Kept, Tensor]], FiniteChecks]:
    """The distributions of some positions by entrant, what `pair_columns` takes of those present, and what to check."""
    part, logits = chunk
    checks = FiniteChecks()
    distributions = {name: Distribution(logits_TV, name, checks) for name, logits_TV in logits.items()}
    kept = {name: Kept.of(distribution, targets_T[part]) for name, distribution in distributions.items()}
    found = {
        pair.name: (
            kept[pair.reference],
            kept[pair.other],
            distributions[pair.reference].divergence_sums(distributions[pair.other], checks),
        )
        for pair in pairs
        if pair.reference in kept and pair.other in kept
    }
    return part, distributions, found, checks


def _add_columns(
    table: PairStatistics, parts: Sequence[tuple[Kept, Kept, Tensor]], rows: TokenRows, num_rows: int
) -> None:
    """Columns of all positions at once: operations on those of one chunk would take longer to start than to run."""
    if not parts:
        return
    reference, other, sums = zip(*parts, strict=True)
    sums_T4 = torch.cat(sums)
    targets_T = rows.ids_TS[:num_rows, 1:].flatten().to(sums_T4.device)
    columns = pair_columns(Kept.cat(reference), Kept.cat(other), sums_T4, targets_T)
    for row, part in enumerate(slices(len(targets_T), rows.ids_TS.shape[1] - 1)):
        table.add({name: values[part] for name, values in columns.items()}, rows.documents_TS[row, 1:], row)
