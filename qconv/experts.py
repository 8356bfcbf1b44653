"""How families of mixtures of experts name their experts, in files and in memory.

Everything here speaks of an expert as three linears with names of their own (``...experts.3.gate_proj.weight``): so
these families lie in the files that transformers and serving engines read and write. Since release 5, transformers
keeps them in memory as two parameters of each block, ``gate_up_proj [E, 2I, H]`` (gate rows above up rows) and
``down_proj [E, H, I]``, and a folder that was saved without its conversion has them like that, too.

Left out: families whose fused parameters are stored transposed, interleaved or with biases (gpt-oss, Llama 4).

Dimension legend: E = experts, H = hidden features, I = inner features of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

EXPERTS = "experts"
GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""The fused parameters, in the order in which modules hold them."""
ROUTER = "gate"
RUNNING = "mlp"
"""What transformers calls the module of a decoder layer that holds router and experts."""


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """Names in one family.

    Attributes:
        stored: the module of a decoder layer that holds router and experts, as files call it.
        gate, up, down: the linears of one expert, as files call them.
        unquantized: further linears of that module that choose instead of compute, and stay in 16 bits.
    """

    stored: str
    gate: str
    up: str
    down: str
    unquantized: tuple[str, ...] = ()

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """Fused parameter -> the linears that lie in its rows, from above."""
        return {GATE_UP: (self.gate, self.up), DOWN: (self.down,)}

    def stored_name(self, name: str) -> str:
        """A module or tensor in a decoder layer under the name that files give it."""
        if self.stored == RUNNING:
            return name
        return re.sub(rf"(\.layers\.\d+)\.{RUNNING}(?=\.|$)", rf"\1.{self.stored}", name)


_QWEN = ExpertNames(stored="mlp", gate="gate_proj", up="up_proj", down="down_proj")
FAMILIES: Mapping[str, ExpertNames] = {
    "mixtral": ExpertNames(stored="block_sparse_moe", gate="w1", up="w3", down="w2"),
    "olmoe": _QWEN,
    "qwen2_moe": replace(_QWEN, unquantized=("shared_expert_gate",)),
    "qwen3_moe": _QWEN,
}
"""By ``model_type``."""


def names_of(config: Mapping[str, Any]) -> ExpertNames | None:
    """None for models without experts, and for families that are not known here."""
    return FAMILIES.get(str(config.get("model_type")))


@dataclass(frozen=True)
class ExpertLinear:
    """Where a linear belongs: ``layers.0.mlp.experts.3.gate_proj`` is ``gate_proj`` of expert 3 of
    ``layers.0.mlp.experts``."""

    experts: str
    number: int
    role: str


_LINEAR = re.compile(rf"(.+\.{EXPERTS})\.(\d+)\.([^.]+)")


def expert_of(module: str) -> ExpertLinear | None:
    """The expert that a linear is of, by its module's name; None for all other linears."""
    found = _LINEAR.fullmatch(module)
    return None if found is None else ExpertLinear(found[1], int(found[2]), found[3])


def has_experts(names: Iterable[str]) -> bool:
    """Whether tensor names are of a mixture of experts, of whatever family."""
    return any(f".{EXPERTS}." in name for name in names)
