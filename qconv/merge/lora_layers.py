"""The LoRA layers of an adapter, each checked against the base weight it changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from qconv.merge.adapter_source import AdapterSource
from qconv.merge.variants import check_elastic, could_be_pooled, find_pooling
from qconv.types import LoraDelta

# Model types whose linears are Conv1D layers, stored [in, out]; only the head is a Linear.
CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_SPELLED = {
    "a": "lora_A",
    "b": "lora_B",
    "embedding_a": "lora_embedding_A",
    "embedding_b": "lora_embedding_B",
    "b_bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
    "singular": "lora_E or lora_diag",
    "elastic_a": "lora_default_A_scale",
    "elastic_b": "lora_default_B_scale",
}
_SAID_BY = {"b_bias": "lora_bias", "magnitude": "use_dora"}
_OF_TRAINING = {
    "velora": ("velora",),
    "monteclora": tuple(
        f"monteclora_{part}" for part in ("weights", "weights_prior", "variances_prior", "deviations_prior")
    ),
}
_SPELLED |= {part: f"tensor of {scheme}_config" for scheme, parts in _OF_TRAINING.items() for part in parts}
_SAID_BY |= {part: f"{scheme}_config" for scheme, parts in _OF_TRAINING.items() for part in parts}


def find_deltas(
    source: AdapterSource, replacements: Mapping[str, str], linear_weights: Collection[str] | None
) -> dict[str, LoraDelta]:
    """Base weight -> its low-rank update.

    Raises:
        AdapterError: a part is missing or spare, a rank or shape does not fit, the base lacks the
            weight or the bias, or the weight is no linear layer's.
    """
    deltas = {}
    for module, parts in source.names.layers.items() if source.config.kind is None else ():
        _check_parts(source, module, parts)
        delta = _delta(source, module, parts, replacements)
        is_linear = linear_weights is None or delta.weight in linear_weights
        if not (is_linear or delta.of_embedding or delta.weight == source.vocabulary.head):
            source.refuse(f"tensor {delta.a!r} is a LoRA on {delta.weight}, which is not the weight of a linear layer")
        deltas[delta.weight] = delta
    _check_squares(source, deltas)
    return deltas


def _check_parts(source: AdapterSource, module: str, parts: Mapping[str, str]) -> None:
    config = source.config
    of_embedding = "embedding_a" in parts or "embedding_b" in parts
    wanted_parts = {"a": not of_embedding, "b": not of_embedding}
    wanted_parts |= {"embedding_a": of_embedding, "embedding_b": of_embedding}
    wanted_parts |= {"b_bias": config.lora_bias, "magnitude": config.use_dora}
    if source.options.kasa is not None and (config.is_kasa or config.is_adalora or config.use_dora):
        source.refuse(
            f"--kasa {source.options.kasa} is for plain LoRA with a lora_diag in every layer, and {config.where} says "
            + ("kasa_config, which is peft's: drop the option" if config.is_kasa else "another variant")
        )
    wanted_parts["singular"] = config.is_adalora or config.is_kasa or source.options.kasa is not None
    wanted_parts |= dict.fromkeys(("elastic_a", "elastic_b"), source.options.ir_qlora is not None)
    for scheme, own in _OF_TRAINING.items():
        wanted_parts |= dict.fromkeys(own, scheme in config.of_training)
    for part, wanted in wanted_parts.items():
        if wanted and part not in parts:
            found = ", ".join(map(repr, parts.values()))
            source.refuse(f"{module} has no {_SPELLED[part]} (found only {found}); the file is incomplete")
        if not wanted and part in ("a", "b") and part in parts:
            source.refuse(f"spare tensor {parts[part]!r}: {module} has a LoRA as an embedding; keep one")
        if not wanted and part in parts:
            if part.startswith("elastic"):
                source.refuse(
                    f"tensor {parts[part]!r} is IR-QLoRA's; its config does not say on which base it was trained: "
                    "--ir-qlora calibrated (W - tau in 4 bits, as its authors do) or plain (bitsandbytes' own 4 bits)"
                )
            if part == "singular":
                source.refuse(
                    f"tensor {parts[part]!r} is KaSA's, and {config.where} has no kasa_config, which peft writes: if "
                    "the code of its authors' repository wrote it, say --kasa repository (it cuts the base otherwise)"
                )
            source.refuse(
                f"spare tensor {parts[part]!r}: {config.where} says that {_SAID_BY[part]} is false or not set"
            )


def _delta(source: AdapterSource, module: str, parts: Mapping[str, str], replacements: Mapping[str, str]) -> LoraDelta:
    weight, of_embedding = module + ".weight", "embedding_a" in parts
    a, b = (parts["embedding_a"], parts["embedding_b"]) if of_embedding else (parts["a"], parts["b"])
    source.refuse_convolution(weight, a)
    base_shape = source.base_spec(weight, a).shape
    if weight in replacements:
        base_shape = source.shape(replacements[weight])
    pooled = find_pooling(source, module, a, b, base_shape)
    _check_factors(source, module, a, b, base_shape, pooled.inputs)
    delta = LoraDelta(
        weight=weight,
        a=a,
        b=b,
        rank=source.rank_of(module),
        scaling=source.scaling_of(module) * pooled.factor,
        transposed=of_embedding or _is_transposed(source, weight, a, b, base_shape, pooled.inputs),
        b_bias=parts.get("b_bias"),
        magnitude=parts.get("magnitude"),
        singular=parts.get("singular"),
        of_embedding=of_embedding,
        pooled=pooled.inputs,
        elastic_a=parts.get("elastic_a"),
        elastic_b=parts.get("elastic_b"),
        dropped=_dropped(source, module, base_shape),
    )
    if of_embedding and base_shape != (source.shape(a)[1], source.shape(b)[0]):
        source.refuse(
            f"{a!r} {list(source.shape(a))} and {b!r} {list(source.shape(b))} update an embedding of "
            f"{source.shape(a)[1]} rows of {source.shape(b)[0]}: {weight} is {list(base_shape)} in "
            f"{source.base.location}; the adapter belongs to another base model"
        )
    num_out = source.shape(b)[0]
    for vector in (delta.b_bias, delta.magnitude):
        if vector is not None and source.shape(vector) != (num_out,):
            source.refuse(f"tensor {vector!r}: expected shape [{num_out}], found {list(source.shape(vector))}")
    singular_shape = (delta.rank, 1) if source.config.is_adalora else (delta.rank,)
    if delta.singular is not None and source.shape(delta.singular) != singular_shape:
        source.refuse(
            f"tensor {delta.singular!r}: expected shape {list(singular_shape)}, found "
            f"{list(source.shape(delta.singular))}"
        )
    check_elastic(source, delta, *(base_shape[::-1] if delta.transposed else base_shape))
    is_kasa = delta.singular is not None and not source.config.is_adalora
    if is_kasa and (delta.dropped >= min(base_shape) or delta.transposed):
        source.refuse(
            f"{module}: KaSA takes the {delta.dropped} smallest components of a base weight {list(base_shape)}, which "
            "has to be a plain linear with more of them"
        )
    if delta.b_bias is not None and delta.bias not in source.base.specs():
        source.refuse(
            f"tensor {delta.b_bias!r} (lora_bias) adds to {delta.bias}, which {source.base.location} does not have; "
            "a model without that bias cannot hold the merged one"
        )
    return delta


def _dropped(source: AdapterSource, module: str, base_shape: tuple[int, ...]) -> int:
    """Components that KaSA took from the base: R of them in peft; its repository keeps the first K - R there are."""
    rank = source.rank_of(module)
    if source.config.is_kasa:
        return rank
    if source.options.kasa is None or len(base_shape) != 2:
        return 0
    return max(0, min(base_shape) - max(0, base_shape[1] - rank))


def _check_factors(
    source: AdapterSource, module: str, a: str, b: str, base_shape: tuple[int, ...], pooled: int
) -> None:
    a_shape, b_shape, rank = source.shape(a), source.shape(b), source.rank_of(module)
    if len(a_shape) != 2 or len(b_shape) != 2:
        source.refuse(
            f"expected 2-D matrices, found {a!r} {list(a_shape)} and {b!r} {list(b_shape)}; a flat or "
            "empty tensor means that a sharded training run did not gather it"
        )
    if a_shape[0] != rank or b_shape[1] != rank:
        source.refuse(
            f"{source.config.where} gives {module} rank {rank}: expected {a!r} [{rank}, in] and {b!r} [out, {rank}], "
            f"found {list(a_shape)} and {list(b_shape)}; config and tensors are not of one adapter"
        )
    update = (b_shape[0], a_shape[1] * pooled)
    if base_shape not in (update, update[::-1]):
        hint = "; a QA-LoRA adapter needs --qa-lora" if could_be_pooled(update, base_shape) else ""
        source.refuse(
            f"{b!r} {list(b_shape)} and {a!r} {list(a_shape)} update a weight of shape {list(update)}: expected that "
            f"of {module}.weight, found {list(base_shape)} in {source.base.location}; "
            f"the adapter belongs to another base model{hint}"
        )


def _is_transposed(
    source: AdapterSource, weight: str, a: str, b: str, base_shape: tuple[int, ...], pooled: int
) -> bool:
    """Whether the base stores this weight ``[in, out]``: the shapes decide, and for squares the kind of layer.

    fan_in_fan_out alone cannot: peft overwrites it for each module, so the file holds the last one's.
    """
    update = (source.shape(b)[0], source.shape(a)[1] * pooled)
    if update != update[::-1]:
        return base_shape != update
    if source.base.config.get("model_type") in CONV1D_MODEL_TYPES:
        return weight != source.vocabulary.head
    return source.config.fan_in_fan_out


def _check_squares(source: AdapterSource, deltas: Mapping[str, LoraDelta]) -> None:
    """Refuses square weights taken as transposed when other weights show that this base transposes nothing."""
    if source.base.config.get("model_type") in CONV1D_MODEL_TYPES or not source.config.fan_in_fan_out:
        return
    linears = {name: d for name, d in deltas.items() if not d.of_embedding}
    oblong = {name: source.shape(d.b)[0] != source.shape(d.a)[1] * d.pooled for name, d in linears.items()}
    squares = [name for name in linears if not oblong[name]]
    straight = [
        name for name, d in linears.items() if oblong[name] and not d.transposed and name != source.vocabulary.head
    ]
    if squares and straight:
        source.refuse(
            f"{source.config.where} says fan_in_fan_out, but {straight[0]} is stored [out, in], so how the square "
            f"{squares[0]} is stored is unclear; set fan_in_fan_out to false if the base has plain linear layers"
        )
