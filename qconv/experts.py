"""How families of mixtures of experts name their experts, in files and in memory.

Everything here speaks of an expert as three linears with names of their own (``...experts.3.gate_proj.weight``). Most
families lie so in the files that transformers and serving engines read and write. Since release 5, transformers
keeps them in memory as two parameters of each block, ``gate_up_proj [E, 2I, H]`` (gate rows above up rows) and
``down_proj [E, H, I]``, and a folder that was saved without its conversion has them like that, too.

gpt-oss has never had linears: its files hold the two parameters themselves, as ``[E, in, out]`` with the columns of
gate and up projection in turn, and biases beside them, in 16 bits or as published in MXFP4. What is written for such
a family is fused again (`convert/fused_experts.py`).

Left out: families that weigh an expert's inputs instead of its output (Llama 4).

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
RUNNING = "mlp"
"""What transformers calls the module of a decoder layer that holds router and experts."""
FUSED_TENSORS: Mapping[str, str] = {
    ".weight": "",
    ".bias": "_bias",
    ".weight_blocks": "_blocks",
    ".weight_scales": "_scales",
}
"""End of a linear's tensor -> end of the fused tensor that holds it; the last two are MXFP4."""


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """Names and layout in one family.

    Attributes:
        stored: the module of a decoder layer that holds router and experts, as files call it.
        gate, up, down: the linears of one expert, as files call them.
        unquantized: further linears of that module that choose instead of compute, and stay in 16 bits.
        router: the module that chooses experts.
        beside_router: modules that lie in the router in memory, and beside it in files.
        float32_router: the router's weight is in float32 in any model.
        transposed: fused weights are ``[E, in, out]``.
        interleaved: outputs of gate and up projection take turns in `GATE_UP`; else the gate's lie above.
        biases: linears of experts have biases.
        fused_in_files: files hold the fused parameters, and readers expect them.
    """

    stored: str = RUNNING
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    unquantized: tuple[str, ...] = ()
    router: str = "gate"
    beside_router: tuple[str, ...] = ()
    float32_router: bool = False
    transposed: bool = False
    interleaved: bool = False
    biases: bool = False
    fused_in_files: bool = False

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """Fused parameter -> the linears that lie in its outputs, from above."""
        return {GATE_UP: (self.gate, self.up), DOWN: (self.down,)}

    def outputs(self, parameter: str, linear: str, num_outputs: int) -> slice:
        """Where the outputs of a linear lie among the ``num_outputs`` of a fused parameter."""
        linears = self.parts[parameter]
        place, n = linears.index(linear), num_outputs // len(linears)
        if self.interleaved and len(linears) > 1:
            return slice(place, None, len(linears))
        return slice(place * n, (place + 1) * n)

    def stored_name(self, name: str) -> str:
        """A module or tensor in a decoder layer under the name that files give it."""
        for module in self.beside_router:
            name = re.sub(rf"\.{self.router}\.{module}(?=\.|$)", f".{module}", name)
        if self.stored == RUNNING:
            return name
        return re.sub(rf"(\.layers\.\d+)\.{RUNNING}(?=\.|$)", rf"\1.{self.stored}", name)


_QWEN = ExpertNames()
FAMILIES: Mapping[str, ExpertNames] = {
    "deepseek_v2": _QWEN,
    "deepseek_v3": _QWEN,
    "dots1": _QWEN,
    "ernie4_5_moe": replace(_QWEN, beside_router=("moe_statics",), float32_router=True),
    "flex_olmo": _QWEN,
    "glm4_moe": _QWEN,
    "gpt_oss": ExpertNames(router="router", transposed=True, interleaved=True, biases=True, fused_in_files=True),
    "mixtral": ExpertNames(stored="block_sparse_moe", gate="w1", up="w3", down="w2"),
    "olmoe": _QWEN,
    "qwen2_moe": replace(_QWEN, unquantized=("shared_expert_gate",)),
    "qwen3_moe": _QWEN,
    "qwen3_next": replace(_QWEN, unquantized=("shared_expert_gate",)),
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


def stays_float32(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is kept in float32 in any model: what is added to scores only to choose experts (DeepSeek-V3
    technical report, 2024, section 2.1.2) is large beside the differences that decide; some routers are, too."""
    names = names_of(config)
    has_router = names is not None and names.float32_router and name.endswith(f".{names.router}.weight")
    return has_router or name.endswith(".e_score_correction_bias")


def has_experts(names: Iterable[str]) -> bool:
    """Whether tensor names are of a mixture of experts, of whatever family."""
    return any(f".{EXPERTS}." in name for name in names)
