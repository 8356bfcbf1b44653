"""Who runs in a comparison: the reference, the candidate, and the controls between them.

Controls run on the first rows only: the merge in 16 bit (so that a failure names its cause), the base without
the adapter (what the adapter changed), and the reference again with another batch shape (the noise floor).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from qconv.config import ValidationConfig
from qconv.convert import is_fused
from qconv.layout import config_dtype
from qconv.read_ahead import read_ahead
from qconv.remembered import Remembered
from qconv.remembered_codes import RememberedCodes
from qconv.runners import Candidate, Reference, candidate_model, reference_model, resident_bytes, streamed
from qconv.streaming import BlockModel
from qconv.timeline import TIMELINE
from qconv.types import Checkpoint
from qconv.validate.compare import CANDIDATE, REFERENCE, Entrant, Pair
from qconv.validate.resident import ResidentModel

CONTROL_SHARE = 10  # one row in so many runs through the controls, unless a gate is about them
LEAST_CONTROL_ROWS = 4
LEAST_FLOOR_ROWS = 2
TOKENS_PER_BATCH = 4096  # the activations of one batch are what a forward pass needs most
LARGE_GPU_TOKENS, LARGE_GPU_BYTES = 8192, 32_000_000_000  # a fast one waits for the interpreter if it gets less
_KEPT_BYTES = 2_000_000_000  # models this small stay in memory between passes


@dataclass(frozen=True, kw_only=True)
class Views:
    """What the models of one comparison read through; shared, so that a tensor is read and decoded once.

    Attributes:
        base: the reference's base as training saw it.
        merged: the merge over it; the base itself without an adapter.
        changed: names of the tensors that the adapter changes.
        stored: the candidate, decoded from codes that are remembered; None without a candidate.
        factors: the adapter's own tensors, of which the merge is made more than once; None without an adapter.
    """

    base: Remembered
    merged: Checkpoint
    changed: frozenset[str]
    stored: RememberedCodes | None
    factors: Remembered | None = None

    @staticmethod
    def of(reference: Reference, candidate: Candidate | None, device: str) -> Views:
        base = Remembered(reference.base)
        merged: Checkpoint = base
        changed: frozenset[str] = frozenset()
        factors = None
        if reference.adapter is not None:
            factors = Remembered((reference.merged_adapter or reference.adapter).tensors)
            view = reference.merged_into(base, factors)
            changed = frozenset(getattr(view, "changed", ()))
            # In float32, so worth its memory only where merging again is slow.
            merged = view if device.startswith("cuda") else Remembered(view)
        stored = RememberedCodes(candidate.source) if candidate else None
        return Views(base=base, merged=merged, changed=changed, stored=stored, factors=factors)

    def _remembered(self) -> Iterator[Remembered | RememberedCodes]:
        for view in (self.base, self.merged, self.stored, self.factors):
            if isinstance(view, Remembered | RememberedCodes):
                yield view

    def forget(self) -> None:
        for view in self._remembered():
            view.forget()

    def stop(self) -> None:
        """Remembers nothing any more; for passes after the comparison, which go through the models one by one."""
        for view in self._remembered():
            view.stop()


@dataclass(kw_only=True)
class Lineup:
    """Models by name, and the pairs to compare.

    Attributes:
        runs: how reference and candidate are computed, for the report.
        notes: what is not measured, and why.
        decoded: the candidate in torch, where an engine runs it that shows no blocks.
    """

    reference: Reference
    candidate: Candidate | None
    device: str
    views: Views
    rows_per_batch: int
    entrants: list[Entrant] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    runs: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    decoded: BlockModel | None = None

    def enter(self, name: str, model: BlockModel, num_rows: int, rows_per_batch: int | None = None) -> None:
        batch = rows_per_batch or self.rows_per_batch
        self.entrants.append(Entrant(name=name, model=model, num_rows=num_rows, rows_per_batch=batch))

    def pair(self, name: str, reference: str, other: str) -> None:
        self.pairs.append(Pair(name=name, reference=reference, other=other))

    @property
    def layers_name(self) -> str:
        return self.entrants[0].model.layers_name

    def read_ahead(self, index: int) -> None:
        """Begins to read what block ``index`` is stored as, of both models; after the last one, what follows it."""
        prefix = f"{self.layers_name}.{index}."
        is_after = index >= self.entrants[0].model.num_blocks
        for side in (self.reference, self.candidate):
            if side is not None:
                names = [name for name in side.source.specs() if name.startswith("lm_head." if is_after else prefix)]
                names = [name for name in names if not is_fused(name)]  # of which ranges are read
                if side is self.reference:
                    names = [name for name in names if not self.views.base.is_lent(name, self.device)]
                    names = [name for name in names if not side.source.is_lent(name, self.device)]
                side.source.read_ahead(names, pin=self.device.startswith("cuda"))
        if self.reference.adapter is not None:
            read_ahead(self.reference.adapter.tensors, self._factors_of(prefix), pin=self.device.startswith("cuda"))

    def _factors_of(self, prefix: str) -> list[str]:
        """Names of the adapter's tensors that weights of this prefix are merged with."""
        assert self.reference.adapter is not None
        deltas = [d for name, d in self.reference.adapter.deltas.items() if name.startswith(prefix)]
        return [part for d in deltas for part in (d.a, d.b, d.singular, d.magnitude) if part is not None]

    def let_embedding_go(self) -> None:
        """Frees the input embedding of a reference that is on the GPU as a whole, until somebody embeds again."""
        model, base = self.entrants[0].model, self.reference.base
        if isinstance(model, ResidentModel) and self.device.startswith("cuda"):
            name = model.let_embedding_go(base.specs(), partial(base.read, device=self.device))
            if name is not None:
                self.views.base.take_back(name, self.device)

    def end(self) -> None:
        """Drops what was read ahead, what the views remember and what the reference lent."""
        self.reference.source.lend({}, self.device)
        for side in (self.reference, self.candidate):
            if side is not None:
                side.source.read_ahead(())
        if self.reference.adapter is not None:
            read_ahead(self.reference.adapter.tensors, ())
        self.views.stop()

    def tidy(self) -> None:
        """Lets go of what the views remember, and gives memory back to the GPU for tensors of other sizes."""
        self.views.forget()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()


