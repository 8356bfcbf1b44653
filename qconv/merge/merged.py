"""The merged model: a frozen, lazy view of a base with one adapter in it.

Method: each touched tensor is the base's (or the adapter's whole tensor in its place) with the update of its
kind, computed when it is read (see `delta.py` and `kinds/` for the formulas and the rounding).

Tied embeddings: a LoRA or a trained copy belongs to one place. When embedding and head end up
different, the view has a head of its own and its config says so; the result computes what the
unmerged peft model computes. A vocabulary that was resized in training resizes the config.

Left out: more than one adapter (`combine.py` makes one of several).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qconv.errors import AdapterError, CheckpointError, NumericsError
from qconv.finite import all_finite
from qconv.merge.delta import merged_weight
from qconv.merge.transform import transformed_bias, transformed_weight
from qconv.merge.vocabulary import Vocabulary, find_vocabulary, resized_config, untied_config
from qconv.read_ahead import read_ahead
from qconv.types import Adapter, Checkpoint, LoraDelta, TensorSpec, TrainedRows, Transform


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """How one tensor of the merged model is made.

    Attributes:
        base: base tensor it starts from.
        whole: adapter tensor it starts from instead, or None.
        delta: low-rank update of a weight, or None.
        bias_of: the layer whose scaled ``b_bias`` is added (the tensor is its bias), or None.
        transform: update of another kind, or None; ``of_bias`` when the tensor is its layer's bias.
        rows: rows that are replaced, or None.
    """

    base: str
    whole: str | None = None
    delta: LoraDelta | None = None
    bias_of: LoraDelta | None = None
    transform: Transform | None = None
    of_bias: bool = False
    rows: TrainedRows | None = None

    @property
    def is_computed(self) -> bool:
        return self.of_adapter != (None, None, None, None)

    @property
    def of_adapter(self) -> tuple[object, ...]:
        """What the adapter does to the tensor."""
        return self.delta, self.bias_of, self.transform, self.rows

    def is_like(self, other: _Recipe) -> bool:
        """Whether both make the same values, as far as names tell; of the base they start alike."""
        rows = (None if r is None else (r.tensor, r.rows) for r in (self.rows, other.rows))
        return self.whole == other.whole and self.of_adapter[:3] == other.of_adapter[:3] and next(rows) == next(rows)


class MergedCheckpoint:
    """A `Checkpoint` over base and adapter; make it with `merge`.

    Attributes:
        changed: names of the tensors that are not simply the base's.
        notes: what a user should know of the result, in sentences.
    """

    def __init__(
        self,
        base: Checkpoint,
        adapter: Adapter,
        recipes: Mapping[str, _Recipe],
        specs: Mapping[str, TensorSpec],
        config: Mapping[str, Any],
        notes: tuple[str, ...],
    ):
        self._base = base
        self._adapter = adapter
        self._recipes = recipes
        self._specs = specs
        self.config = config
        self.notes = notes
        self.changed = frozenset(recipes)

    @property
    def location(self) -> str:
        return f"{self._base.location} + {self._adapter.location}"

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    def read(self, name: str, device: str = "cpu") -> Tensor:
        """The merged tensor with the shape and dtype of its spec (float32 where the adapter adds to it).

        Raises:
            CheckpointError: no such tensor, or its bytes cannot be read.
            NumericsError: NaN or infinity in what the adapter added to; within `finite.putting_off`, maybe later.
        """
        if name not in self._specs:
            raise CheckpointError(f"{self.location}: no tensor {name!r}")
        recipe = self._recipes.get(name)
        if recipe is None:
            return self._base.read(name, device)
        if recipe.whole is not None:
            tensor = self._adapter.tensors.read(recipe.whole, device)
        else:
            tensor = self._base.read(recipe.base, device)
        if recipe.delta is not None:
            return merged_weight(tensor, self._adapter, recipe.delta, partial(self.read, name, device))
        if recipe.transform is not None:
            if not recipe.of_bias:
                return transformed_weight(tensor, self._adapter, recipe.transform)
            weight = recipe.transform.weight
            read_weight = partial(self._base.read, weight, device)
            return transformed_bias(tensor, read_weight, self._adapter, recipe.transform)
        if recipe.bias_of is not None and recipe.bias_of.b_bias is not None:
            b_bias_N = self._adapter.tensors.read(recipe.bias_of.b_bias, device).float()
            tensor = tensor.float() + recipe.bias_of.scaling * b_bias_N
            if not all_finite(tensor):
                raise NumericsError(f"{self.location}: NaN or infinity in the merged bias {name!r}")
        if recipe.rows is not None:
            values = self._adapter.tensors.read(recipe.rows.tensor, device).float()
            tensor = tensor.float().index_copy(0, torch.tensor(recipe.rows.rows, device=device), values)
        return tensor

    def read_ahead(self, names: Iterable[str], pin: bool = False, max_bytes: int | None = None) -> None:
        """Begins to fetch what merged tensors are made of, see `ReadsAhead`."""
        of_base: list[str] = []
        of_adapter: list[str | None] = []
        for name in names:
            recipe = self._recipes.get(name) or _Recipe(base=name)
            if recipe.whole is None:
                of_base.append(recipe.base)
            else:
                of_adapter.append(recipe.whole)
            if recipe.delta is not None:
                of_adapter += [recipe.delta.a, recipe.delta.b, recipe.delta.magnitude, recipe.delta.singular]
                of_adapter += [recipe.delta.elastic_a, recipe.delta.elastic_b]
            elif recipe.transform is not None:
                of_adapter += recipe.transform.tensors.values()
            elif recipe.bias_of is not None:
                of_adapter.append(recipe.bias_of.b_bias)
            elif recipe.rows is not None:
                of_adapter.append(recipe.rows.tensor)
        read_ahead(self._base, of_base, pin, max_bytes)
        read_ahead(self._adapter.tensors, [name for name in of_adapter if name is not None], pin, max_bytes)


def merge(base: Checkpoint, adapters: Sequence[Adapter]) -> MergedCheckpoint:
    """A view of the base with the adapter merged in; reads no weights until it is read.

    Args:
        base: the dequantized view the adapter was loaded against.
        adapters: exactly one, from `load_adapter`.

    Raises:
        AdapterError: not exactly one adapter, an adapter of another base, or a vocabulary that
            embedding and head disagree on.
    """
    if len(adapters) != 1:
        raise AdapterError(
            f"expected one adapter, found {len(adapters)}"
            + (f" ({', '.join(a.location for a in adapters)})" if adapters else "")
            + "; make one of them with combine_adapters first"
        )
    adapter = adapters[0]
    vocabulary = find_vocabulary(
        base, adapter.deltas.keys() | adapter.transforms.keys() | adapter.replacements.keys() | adapter.rows.keys()
    )
    recipes = _recipes(base, adapter, vocabulary)
    config, notes = dict(base.config), []
    untied = _untie(recipes, vocabulary, adapter)
    if untied is not None:
        config = untied_config(config)
        notes.append(f"{vocabulary.head} was untied from {vocabulary.embedding}: {untied}")
    specs = _specs(base, adapter, recipes)
    rows = _resized_rows(base, adapter, vocabulary, specs)
    if rows is not None:
        old_rows = base.specs()[vocabulary.embedding or ""].shape[0]
        config = resized_config(config, rows)
        notes.append(f"the vocabulary has {rows} rows, {old_rows} in the base: the adapter was trained after a resize")
    return MergedCheckpoint(base, adapter, recipes, specs, config, tuple(notes))


def _recipes(base: Checkpoint, adapter: Adapter, vocabulary: Vocabulary) -> dict[str, _Recipe]:
    biases = {delta.bias: delta for delta in adapter.deltas.values() if delta.b_bias is not None}
    changed = {t.bias: t for t in adapter.transforms.values() if t.changes_bias and t.bias in base.specs()}
    weights = {name: t for name, t in adapter.transforms.items() if t.changes_weight}
    recipes = {}
    updated = [*adapter.deltas, *weights, *biases, *changed, *adapter.replacements, *adapter.rows]
    for name in dict.fromkeys(updated):
        source = vocabulary.embedding if vocabulary.head_is_embedding and name == vocabulary.head else name
        if source is None or source not in base.specs():
            raise AdapterError(
                f"{adapter.location}: changes {name!r}, which {base.location} does not have; "
                "load the adapter against the base that it is merged into"
            )
        recipes[name] = _Recipe(
            base=source,
            whole=adapter.replacements.get(name),
            delta=adapter.deltas.get(name),
            bias_of=biases.get(name),
            transform=weights.get(name) or changed.get(name),
            of_bias=name in changed,
            rows=adapter.rows.get(name),
        )
    return recipes


def _untie(recipes: dict[str, _Recipe], vocabulary: Vocabulary, adapter: Adapter) -> str | None:
    """Gives a tied head its own recipe when its values leave the embedding's, and says why; else None."""
    embedding, head = vocabulary.embedding, vocabulary.head
    if not vocabulary.tied or embedding is None or head is None or recipes.keys().isdisjoint((embedding, head)):
        return None
    of_embedding = recipes.get(embedding, _Recipe(base=embedding))
    of_head = recipes.get(head, _Recipe(base=embedding))
    if of_head.is_like(of_embedding) or _is_tied_update(of_head, of_embedding, adapter):
        if not vocabulary.head_stored:
            recipes.pop(head, None)
        return None
    if not vocabulary.head_stored:
        recipes[head] = of_head
    if of_embedding.is_computed and (of_head.is_computed or of_head.whole != of_embedding.whole):
        return "the adapter trained embedding and head apart, and they differ"
    if of_embedding.is_computed:
        return "the adapter has an update on the embedding, and the unmerged model keeps the base's as its head"
    if of_head.is_computed:
        return "the adapter has an update on the head, which must not change the embedding"
    if of_head.whole is None:
        return "the adapter trained the embedding alone, and the unmerged model keeps the base's as its head"
    if of_embedding.whole is None:
        return "the adapter trained the head alone"
    return "the adapter trained embedding and head apart, and they differ"


