"""Runnable models from what lies on disk: a checkpoint in any format that is read, with or without an unmerged adapter.

Four ways to run one: transformers with bitsandbytes' kernels and peft's unmerged adapter, whole on a
GPU (`validate/resident.py`); transformers with its own quantized kernels, whole (``--engine
transformers``); ONNX Runtime, whole, what is its folder; or decoded by qconv and run block by block, which needs
neither kernels nor memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qconv.adapter_configs import CombinationConfig
from qconv.cached_attentions import cache_use
from qconv.convert import DequantizedCheckpoint, dequantize
from qconv.errors import AdapterError, UsageError
from qconv.experts import expert_of
from qconv.layout import config_dtype
from qconv.merge import DampenedCheckpoint, Dampening, MergedCheckpoint, merge, trained_experts
from qconv.onnx import LAYERS_NAME, OnnxCheckpoint, OnnxSession
from qconv.quantize.fp4_inputs import fake_quantize_fp4
from qconv.quantize.fp8_static import fake_quantize_static
from qconv.quantize.int8 import fake_quantize_inputs
from qconv.quantize.key_values import CacheRounding
from qconv.side_files import tokenizer_files
from qconv.skeleton import block_linears
from qconv.stored_tensors import FileCheckpoint
from qconv.streaming import BlockModel, Decorate, StreamedModel
from qconv.types import Adapter, BnbKind, Checkpoint, Scheme
from qconv.validate.onnx_model import OnnxModel
from qconv.validate.reference import unmerged
from qconv.validate.resident import load_resident, load_whole, why_not_resident


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combination:
    """Several adapters, each checked against the base, and how they become one change of it."""

    config: CombinationConfig
    adapters: tuple[Adapter, ...]

    @property
    def is_low_rank(self) -> bool:
        """Whether the result can be left unmerged beside the base."""
        return self.config.is_low_rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """What training produced.

    Attributes:
        source: the base as it lies on disk.
        base: the same as training saw it: decoded, or rounded to 4 bits and back.
        adapter: left unmerged, or None.
        kind: how training saw the base; ``"16bit"`` of a base that has several adapters in it.
        combination: what ``adapter`` was made of, or ``base`` where the update has full rank; None = one adapter.
        merged_adapter: what is merged in the place of ``adapter``, where that is only near it.
        dampening: how intruder dimensions are scaled in the merge; None = they are not.
    """

    source: FileCheckpoint
    base: Checkpoint
    adapter: Adapter | None
    kind: BnbKind
    combination: Combination | None = None
    merged_adapter: Adapter | None = None
    dampening: Dampening | None = None

    @cached_property
    def stored(self) -> DequantizedCheckpoint:
        """The base as its files have it, decoded."""
        return self.base if isinstance(self.base, DequantizedCheckpoint) else dequantize(self.source)

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """As they lie on disk, in their order."""
        if self.combination is not None:
            return self.combination.adapters
        return () if self.adapter is None else (self.adapter,)

    @property
    def adapter_folders(self) -> tuple[Path, ...]:
        """Of all adapters, in their order."""
        return tuple(Path(adapter.location) for adapter in self.adapters)

    @property
    def side_folder(self) -> Path | None:
        """The adapter folder whose tokenizer and chat template count: the first that has one."""
        return next((folder for folder in self.adapter_folders if tokenizer_files(folder)), None)

    @property
    def merged(self) -> Checkpoint:
        return self.merged_into(self.base)

    def merged_into(self, base: Checkpoint, factors: Checkpoint | None = None) -> Checkpoint:
        """What is written.

        Args:
            base: ours, or a view of it that has the same values; it is the result, without an adapter.
            factors: the same of the tensors of the adapter that is merged.
        """
        view = self.undampened(base, factors)
        if self.dampening is None or not isinstance(view, MergedCheckpoint) or self.adapter is None:
            return view
        return DampenedCheckpoint(base, view, self.adapter, self.dampening)

    def undampened(self, base: Checkpoint, factors: Checkpoint | None = None) -> Checkpoint:
        """The same with all intruder dimensions."""
        adapter = self.merged_adapter or self.adapter
        if adapter is None:
            return base
        return merge(base, [adapter if factors is None else dataclasses.replace(adapter, tensors=factors)])

    @property
    def resizes_vocabulary(self) -> bool:
        """Whether the adapter brings tensors of other shapes; only embedding and head may have them."""
        merged = self.merged.specs()
        return any(merged[name].shape != spec.shape for name, spec in self.base.specs().items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is about to be released.

    Attributes:
        source: the stored checkpoint.
        view: the same, dequantized.
        adapter: an adapter that it is served with, unmerged, or None.
    """

    source: FileCheckpoint
    view: DequantizedCheckpoint
    adapter: Adapter | None = None

    @staticmethod
    def of(source: FileCheckpoint) -> Candidate:
        return Candidate(source=source, view=dequantize(source))

    @cached_property
    def rounding(self) -> CacheRounding | None:
        """What the FP8 cache that the checkpoint announces does to keys and values; reads its scales."""
        if not self.view.cache.is_float8:
            return None
        stored = {attention: self.view.cache_scales(attention) for attention in self.view.cache.scales}
        ones = torch.ones(1), torch.ones(1)
        return CacheRounding(scales={attention: stored.get(attention, ones) for attention in self._attentions})

    @cached_property
    def _attentions(self) -> tuple[str, ...]:
        return cache_use(self.view).handing

    def cache_facts(self) -> dict[str, Any]:
        """For reports: how many keys and values, of all that were computed so far, its cache had no range for."""
        if self.rounding is None or not self.rounding.clipped():
            return {}
        clipped = {what: {"clipped": share, "most_in": name} for what, (share, name) in self.rounding.clipped().items()}
        return {"kv_cache": {"dtype": "float8_e4m3fn", **clipped}}

    def cache_notes(self) -> list[str]:
        """The same in words, and what of its cache was not computed."""
        found = [] if self.view.cache.why_not is None else [f"the candidate: {self.view.cache.why_not}"]
        if self.cache_facts():
            found += self._scale_notes()
        for what, facts in self.cache_facts().get("kv_cache", {}).items():
            if what != "dtype":
                most = f", most in {facts['most_in']}" if facts["clipped"] else ""
                found.append(
                    f"{100 * facts['clipped']:.2g}% of the {what} were beyond the range of the FP8 cache{most}"
                )
        return found

    def _scale_notes(self) -> list[str]:
        found, stored = [], self.view.cache.scales
        without = [attention for attention in self._attentions if attention not in stored]
        if without:
            found.append(
                f"no scales of keys and values are stored for {len(without)} of {len(self._attentions)} attentions "
                f"({without[0]}{' and others' if without[1:] else ''}): the candidate has 1 for them, as in vLLM; "
                "transformers leaves theirs uninitialised"
            )
        unused = [attention for attention in stored if attention not in self._attentions]
        if unused:
            found.append(f"scales of keys and values are stored for {unused[0]}, which hands none to a cache")
        return found


