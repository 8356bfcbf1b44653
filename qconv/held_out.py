"""Loss on held-out text of the adapter's task and of anything else, of the models that a merge can choose between.

Every model is decoded and run block by block, all of them in lockstep, on the same rows. Differences are per token and
paired; their intervals come from resampled documents, as everywhere (`validate/bootstrap.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from qconv import corpus
from qconv.config import ValidationConfig
from qconv.corpus import TokenRows
from qconv.evaluation import check_vocabulary, reference_tokenizer
from qconv.lineup import rows_per_batch
from qconv.progress import Progress
from qconv.remembered import Remembered
from qconv.runners import Reference, streamed
from qconv.streaming import BlockModel
from qconv.timeline import TIMELINE
from qconv.types import Checkpoint
from qconv.validate.compare import REFERENCE, Entrant, Pair, compare

UNMERGED = "adapter unmerged"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Of one model on one text.

    Attributes:
        loss: mean negative log-likelihood, nats per token.
        change: from the first model, of the same tokens; with its 95% interval. None of the first itself.
    """

    text: str
    model: str
    loss: float
    change: float | None = None
    interval_95: tuple[float, float] | None = None

    def facts(self) -> dict[str, float]:
        if self.change is None or self.interval_95 is None:
            return {"loss": self.loss}
        low, high = self.interval_95
        return {"loss": self.loss, "change": self.change, "from": low, "to": high}

    def line(self) -> str:
        words = f"loss on {self.text}: {self.loss:.4f} nats a token, {self.model}"
        if self.change is None or self.interval_95 is None:
            return words
        return words + f" ({self.change:+.4f}, {self.interval_95[0]:+.4f} to {self.interval_95[1]:+.4f})"


def merge_losses(reference: Reference, config: ValidationConfig, device: str, progress: Progress) -> list[Loss]:
    """Of the unmerged adapter, the base without it, the merge, and the merge with its intruders scaled, on both texts.

    Raises:
        CalibrationError: a text is missing or too short.
        NumericsError: NaN or infinity in a model.
    """
    base = Remembered(reference.base)
    merged = Remembered(reference.undampened(base))
    views: dict[str, Checkpoint] = {"merged": merged}
    if not reference.resizes_vocabulary:
        views = {"base without the adapter": base, **views}
    if reference.dampening is not None:
        views[f"merged, intruders scaled by {reference.dampening.factor:g}"] = reference.merged_into(base)
    models: dict[str, BlockModel] = {UNMERGED: streamed(base, reference.adapter, None, device)}
    models |= {name: streamed(view, None, None, device) for name, view in views.items()}

    def forget() -> None:
        base.forget()
        merged.forget()

    return measure_losses(models, held_out_rows(reference, config), config, device, progress, forget)


def held_out_rows(reference: Reference, config: ValidationConfig, with_general: bool = True) -> dict[str, TokenRows]:
    """Rows of the task's text, as many as it has and are asked for, and of the text that everything is validated on."""
    folder = reference_tokenizer(reference) or reference.source.folder
    tokenizer = corpus.load_tokenizer(folder)
    texts = {f"task text {config.task_data}": config.task_data} if config.task_data else {}
    if with_general:
        texts[f"general text {config.source}"] = config.source
    found = {}
    for name, source in texts.items():
        documents = corpus.load_documents(source, tokenizer)
        rows = corpus.pack_rows(documents, tokenizer, config.rows, config.seq_len, config.seed, allow_fewer=True)
        check_vocabulary(rows.ids_TS, reference.merged, folder)
        found[name] = rows
    return found


def measure_losses(
    models: Mapping[str, BlockModel],
    texts: Mapping[str, TokenRows],
    config: ValidationConfig,
    device: str,
    progress: Progress,
    after_block: Callable[[], None] = lambda: None,
) -> list[Loss]:
    """Every model on every text; changes are from the first model."""
    found: list[Loss] = []
    first, *others = models
    for text, rows in texts.items():
        batch = rows_per_batch(replace(config, seq_len=rows.ids_TS.shape[1]), device)
        names = [REFERENCE, *others]
        entrants = [
            Entrant(name=name, model=model, num_rows=len(rows.ids_TS), rows_per_batch=batch)
            for name, model in zip(names, models.values(), strict=True)
        ]
        pairs = [Pair(name=name, reference=REFERENCE, other=name) for name in others]
        with TIMELINE.stage("held-out loss"):
            tables = compare(
                entrants,
                pairs,
                rows,
                after_block=lambda _: after_block(),
                after_embedding=after_block,
                progress=progress,
            ).pairs
        own = next(iter(tables.values()))["reference_logp"]
        found.append(Loss(text=text, model=first, loss=-float(own.double().mean())))
        for name in others:
            value, (low, high) = tables[name].measure("log_perplexity_ratio")
            loss = -float(tables[name]["candidate_logp"].double().mean())
            found.append(Loss(text=text, model=name, loss=loss, change=value, interval_95=(low, high)))
    return found


def loss_facts(losses: Sequence[Loss]) -> dict[str, dict[str, float]]:
    """For the report."""
    return {f"{one.text}: {one.model}": one.facts() for one in losses}
