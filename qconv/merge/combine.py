"""Several adapters of one base as one change of it.

Method: ``linear``, ``cat``, ``svd`` and ``sequential`` give a low-rank update again: A of all adapters on top of one
another, B beside one another with weight and scaling in them, so ``B @ A`` is the weighted sum of the updates, exactly.
``svd`` truncates that sum (see `low_rank.py`). That makes an `Adapter` like any other, which can be left unmerged to be
compared with. peft's own ``linear`` sums A and B apart, which adds products of one adapter's A with another's B; its
``cat`` is what both names mean here, unless ``factors`` is set: then A and B are combined apart, each with the square
root of weight and scaling, as peft does with ``linear``, ``ties``, ``dare_*`` and ``magnitude_prune``. ``sequential``
is the sum with weights 1, where a later adapter was trained on what the earlier ones made, and a later one's whole
tensors replace an earlier one's.

The others (see `elementwise.py`) give an update of full rank: a view of the base that has it; with a rank, its leading
components (peft's ``*_svd``).

Left out, and refused: DoRA (its magnitude is of one weight and one adapter) and lora_bias.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qconv.adapter_configs import CombinationConfig
from qconv.errors import AdapterError, CheckpointError, NumericsError
from qconv.finite import all_finite
from qconv.merge.delta import delta_weight, factors
from qconv.merge.elementwise import combined_update
from qconv.merge.low_rank import low_rank
from qconv.merge.merged import MergedCheckpoint, merge
from qconv.read_ahead import read_ahead
from qconv.types import Adapter, Checkpoint, LoraDelta, TensorSpec

Part = tuple[Adapter, LoraDelta, float]


def combine_adapters(adapters: Sequence[Adapter], config: CombinationConfig) -> Adapter:
    """One adapter for the methods that give a low-rank update; for the others, one of the whole tensors alone.

    Raises:
        AdapterError: an adapter has what cannot be combined, or two replace one tensor.
    """
    parts = combined_parts(adapters, config)
    replaced = _replaced(adapters, config)
    tensors = _CombinedTensors(adapters, parts if config.is_low_rank else {}, replaced, config)
    return Adapter(
        tensors=tensors,
        deltas=tensors.deltas,
        replacements={name: name for name in replaced},
        trained_on=adapters[0].trained_on,
        backend=adapters[0].backend,
    )


def combined_parts(adapters: Sequence[Adapter], config: CombinationConfig) -> dict[str, list[Part]]:
    """By base weight: the updates of it, with the weight of each adapter.

    Raises:
        AdapterError: DoRA, lora_bias, or adapters that take a weight to be stored differently.
    """
    parts: dict[str, list[Part]] = {}
    for adapter, weight in zip(adapters, config.resolved_weights, strict=True):
        if adapter.rows:
            raise AdapterError(
                f"{adapter.location}: has trained rows of {' and '.join(adapter.rows)}, which cannot be combined with "
                "other adapters; merge it by itself first, and combine the rest on the result"
            )
        if adapter.transforms or any(d.singular is not None for d in adapter.deltas.values()):
            raise AdapterError(
                f"{adapter.location}: peft_type {adapter.kind} cannot be combined with others, that is for LoRA "
                "alone; merge it by itself first, and combine the rest on the result"
            )
        for delta in adapter.deltas.values():
            if delta.magnitude is not None or delta.b_bias is not None:
                what = "DoRA: its magnitude rescales" if delta.magnitude is not None else "lora_bias: it adds to"
                raise AdapterError(
                    f"{adapter.location}: {delta.module} has {what} the layer for this adapter alone, so it cannot be "
                    "combined with others; merge it by itself first, and combine the rest on the result"
                )
            parts.setdefault(delta.weight, []).append((adapter, delta, weight))
    for name, found in parts.items():
        if len({delta.transposed for _, delta, _ in found}) > 1:
            places = " and ".join(adapter.location for adapter, _, _ in found)
            raise AdapterError(f"{places} disagree on whether {name} is stored transposed (fan_in_fan_out)")
    return parts


def _replaced(adapters: Sequence[Adapter], config: CombinationConfig) -> dict[str, tuple[Adapter, str]]:
    result: dict[str, tuple[Adapter, str]] = {}
    for adapter, weight in zip(adapters, config.resolved_weights, strict=True):
        if adapter.replacements and weight != 1:
            raise AdapterError(
                f"{adapter.location}: brings {next(iter(adapter.replacements))} whole (modules_to_save or a trained "
                f"bias), to which its weight {weight:g} does not apply; give this adapter the weight 1"
            )
        for name, tensor in adapter.replacements.items():
            other = next((one for one in adapters if name in one.deltas), None)
            if other is not None:
                raise AdapterError(
                    f"{adapter.location} brings {name} whole and {other.location} has a LoRA on it; these cannot be "
                    "combined: merge one first, and the other into the result"
                )
            if name in result and config.method != "sequential":
                raise AdapterError(
                    f"{result[name][0].location} and {adapter.location} both bring a whole {name}, which cannot be "
                    "weighed; drop one of them, or use --combine sequential, where the later one counts"
                )
            result[name] = (adapter, tensor)
    return result


class _CombinedTensors:
    """The tensors of a combined adapter: factors made when they are read, whole tensors from where they lie."""

    def __init__(
        self,
        adapters: Sequence[Adapter],
        parts: Mapping[str, list[Part]],
        replaced: Mapping[str, tuple[Adapter, str]],
        config: CombinationConfig,
    ):
        self.location = " + ".join(adapter.location for adapter in adapters)
        self.config: Mapping[str, Any] = adapters[0].tensors.config
        self._parts = parts
        self._replaced = replaced
        self._config = config
        self._factors: tuple[str, Tensor, Tensor] | None = None  # of the weight that svd decomposed last
        self._decomposing = threading.Lock()  # weights are read by several threads
        self._specs: dict[str, TensorSpec] = {}
        self.deltas: dict[str, LoraDelta] = {}
        for name, (adapter, tensor) in replaced.items():
            spec = adapter.tensors.specs()[tensor]
            self._specs[name] = TensorSpec(name=name, shape=spec.shape, dtype=spec.dtype)
        for weight, found in parts.items():
            self._add_delta(weight, found)

    def _add_delta(self, weight: str, found: list[Part]) -> None:
        adapter, delta, _ = found[0]
        k, n = adapter.tensors.specs()[delta.a].shape[1], adapter.tensors.specs()[delta.b].shape[0]
        k *= delta.pooled
        total = sum(one.rank for _, one, _ in found)
        if self._is_truncated:
            total = min(self._config.rank or max(one.rank for _, one, _ in found), n, k)
        if self._config.factors:
            total = found[0][1].rank
            if any(one.rank != total for _, one, _ in found):
                ranks = ", ".join(f"{one.rank} ({adapter.location})" for adapter, one, _ in found)
                raise AdapterError(
                    f"--combine-factors puts A upon A and B upon B, and {weight} has ranks {ranks}; combine whole "
                    "updates instead, with --combine-rank for a low-rank result"
                )
        made = LoraDelta(
            weight=weight,
            a=weight + ":A",
            b=weight + ":B",
            rank=total,
            scaling=1.0,
            transposed=delta.transposed,
            of_embedding=delta.of_embedding,
        )
        self.deltas[weight] = made
        for name, shape in ((made.a, (total, k)), (made.b, (n, total))):
            self._specs[name] = TensorSpec(name=name, shape=shape, dtype=torch.float32)

    @property
    def _is_truncated(self) -> bool:
        return self._config.method == "svd" or self._config.rank is not None

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str, device: str = "cpu") -> Tensor:
        """A factor in float32, or a whole tensor as it is stored.

        Raises:
            CheckpointError: no such tensor, or its bytes cannot be read.
        """
        if name in self._replaced:
            adapter, tensor = self._replaced[name]
            return adapter.tensors.read(tensor, device)
        weight, _, side = name.rpartition(":")
        if name not in self._specs:
            raise CheckpointError(f"{self.location}: no tensor {name!r}")
        if self._is_truncated:
            with self._decomposing:
                a_RK, b_NR = self._truncated(weight)
            return (a_RK if side == "A" else b_NR).to(device, copy=True)
        made = [
            (*factors(adapter, delta, device), delta.scaling * share) for adapter, delta, share in self._parts[weight]
        ]
        if self._config.factors:
            factors_of_side = [a_RK if side == "A" else b_NR for a_RK, b_NR, _ in made]
            roots = [math.sqrt(abs(scale)) * (-1 if side == "A" and scale < 0 else 1) for *_, scale in made]
            return combined_update(factors_of_side, roots, self._config, name)
        if side == "A":
            return torch.cat([a_RK for a_RK, _, _ in made])
        return torch.cat([b_NR * scaling for _, b_NR, scaling in made], dim=1)

    def _truncated(self, weight: str) -> tuple[Tensor, Tensor]:
        """The leading singular vectors of the sum, padded with zeros where the sum has fewer."""
        if self._factors is None or self._factors[0] != weight:
            made = self.deltas[weight]
            shape_a, shape_b = self._specs[made.a].shape, self._specs[made.b].shape
            pairs = [(*factors(adapter, delta), delta.scaling) for adapter, delta, _ in self._parts[weight]]
            updates = [b_NR * scaling @ a_RK for a_RK, b_NR, scaling in pairs]
            d_NK = combined_update(updates, [share for *_, share in self._parts[weight]], self._config, weight)
            best = low_rank(d_NK, rank=made.rank).factors
            a_RK, b_NR = torch.zeros(shape_a), torch.zeros(shape_b)
            a_RK[: best.rank], b_NR[:, : best.rank] = best.a_RK, best.b_NR
            self._factors = (weight, a_RK, b_NR)
        return self._factors[1], self._factors[2]


class CombinedCheckpoint:
    """A `Checkpoint`: a base with an update of full rank, which several adapters make together.

    Attributes:
        changed: names of the tensors that are not simply the base's.
        notes: what a user should know of the result, in sentences.
    """

    def __init__(self, base: Checkpoint, adapters: Sequence[Adapter], config: CombinationConfig):
        whole = combine_adapters(adapters, config)
        self._base: Checkpoint = merge(base, [whole]) if whole.replacements else base
        self._parts = combined_parts(adapters, config)
        self._method = config
        self.location = " + ".join([base.location, *(adapter.location for adapter in adapters)])
        self.config = self._base.config
        self.notes: tuple[str, ...] = self._base.notes if isinstance(self._base, MergedCheckpoint) else ()
        self._specs = dict(self._base.specs())
        for name in self._parts:
            if name not in self._specs:
                raise AdapterError(
                    f"{self.location}: a LoRA on {name}, which is tied to the embedding, is combined by linear, cat, "
                    f"svd or sequential, not by {config.method}"
                )
            self._specs[name] = TensorSpec(name=name, shape=self._specs[name].shape, dtype=torch.float32)
        self.changed = frozenset(self._parts) | frozenset(whole.replacements)

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str, device: str = "cpu") -> Tensor:
        """The tensor, in float32 where the adapters add to it.

        Raises:
            CheckpointError: no such tensor, or its bytes cannot be read.
            NumericsError: NaN or infinity in the sum.
        """
        tensor = self._base.read(name, device)
        parts = self._parts.get(name)
        if parts is None:
            return tensor
        updates = [delta_weight(adapter, delta, device) for adapter, delta, _ in parts]
        result = tensor.float() + combined_update(updates, [share for *_, share in parts], self._method, name)
        if not all_finite(result):
            raise NumericsError(f"{self.location}: NaN or infinity in the merged weight {name!r}")
        return result

    def read_ahead(self, names: Iterable[str], pin: bool = False, max_bytes: int | None = None) -> None:
        """Begins to fetch what is stored of the base, see `ReadsAhead`."""
        read_ahead(self._base, names, pin, max_bytes)
