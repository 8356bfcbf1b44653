"""How a PEFT adapter names its tensors (peft 0.21, and the older spellings it still reads).

A tensor is called ``base_model.model.<module>.<part>``. peft strips the adapter's name on save;
files of older versions keep it, and the usual name ``default`` is accepted in the middle. Other spellings are read by
the rules of `spellings.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from qconv.errors import AdapterError
from qconv.merge.kinds import KINDS
from qconv.merge.spellings import PREFIX, as_peft_spells, in_the_base

_LORA_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "b_bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_diag": "singular",
    "lora_default_A_scale": "elastic_a",
    "lora_default_B_scale": "elastic_b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_velora_embed": "velora",
    "lora_monteclora_sampler.expert_weights": "monteclora_weights",
    "lora_monteclora_sampler.expert_weights_prior": "monteclora_weights_prior",
    "lora_monteclora_sampler.gaussian_var_prior": "monteclora_variances_prior",
    "lora_monteclora_sampler.std_prior": "monteclora_deviations_prior",
}
_PARTS_OF_LOW_RANK = {"LORA": _LORA_PARTS, "ADALORA": {"lora_A": "a", "lora_B": "b", "lora_E": "singular"}}
_HEADS = frozenset(part.partition(".")[0] for part in _LORA_PARTS)
_TUNED = "ln_tuning_layers"
# What peft calls trained rows, by the kind of adapter that has them.
_ROWS_BESIDE_LORA = {"token_adapter.trainable_tokens_delta": "rows"}
_ROWS = {
    "LORA": _ROWS_BESIDE_LORA,
    "ADALORA": _ROWS_BESIDE_LORA,
    "TRAINABLE_TOKENS": {"trainable_tokens_delta": "rows"},
}
_SAVED = re.compile(r"\.modules_to_save(?:\.default)?\.(?=[^.]+$)|\.modules_to_save(?:\.default)?(?=\.)")
_TUCKER = "the Tucker form is that of convolutions, which are not read"
_EMBEDDING = "on embeddings, LoRA and trainable tokens are read, no other kind"
_REFUSED = {
    "hada_t1": _TUCKER,
    "hada_t2": _TUCKER,
    "lokr_t2": _TUCKER,
    "hira_embedding_A": _EMBEDDING,
    "hira_embedding_B": _EMBEDDING,
    "oft_embedding_R": _EMBEDDING,
    "trainable_tokens_delta": "trained rows of an embedding belong to peft_type TRAINABLE_TOKENS or to a LoRA",
    "lora_E": "AdaLoRA's singular values scale the update; the config should then say peft_type ADALORA",
}


@dataclass(frozen=True, kw_only=True)
class AdapterNames:
    """The tensors of an adapter by what they do.

    Attributes:
        layers: module -> part -> adapter tensor. Parts are ``a``, ``b``, ``b_bias``, ``magnitude``, ``singular``,
            ``elastic_a`` and ``elastic_b`` for the low-rank kinds (``embedding_a`` and ``embedding_b`` where an
            embedding is adapted; ``velora`` and ``monteclora_...`` are of training alone), and as the file spells
            them for others (`Kind.parts`).
        rows: module -> adapter tensor with some rows of its weight (trainable tokens).
        shared: part -> adapter tensor, for those that all layers share.
        tuned: base tensor names whose values are trained copies of whole layers (LN tuning).
        plain: base tensor name -> adapter tensors that hold a value for it (more than one only
            where peft saves a module twice).
        copies: base tensor name -> copy of the layer under a LoRA (``base_layer.weight`` is frozen,
            ``base_layer.bias`` may have been trained).
        peft: tensor -> its name as peft writes it.
        rules: of `spellings.py` that were needed to read the names.
        trained_as: module -> its name when the adapter was trained, where the base has another.
    """

    layers: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    tuned: set[str] = field(default_factory=set)
    plain: dict[str, list[str]] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    peft: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[str, ...] = ()
    trained_as: dict[str, str] = field(default_factory=dict)


def sort_names(tensor_names: Iterable[str], peft_type: str, where: str) -> AdapterNames:
    """Sorts every tensor of an adapter file of a kind that is merged; ``where`` is the file, for messages.

    Raises:
        AdapterError: no tensors, a missing prefix, a name of another method, a double.
    """
    spelled = as_peft_spells(tensor_names, peft_type, where)
    names = AdapterNames(peft=spelled.names, rules=spelled.rules)
    kind = KINDS.get(peft_type)
    parts = _PARTS_OF_LOW_RANK.get(peft_type, {}) if kind is None else {part: part for part in kind.parts}
    shared = {} if kind is None else kind.shared
    frozen: dict[str, str] = {}
    tensor_name = None
    for tensor_name, name in spelled.names.items():
        if (part := _shared_part(name.removesuffix(".default"), shared)) is not None:
            names.shared[part] = tensor_name
            continue
        if not name.startswith(PREFIX):
            raise AdapterError(
                f"{where}: expected tensor names to start with {PREFIX!r}, found {tensor_name!r}; not an adapter that "
                "peft saved? Load it with the tool that made it and save it with peft's save_pretrained"
            )
        name = name.removeprefix(PREFIX)
        layer = _layer_of(name, parts)
        if layer is not None and ".base_layer." in name:
            raise AdapterError(
                f"{where}: tensor {tensor_name!r} is an adapter inside an adapted layer, as peft makes them for "
                "nn.MultiheadAttention; such layers are not read"
            )
        if layer is not None:
            _put(names.layers.setdefault(layer[0], {}), layer[1], tensor_name, where)
            continue
        layer = _layer_of(name, _ROWS.get(peft_type, {}))
        if layer is not None:
            _put(names.rows, layer[0], tensor_name, where)
            continue
        name = name.replace(".token_adapter.", ".")
        _refuse_foreign(name, tensor_name, peft_type, where)
        if f".{_TUNED}." in name and peft_type == "LN_TUNING":
            name = name.replace(f".{_TUNED}.default.", ".").replace(f".{_TUNED}.", ".")
            names.tuned.add(name)
            names.plain.setdefault(name, []).append(tensor_name)
        elif ".original_module." in name:
            frozen[name.replace(".original_module.", ".")] = tensor_name
        elif ".base_layer." in name:
            names.copies[name.replace(".base_layer.", ".")] = tensor_name
        else:
            names.plain.setdefault(_SAVED.sub(lambda m: "." if m[0].endswith(".") else "", name), []).append(
                tensor_name
            )
    if tensor_name is None:
        raise AdapterError(f"{where}: holds no tensors; the save was interrupted, or only the config was saved")
    for name, tensor_name in frozen.items():
        # modules_to_save runs its trained copy; the original that bias="all" or a resize saves along is unused.
        if name not in names.plain:
            raise AdapterError(
                f"{where}: tensor {tensor_name!r} is the untrained original of a module in modules_to_save, "
                "but the trained one is missing; save the adapter again"
            )
    return names


def _shared_part(name: str, shared: Mapping[str, str]) -> str | None:
    if name in shared:
        return shared[name]
    return next(
        (part + name.removeprefix(s) for s, part in shared.items() if s[-1] == "." and name.startswith(s)), None
    )


def named_as_in_base(names: AdapterNames, base: Collection[str], where: str) -> AdapterNames:
    """The same with modules and whole tensors called as the base calls them, where a rule finds them there.

    Raises:
        AdapterError: the base has one under several names, or two of the adapter are one of the base.
    """
    rules, trained_as = dict.fromkeys(names.rules), {}

    def moved(name: str) -> str:
        there, rule = in_the_base(name, base, where)
        if rule is not None:
            rules.setdefault(rule)
            trained_as[there.removesuffix(".weight")] = name.removesuffix(".weight")
        return there

    layers: dict[str, dict[str, str]] = {}
    for module, parts in names.layers.items():
        for part, tensor_name in parts.items():
            found = layers.setdefault(moved(module + ".weight").removesuffix(".weight"), {})
            _put(found, part, tensor_name, where)
    rows: dict[str, str] = {}
    for module, tensor_name in names.rows.items():
        _put(rows, moved(module + ".weight").removesuffix(".weight"), tensor_name, where)
    plain: dict[str, list[str]] = {}
    for name, tensor_names in names.plain.items():
        plain.setdefault(moved(name), []).extend(tensor_names)
    copies: dict[str, str] = {}
    for name, tensor_name in names.copies.items():
        _put(copies, moved(name), tensor_name, where)
    return replace(
        names,
        layers=layers,
        rows=rows,
        plain=plain,
        copies=copies,
        tuned={moved(name) for name in names.tuned},
        rules=tuple(rules),
        trained_as=trained_as,
    )


def _layer_of(name: str, parts: Mapping[str, str]) -> tuple[str, str] | None:
    """Module and part of ``<module>.<part>``; an adapter name ``default`` may stand within the part."""
    for spelled, part in parts.items():
        head, dot, leaf = spelled.partition(".")
        for suffix in (f".{spelled}", f".{head}.default{dot}{leaf}"):
            if name.endswith(suffix):
                return name.removesuffix(suffix), part
    return None


def _refuse_foreign(name: str, tensor_name: str, peft_type: str, where: str) -> None:
    """Refuses what is named as a part of a layer and is none of this kind."""
    for component in name.split("."):
        reason = _REFUSED.get(component)
        if component in _HEADS and peft_type == "LORA":
            raise AdapterError(f"{where}: tensor {tensor_name!r} is no part of a LoRA layer that peft saves")
        if reason is None and component.startswith("lora_"):
            reason = f"{component!r} is not a part of " + (
                "plain LoRA, rsLoRA or DoRA" if peft_type == "LORA" else f"peft_type {peft_type}"
            )
        if reason is not None:
            raise AdapterError(f"{where}: tensor {tensor_name!r} cannot be merged: {reason}")


def _put(parts: dict[str, str], part: str, tensor_name: str, where: str) -> None:
    if part in parts:
        raise AdapterError(f"{where}: tensors {parts[part]!r} and {tensor_name!r} are the same part; keep one adapter")
    parts[part] = tensor_name
