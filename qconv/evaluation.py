"""The tokens that a validation is made on, and whether two models can be compared on them at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qconv import corpus
from qconv.config import ValidationConfig
from qconv.corpus import Documents, TokenRows
from qconv.errors import CheckpointError
from qconv.runners import Candidate, Reference
from qconv.side_files import VOCABULARY_FILES, tokenizer_folder
from qconv.skeleton import text_config
from qconv.types import Checkpoint

PAIRS = ("total", "merge", "requantization", "base_without_adapter", "floor")


def evaluation_rows(folder: Path, config: ValidationConfig) -> tuple[TokenRows, Documents]:
    """Held-out rows through the tokenizer of a folder, and the documents that they are cut from.

    Raises:
        CalibrationError: text that is missing or too short, or conversations without a chat template.
        CheckpointError: no tokenizer.
    """
    tokenizer = corpus.load_tokenizer(folder)
    documents = corpus.load_documents(config.source, tokenizer)
    return corpus.pack_rows(documents, tokenizer, config.rows, config.seq_len, config.seed), documents


def empty_facts(rows: TokenRows, config: ValidationConfig) -> dict[str, Any]:
    """The ``fidelity`` part of a report before anything is measured."""
    num_rows, seq_len = rows.ids_TS.shape
    return {
        "evaluation": {
            "source": config.source,
            "seq_len": seq_len,
            "seed": config.seed,
            "sha256": corpus.calibration_digest(rows.ids_TS),
            "rows": num_rows,
            "positions": num_rows * (seq_len - 1),
            "documents": len(torch.unique(rows.documents_TS[:, 1:])),
        },
        "reference": None,
        "candidate": None,
        **dict.fromkeys(PAIRS),
        "adapter_effect_retained": None,
        "blocks": [],
        "attribution": None,
        "worst_tokens": [],
        "prompts": None,
        "notes": [],
    }


def reference_tokenizer(reference: Reference) -> Path | None:
    """The folder whose tokenizer the reference is used with; None when neither adapter nor base has one."""
    folder = tokenizer_folder(reference.source.folder, reference.side_folder)
    return folder if any((folder / name).is_file() for name in VOCABULARY_FILES) else None


def check_vocabulary(ids_TS: torch.Tensor, view: Checkpoint, tokenizer: Path) -> None:
    """Refuses a tokenizer that makes tokens which the model's embedding does not have."""
    size = view.config.get("vocab_size")
    if isinstance(size, int) and int(ids_TS.max()) >= size:
        raise CheckpointError(
            f"{tokenizer}: its tokenizer gives token {int(ids_TS.max())}, {view.location} has {size}; "
            "the tokenizer is from another model, or its new tokens were never trained"
        )


def check_alike(reference: Reference, candidate: Candidate) -> None:
    """Refuses a pair that cannot be two versions of one model.

    Raises:
        CheckpointError: another depth, width or vocabulary.
    """
    # As transformers reads them: families have names of their own for these, composite models a part for text.
    expected, found = text_config(reference.merged), text_config(candidate.view)
    for key in ("num_hidden_layers", "vocab_size", "hidden_size"):
        wanted, has = getattr(expected, key, None), getattr(found, key, None)
        if wanted != has:
            raise CheckpointError(
                f"{candidate.source.location}: config.json has {key} {has}, the reference "
                f"({reference.source.location}, with its adapter) has {wanted}; they are different models"
            )