def _is_tied_update(of_head: _Recipe, of_embedding: _Recipe, adapter: Adapter) -> bool:
    """Whether embedding and head have one LoRA, stored twice (``ensure_weight_tying``)."""
    ours, theirs = of_head.delta, of_embedding.delta
    if ours is None or theirs is None or of_head.whole != of_embedding.whole:
        return False
    if ours.of_embedding or ours.transposed or not theirs.of_embedding:
        return False
    plain = LoraDelta(weight="", a="", b="", rank=ours.rank, scaling=ours.scaling)
    if any(
        replace(one, weight="", a="", b="", transposed=False, of_embedding=False) != plain for one in (ours, theirs)
    ):
        return False
    read = adapter.tensors.read
    return torch.equal(read(ours.a).T, read(theirs.b)) and torch.equal(read(ours.b).T, read(theirs.a))


def _specs(base: Checkpoint, adapter: Adapter, recipes: Mapping[str, _Recipe]) -> dict[str, TensorSpec]:
    """Specs in the base's order; a head that was untied comes last, as transformers has it."""
    specs = dict(base.specs())
    for name, recipe in recipes.items():
        source = base.specs()[recipe.base] if recipe.whole is None else adapter.tensors.specs()[recipe.whole]
        specs[name] = TensorSpec(
            name=name, shape=source.shape, dtype=torch.float32 if recipe.is_computed else source.dtype
        )
    return specs


def _resized_rows(
    base: Checkpoint, adapter: Adapter, vocabulary: Vocabulary, specs: Mapping[str, TensorSpec]
) -> int | None:
    """The new number of vocabulary rows, or None when it is the base's."""
    if vocabulary.embedding is None:
        return None
    rows = specs[vocabulary.embedding].shape[0]
    head = vocabulary.head or ""
    for name in (head, head.removesuffix("weight") + "bias"):
        if name in specs and specs[name].shape[0] != rows:
            raise AdapterError(
                f"{adapter.location}: the merged {vocabulary.embedding} has {rows} rows and {name} has "
                f"{specs[name].shape[0]}; a resized vocabulary needs both: train with modules_to_save="
                "['embed_tokens', 'lm_head'], or save with save_embedding_layers=True"
            )
    return None if rows == base.specs()[vocabulary.embedding].shape[0] else rows
