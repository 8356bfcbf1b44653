"""Trained rows of embedding and head: trainable tokens, by themselves or beside a LoRA.

Method: as peft 0.21 does it, ``W'[rows] = trained``; the rows are in the config, their values in the file. A head that
is tied to an embedding with trained rows has them too, unless the file holds rows of its own for the head.
"""

from __future__ import annotations

from typing import Any

from qconv.merge.adapter_source import AdapterSource
from qconv.merge.config_values import short
from qconv.types import TrainedRows


def find_rows(source: AdapterSource) -> dict[str, TrainedRows]:
    """Base weight -> rows that are replaced in it.

    Raises:
        AdapterError: rows that the config does not name, that the weight does not have, or that do not fit it.
    """
    found = {}
    for module, tensor in source.names.rows.items():
        weight = module + ".weight"
        shape = source.base_spec(weight, tensor).shape
        if module in source.names.layers or source.saves_module(module):
            source.refuse(
                f"{module} has trained rows in {tensor!r} and is trained otherwise, too; peft runs no such model"
            )
        if module + ".bias" in source.base.specs():
            source.refuse(
                f"{module} has trained rows in {tensor!r} and a bias, which peft leaves out when it runs them"
            )
        rows = _rows_of(source, module, tensor)
        if len(shape) != 2 or source.shape(tensor) != (len(rows), shape[1]):
            source.refuse(
                f"tensor {tensor!r}: expected {[len(rows), *shape[1:]]}, a row of {weight} for each of the "
                f"{len(rows)} tokens in {source.config.where}, found {list(source.shape(tensor))}"
            )
        found[weight] = TrainedRows(weight=weight, tensor=tensor, rows=rows)
    _check_all_there(source)
    _tie(source, found)
    return found


def check_number_of_rows(source: AdapterSource, rows: dict[str, TrainedRows], replacements: dict[str, str]) -> None:
    """Refuses rows beyond the end of their weight, after what replaces the weight is known.

    Raises:
        AdapterError: names the row.
    """
    for weight, trained in rows.items():
        tensor = replacements.get(weight)
        count = (source.base_spec(weight, trained.tensor).shape if tensor is None else source.shape(tensor))[0]
        if max(trained.rows) >= count:
            source.refuse(
                f"{source.config.where} trains row {max(trained.rows)} of {weight}, which has {count}; the adapter "
                "belongs to another base model, or to one with tokens added: save it with save_embedding_layers=True"
            )


def _rows_of(source: AdapterSource, module: str, tensor: str) -> tuple[int, ...]:
    key = "token_indices" if source.config.read.config["peft_type"] == "TRAINABLE_TOKENS" else "trainable_token_indices"
    value: Any = source.config.read.config.get(key)
    if isinstance(value, dict):
        module = source.names.trained_as.get(module, module)
        named = [name for name in value if module == name or module.endswith("." + name)]
        value = value[named[0]] if len(named) == 1 else None
    is_list = isinstance(value, list) and all(type(row) is int and row >= 0 for row in value)
    if not is_list or not value or len(set(value)) != len(value):
        source.refuse(
            f"tensor {tensor!r} holds rows of {module}: expected {key} in {source.config.where} to list them, each "
            f"once, found {short(source.config.read.config.get(key))}"
        )
    return tuple(value)


def _check_all_there(source: AdapterSource) -> None:
    """Refuses a file without rows that the config says were trained."""
    value = source.config.read.config.get("trainable_token_indices")
    modules = [source.names.trained_as.get(module, module) for module in source.names.rows]
    missing = value and not modules
    if isinstance(value, dict) and not source.vocabulary.tied:
        missing = [name for name in value if not any(m == name or m.endswith("." + name) for m in modules)]
    if missing:
        source.refuse(
            f"{source.config.where} says trainable_token_indices {short(value)}, and the file does not hold the rows; "
            "it is incomplete: save the adapter again"
        )


def _tie(source: AdapterSource, found: dict[str, TrainedRows]) -> None:
    """Gives a tied head the rows of its embedding."""
    embedding, head = source.vocabulary.embedding, source.vocabulary.head
    if not source.vocabulary.tied or embedding is None or head is None or embedding not in found:
        return
    ours, theirs = found[embedding], found.get(head, found[embedding])
    if ours.rows == theirs.rows and source.are_same(ours.tensor, theirs.tensor):
        found[head] = TrainedRows(weight=head, tensor=ours.tensor, rows=ours.rows)  # one name: the model can stay tied
