"""Spellings of an adapter's tensor names that are not peft's own: each is read by one listed rule, or refused.

Two steps. `as_peft_spells` knows names alone: what wrappers put in, an adapter's name in the middle, torchtune's own
keys. `in_the_base` knows the base: transformers has moved language models into and out of composite ones, so a module
that the base does not have may be there under the other name.

torchtune (`models/convert_weights.py` of its repository) turns neighbouring channels of a head by rotary positions,
where transformers turns channels half a head apart. In the families of `TURNED_IN_PAIRS` rows of q and k therefore lie
in another order (see `HalvedHeads`), in those of `TURNED_IN_HALVES` they do not.

Left out, and refused with the reason: keys of torchtune for other modules, MLX, kohya, NeMo.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qconv.checkpoint import SafetensorsCheckpoint
from qconv.errors import AdapterError
from qconv.read_ahead import read_ahead
from qconv.types import TensorSpec

PREFIX = "base_model.model."

WRAPPERS = {
    "_orig_mod": "`_orig_mod.` (torch.compile), anywhere",
    "_fsdp_wrapped_module": "`_fsdp_wrapped_module.` (FSDP), anywhere",
    "_checkpoint_wrapped_module": "`_checkpoint_wrapped_module.` (activation checkpointing), anywhere",
}
DATA_PARALLEL = "`module.` (data parallel), in front of the model's own name"
NAMED = "the adapter's own name after a part, as in `lora_A.sft.weight`; one name for all"
BARE = f"no `{PREFIX}` on any tensor (the state dict of the model under the adapter)"
TORCHTUNE = "torchtune's own keys, as in `layers.0.attn.output_proj.lora_a.weight`"
MOVED = {
    ("model.language_model.", "language_model.model."): "`model.language_model.` for `language_model.model.`",
    ("model.language_model.", "model."): "`model.language_model.` for `model.`",
    ("language_model.model.", "model.language_model."): "`language_model.model.` for `model.language_model.`",
    ("language_model.model.", "model."): "`language_model.model.` for `model.`",
    ("model.", "model.language_model."): "`model.` for `model.language_model.`",
    ("model.", "language_model.model."): "`model.` for `language_model.model.`",
    ("lm_head", "language_model.lm_head"): "`lm_head` for `language_model.lm_head`",
    ("language_model.lm_head", "lm_head"): "`language_model.lm_head` for `lm_head`",
    ("model.visual.", "visual."): "`model.visual.` for `visual.`",
    ("visual.", "model.visual."): "`visual.` for `model.visual.`",
    ("model.vision_tower.", "vision_tower."): "`model.vision_tower.` for `vision_tower.`",
    ("vision_tower.", "model.vision_tower."): "`vision_tower.` for `model.vision_tower.`",
    ("model.multi_modal_projector.", "multi_modal_projector."): (
        "`model.multi_modal_projector.` for `multi_modal_projector.`"
    ),
    ("multi_modal_projector.", "model.multi_modal_projector."): (
        "`multi_modal_projector.` for `model.multi_modal_projector.`"
    ),
    ("model.model.", "model."): "`model.model.` for `model.` (the state dict of the adapter's own wrapper)",
    ("layers.", "model.layers."): "`layers.` for `model.layers.` (trained without the head)",
}
"""(in the adapter, in the base): how docs and reports call the rule."""

RULES = (*WRAPPERS.values(), DATA_PARALLEL, NAMED, BARE, TORCHTUNE, *MOVED.values())

TURNED_IN_PAIRS = frozenset({"llama", "mistral", "gemma", "gemma2"})
TURNED_IN_HALVES = frozenset({"qwen2", "qwen3"})
_TUNED = re.compile(
    r"(?:layers\.(?P<layer>\d+)\.(?P<module>attn\.(?:[qkv]|output)_proj|mlp\.w[123])|(?P<head>output))"
    r"\.(?P<part>lora_a\.weight|lora_b\.weight|magnitude)"
)
_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_TUNED_PARTS = {
    "lora_a.weight": "lora_A.weight",
    "lora_b.weight": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}
_OWN_NAME = re.compile(
    r"\.lora_(?:[AB]|magnitude_vector)\.(?!weight$|bias$)([^.]+)\.(?:weight|bias)$"
    r"|\.lora_(?:[ABE]|embedding_[AB])\.(?!weight$|bias$)([^.]+)$"
)
_STRANGE = (
    (re.compile(r"\.lora_[ab]$"), "an adapter of MLX; save it with peft's names, and A and B transposed"),
    (re.compile(r"\.lora_(?:down|up)\."), "kohya's names; convert it to peft's with the tool that made it"),
    (re.compile(r"\.(?:linear_(?:in|out)|lora_\w+_adapter)\."), "NeMo's names; export it to peft's with NeMo"),
)


@dataclass(frozen=True, kw_only=True)
class Spelled:
    """Tensor names of a file as peft writes them.

    Attributes:
        names: in the file -> as peft writes it.
        rules: that were needed, from `RULES`.
    """

    names: Mapping[str, str]
    rules: tuple[str, ...]


def as_peft_spells(tensor_names: Iterable[str], peft_type: str, where: str) -> Spelled:
    """Reads names by the rules that need no base; what no rule knows stays as it is.

    Raises:
        AdapterError: names of another library that are not read, or several adapters in one file.
    """
    names, rules = {}, dict[str, None]()
    for name in tensor_names:
        names[name], used = _unwrapped(name)
        rules.update(dict.fromkeys(used))
    if peft_type in ("LORA", "ADALORA"):
        _drop_own_name(names, rules, where)
    if peft_type == "LORA":
        _refuse_strange(names, where)
        _read_torchtune(names, rules, where)
    bare = names and not any(name.startswith("base_model.") for name in names.values())
    if bare and any(".lora_" in name for name in names.values()):
        names = {stored: PREFIX + name for stored, name in names.items()}
        rules.setdefault(BARE)
    if TORCHTUNE in rules:
        rules.pop(BARE, None)
    return Spelled(names=names, rules=tuple(rules))


def in_the_base(name: str, base: Collection[str], where: str) -> tuple[str, str | None]:
    """The name of a tensor in the base, and the rule that found it; the name itself where no rule does.

    Raises:
        AdapterError: the base has it under several names.
    """
    if name in base:
        return name, None
    found = {
        there + name.removeprefix(here): rule
        for (here, there), rule in MOVED.items()
        if name.startswith(here) and there + name.removeprefix(here) in base
    }
    if len(found) > 1:
        raise AdapterError(
            f"{where}: {name!r} is not in the base, which has {' and '.join(map(repr, found))}; which of them was "
            "trained is not recorded: rename the adapter's tensors to the one that was meant"
        )
    return next(iter(found.items()), (name, None))


def _unwrapped(stored: str) -> tuple[str, list[str]]:
    """Without what wrappers of the model add."""
    parts = stored.split(".")
    rules = [rule for wrapper, rule in WRAPPERS.items() if wrapper in parts]
    name = ".".join(part for part in parts if part not in WRAPPERS)
    within = PREFIX if name.startswith(PREFIX) else ""
    for prefix in dict.fromkeys(("", within)):
        if name.startswith(prefix + "module."):
            name = prefix + name.removeprefix(prefix + "module.")
            rules.append(DATA_PARALLEL)
            within = PREFIX if name.startswith(PREFIX) else ""
    return name, rules


def _drop_own_name(names: dict[str, str], rules: dict[str, None], where: str) -> None:
    """Takes an adapter's name out of ``lora_A.<name>.weight``; ``default`` is what older peft wrote."""
    matches = [match for name in names.values() if (match := _OWN_NAME.search(name))]
    own = sorted({match[1] or match[2] for match in matches})
    if len(own) > 1:
        raise AdapterError(
            f"{where}: holds several adapters ({', '.join(own)}); save one of them by itself, with save_pretrained("
            "..., selected_adapters=[...])"
        )
    if not own:
        return
    within = re.compile(rf"(\.(?:lora_\w+|modules_to_save))\.{re.escape(own[0])}(?=\.|$)")
    for stored, name in names.items():
        names[stored] = within.sub(r"\1", name)
    rules.setdefault(NAMED)


