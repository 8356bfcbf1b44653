"""A compact store of the reference's next-token distributions, to validate candidates without the reference model.

What is kept for each position, and why statistics from it are exact, unbiased or bounds: `cached_row`. The file is one
safetensors file with these tensors (R rows, S tokens per row, T = R (S - 1) positions, K, M as in `cached_row`):

    ids, documents          int32 [R, S]        tokens and the document of each
    target_logp, log_tail   float32, float64 [T]
    top_ids, top_logp       [T, K]              ids are uint16 where the vocabulary has at most 65536 tokens, else int32
    sample_ids, sample_logp [T, M]              log-probabilities are float32

and one metadata entry: a JSON object with the format, the settings, the header that the caller gave, the fingerprint of
what was measured (`fingerprint`), the measured losses of storage, and a SHA-256 over all of that and every tensor. The
digest detects damage; it does not tell who wrote the file. Equal content gives equal bytes.

Size: 6 (K + M) + 12 bytes a position (8 (K + M) + 12 with int32 ids), 588 with the defaults. Measured on SmolLM2-135M
(tail mass 21% at K = 64), 2048 positions of ``default-prose-eval``, root mean square over 12 to 16 seeds: error of the
mean KL and of its 99th percentile, error at one position relative to the mean KL, and the lower bound of the mean:

       K    M  bytes   4-bit GPTQ, KL 0.0815            FP8, KL 0.0118
                       mean    p99  position  bound     mean    p99  position  bound
      32   64    588   0.2%   3.0%      0.09   -27%     0.2%   0.4%      0.10   -30%
      64   32    588   0.4%   3.6%      0.13   -21%     0.3%   0.4%      0.11   -24%
      64   64    780   0.1%   2.0%      0.07   -21%     0.2%   0.3%      0.07   -24%

For a model far away (KL 0.41, the base without its adapter) the mean errs by 0.5% with K = 64 and by 1.3% with K = 32;
reverse KL, which then rests on few draws, by 2% and 25%. Hence the defaults: of equal sizes the larger K.

Left out: the reference's hidden states, so errors of single blocks cannot be measured from a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qconv.errors import CheckpointError, UsageError
from qconv.validate.cache_format import Arrays, id_dtype, read_cache, write_cache
from qconv.validate.cached_row import TOP, CachedRow, compress

DEFAULT_TOP_K = 64
DEFAULT_SAMPLES = 32


class CacheWriter:
    """Collects the reference's distributions in the order of the positions; `finish` writes them.

    Args:
        k: top tokens kept exactly; all of them where the vocabulary is smaller.
        samples: tokens drawn from the tail for each position; 0 leaves lower bounds of KL only.
        seed: of the draws.

    Raises:
        UsageError: fewer top tokens than top-5 agreement needs, or a negative number of samples.
    """

    def __init__(self, k: int = DEFAULT_TOP_K, samples: int = DEFAULT_SAMPLES, seed: int = 0):
        if k < TOP or samples < 0:
            raise UsageError(
                f"a reference cache needs at least {TOP} top tokens and no negative number of samples, "
                f"got {k} and {samples}"
            )
        self._settings = {"top_k": k, "samples": samples, "seed": seed}
        self._generator = torch.Generator().manual_seed(seed)
        self._parts: list[Arrays] = []
        self._vocab_size: int | None = None

    def add(self, logp_TV: Tensor, targets_T: Tensor) -> CachedRow:
        """Adds positions; they may come in pieces of any length.

        Args:
            logp_TV: the reference's log-probabilities, float32, on any device.
            targets_T: the actual next tokens, int64.

        Returns:
            What was kept, to measure at once what that loses (`cached_row.loss_against`).

        Raises:
            CheckpointError: another vocabulary than before.
            NumericsError: NaN or infinity, or rows that are not log-probabilities.
        """
        size = logp_TV.shape[1]
        if self._vocab_size not in (None, size):
            raise CheckpointError(f"the reference had {self._vocab_size} tokens in its vocabulary and now has {size}")
        self._vocab_size = size
        row = compress(logp_TV, targets_T, self._settings["top_k"], self._settings["samples"], self._generator)
        dtype = id_dtype(size)
        self._parts.append(
            {
                "targets": _array(row.targets_T),
                "target_logp": _array(row.target_logp_T),
                "log_tail": _array(row.log_tail_T),
                "top_ids": _array(row.top_ids_TK).astype(dtype),
                "top_logp": _array(row.top_logp_TK),
                "sample_ids": _array(row.sample_ids_TM).astype(dtype),
                "sample_logp": _array(row.sample_logp_TM),
            }
        )
        return row

    def finish(
        self,
        path: str | Path,
        ids_TS: Tensor,
        documents_TS: Tensor,
        header: Mapping[str, Any],
        loss: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Writes the file, complete or not at all; an existing one is replaced in the last step.

        Args:
            ids_TS: all evaluated rows, int64; the positions that were added are those that have a next token.
            documents_TS: the document of each token, int32, same shape.
            header: JSON content for `ReferenceCache.header`; its ``"fingerprint"`` is from `fingerprint`.
            loss: `cached_row.loss_against` a candidate of the same run, where there was one.

        Returns:
            The losses of storage, as in `ReferenceCache.storage`.

        Raises:
            CheckpointError: positions are missing or too many or of other tokens, or the file cannot be written.
        """
        path = Path(path)
        names = self._parts[0] if self._parts else ()
        arrays: Arrays = {name: np.concatenate([part[name] for part in self._parts]) for name in names}
        targets = arrays.pop("targets", np.empty(0, np.int64))
        if tuple(documents_TS.shape) != tuple(ids_TS.shape) or not np.array_equal(
            _array(ids_TS)[:, 1:].reshape(-1), targets
        ):
            raise CheckpointError(
                f"{path}: {len(targets)} positions were added; they are not those of the {tuple(ids_TS.shape)} "
                f"tokens and {tuple(documents_TS.shape)} document numbers to store"
            )
        if not len(targets):
            raise CheckpointError(f"{path}: no position was added, there is nothing to store")
        num_bytes = sum(array.nbytes for array in arrays.values())
        arrays |= {"ids": _array(ids_TS).astype(np.int32), "documents": _array(documents_TS).astype(np.int32)}
        tail = np.exp(arrays["log_tail"])
        storage = {
            "tail_mass": {"mean": float(tail.mean()), "p99": float(np.quantile(tail, 0.99)), "max": float(tail.max())},
            "bytes_per_position": num_bytes / len(targets),
            "loss": loss,
        }
        kept = {"top_k": arrays["top_ids"].shape[1], "samples": arrays["sample_ids"].shape[1]}
        content = {
            "settings": {**self._settings, **kept, "vocab_size": self._vocab_size},
            "storage": storage,
            "fingerprint": header["fingerprint"],
            "header": {key: value for key, value in header.items() if key != "fingerprint"},
        }
        write_cache(path, content, arrays)
        return storage