def reference_model(reference: Reference, base: Checkpoint, device: str, keep: bool) -> tuple[BlockModel, str]:
    """The reference and which implementation runs it, for the report.

    Args:
        base: the view of ``reference.base`` to read through.
        keep: see `StreamedModel`.
    """
    adapter = reference.adapter
    is_quantized = reference.stored.kind.startswith("bnb-")  # else 16-bit, quantized as it is loaded
    _, reason = _residence(reference, is_quantized, device)
    if reason is None:
        folder = None if adapter is None else Path(adapter.location)
        resident = load_resident(reference.source.folder, folder, reference.kind, is_quantized, device)
        return resident, f"bitsandbytes {'and peft kernels, adapter unmerged' if adapter else 'kernels'}"
    model = streamed(base, adapter, _input_quantization(reference.stored), device, keep)
    how = "decoded by qconv" + (", adapter unmerged" if adapter else "")
    return model, f"{how} ({reason})" if reference.kind != "16bit" else how


def resident_bytes(reference: Reference, device: str) -> int | None:
    """Memory of a reference that will run whole on the device; None where it runs block by block."""
    num_bytes, reason = _residence(reference, reference.stored.kind.startswith("bnb-"), device)
    if reason is not None:
        return None
    adapter = reference.adapter
    return num_bytes + (0 if adapter is None else sum(spec.num_bytes for spec in adapter.tensors.specs().values()))