def line_up(reference: Reference, candidate: Candidate | None, config: ValidationConfig, device: str) -> Lineup:
    """Loads or prepares all models; without a candidate, reference and controls alone."""
    keep = _fits(reference, candidate, device)
    views = Views.of(reference, candidate, device)
    batch = rows_per_batch(config, device)
    lineup = Lineup(reference=reference, candidate=candidate, device=device, views=views, rows_per_batch=batch)
    is_resident = resident_bytes(reference, device) is not None
    for side in (None if is_resident else reference, candidate):
        if side is not None:  # while models are prepared
            names = [name for name in side.source.specs() if "embed" in name]
            side.source.read_ahead(names, pin=device.startswith("cuda"))
    with TIMELINE.stage("load reference"):
        model, lineup.runs[REFERENCE] = reference_model(reference, views.base, device, keep)
    if isinstance(model, ResidentModel):  # the controls and the audit read what it holds: embedding and head are large
        views.base.lend(model.held(views.base.specs()), device)
        stored = reference.source.specs()
        codes = {name: spec for name, spec in stored.items() if not spec.dtype.is_floating_point}
        reference.source.lend(model.held(codes), device)
    lineup.enter(REFERENCE, model, config.rows)
    if candidate is not None and views.stored is not None:
        with TIMELINE.stage("load candidate"):
            other, lineup.runs[CANDIDATE] = candidate_model(candidate, views.stored, device, keep, config.engine)
        lineup.enter(CANDIDATE, other, config.rows)
        lineup.pair("total", REFERENCE, CANDIDATE)
        if not other.shows_hidden_states:
            lineup.decoded = streamed(views.stored, None, None, device, keep)
            lineup.notes.append(
                "ONNX Runtime runs the candidate whole: hidden states were not compared, and attribution, answers to "
                "prompts and tasks are of its weights decoded by qconv"
            )
    controls = control_rows(config)
    if reference.adapter is not None:
        lineup.enter("merged", streamed(views.merged, None, None, device), controls)
        lineup.pair("merge", REFERENCE, "merged")
        if candidate is not None:
            lineup.pair("requantization", "merged", CANDIDATE)
        if reference.resizes_vocabulary:
            lineup.notes.append(
                "the adapter resizes the vocabulary of the base: effect retained not measured, and the adapter's whole "
                "tensors are on both sides as the merge has them"
            )
        else:
            lineup.enter("base", streamed(views.base, None, None, device), controls)
            lineup.pair("base_without_adapter", REFERENCE, "base")
    of_base = reference.stored.cache
    if of_base.is_float8 or of_base.why_not:
        lineup.notes.append(
            "the base announces a quantized cache of keys and values, or holds scales for one: training had none, and "
            "neither has the reference"
        )
    if reference.dampening is not None:
        lineup.notes.append(
            f"intruder dimensions were scaled by {reference.dampening.factor:g}: the reference is still the unmerged "
            "adapter with all of them, so that the merge's distance has what the scaling changed; the audit expects it"
        )
    if reference.combination is not None and reference.adapter is None:
        lineup.notes.append(
            "the adapters were combined to an update of full rank, which nothing unmerged equals: the reference is the "
            "merged model itself, and the merge is not measured"
        )
    if config.rows == 1:
        lineup.notes.append("one row has one batch shape only: the noise floor says nothing, evaluate more tokens")
    lineup.enter("floor", model, min(config.rows, max(LEAST_FLOOR_ROWS, controls // 2)), 1 if batch > 1 else 2)
    lineup.pair("floor", REFERENCE, "floor")
    return lineup


def rows_per_batch(config: ValidationConfig, device: str) -> int:
    """Rows that run together; the same on every run of one machine, whatever else its memory holds."""
    tokens = TOKENS_PER_BATCH
    if device.startswith("cuda") and torch.cuda.get_device_properties(device).total_memory > LARGE_GPU_BYTES:
        tokens = LARGE_GPU_TOKENS
    return max(1, tokens // config.seq_len)


def control_rows(config: ValidationConfig) -> int:
    """How many of the evaluated rows the controls see: few, unless somebody gates on what they measure."""
    if config.control_tokens is not None:
        return min(config.rows, max(1, config.control_tokens // config.seq_len))
    wanted = ("merge.", "requantization.", "adapter_effect_retained")
    if any(rule.metric.startswith(wanted) for rule in (*config.policy.rules, *config.rules)):
        return config.rows
    return min(config.rows, max(LEAST_CONTROL_ROWS, -(-config.rows // CONTROL_SHARE)))


def _fits(reference: Reference, candidate: Candidate | None, device: str) -> bool:
    """Whether both models are small enough to stay in memory for the passes that come after the comparison."""
    total = 0
    for view in (reference.base, *([candidate.view] if candidate else [])):
        width = config_dtype(view.config).itemsize
        total += sum(spec.num_bytes // spec.dtype.itemsize * width for spec in view.specs().values())
    return fits_in_memory(total, device)


def fits_in_memory(models_bytes: int, device: str) -> bool:
    """Whether models of this size, together, stay in memory between passes."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return models_bytes < min(_KEPT_BYTES, free // 4)
    return models_bytes < _KEPT_BYTES