class ReferenceCache:
    """A cache that was read and checked; build with `open`.

    Attributes:
        path: of the file.
        ids_TS, documents_TS: the evaluated rows, int64 and int32 ``[R, S]``.
        header: what the writer's caller gave, without the fingerprint.
        fingerprint: what was measured; see `fingerprint.check_fingerprint`.
        settings: ``top_k``, ``samples`` (both as kept), ``seed``, ``vocab_size``.
        storage: ``tail_mass`` (``mean``, ``p99``, ``max``), ``bytes_per_position``, and ``loss`` or None.
    """

    def __init__(self, path: Path, content: Mapping[str, Any], arrays: Arrays):
        self.path = path
        self.header: dict[str, Any] = content["header"]
        self.fingerprint: dict[str, Any] = content["fingerprint"]
        self.settings: dict[str, int] = content["settings"]
        self.storage: dict[str, Any] = content["storage"]
        self.sha256: str = content["sha256"]
        self.ids_TS = torch.from_numpy(arrays["ids"].astype(np.int64))
        self.documents_TS = torch.from_numpy(arrays["documents"].copy())
        self._arrays = arrays

    @property
    def num_rows(self) -> int:
        return len(self.ids_TS)

    @property
    def num_positions(self) -> int:
        return self.num_rows * (self.ids_TS.shape[1] - 1)

    @property
    def vocab_size(self) -> int:
        return self.settings["vocab_size"]

    @property
    def is_lower_bound(self) -> bool:
        """Whether KLs from this cache are lower bounds: it has a tail and no samples of it."""
        return self.settings["samples"] == 0 and self.settings["top_k"] < self.vocab_size

    @staticmethod
    def open(path: str | Path) -> ReferenceCache:
        """Reads a cache into memory.

        Raises:
            CheckpointError: no such file, truncated, damaged, of another format, or inconsistent.
            NumericsError: NaN, infinity, or values that are no log-probabilities.
        """
        path = Path(path)
        content, arrays = read_cache(path)
        return ReferenceCache(path, content, arrays)

    def row(self, index: int) -> CachedRow:
        """The positions of one evaluated row, on the CPU; `CachedRow` can be sliced."""
        length = self.ids_TS.shape[1] - 1
        part = slice(index * length, (index + 1) * length)
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")

        def ids(name: str) -> Tensor:
            return torch.from_numpy(self._arrays[name][part].astype(np.int64))

        def values(name: str) -> Tensor:
            return torch.from_numpy(self._arrays[name][part].copy())

        return CachedRow(
            vocab_size=self.vocab_size,
            targets_T=self.ids_TS[index, 1:],
            target_logp_T=values("target_logp"),
            top_ids_TK=ids("top_ids"),
            top_logp_TK=values("top_logp"),
            log_tail_T=values("log_tail"),
            sample_ids_TM=ids("sample_ids"),
            sample_logp_TM=values("sample_logp"),
        )


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().cpu().contiguous().numpy()
    return array