def _residence(reference: Reference, is_quantized: bool, device: str) -> tuple[int, str | None]:
    """Bytes of the base in 4 bits, and why it does not run whole on the device; None = it does."""
    num_bytes = sum(spec.num_bytes for spec in reference.source.specs().values()) // (1 if is_quantized else 3)
    reason = why_not_resident(device, reference.kind, num_bytes)
    if reason is None and is_quantized and reference.stored.has_tau:
        reason = "bitsandbytes knows no tau of IR-QLoRA"
    if reason is None and reference.resizes_vocabulary:
        reason = "the adapter resizes the vocabulary, and peft does not load it on the base as it is"
    if reason is None and reference.combination is not None:
        reason = "several adapters, which peft would not combine alike"
    if reason is None and _has_experts_in_4_bits(reference):
        reason = "transformers keeps experts in 16 bits, and training had them in 4"
    if reason is None and reference.adapter is not None:
        reason = _why_not_peft(reference.adapter)
    return num_bytes, reason


def _why_not_peft(adapter: Adapter) -> str | None:
    """Why peft does not run an adapter on 4-bit layers as it is meant here; None = it does."""
    if adapter.name_rules:
        return "peft does not know the names of the adapter's tensors"
    if adapter.transforms:
        return f"peft's {adapter.kind} layers run on decoded weights"
    for delta in adapter.deltas.values():
        if delta.pooled > 1 or delta.elastic_a is not None or delta.dropped:
            return "peft has no such layers in 4 bits"
        if adapter.tensors.specs()[delta.a].shape[0] != delta.rank:
            return "peft would run it with all of its rank"
    return None


def _has_experts_in_4_bits(reference: Reference) -> bool:
    """Whether experts are stored in 4 bits, or were trained with in 4 bits (before release 5 of transformers)."""
    if reference.stored.kind != "plain":
        return any(expert_of(module) is not None for module in reference.stored.quantized_modules)
    return any(trained_experts(adapter.tensors) == "linears" for adapter in reference.adapters)


def candidate_model(
    candidate: Candidate, view: Checkpoint, device: str, keep: bool, engine: str | None
) -> tuple[BlockModel, str]:
    """The candidate and which implementation runs it, for the report.

    Args:
        engine: see `ValidationConfig`.

    Raises:
        CheckpointError: transformers (``engine="transformers"``) or ONNX Runtime cannot load it.
        AdapterError: peft cannot (the same).
        UsageError: ``engine="onnxruntime"`` for another folder.
    """
    if runs_in_onnxruntime(candidate, engine):
        return _onnx_model(candidate, device)
    if engine == "transformers":
        if candidate.adapter is not None and candidate.adapter.name_rules:
            raise AdapterError(
                f"{candidate.adapter.location}: --engine transformers loads it with peft, which does not know the "
                f"names of its tensors ({'; '.join(candidate.adapter.name_rules)}); qconv convert --to lora writes "
                "it with peft's names"
            )
        folder = None if candidate.adapter is None else Path(candidate.adapter.location)
        return load_whole(candidate.source.folder, folder, device), "transformers, with its own kernels"
    how = "decoded by qconv" + (", adapter unmerged" if candidate.adapter else "")
    inputs = _input_quantization(candidate.view)
    if inputs is not None:
        kinds = {s.input_words for s in _rounding_inputs(candidate.view).values()}
        how += f", inputs of quantized linears rounded to {' and '.join(sorted(kinds))} as engines do"
    if candidate.rounding is not None:
        how += ", keys and values rounded to float8, as an FP8 cache keeps them"
    return streamed(view, candidate.adapter, inputs, device, keep, candidate.rounding), how


