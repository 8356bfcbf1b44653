"""What a job names, opened and checked: the reference as training saw it, the candidate, the device."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from qconv.adapter_configs import AdapterOptions, CombinationConfig
from qconv.checkpoint import open_checkpoint
from qconv.config import BNB_KINDS
from qconv.convert import DequantizedCheckpoint, dequantize, simulate_training_base
from qconv.errors import AdapterError, UsageError, concerning
from qconv.experts import names_of
from qconv.merge import (
    CombinedCheckpoint,
    Dampening,
    WithoutSmallest,
    combine_adapters,
    load_adapter,
    trained_experts,
    truncated,
)
from qconv.runners import Candidate, Combination, Reference
from qconv.skeleton import linears_of_training
from qconv.stored_tensors import FileCheckpoint
from qconv.types import Adapter, BnbKind, Checkpoint


def load_reference(
    source: FileCheckpoint,
    adapter_source: str | None,
    trained_on: BnbKind | None,
    combination: CombinationConfig | None = None,
    options: AdapterOptions | None = None,
) -> Reference:
    """The base as training saw it, and the checked adapter, or several in its place.

    Raises:
        UsageError: a 16-bit base whose training quantization nobody recorded, or options that disagree.
        AdapterError: the adapter was trained on another kind of base than the one given.
    """
    base, options = dequantize(source), options or AdapterOptions()
    dampening = None if options.dampen_intruders is None else Dampening(options.dampen_intruders)
    if combination is not None:
        return replace(_combined_reference(source, base, combination, trained_on), dampening=dampening)
    if adapter_source is None:
        if trained_on is not None:
            raise UsageError("--trained-on says how an adapter saw its base, and there is no adapter")
        return Reference(source=source, base=base, adapter=None, kind=_stored_kind(base))
    adapter = load_adapter(adapter_source, base, options=options)
    kind = _training_kind(base, adapter, trained_on)
    _check_base_of(base, adapter, kind, options)
    if isinstance(options.rank, int) and options.rank_scaling is not None:
        adapter = truncated(adapter, options.rank, options.rank_scaling)
    dropped = {name: delta.dropped for name, delta in adapter.deltas.items() if delta.dropped}
    seen = _seen(base, kind, adapter)
    seen = WithoutSmallest(seen, dropped) if dropped else seen
    return Reference(source=source, base=seen, adapter=adapter, kind=kind, dampening=dampening)


def _check_base_of(base: DequantizedCheckpoint, adapter: Adapter, kind: BnbKind, options: AdapterOptions) -> None:
    """Refuses kinds of LoRA on a base that they were not trained on.

    Raises:
        AdapterError: KaSA on 4 bits; information calibration on a base without it, or none on one that has it.
    """
    if kind != "16bit" and any(delta.dropped for delta in adapter.deltas.values()):
        raise AdapterError(
            f"{adapter.location}: KaSA takes components out of 16-bit weights, and the base was quantized as {kind}; "
            "peft has no KaSA on 4-bit layers: is this the adapter's base?"
        )
    if kind != "16bit" and base.has_tau != (options.ir_qlora == "calibrated"):
        raise AdapterError(
            f"{adapter.location}: --ir-qlora calibrated was trained on 4-bit codes of W - tau, with tau of each block "
            f"(tau_quant and tau_absmax), and {base.location} "
            + (
                "is such a base: give that option"
                if base.has_tau
                else "has no tau. docs/adapters.md says how to save it"
            )
        )


def _seen(base: DequantizedCheckpoint, kind: BnbKind, adapter: Adapter) -> Checkpoint:
    """The base with the values that training computed with."""
    if base.kind == "plain" and kind != "16bit":
        linears = linears_of_training(base, _were_linears(base, adapter))
        return simulate_training_base(base, kind, linears, adapter.backend)
    return base


def _were_linears(base: DequantizedCheckpoint, adapter: Adapter) -> bool:
    """Whether training had experts that bitsandbytes quantizes."""
    names = names_of(base.config)
    if names is None or names.fused_in_files or adapter.trained_on is not None:
        return False  # what `qconv train` records was trained with transformers 5 or later
    found = trained_experts(adapter.tensors)
    if found is None:
        raise UsageError(
            f"{base.location} is a mixture of experts in 16 bits, and {adapter.location}, which leaves the experts "
            "alone, does not tell whether training had them in 4 bits: transformers quantized them before release 5, "
            "and leaves them in 16 bits since. Save the base in 4 bits with the release that trained the adapter "
            "(save_pretrained), and pass that folder"
        )
    return found == "linears"


def _combined_reference(
    source: FileCheckpoint, base: DequantizedCheckpoint, config: CombinationConfig, trained_on: BnbKind | None
) -> Reference:
    adapters = tuple(load_adapter(name, base) for name in config.adapters)
    if base.has_tau:
        raise AdapterError(f"{base.location}: has IR-QLoRA's tau, and its adapters are merged one by one, not combined")
    kinds = [(_training_kind(base, adapter, trained_on), adapter) for adapter in adapters]
    first, one = kinds[0]
    for kind, other in kinds[1:]:
        if kind != first:
            raise AdapterError(
                f"{one.location} was trained on a base quantized as {first}, and {other.location} on {kind}; adapters "
                "are combined that corrected the same base: merge them one after the other instead"
            )
        if base.kind == "plain" and first != "16bit" and other.backend != one.backend:
            raise AdapterError(
                f"{one.location} was trained where {one.backend} kernels quantized the base, and {other.location} with "
                f"those of {other.backend}, which round differently; merge them one after the other instead"
            )
    combination, seen = Combination(config=config, adapters=adapters), _seen(base, first, one)
    if combination.is_low_rank:
        adapter, near = combine_adapters(adapters, config), None
        if config.method == "svd":  # what the truncation loses is part of the merge's error
            adapter, near = combine_adapters(adapters, replace(config, method="cat", rank=None)), adapter
        return Reference(
            source=source, base=seen, adapter=adapter, kind=first, combination=combination, merged_adapter=near
        )
    view = CombinedCheckpoint(seen, adapters, config)
    return Reference(source=source, base=view, adapter=None, kind="16bit", combination=combination)


def _stored_kind(base: DequantizedCheckpoint) -> BnbKind:
    stored = base.kind.removeprefix("bnb-")
    return next((kind for kind in BNB_KINDS if kind == stored), "16bit")


def _training_kind(base: DequantizedCheckpoint, adapter: Adapter, trained_on: BnbKind | None) -> BnbKind:
    recorded = adapter.trained_on
    if trained_on and recorded and trained_on != recorded:
        raise UsageError(f"{adapter.location}: --trained-on {trained_on}, but the adapter's own record says {recorded}")
    kind = trained_on or recorded
    if base.kind != "plain":
        stored = _stored_kind(base)
        if kind is not None and kind != stored:
            raise AdapterError(
                f"{adapter.location}: trained on a base quantized as {kind}, but {base.location} is "
                f"stored as {stored}; "
                "give the base that the adapter was trained on"
            )
        return stored
    if kind is None:
        raise UsageError(
            f"{base.location} is a 16-bit base and {adapter.location} does not record how training saw it. "
            "Say which:\n"
            "  --trained-on nf4-dq  load_in_4bit with nf4 and double quantization (most QLoRA recipes)\n"
            "  --trained-on nf4     load_in_4bit with nf4, bnb_4bit_use_double_quant=False\n"
            "  --trained-on fp4-dq | fp4   the same with bnb_4bit_quant_type fp4 (the default of transformers is fp4)\n"
            "  --trained-on 16bit   plain LoRA on the 16-bit weights, nothing was quantized\n"
            "The adapter corrects the rounding that it was trained on. Merged into another rounding it drifts: "
            "KL 0.164 instead of 0.0016 nats per token on SmolLM2-135M (docs/quality.md)"
        )
    return kind


def load_candidate(source: str, adapter_source: str | None) -> Candidate:
    """The stored checkpoint, and the adapter that it is served with, checked against it.

    Raises:
        CheckpointError, AdapterError: one of them cannot be read, or they do not fit one another.
    """
    checkpoint = open_checkpoint(source)
    view = dequantize(checkpoint)
    adapter = None if adapter_source is None else load_adapter(adapter_source, view)
    return Candidate(source=checkpoint, view=view, adapter=adapter)


def resolve_device(device: str) -> str:
    """``"auto"`` is CUDA where there is one.

    Raises:
        UsageError: CUDA was asked for and there is none, or the device is another one.
    """
    with concerning("device"):
        return _resolved(device)


def _resolved(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device takes cpu, cuda, cuda:N or auto, got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device on this machine; use --device cpu or auto")
    return device
