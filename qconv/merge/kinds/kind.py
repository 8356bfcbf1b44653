"""What a kind of adapter has to say for its layers to be checked and merged.

Dimensions: N = out, K = in, R = rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import Tensor

from qconv.errors import AdapterError
from qconv.merge.config_values import ConfigReader

Parts = Mapping[str, Tensor]
Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of an adapter file beside its base weight ``[N, K]``; shapes alone.

    Attributes:
        where: the adapter's tensor file, for messages.
        module: the base module that it changes.
        shapes: of the layer's tensors and of those that all layers share, by part.
        rank, scaling: of this layer, after patterns; 1 for a kind that has none.
        read: the adapter's config.
        seen: parts that were asked for; what is left over is spare.
    """

    where: str
    module: str
    shapes: Mapping[str, tuple[int, ...]]
    n: int
    k: int
    rank: int
    scaling: float
    read: ConfigReader
    seen: set[str] = field(default_factory=set)

    def shape(self, part: str, ndim: int) -> tuple[int, ...]:
        """The shape of a part that has to be there."""
        self.seen.add(part)
        if part not in self.shapes:
            self.refuse(f"has no {part} (found only {', '.join(self.shapes)}); the file is incomplete")
        shape = self.shapes[part]
        if len(shape) != ndim:
            self.refuse(
                f"expected {part} with {ndim} dimensions, found {list(shape)}; convolutions are not read, "
                "and a flat or empty tensor means that a sharded training run did not gather it"
            )
        return shape

    def expect(self, part: str, *shape: int) -> None:
        found = self.shape(part, len(shape))
        if found != shape:
            self.refuse(
                f"expected {part} of shape {list(shape)} for a weight [{self.n}, {self.k}], found {list(found)}; "
                "config and tensors are not of one adapter, or it belongs to another base model"
            )

    def refuse(self, message: str) -> NoReturn:
        raise AdapterError(f"{self.where}: {self.module} {message}")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of adapter that is merged.

    Attributes:
        peft_type: as in ``adapter_config.json``.
        title: name and paper.
        parts: tensors of a layer, as the file names them after the module.
        keys: of the config, that decide the merge.
        harmless: of the config, without effect on the merged weights once training is over.
        check: refuses a layer that does not fit; returns what `merged` needs beside the tensors.
        merged: the new weight ``[N, K]`` from the old one (not changed), the parts and the settings, all of one
            float dtype but for indices.
        merged_bias: the new bias ``[N]``, for kinds that change it too.
        vanishing: parts that make the update nothing when they are all zero.
        shared: tensors that all layers share: full name in the file -> part.
        indices: parts that hold integers.
        rank_key, alpha_key: config keys of rank (or what a layer's size is called) and alpha, when there are such.
        rank_pattern: config key of the patterns that override the rank.
    """

    peft_type: str
    title: str
    parts: frozenset[str]
    check: Callable[[Layer], Settings]
    merged: Callable[[Tensor, Parts, Settings], Tensor]
    keys: frozenset[str] = frozenset()
    harmless: frozenset[str] = frozenset()
    merged_bias: Callable[[Tensor, Parts, Settings], Tensor] | None = None
    vanishing: frozenset[str] = frozenset()
    shared: Mapping[str, str] = field(default_factory=dict)
    indices: frozenset[str] = frozenset()
    rank_key: str | None = None
    alpha_key: str | None = None
    rank_pattern: str = "rank_pattern"