def runs_in_onnxruntime(candidate: Candidate, engine: str | None) -> bool:
    """Whether a candidate is run whole by ONNX Runtime, so that its blocks cannot be looked at."""
    return engine == "onnxruntime" or (engine is None and isinstance(candidate.source, OnnxCheckpoint))


def _onnx_model(candidate: Candidate, device: str) -> tuple[BlockModel, str]:
    source = candidate.source
    if not isinstance(source, OnnxCheckpoint):
        raise UsageError(
            f"--engine onnxruntime runs folders of ONNX Runtime GenAI (--requant onnx and others), and "
            f"{source.location} is none"
        )
    if candidate.adapter is not None:
        raise UsageError("--candidate-adapter: an ONNX graph is run without one; give --engine qconv to decode it")
    session = OnnxSession(source.graph_file)
    blocks = int(source.config["num_hidden_layers"])
    return OnnxModel(session, blocks, LAYERS_NAME, device), session.runs


def streamed(
    view: Checkpoint,
    adapter: Adapter | None,
    inputs: Decorate | None,
    device: str,
    keep: bool = False,
    rounding: CacheRounding | None = None,
) -> StreamedModel:
    """A view run by qconv: the decoded weights, the adapter's branches beside them."""
    decorations = [] if inputs is None else [inputs]
    decorations += [] if rounding is None else [rounding.decorate]
    dtype = config_dtype(view.config)
    if adapter is not None:
        if _resizes(view, adapter):  # whole tensors join the view, updates stay beside it
            view = merge(view, [dataclasses.replace(adapter, deltas={}, transforms={}, rows={})])
            adapter = dataclasses.replace(adapter, replacements={})
        decorations.append(unmerged(adapter))

    def decorate(prefix: str, module: nn.Module) -> None:
        for decoration in decorations:
            decoration(prefix, module)

    return StreamedModel(view, device, dtype, decorate, keep)


def _resizes(view: Checkpoint, adapter: Adapter) -> bool:
    """Whether the adapter brings whole tensors of other shapes, for which the model has to be another."""
    specs = view.specs()
    return any(
        name in specs and specs[name].shape != adapter.tensors.specs()[tensor].shape
        for name, tensor in adapter.replacements.items()
    )


def _input_quantization(view: DequantizedCheckpoint) -> Decorate | None:
    """Engines quantize the inputs of W8A8, W4A8 and W4A4 linears; so does a model that is run here."""
    schemes = _rounding_inputs(view)

    def rounding(name: str, scheme: Scheme) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        if scheme.stores_input_scale:
            scale = view.input_scale(name)
            if scheme.is_fp4:
                return lambda _, args: (fake_quantize_fp4(args[0], scheme, scale, name), *args[1:])
            return lambda _, args: (fake_quantize_static(args[0], scale, name), *args[1:])
        return lambda _, args: (fake_quantize_inputs(args[0], scheme, name), *args[1:])

    def decorate(prefix: str, block: nn.Module) -> None:
        for name, linear in block_linears(block).items():
            scheme = schemes.get(prefix + name)
            if scheme is not None and not linear.weight.is_meta:  # each block is a copy of one on the meta device
                linear.register_forward_pre_hook(rounding(prefix + name, scheme))

    return decorate if schemes else None


def _rounding_inputs(view: DequantizedCheckpoint) -> dict[str, Scheme]:
    """The modules whose inputs an engine quantizes."""
    return {module: scheme for module, scheme in view.schemes.items() if scheme.rounds_activations}