def _refuse_strange(names: Mapping[str, str], where: str) -> None:
    for stored, name in names.items():
        for pattern, reason in _STRANGE:
            if pattern.search(name):
                raise AdapterError(f"{where}: tensor {stored!r} has no peft name: {reason}")


def _read_torchtune(names: dict[str, str], rules: dict[str, None], where: str) -> None:
    if not any(re.search(r"\.lora_[ab]\.weight$", name) for name in names.values()):
        return
    for stored, name in names.items():
        match = _TUNED.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"{where}: tensor {stored!r} stands among torchtune's own keys, and no rule reads it; expected "
                "layers.N.attn.{q,k,v,output}_proj, layers.N.mlp.w{1,2,3} or output, each with lora_a, lora_b or "
                "magnitude. Let torchtune save the adapter in peft's format"
            )
        module = "lm_head" if match["head"] else f"model.layers.{match['layer']}.{_MODULES[match['module']]}"
        names[stored] = f"{PREFIX}{module}.{_TUNED_PARTS[match['part']]}"
    rules.setdefault(TORCHTUNE)


class HalvedHeads:
    """An adapter's files with the rows of torchtune's q and k where transformers has them.

    Of a head of D channels, torchtune's rows 2i and 2i + 1 are transformers' rows i and i + D/2.

    Raises:
        AdapterError: a family whose order is not known, or a base that does not say how many heads it has.
    """

    def __init__(
        self, files: SafetensorsCheckpoint, names: Mapping[str, str], base_config: Mapping[str, Any], where: str
    ):
        self._files = files
        self.location, self.config = files.location, files.config
        family = base_config.get("model_type")
        if family not in TURNED_IN_PAIRS | TURNED_IN_HALVES:
            raise AdapterError(
                f"{where}: has torchtune's own keys, and how torchtune orders the heads of model_type {family!r} is "
                f"not known (known: {', '.join(sorted(TURNED_IN_PAIRS | TURNED_IN_HALVES))}); let torchtune save the "
                "adapter in peft's format" + ("" if family else ", or give the base")
            )
        self._heads: dict[str, int] = {}
        if family in TURNED_IN_HALVES:
            return
        heads = {"q_proj": base_config.get("num_attention_heads")}
        heads["k_proj"] = base_config.get("num_key_value_heads") or heads["q_proj"]
        for stored, name in names.items():
            module, _, part = name.partition(".lora_")
            count = heads.get(module.rpartition(".")[2])
            if module.rpartition(".")[2] not in heads or part == "A.weight":
                continue
            rows = files.specs()[stored].shape[0] if files.specs()[stored].shape else 0
            if type(count) is not int or count < 1 or rows % (2 * count):
                raise AdapterError(
                    f"{where}: tensor {stored!r} has {rows} rows, which {count} heads of the base do not divide in "
                    "pairs; the adapter belongs to another base model"
                )
            self._heads[stored] = count

    def specs(self) -> Mapping[str, TensorSpec]:
        return self._files.specs()

    def read(self, name: str, device: str = "cpu") -> Tensor:
        """The tensor as transformers orders its rows.

        Raises:
            CheckpointError: no such tensor, or its bytes cannot be read.
        """
        tensor = self._files.read(name, device)
        if name not in self._heads:
            return tensor
        pairs = tensor.reshape(self._heads[name], -1, 2, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)

    def read_ahead(self, names: Iterable[str], pin: bool = False, max_bytes: int | None = None) -> None:
        """Begins to fetch tensors, see `ReadsAhead`."""
        read_ahead(self._files, names, pin, max_bytes)
