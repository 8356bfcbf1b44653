"""Which tensor of a candidate is to be compared with which expected one, and which file it lies in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from qconv.types import Checkpoint, QuantizedLinear, Scheme


class Candidate(Checkpoint, Protocol):
    """A dequantized view (`qconv.convert.DequantizedCheckpoint` is one)."""

    @property
    def kind(self) -> str:
        """``"plain"``, ``"bnb-..."`` or the name of an integer or float8 format."""

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        """Of the modules whose integer or float8 codes can be read."""

    @property
    def quantized_modules(self) -> tuple[str, ...]:
        """Names without ``.weight``."""

    def read_quantized(self, module: str, device: str = "cpu") -> QuantizedLinear:
        """Codes and scales of one module (integer and float8 formats)."""


# Buffers that old versions of transformers stored: constants of the architecture.
BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


def is_tied(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.config.get("tie_word_embeddings", False))


def is_head(name: str) -> bool:
    return name.endswith("lm_head.weight")


def pairs_of(expected: Checkpoint, candidate: Checkpoint) -> dict[str, str]:
    """Tensors of the candidate and what to compare them with; a tied head goes with the embedding."""
    wanted, found = expected.specs(), candidate.specs()
    pairs = {n: n for n in found if n in wanted and wanted[n].shape == found[n].shape}
    embedding = next((n for n in wanted if n.endswith(("embed_tokens.weight", "wte.weight"))), None)
    for name in found:
        if name not in wanted and is_head(name) and embedding and is_tied(expected):
            pairs[name] = embedding
    return pairs


def is_buffer(name: str) -> bool:
    """Whether readers compute this tensor themselves."""
    return name.endswith(BUFFERS)


def files_of(files: Mapping[str, str], candidate: Candidate) -> dict[str, str]:
    """Shards by logical name: of a quantized weight, the shard of the first of its stored tensors."""
    result = {name: files[name] for name in candidate.specs() if name in files}
    modules = {module: f"{module}.weight" for module in candidate.quantized_modules}
    for stored, file in files.items():
        weight = modules.get(stored.rpartition(".")[0].removesuffix(".weight"))
        if weight is not None:
            result.setdefault(weight, file)
    return result
