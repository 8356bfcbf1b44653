"""Experts as linears of their own, in the place of transformers' fused parameters.

Whatever looks at linears (calibration, adapters, rounded inputs, audits) then finds those of experts, under the names
that files give them. A decoder layer computes what it did: the router is the model's own, and an expert is
``down(act(gate(x)) * up(x))``, or whatever else the family's own module makes of gate and up, on the tokens that chose
it, weighted and added up in the order of the experts, as the plain implementation of transformers does it.

Dimension legend: T = tokens, J = experts that a token chooses, E = experts, H = hidden features, I = inner features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qconv.experts import DOWN, EXPERTS, GATE_UP, RUNNING, ExpertNames


class Expert(nn.Module):
    """One expert: three linears under the names of its family.

    Args:
        combine: what the family makes of the outputs of gate and up projection, as they lie fused.
    """

    def __init__(
        self, names: ExpertNames, hidden: int, inner: int, combine: Callable[[Tensor], Tensor], dtype: torch.dtype
    ):
        super().__init__()
        self._names = names
        self._combine = combine
        for name, k, n in ((names.gate, hidden, inner), (names.up, hidden, inner), (names.down, inner, hidden)):
            self.add_module(name, nn.Linear(k, n, bias=names.biases, device="meta", dtype=dtype))

    def forward(self, x_TH: Tensor) -> Tensor:
        gate, up, down = (self._modules[name] for name in (self._names.gate, self._names.up, self._names.down))
        halves = (gate(x_TH), up(x_TH))  # type: ignore[misc]
        fused = torch.stack(halves, -1).flatten(-2) if self._names.interleaved else torch.cat(halves, -1)
        result: Tensor = down(self._combine(fused))  # type: ignore[misc]
        return result


class Experts(nn.Module):
    """The experts of a layer, by their numbers.

    Attributes:
        router: the module beside this one that chooses.
        given_all: numbers of experts that are called with all tokens; what they make of those that did not choose
            them is dropped. For statistics of their inputs.
    """

    def __init__(self, experts: Collection[Expert], router: str):
        super().__init__()
        self.router = router
        self.given_all: frozenset[int] = frozenset()
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)

    def forward(self, hidden_TH: Tensor, top_k_index_TJ: Tensor, top_k_weights_TJ: Tensor) -> Tensor:
        out_TH = torch.zeros_like(hidden_TH)
        if hidden_TH.is_meta:  # who is chosen depends on values
            return out_TH
        chosen = top_k_index_TJ.reshape(-1)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self._modules)).tolist()
        for number, (expert, picked) in enumerate(zip(self.children(), torch.split(order, counts), strict=True)):
            token = picked // top_k_index_TJ.shape[1]
            if number in self.given_all:
                made_tH = expert(hidden_TH)[token]
            elif len(token):
                made_tH = expert(hidden_TH[token])
            else:
                continue
            weighted_tH = made_tH * top_k_weights_TJ.reshape(-1)[picked, None]
            out_TH.index_add_(0, token, weighted_tH.to(out_TH.dtype))
        return out_TH


def separate_experts(model: nn.Module, names: ExpertNames) -> None:
    """Replaces the fused experts of a model on the meta device; their module gets the name that files give it."""
    for layer in [module for module in model.modules() if _is_sparse(module._modules.get(RUNNING))]:
        sparse: Any = layer._modules[RUNNING]
        fused = sparse.experts
        num_experts, hidden, inner = getattr(fused, DOWN).shape
        if names.transposed:
            hidden, inner = inner, hidden
        dtype = getattr(fused, GATE_UP).dtype
        fused._parameters.clear()  # what is left of it says how gate and up are combined
        experts = [Expert(names, hidden, inner, fused._apply_gate, dtype) for _ in range(num_experts)]
        sparse.experts = Experts(experts, names.router)
        router = getattr(sparse, names.router)
        for module in names.beside_router:
            own = router._modules.pop(module)
            sparse.add_module(module, own)
            router.__dict__[module] = own  # what its forward asks for
        if names.stored != RUNNING:
            layer._modules = {names.stored if k == RUNNING else k: m for k, m in layer._modules.items()}
            layer.__dict__[RUNNING] = sparse  # what the layer's forward asks for; no second place of parameters


def _is_sparse(module: nn.Module | None) -> bool:
    experts = getattr(module, EXPERTS, None)
    parts = dict(experts.named_parameters(recurse=False)) if isinstance(experts, nn.Module) else {}
    return {GATE_UP, DOWN} <= parts.keys()


def router_modules(model: nn.Module) -> list[str]:
    """The modules that choose experts; they are no `nn.Linear`, and are never quantized."""
    return [
        f"{name.rpartition('.')[0]}.{module.router}"
        for name, module in model.named_modules()
        if isinstance(module, Experts)
    ]


def all_experts(block: nn.Module) -> Iterator[tuple[str, Experts]]:
    """Of one decoder block, with their names inside it."""
    return ((name, module) for name, module in block.named_modules() if isinstance(module, Experts))
