"""Token rows, cut from documents for calibration, training and evaluation.

Documents are taken in a systematic sample (Cochran 1977, Sampling Techniques, chapter 8): whatever
is needed comes evenly from all parts of the list, so a small sample of the embedded text has both
prose and speeches, and one of a file sorted by topic has all topics. The seed moves the sample.
`text_sources` reads the documents, `mixture` takes rows from several sources by weight.
Left out: streaming of data sets larger than memory.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconv.errors import CalibrationError, CheckpointError
from qconv.own_process import importing_libraries
from qconv.side_files import VOCABULARY_FILES
from qconv.text_sources import Documents as Documents
from qconv.text_sources import digest_texts
from qconv.text_sources import load_documents as load_documents

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

SHARED_CHARACTERS = 128  # a run of text this long is taken as copied, not as a common phrase
SHARED_STRIDE = 32
_GOLDEN = 0.6180339887498949  # (sqrt(5) - 1) / 2: its multiples modulo 1 fill the interval most evenly


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of tokens cut from documents.

    Attributes:
        ids_TS: token ids, int64 ``[rows, seq_len]``.
        documents_TS: the document that each token is of, int32 ``[rows, seq_len]``, numbered as in the source.
    """

    ids_TS: Tensor
    documents_TS: Tensor


def pack_rows(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    seq_len: int,
    seed: int,
    allow_fewer: bool = False,
) -> TokenRows:
    """``num_samples`` rows of ``seq_len`` tokens, cut from documents in a seeded systematic order.

    Each document is tokenized whole, with the special tokens that the tokenizer adds by itself (a
    BOS in front, for most Llamas; text that starts with its own gets no second one), and closed with EOS
    where the tokenizer has one. What a chat template has rendered gets neither: it has the special tokens
    that it is to have, and its tokens are those of ``apply_chat_template``. The stream is cut
    into rows without padding, so a row may start and end within a document. The tokenizer object
    stays as it is: tokenizing with transformers changes the truncation that it would save, hence a copy.

    Args:
        documents: `Documents` say whether a template rendered them; other sequences are plain text.

    Raises:
        CalibrationError: the documents have fewer than ``num_samples * seq_len`` tokens (with
            ``allow_fewer``, which then gives the whole rows there are: fewer than ``seq_len``).
    """
    import torch

    need = num_samples * seq_len
    if num_samples < 1 or seq_len < 1:
        raise CalibrationError(f"expected at least one row of one token, got {num_samples} rows of {seq_len}")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = int(1e30)  # rows are cut here; a warning about long documents would mislead
    stream: list[int] = []
    origins: list[int] = []
    rendered = isinstance(documents, Documents) and documents.rendered
    for index in _systematic_order(len(documents), seed):
        ids = _tokenize(documents[index], tokenizer, rendered)
        stream += ids
        origins += [index] * len(ids)
        if len(stream) >= need:
            break
    num_rows = min(num_samples, len(stream) // seq_len)
    if num_rows < num_samples and not (allow_fewer and num_rows):
        source = f"{documents.source}: " if isinstance(documents, Documents) else ""
        raise CalibrationError(
            f"{source}{num_samples} rows of {seq_len} tokens need {need} tokens, the text has {len(stream)}: "
            + (f"ask for at most {num_rows} rows of this length, " if num_rows else "ask for shorter rows, ")
            + "or give more text"
        )
    cut = num_rows * seq_len
    return TokenRows(
        torch.tensor(stream[:cut], dtype=torch.int64).reshape(num_rows, seq_len),
        torch.tensor(origins[:cut], dtype=torch.int32).reshape(num_rows, seq_len),
    )


def pack_tokens(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    num_samples: int,
    seq_len: int,
    seed: int,
    allow_fewer: bool = False,
) -> Tensor:
    """The token ids of `pack_rows` alone, int64 ``[num_samples, seq_len]``."""
    return pack_rows(documents, tokenizer, num_samples, seq_len, seed, allow_fewer).ids_TS


def calibration_digest(content: Sequence[str] | Tensor) -> str:
    """SHA-256 (hex) of documents, or of token rows with their shape; equal text gives an equal digest."""
    if isinstance(content, Sequence):
        return digest_texts(content)
    digest = hashlib.sha256(f"{tuple(content.shape)}:".encode())
    digest.update(content.cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def check_disjoint(calibration: Sequence[str], evaluation: Sequence[str]) -> None:
    """Refuses an evaluation on text that calibrates: its numbers would be too good.

    Runs of text are compared with white space collapsed. Any shared run of 159 characters is found
    (128-character windows, every 32nd of the evaluation text against every one of the calibration
    text); none below 128 characters counts. Documents shorter than a window are compared whole. Of
    `Documents` the bodies are compared: two sets of conversations share the words of a chat template
    or of Alpaca's prompt, and need share nothing else.

    Raises:
        CalibrationError: text is shared; quotes it.
    """
    import numpy as np

    left, right = (
        [" ".join(text.split()) for text in (side.bodies if isinstance(side, Documents) else side)]
        for side in (calibration, evaluation)
    )
    whole = set(left).intersection(right) - {""}
    if whole:
        raise _shared_text(min(whole))
    marks = [_window_hashes(text)[::SHARED_STRIDE] for text in right]
    known = np.unique(np.concatenate(marks)) if marks else np.empty(0, dtype=np.uint64)
    for text in left if len(known) else []:
        hashes = _window_hashes(text)
        place = np.searchsorted(known, hashes).clip(max=len(known) - 1)
        for start in np.flatnonzero(known[place] == hashes):
            window = text[start : start + SHARED_CHARACTERS]
            if any(window in other for other in right):  # the hash is not proof
                raise _shared_text(window)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model or adapter folder; fetches nothing and runs no code of the folder.

    Raises:
        CheckpointError: the folder has no tokenizer, or one that transformers cannot read.
    """
    folder = Path(folder)
    found = [name for name in VOCABULARY_FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(
            f"{folder}: has no tokenizer; expected {' or '.join(VOCABULARY_FILES)} beside the weights: "
            "copy the tokenizer files of the base model there"
        )
    with importing_libraries():
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the reader below raises whatever its parser meets
        raise CheckpointError(
            f"{folder}: transformers cannot read the tokenizer in {', '.join(found)} ({error}); "
            "copy the tokenizer files of the base model there again"
        ) from error
    return tokenizer


def adds_special_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it puts any around a text by itself, such as a BOS."""
    return bool(tokenizer("a").input_ids != tokenizer("a", add_special_tokens=False).input_ids)


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase, rendered: bool) -> list[int]:
    """Token ids of one document, special tokens included."""
    ids = list(tokenizer(text, add_special_tokens=not rendered, truncation=False, padding=False)["input_ids"])
    if rendered:
        return ids
    if len(ids) > 1 and tokenizer.bos_token_id is not None and ids[0] == ids[1] == tokenizer.bos_token_id:
        del ids[0]  # text that was rendered before it was stored
    if tokenizer.eos_token_id is not None and ids and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return ids


def _systematic_order(count: int, seed: int) -> list[int]:
    """All of ``range(count)``; every prefix is spread evenly over it, from a start that the seed sets."""
    start = random.Random(seed).random()
    return sorted(range(count), key=lambda index: (start + index * _GOLDEN) % 1.0)


def _window_hashes(text: str) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Polynomial hashes (modulo 2**64) of all 128-character windows, by doubling: 1, 2, 4, ... 128."""
    import numpy as np

    if len(text) < SHARED_CHARACTERS:
        return np.empty(0, dtype=np.uint64)
    hashes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    factor, width = 6364136223846793005, 1
    while width < SHARED_CHARACTERS:
        hashes = hashes[:-width] * np.uint64(factor) + hashes[width:]
        factor, width = factor * factor % 2**64, 2 * width
    return hashes


def _shared_text(text: str) -> CalibrationError:
    quote = text if len(text) <= 80 else text[:80] + "…"
    return CalibrationError(
        f"calibration and evaluation share text, so the evaluation would be too good: {quote!r}; "
        "evaluate on text that was held out"
    )
