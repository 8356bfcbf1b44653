"""The reference: the base with its adapter left unmerged, computed the way training computed it.

The side branch follows peft's `lora.Linear` / `lora.bnb.Linear4bit` forward: the input is cast to
the adapter's float32, ``scaling * B(A(x))`` is formed there, rounded once to the activation dtype,
and added to the base linear's output. DoRA (Liu et al. 2024, equation 5) scales the result by
magnitude / ||W + dW|| per output feature, as peft's `DoraLinearLayer` does. AdaLoRA (Zhang et al. 2023, equation 3)
and KaSA scale what A gives, QA-LoRA pools inputs, IR-QLoRA has connections beside A and B. A LoRA on an embedding is
looked up as the embedding is; trained rows take the place of what the layer gives for their tokens. No merging code is
used, so that a mistake there cannot hide here; adapters of other kinds run in peft's own layers (`peft_layers.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qconv.errors import AdapterError
from qconv.expert_modules import router_modules
from qconv.streaming import Decorate
from qconv.types import Adapter, LoraDelta, TrainedRows
from qconv.validate.peft_layers import attach_peft_layers, check_peft


def unmerged(adapter: Adapter) -> Decorate:
    """A `Decorate` that hangs the adapter's branches on the linears it targets.

    Whole replacements (biases, saved modules) are put into the modules, as peft puts trained copies there; a tied
    head keeps its own values when the embedding alone is replaced. Tensors of another shape than the module's (a
    resized vocabulary) do not fit: read the reference through a view that has them, and leave them out here.

    Raises:
        AdapterError: a target is not a linear of the running model.
        UsageError: an adapter that is not low-rank, where peft is not installed.
    """

    check_peft(adapter)

    def decorate(prefix: str, module: nn.Module) -> None:
        loaded = {name: child for name, child in module.named_modules() if _is_loaded(child)}
        routers = router_modules(module)
        for name, tensor in adapter.replacements.items():
            local, _, parameter = name.removeprefix(prefix).rpartition(".")
            if name.startswith(prefix) and local in loaded:
                _replace(loaded[local], parameter, adapter, tensor)
        for name, delta in adapter.deltas.items():
            local = delta.module.removeprefix(prefix)
            if name.startswith(prefix) and local in loaded:
                attach = _add if local in routers else _attach
                attach(loaded[local], adapter, delta)
        for name, rows in adapter.rows.items():
            local = name.removeprefix(prefix).removesuffix(".weight")
            if name.startswith(prefix) and local in loaded:
                loaded[local].register_forward_hook(_trained_rows(loaded[local], adapter, rows))
        transforms = {
            transform.module.removeprefix(prefix): transform
            for name, transform in adapter.transforms.items()
            if name.startswith(prefix) and transform.module.removeprefix(prefix) in loaded
        }
        if transforms:
            attach_peft_layers(module, adapter, transforms)

    return decorate


def _is_loaded(module: nn.Module) -> bool:
    """Whether the weight is here: the parts outside the blocks come with decoder layers still on the meta device."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_meta


def _replace(module: nn.Module, parameter: str, adapter: Adapter, tensor: str) -> None:
    before = module.get_parameter(parameter)
    value = adapter.tensors.read(tensor, str(before.device)).to(before.dtype)
    if value.shape != before.shape:
        raise AdapterError(
            f"{adapter.location}: tensor {tensor!r}: expected shape {list(before.shape)} to run it unmerged, found "
            f"{list(value.shape)}"
        )
    setattr(module, parameter, nn.Parameter(value, requires_grad=False))


def _add(router: nn.Module, adapter: Adapter, delta: LoraDelta) -> None:
    """A router's scores never leave it, so its update has no place beside it: as in peft, its weight is changed for
    the time that it runs."""
    weight = router.weight
    assert isinstance(weight, nn.Parameter)
    a_RK, b_NR = _factors(adapter, delta, str(weight.device))
    changed_NK = weight.float() + delta.scaling * (b_NR @ a_RK)
    if delta.magnitude:
        changed_NK *= _dora_factor(weight, adapter, delta, a_RK, b_NR)[:, None]
    weight.data = changed_NK.to(weight.dtype)


def _attach(linear: nn.Module, adapter: Adapter, delta: LoraDelta) -> None:
    weight = linear.weight
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(linear, nn.Embedding) is not delta.of_embedding:
        what = "an embedding" if delta.of_embedding else "a linear layer"
        raise AdapterError(f"{adapter.location}: {delta.module!r} is not {what}, cannot run it unmerged")
    device = str(weight.device)
    a_RK, b_NR = _factors(adapter, delta, device)
    b_bias_N = adapter.tensors.read(delta.b_bias, device).float() if delta.b_bias else None
    factor_N = _dora_factor(weight, adapter, delta, a_RK, b_NR) if delta.magnitude else None
    if delta.of_embedding:
        linear.register_forward_hook(_looked_up(a_RK, b_NR, factor_N, delta.scaling))
        return
    down, up = (_down(a_RK, delta), _up(b_NR, b_bias_N))
    if delta.elastic_a is not None and delta.elastic_b is not None:
        scale_a, scale_b = (adapter.tensors.read(name, device).float() for name in (delta.elastic_a, delta.elastic_b))
        down, up = _elastic(down, up, scale_a, scale_b, delta.rank, len(b_NR))
    linear.register_forward_hook(_branch(lambda x: up(down(x.float())), factor_N, delta.scaling))


