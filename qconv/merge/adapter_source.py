"""An opened adapter beside its base: what the checks on its layers and whole tensors ask for."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import NoReturn

from qconv.adapter_configs import AdapterOptions
from qconv.errors import AdapterError
from qconv.merge.adapter_config import AdapterConfig
from qconv.merge.adapter_names import AdapterNames
from qconv.merge.compare import relative_difference
from qconv.merge.vocabulary import Vocabulary
from qconv.types import Checkpoint, TensorSpec


@dataclass(frozen=True, kw_only=True)
class AdapterSource:
    """Nothing here is data; tensors are read where they are compared.

    Attributes:
        files: the adapter's tensors, see `expert_adapter` for those of experts.
        where: the adapter's tensor file, for messages.
        options: what was said of it beside its config.
    """

    files: Checkpoint
    where: str
    config: AdapterConfig
    options: AdapterOptions
    names: AdapterNames
    base: Checkpoint
    vocabulary: Vocabulary

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self.files.specs()[tensor].shape

    def rank_of(self, module: str) -> int:
        return self.config.rank_of(self.names.trained_as.get(module, module))

    def scaling_of(self, module: str) -> float:
        return self.config.scaling_of(self.names.trained_as.get(module, module))

    def saves_module(self, module: str) -> bool:
        return self.config.saves_module(self.names.trained_as.get(module, module))

    def in_base(self, name: str) -> str:
        """The base tensor that holds the values of ``name``: itself, or the embedding for a tied head."""
        if self.vocabulary.head_is_embedding and name == self.vocabulary.head and self.vocabulary.embedding:
            return self.vocabulary.embedding
        return name

    def base_spec(self, name: str, tensor: str) -> TensorSpec:
        """The base's spec for ``name``, which the adapter's ``tensor`` changes.

        Raises:
            AdapterError: the base has no such tensor; the message offers the nearest name.
        """
        spec = self.base.specs().get(self.in_base(name))
        if spec is None:
            near = difflib.get_close_matches(name, self.base.specs(), n=1, cutoff=0.0)
            hint = f"; the nearest name there is {near[0]!r}" if near else ""
            raise AdapterError(
                f"{self.where}: tensor {tensor!r} belongs to {name!r}, which {self.base.location} does not have{hint}. "
                "Is this the base that the adapter was trained on?"
            )
        return spec

    def refuse_convolution(self, name: str, tensor: str) -> None:
        """Refuses a base weight of more than two dimensions."""
        shape = self.base_spec(name, tensor).shape
        if len(shape) > 2:
            self.refuse(
                f"tensor {tensor!r} changes {name} {list(shape)}, the weight of a convolution; convolutions are not "
                "read: merge the adapter with peft's merge_and_unload, or train without that module"
            )

    def difference_to_base(self, name: str, tensor: str) -> float:
        """Relative Frobenius difference between an adapter tensor and the base's, over the rows both have."""
        base = self.base.read(self.in_base(name))
        found = self.files.read(tensor)
        rows = min(len(base), len(found))
        return relative_difference(found[:rows], base[:rows])

    def equals_base(self, name: str, tensor: str) -> bool:
        same_shape = self.base_spec(name, tensor).shape == self.shape(tensor)
        return same_shape and self.difference_to_base(name, tensor) == 0

    def are_same(self, first: str, second: str) -> bool:
        """Whether two adapter tensors hold equal values."""
        if first == second:
            return True
        if self.shape(first) != self.shape(second):
            return False
        return relative_difference(self.files.read(first), self.files.read(second)) == 0

    def refuse(self, message: str) -> NoReturn:
        raise AdapterError(f"{self.where}: {message}")
