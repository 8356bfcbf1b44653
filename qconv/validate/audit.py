"""Compares a candidate's stored weights with what the merge should give, and names what is wrong.

Token statistics say that a release is wrong; this says which tensors, and why. Every weight of the candidate is
read once and fitted to the expected one (`audit_measure`); the rules in `audit_rules` turn the fits into
findings, one for each cause. One weight at a time is in memory: the candidate's, the expected one, the base's.

What cannot be seen, and is left to the comparison of logits:

- Which base a 4-bit candidate with folded scales (AWQ) was merged into. The difference between the original
  16-bit weights and the 4-bit ones (9% of the norm) is no larger than the rounding of the candidate itself (9 to
  15%). Without folds `audit_cells` tells them apart by their shape; in 8-bit, float8 and 16-bit candidates the
  size is enough.
- An adapter so weak that the rounding noise of all weights together hides it; a note says so.
- Whether an update that is at half its size in a 4-bit candidate lost it to rounding or to a wrong alpha, when
  rounding to nearest on that grid would leave as little. The finding gives both.
- Scales moved between neighbouring layers (AWQ) are checked for balance only where a norm's weight, or the rows
  of another linear of the block, take them back channel by channel. Equal scales of a whole pair (v_proj at
  twice, o_proj at half) change nothing and raise nothing.
- Errors within the storage rounding, by definition, and changes of single values that a norm over the whole
  tensor does not show (in a 4-bit tensor: up to about the square of its rounding error, 1% of its energy).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qconv.on_the_way import mark
from qconv.types import Checkpoint
from qconv.validate import audit_measure
from qconv.validate.audit_folds import FoldVerdict, judge_folds
from qconv.validate.audit_pairs import Candidate, files_of, is_buffer, is_head, is_tied, pairs_of
from qconv.validate.audit_rules import findings_of, is_coarse
from qconv.validate.audit_stored import Stored, lies_on_blocks, share_after_encoding
from qconv.validate.audit_tensor import TensorAudit
from qconv.validate.audit_vectors import compare_vectors, has_plus_one

MAX_ENCODINGS = 3
MAX_SEARCHES = 12  # outliers for which other tensors are tried: more than that have one common cause
SWAP_COSINE, SWAP_GAIN = 0.6, 0.2  # unrelated weights have cosines of 1/sqrt(numel); 2-bit copies still 0.9
OUTLIER_COSINE = 0.8


@dataclass(frozen=True, kw_only=True, eq=False)
class Begun:
    """One tensor that is being measured.

    Attributes:
        finish: gives the result, in any thread, once a `mark` that was set after `WeightAudit.begin` is reached.
        sample: the first values of the stored, the expected and the base's weight, where there are all three.
    """

    finish: Callable[[], TensorAudit]
    sample: tuple[Tensor, Tensor, Tensor] | None = None


class WeightAudit:
    """Feed it tensor by tensor with `add`, in any order, then ask for `findings`.

    `add` is four steps, of which the second and the last need no GPU and may be taken by another thread: `begin`,
    `Begun.finish` and `keep`, `look_again`, and `judge` for a block whose tensors are all there.

    Args:
        expected: the merged view (the base's when there is no adapter).
        base: the base as training saw it.
        candidate: dequantized view of what is stored.
        changed: names of the tensors that the adapter changes (`MergedCheckpoint.changed`).
        files: tensor -> shard file, by stored or logical name; may be empty.
        encode: rounds a weight to the grid that training saw the base on, and back (`simulate` of the base's
            kind); tells a merge into the original 16-bit weights from one into another base. May be None.
    """

    def __init__(
        self,
        *,
        expected: Checkpoint,
        base: Checkpoint,
        candidate: Candidate,
        changed: Collection[str] = (),
        files: Mapping[str, str] | None = None,
        encode: Callable[[Tensor], Tensor] | None = None,
    ):
        self.expected = expected
        self.base = base
        self.candidate = candidate
        self.changed = frozenset(changed)
        self.tensors: dict[str, TensorAudit] = {}
        self._folds: dict[str, FoldVerdict] = {}  # of blocks that were judged
        self._files = files_of(files or {}, candidate)
        self._encode = encode
        self._quantized = frozenset(f"{module}.weight" for module in candidate.quantized_modules)
        self._pairs = pairs_of(expected, candidate)
        self._num_searches = 0
        self._num_encodings = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors to add: those of the candidate that have a counterpart of the same shape."""
        return tuple(self._pairs)

    @property
    def missing(self) -> list[str]:
        """Expected tensors that the candidate does not have (a head that is tied may be absent)."""
        found = set(self._pairs.values()) | set(self.reshaped)
        tied = is_tied(self.candidate) and is_tied(self.expected)
        names = [n for n in self.expected.specs() if n not in found and not is_buffer(n)]
        return [n for n in names if not (tied and is_head(n))]

    @property
    def unexpected(self) -> list[str]:
        """Tensors of the candidate that nothing is expected for."""
        known = self._pairs.keys() | self.reshaped.keys()
        return [n for n in self.candidate.specs() if n not in known and not is_buffer(n)]

    @property
    def reshaped(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Tensors of another shape than expected: name -> (expected, found)."""
        expected, found = self.expected.specs(), self.candidate.specs()
        return {n: (expected[n].shape, found[n].shape) for n in found if n in expected and n not in self._pairs}

    def file_of(self, name: str) -> str:
        """The shard that a tensor of the candidate lies in, or ""."""
        return self._files.get(name, "")

    @property
    def files(self) -> Mapping[str, str]:
        """Logical tensor name -> shard."""
        return self._files

    def add(self, name: str, device: str = "cpu") -> TensorAudit:
        """Measures one tensor of `names`.

        Raises:
            CheckpointError, NumericsError: a tensor cannot be read, or the merge itself is not finite.
        """
        begun, arrived = self.begin(name, device), mark(device)
        arrived()
        self.keep(begun.finish())
        return self.look_again(name, device)

    @torch.no_grad()
    def begin(self, name: str, device: str = "cpu", sample_size: int = 0) -> Begun:
        """Reads one tensor of `names` and what it is compared with, and begins to measure it.

        Args:
            sample_size: of `Begun.sample`, in values; 0 = none is taken.

        Raises:
            CheckpointError, NumericsError: a tensor cannot be read, or the merge itself is not finite.
        """
        own = self._pairs[name]
        stored, dtype, bits = self._read(name, device)
        facts: dict[str, Any] = {
            "name": name,
            "expected_name": own,
            "shape": self.candidate.specs()[name].shape,
            "changed": own in self.changed,
            "dtype": dtype,
            "bits": bits,
            "file": self.file_of(name),
        }
        expected = self.expected.read(own, device).float()
        if len(facts["shape"]) < 2:
            plus_one = "norm" in name and has_plus_one(self.candidate.config)
            finish_vector = compare_vectors(stored, expected, plus_one)
            return Begun(finish=lambda: TensorAudit(**facts, **finish_vector()))
        expected = _matrix(expected)
        base = self._base_of(own, device)
        finish_fit = audit_measure.begin(stored, expected, base)
        if stored.plain is not None:
            facts["on_blocks"] = not stored.nearest_is_known or lies_on_blocks(stored.plain)

        def finish() -> TensorAudit:
            fit = finish_fit()
            return TensorAudit(**facts, fit=fit) if fit is not None else TensorAudit(**facts, is_finite=False)

        if not sample_size or base is None:
            return Begun(finish=finish)
        rows = slice(-(-sample_size // expected.shape[1]))
        parts = stored.values(rows), expected[rows], base[rows]
        first, second, third = (part.flatten()[:sample_size].clone() for part in parts)
        return Begun(finish=finish, sample=(first, second, third))

    def keep(self, result: TensorAudit) -> None:
        """Takes up what was measured."""
        self.tensors[result.name] = result
        self._folds.pop(result.block, None)

    def judge(self, block: str) -> None:
        """Judges the channel scales of one block; `findings` does so for blocks that were not judged before."""
        members = [t for t in self.tensors.values() if t.block == block and t.is_finite]
        self._folds[block] = judge_folds(members, self.candidate.config)

    def look_again(self, name: str, device: str = "cpu") -> TensorAudit:
        """Reads a weight that is far off once more, to tell what it is instead; the result as it is now."""
        result = self.tensors[name]
        fit = result.fit
        if fit is None:
            return result
        if fit.cosine < OUTLIER_COSINE and self._num_searches < MAX_SEARCHES:
            self._num_searches += 1
            resembles = self._search(name, result.expected_name, self._read(name, device)[0], fit.cosine, device)
            result = dataclasses.replace(result, resembles=resembles)
        elif self._encode is not None and self._num_encodings < MAX_ENCODINGS and self._may_be_other_base(result):
            self._num_encodings += 1
            share = self._share_after_encoding(name, result.expected_name, self._encode, device)
            result = dataclasses.replace(result, encoded_share=share)
        self.tensors[name] = result
        return result

    def findings(self) -> list[dict[str, Any]]:
        """What is wrong, most severe first; empty when all that was added is as the merge gives it."""
        for block in dict.fromkeys(t.block for t in self.tensors.values() if t.is_finite and t.block):
            if block not in self._folds:
                self.judge(block)
        return findings_of(
            list(self.tensors.values()),
            self._folds,
            missing=self.missing,
            unexpected=self.unexpected,
            reshaped=self.reshaped,
            files=self._files,
        )

    def _read(self, name: str, device: str) -> tuple[Stored, torch.dtype | None, int | None]:
        if name not in self._quantized:
            values = self.candidate.read(name, device)
            return Stored(plain=_matrix(values), quantized=None), values.dtype, None
        module = name.removesuffix(".weight")
        if module not in self.candidate.schemes:  # bitsandbytes 4-bit, ggml's blocks with minima: no grid is known
            values = self.candidate.read(name, device)
            return Stored(plain=_matrix(values), quantized=None, nearest_is_known=False), None, 4
        quantized = self.candidate.read_quantized(module, device)
        bits = quantized.scheme.bits if quantized.scheme.kind == "int" or quantized.scheme.is_fp4 else None
        return Stored(plain=None, quantized=quantized), None, bits

    def _base_of(self, own: str, device: str) -> Tensor | None:
        """The base's weight, where the adapter changes it and it has the same shape."""
        spec = self.base.specs().get(own) if own in self.changed else None
        if spec is None or spec.shape != self.expected.specs()[own].shape:
            return None
        return _matrix(self.base.read(own, device))

    def _may_be_other_base(self, tensor: TensorAudit) -> bool:
        """More is left over than 16-bit, float8 or 8-bit rounding leaves, and less than between unrelated weights."""
        fit = tensor.fit
        if fit is None or is_coarse(tensor) or not max(0.01, 2 * (fit.rounding or 0.0)) < fit.residual < 0.4:
            return False
        return tensor.expected_name in self.base.specs() and tensor.name.endswith(".weight")

    @torch.no_grad()
    def _share_after_encoding(self, name: str, own: str, encode: Callable[[Tensor], Tensor], device: str) -> float:
        expected, base = _matrix(self.expected.read(own, device).float()), self._base_of(own, device)
        return share_after_encoding(self._read(name, device)[0], expected, expected if base is None else base, encode)

    @torch.no_grad()
    def _search(self, name: str, own: str, stored: Stored, own_cosine: float, device: str) -> str | None:
        """The expected tensor of the same shape, in this block or of this role nearby, that fits much better."""
        specs = self.expected.specs()
        here = TensorAudit(name=own, expected_name=own, shape=specs[own].shape, changed=False)
        best, best_cosine = None, max(SWAP_COSINE, own_cosine + SWAP_GAIN)
        values = stored.values(slice(None))
        for other in _neighbours(here, specs):
            candidate = _matrix(self.expected.read(other, device)).float()
            cosine = float(torch.nn.functional.cosine_similarity(values.flatten(), candidate.flatten(), dim=0))
            if cosine > best_cosine:
                best, best_cosine = other, cosine
        return best


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor.reshape(-1, tensor.shape[-1])


def _neighbours(here: TensorAudit, specs: Mapping[str, Any]) -> list[str]:
    same = [n for n, s in specs.items() if n != here.name and s.shape == here.shape]
    if not here.block:
        return [n for n in same if "." not in n.removeprefix("model.").removesuffix(".weight")]
    stem, _, index = here.block.rpartition(".")
    near = {f"{stem}.{int(index) + step}.{here.role}" for step in (-2, -1, 1, 2)}
    return [n for n in same if n.startswith(here.block + ".") or n in near]
