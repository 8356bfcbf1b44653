"""Adapter tensors that replace a base tensor whole: biases, ``modules_to_save``, a resized vocabulary.

The rule is to do what the unmerged peft model does. A module in ``modules_to_save`` runs on its own
trained copy, apart from what it was tied to. An embedding or head that peft merely saved along
(after a resize, or as the frozen layer under a LoRA on the head) is loaded into the model, and so
into both places when the two are tied.
"""

from __future__ import annotations

from qconv.merge.adapter_source import AdapterSource

WRONG_BASE_DIFFERENCE = 0.01  # far above what a cast to 16 bits does, far below another model


def find_replacements(source: AdapterSource) -> dict[str, str]:
    """Base tensor name -> adapter tensor that takes its place, checked and with ties resolved.

    Raises:
        AdapterError: a tensor that the config does not explain, that stands twice with different
            values, that the base lacks, or that has another shape.
    """
    result: dict[str, str] = {}
    for name, tensors in source.names.plain.items():
        _check_explained(source, name, tensors[0])
        for other in tensors[1:]:
            if not source.are_same(tensors[0], other):
                source.refuse(f"{tensors[0]!r} and {other!r} both stand for {name} and differ; save the adapter again")
        result[name] = tensors[0]
    for name, tensor in source.names.copies.items():
        if name in result:
            source.refuse(f"{result[name]!r} and {tensor!r} both stand for {name}; save the adapter again")
        result[name] = tensor
    for name, tensor in result.items():
        _check_shape(source, name, tensor)
    for name, tensor in source.names.copies.items():
        _check_copy(source, name, tensor)
    _resolve_ties(source, result)
    return result


def drop_unchanged(source: AdapterSource, replacements: dict[str, str]) -> dict[str, str]:
    """Leaves out biases and vocabulary tensors that equal the base, so that what is reported as changed did change.

    Other weights stay: the merge may run on a base quantized after this one was read.
    """
    unquantized = _vocabulary_names(source)
    return {
        name: tensor
        for name, tensor in replacements.items()
        if not (name.endswith(".bias") or name in unquantized) or not source.equals_base(name, tensor)
    }


def _check_explained(source: AdapterSource, name: str, tensor: str) -> None:
    """A tensor stored whole is something the config says was trained, or the vocabulary saved along."""
    config, module = source.config, name.rpartition(".")[0]
    trained_bias = name.endswith(".bias") and (
        config.bias == "all" or (config.bias == "lora_only" and module in source.names.layers)
    )
    saved = source.saves_module(module) or name in _vocabulary_names(source) or name in source.names.tuned
    if not trained_bias and not saved:
        source.base_spec(name, tensor)  # when the base lacks the name, that is the better thing to report
        source.refuse(
            f"spare tensor {tensor!r}: it is no part of a layer of this kind, and {config.where} does not say that it "
            f"was trained (modules_to_save={list(config.modules_to_save)}, bias={config.bias!r}); "
            "add its module to modules_to_save if it was"
        )
    if name.endswith(".weight") and module in source.names.layers:
        source.refuse(
            f"{module} has both a layer of the adapter and a whole trained weight {tensor!r}; it cannot be in "
            "target_modules and in modules_to_save"
        )


def _check_copy(source: AdapterSource, name: str, tensor: str) -> None:
    """Checks a ``base_layer`` tensor: a trained bias, or the frozen weight that peft keeps of a head under LoRA."""
    module = name.rpartition(".")[0]
    if module not in source.names.layers and module not in source.names.rows:
        source.refuse(f"tensor {tensor!r} is the layer under an update, but {module} has none in this file")
    if name.endswith(".bias"):
        if source.config.bias == "none" and name not in _vocabulary_names(source):
            source.refuse(f"spare tensor {tensor!r}: {source.config.where} says bias='none'")
        return
    difference = source.difference_to_base(name, tensor)
    if difference > WRONG_BASE_DIFFERENCE:
        source.refuse(
            f"the adapter keeps in {tensor!r} the {name} it was trained on, and {source.base.location} differs from "
            f"it by {difference:.1%}; pass the base that the adapter was trained on"
        )


def _check_shape(source: AdapterSource, name: str, tensor: str) -> None:
    expected, found = source.base_spec(name, tensor).shape, source.shape(tensor)
    resized = name in _vocabulary_names(source) and len(found) == len(expected) and found[1:] == expected[1:]
    if found != expected and not resized:
        source.refuse(
            f"tensor {tensor!r} replaces {name}: expected shape {list(expected)} as in {source.base.location}, "
            f"found {list(found)}; the adapter belongs to another base model"
        )


def _resolve_ties(source: AdapterSource, result: dict[str, str]) -> None:
    embedding, head = source.vocabulary.embedding, source.vocabulary.head
    if not source.vocabulary.tied or embedding is None or head is None:
        return
    if source.config.tie_trained and embedding in result:
        trained = result[embedding]
        if not source.are_same(trained, result.setdefault(head, trained)):
            source.refuse(
                f"{source.config.where} says ensure_weight_tying, but {trained!r} and {result[head]!r} differ; "
                "save the adapter again"
            )
    for one, other in ((embedding, head), (head, embedding)):
        if one in result and other not in result and not source.saves_module(one.removesuffix(".weight")):
            result[other] = result[one]
    if embedding in result and head in result and source.are_same(result[embedding], result[head]):
        result[head] = result[embedding]  # one name for equal values: the merged model can stay tied


def _vocabulary_names(source: AdapterSource) -> set[str]:
    """Weights and bias of embedding and head: what peft saves along and what a resize may change."""
    names = {source.vocabulary.embedding, source.vocabulary.head} - {None}
    if source.vocabulary.head is not None:
        names.add(source.vocabulary.head.removesuffix("weight") + "bias")
    return {name for name in names if name is not None}
