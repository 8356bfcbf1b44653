"""The input embedding and the output head of a base, and whether they are one tensor.

transformers ties the head to the embedding when the config says ``tie_word_embeddings``, unless
both are stored and differ (its `tie_weights`). A config that does not say is taken as tied when
the head is not stored, or is stored as an equal copy.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qconv.merge.compare import relative_difference
from qconv.types import Checkpoint

EMBEDDING_NAMES = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
HEAD_NAMES = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Names of the embedding ``[V, K]`` and head ``[V, K]`` weights; None when the base has not one of each.

    Attributes:
        head_stored: the base has a tensor of the head's name.
        tied: the head computes with the embedding's values.
    """

    embedding: str | None = None
    head: str | None = None
    head_stored: bool = False
    tied: bool = False

    @property
    def head_is_embedding(self) -> bool:
        """The head has no tensor of its own; its values are those of `embedding`."""
        return self.tied and not self.head_stored

    def names(self) -> frozenset[str]:
        return frozenset(name for name in (self.embedding, self.head) if name is not None)


def find_vocabulary(base: Checkpoint, touched: Collection[str]) -> Vocabulary:
    """Finds both; data is read only when both are stored, may be tied, and one is ``touched``."""
    embeddings = [name for name in base.specs() if _is_one_of(name, EMBEDDING_NAMES)]
    heads = [name for name in base.specs() if _is_one_of(name, HEAD_NAMES)]
    if len(embeddings) != 1 or len(heads) > 1:
        return Vocabulary()
    embedding, says_tied = embeddings[0], _says_tied(base.config)
    if not heads:
        if says_tied is False:
            return Vocabulary(embedding=embedding)
        return Vocabulary(embedding=embedding, head=_head_name(embedding), tied=True)
    head = heads[0]
    tied = says_tied is not False and not {embedding, head}.isdisjoint(touched) and _are_equal(base, embedding, head)
    return Vocabulary(embedding=embedding, head=head, head_stored=True, tied=tied)


def untied_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with ``tie_word_embeddings`` false, in the text part of a composite config too."""
    return _with_value(config, "tie_word_embeddings", False, always=True)


def resized_config(config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    return _with_value(config, "vocab_size", vocab_size, always="text_config" not in config)


def _with_value(config: Mapping[str, Any], key: str, value: Any, always: bool) -> dict[str, Any]:
    result = copy.deepcopy(dict(config))
    if always or key in result:
        result[key] = value
    text = result.get("text_config")
    if isinstance(text, dict) and (key in text or key == "vocab_size"):
        text[key] = value
    return result


def _says_tied(config: Mapping[str, Any]) -> bool | None:
    value = config.get("tie_word_embeddings")
    if value is None and isinstance(config.get("text_config"), Mapping):
        value = config["text_config"].get("tie_word_embeddings")
    return None if value is None else bool(value)


def _head_name(embedding: str) -> str:
    """The name transformers gives the head beside this embedding."""
    if embedding.endswith("embed_in.weight"):
        return "embed_out.weight"
    if embedding.startswith("language_model.model."):
        return "language_model.lm_head.weight"
    return "lm_head.weight"


def _is_one_of(name: str, ends: tuple[str, ...]) -> bool:
    return any(name == end or name.endswith("." + end) for end in ends)


def _are_equal(base: Checkpoint, first: str, second: str) -> bool:
    if base.specs()[first].shape != base.specs()[second].shape:
        return False
    with torch.no_grad():
        return relative_difference(base.read(first), base.read(second)) == 0
