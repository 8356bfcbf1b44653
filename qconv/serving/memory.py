"""What a model takes on each GPU that serves it: weights from the files, keys and values from the config.

Keys and values: every layer keeps 2 x heads x features for a token (MLA: its latent), in pages of 16 tokens (vLLM,
Kwon et al. 2023, section 4.1), or the last of them where its attention slides. Not counted: activations, CUDA graphs
and the engine itself, which it measures when it starts; layers whose state does not grow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qconv.decoder_shape import DecoderShape
from qconv.tensor_parallel import share_of
from qconv.types import TensorSpec

PAGE = 16
USABLE = 0.9
"""Of a GPU: what vLLM, SGLang and TensorRT-LLM take by themselves."""


@dataclass(frozen=True, kw_only=True)
class ServingMemory:
    """All on one GPU, in bytes.

    Attributes:
        weights: stored tensors, split or copied.
        adapters: LoRA weights; engines keep each on every GPU, counted as unsplit.
        per_token: keys and values of a token, in layers that keep all of them.
        per_sequence: of a sequence of ``context`` tokens, sliding layers less.
        concurrency: sequences at a time.
        gpu: of the GPU; None = not said.
    """

    weights: int
    adapters: int
    per_token: int
    per_sequence: int
    context: int
    concurrency: int
    gpu: int | None = None

    @property
    def cache(self) -> int:
        return self.per_sequence * self.concurrency

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.cache

    @property
    def fitting_sequences(self) -> int | None:
        """Sequences of the whole context that fit beside the weights; None where the GPU is not known."""
        if self.gpu is None:
            return None
        left = int(self.gpu * USABLE) - self.weights - self.adapters
        return max(0, left // self.per_sequence) if self.per_sequence else self.concurrency

    def as_dict(self) -> dict[str, Any]:
        return {
            "weights_bytes": self.weights,
            "adapters_bytes": self.adapters,
            "cache_bytes_per_token": self.per_token,
            "cache_bytes_per_sequence": self.per_sequence,
            "cache_bytes": self.cache,
            "total_bytes": self.total,
            "context": self.context,
            "concurrency": self.concurrency,
            "gpu_bytes": self.gpu,
            "fitting_sequences": self.fitting_sequences,
        }


def serving_memory(
    shape: DecoderShape,
    stored: Iterable[TensorSpec],
    logical: Mapping[str, TensorSpec],
    *,
    num_gpus: int,
    cache_itemsize: int,
    context: int,
    concurrency: int,
    adapters: int = 0,
    gpu: int | None = None,
) -> ServingMemory:
    """Of one GPU among ``num_gpus``; ``stored`` tensors are parts of modules whose weights ``logical`` names."""
    weights = sum(spec.num_bytes * _share(shape, spec.name, logical, num_gpus) for spec in stored)
    heads = max(1, shape.num_kv_heads // num_gpus)
    of_token = (2 * heads * shape.head_dim if shape.latent is None else shape.latent) * cache_itemsize
    pages = -(-context // PAGE) * PAGE
    kept = sum(pages if window is None else min(pages, -(-window // PAGE) * PAGE) for window in shape.windows)
    return ServingMemory(
        weights=round(weights),
        adapters=adapters,
        per_token=of_token * len(shape.windows),
        per_sequence=of_token * kept,
        context=context,
        concurrency=concurrency,
        gpu=gpu,
    )


def _share(shape: DecoderShape, name: str, logical: Mapping[str, TensorSpec], num_gpus: int) -> float:
    module = name.rpartition(".")[0]
    while module and f"{module}.weight" not in logical:
        module = module.rpartition(".")[0]
    weight = logical.get(f"{module}.weight")
    return 1.0 if weight is None else share_of(shape, module, weight.shape, num_gpus)