Map = Callable[[Tensor], Tensor]


def _down(a_RK: Tensor, delta: LoraDelta) -> Map:
    """What A gives, of sums of ``pooled`` neighbouring inputs (QA-LoRA, Xu et al. 2023)."""

    def down(x: Tensor) -> Tensor:
        if delta.pooled > 1:
            x = x.reshape(*x.shape[:-1], -1, delta.pooled).sum(-1)
        return nn.functional.linear(x, a_RK)

    return down


def _up(b_NR: Tensor, b_bias_N: Tensor | None) -> Map:
    return lambda h: nn.functional.linear(h, b_NR, b_bias_N)


def _elastic(down: Map, up: Map, scale_a: Tensor, scale_b: Tensor, rank: int, num_out: int) -> tuple[Map, Map]:
    """Beside A the means of ``rank`` runs of inputs, beside B its inputs again (IR-QLoRA, Qin et al. 2024)."""

    def around_a(x: Tensor) -> Tensor:
        return down(x) + scale_a * x.reshape(*x.shape[:-1], rank, -1).mean(-1)

    def around_b(h: Tensor) -> Tensor:
        return up(h) + scale_b * h.repeat_interleave(num_out // rank, dim=-1)

    return around_a, around_b


def _factors(adapter: Adapter, delta: LoraDelta, device: str) -> tuple[Tensor, Tensor]:
    a_RK = adapter.tensors.read(delta.a, device).float()[: delta.rank]
    if delta.singular is not None:
        a_RK = adapter.tensors.read(delta.singular, device).float().reshape(-1, 1) * a_RK
    return a_RK, adapter.tensors.read(delta.b, device).float()[:, : delta.rank]


def _dora_factor(weight: Tensor, adapter: Adapter, delta: LoraDelta, a_RK: Tensor, b_NR: Tensor) -> Tensor:
    assert delta.magnitude is not None
    magnitude_N = adapter.tensors.read(delta.magnitude, str(weight.device)).float().reshape(-1)
    w_NK = weight.float().T if delta.transposed else weight.float()
    norm_N: Tensor = torch.linalg.vector_norm(w_NK + delta.scaling * (b_NR @ a_RK), dim=1)
    return magnitude_N / norm_N


def _branch(
    update: Map, factor_N: Tensor | None, scaling: float
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        branch = update(args[0]) * scaling
        if factor_N is None:
            return out + branch.to(out.dtype)
        bias = getattr(module, "bias", None)
        plain = out if bias is None else out - bias
        scaled: Tensor = (factor_N * (plain.float() + branch)).to(out.dtype)
        return scaled if bias is None else scaled + bias

    return hook


def _looked_up(
    a_RV: Tensor, b_DR: Tensor, factor_D: Tensor | None, scaling: float
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """The branch of a LoRA on an embedding, as peft's `lora.Embedding` computes it."""

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        branch: Tensor = nn.functional.embedding(args[0], a_RV.T) @ b_DR.T * (scaling * _embed_scale(module))
        if factor_D is None:
            return out + branch.to(out.dtype)
        scaled: Tensor = factor_D * (out.float() + branch)
        return scaled.to(out.dtype)

    return hook


def _trained_rows(
    layer: nn.Module, adapter: Adapter, trained: TrainedRows
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """What an embedding or a head gives for tokens whose rows were trained."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    values_TD = adapter.tensors.read(trained.tensor, str(weight.device)).to(weight.dtype)
    rows_T = torch.tensor(trained.rows, device=weight.device)
    place_V = torch.full((len(weight),), -1, device=weight.device)
    place_V[rows_T] = torch.arange(len(rows_T), device=weight.device)

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if isinstance(module, nn.Embedding):
            place = place_V[args[0]][..., None]
            found = values_TD[place.squeeze(-1)] * _embed_scale(module)
            return torch.where(place >= 0, found.to(out.dtype), out)
        result: Tensor = out.index_copy(-1, rows_T, nn.functional.linear(args[0], values_TD).to(out.dtype))
        return result

    return hook


def _embed_scale(embedding: nn.Module) -> Tensor | float:
    """What models like Gemma multiply their embeddings by."""
    scale = getattr(embedding, "embed_scale", 1.0)
    return scale if isinstance(scale, Tensor) else float(scale)
