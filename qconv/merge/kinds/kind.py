"""What a kind of adapter has to say for its layers to be checked and merged.

Dimensions: N = out, K = in, R = rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from qconv.errors import AdapterError
from qconv.merge.config_values import ConfigReader

if TYPE_CHECKING:
    from qconv.merge.adapter_source import AdapterSource

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
        dtype: of the base weight.
        has_bias: the base has a bias beside the weight.
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
    dtype: torch.dtype
    has_bias: bool
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
            float dtype but for indices. None for a kind that changes the bias alone.
        merged_bias: the new bias ``[N]``, for kinds that change it too; from the old one, what reads the old weight
            ``[N, K]``, the parts and the settings.
        vanishing: parts of which each makes the update nothing when it is all zero.
        vanishing_together: parts that make it nothing when all of them are, as far as the layer has them.
        shared: tensors that layers share: full name in the file -> part. A name that ends with a dot is the beginning
            of several, told apart by `shared_of`.
        shared_of: part -> which of the shared tensors a module uses; by default each is a part of every module.
        when_no_layers: why a file of this kind may hold none.
        indices: parts that hold integers.
        rank_key, alpha_key: config keys of rank (or what a layer's size is called) and alpha, when there are such.
        rank_pattern: config key of the patterns that override the rank.
    """

    peft_type: str
    title: str
    parts: frozenset[str]
    check: Callable[[Layer], Settings]
    merged: Callable[[Tensor, Parts, Settings], Tensor] | None
    keys: frozenset[str] = frozenset()
    harmless: frozenset[str] = frozenset()
    merged_bias: Callable[[Tensor, Callable[[], Tensor], Parts, Settings], Tensor] | None = None
    vanishing: frozenset[str] = frozenset()
    vanishing_together: frozenset[str] = frozenset()
    shared: Mapping[str, str] = field(default_factory=dict)
    shared_of: Callable[[AdapterSource, str], Mapping[str, str]] | None = None
    when_no_layers: str = ""
    indices: frozenset[str] = frozenset()
    rank_key: str | None = None
    alpha_key: str | None = None
    rank_pattern: str = "rank_pattern"


def check_indices(part: str, places: Tensor, count: int) -> None:
    """Refuses indices that are not in ``0 .. count - 1``.

    Raises:
        AdapterError: names the part and what it holds.
    """
    if places.numel() and (places.min() < 0 or places.max() >= count):
        raise AdapterError(
            f"{part}: {int(places.min())} to {int(places.max())} do not all lie in 0 to {count - 1}: damaged, or of "
            "another base"
        )
