"""What a run says about itself: its plan on the terminal, and the report's account of each stage."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from qconv import __version__, corpus
from qconv.config import CalibrationConfig, MergeJob, OutputConfig
from qconv.experts import has_experts
from qconv.layout import Layout
from qconv.merge.combine import combined_parts
from qconv.merge.interference import Interference, measure_interference
from qconv.progress import Progress
from qconv.quantization_config import QuantizationConfig
from qconv.runners import Reference
from qconv.targets import TARGETS, mixed_target
from qconv.types import Checkpoint, Scheme

NOT_MEASURABLE = (
    "this combination is no low-rank update, so nothing unmerged equals it: the reference is the merged 16-bit model "
    "itself, requantization is measured and the merge is not"
)


def reader_notes(quantization: QuantizationConfig, scheme: Scheme | None, has_adapter: bool) -> list[str]:
    """What maintained engines are known not to load, although the format holds it; and what a format costs."""
    notes = []
    if TARGETS[quantization.target].gguf_kind is not None or TARGETS[quantization.target].is_onnx:
        return []
    if has_adapter and quantization.target == "gpt-oss-mxfp4" and quantization.resolved_algorithm == "rtn":
        notes.append(
            "rounding to nearest puts the merged weights of an MXFP4 base back on its own numbers, and takes the "
            "adapter's update of experts back; by gptq other weights make up for it (docs/formats.md)"
        )
    if scheme is None and not has_adapter:
        return []
    if scheme is None:
        return [
            "rounding merged weights to bitsandbytes' 4-bit blocks again takes most of the adapter back (3.5% of its "
            "effect is left on SmolLM2, docs/quality.md), and the audit says so; every other 4-bit target keeps more"
        ]
    if quantization.target in ("gptq", "gptq_v2"):
        if not scheme.symmetric:
            notes.append(
                "current vLLM releases refuse asymmetric GPTQ"
                + ("; --requant awq --algorithm gptq holds the same numbers for it" if scheme.bits == 4 else "")
            )
        if scheme.bits < 4:
            notes.append(f"gptqmodel reads {scheme.bits} bits; Marlin kernels of vLLM and SGLang take 4 and 8")
    if quantization.target == "gptq_v2":
        notes.append(
            "gptqmodel goes by checkpoint_format; a reader that does not know it, such as vLLM until autumn 2025, adds "
            "1 to every zero point"
        )
    if quantization.desc_act and scheme.group_size != -1:
        notes.append(
            "current vLLM releases refuse GPTQ with a stored group index; without --desc-act columns are taken in the "
            "order of their activations, too, and their groups need no index"
        )
    if quantization.target in ("w4a16", "w8a16") and not scheme.symmetric:
        notes.append("asymmetric pack-quantized weights load in vLLM, and not in every transformers release")
        if scheme.bits == 8:
            notes.append("vLLM's and SGLang's Marlin kernels take zero points with 4 bits only")
    if quantization.target in ("w4a16", "w8a16") and scheme.bits not in (4, 8):
        notes.append(
            f"{scheme.bits} bits: read by compressed-tensors since 0.18 (and transformers with it), by vLLM since "
            "summer 2026 on GPUs with its humming kernels, and not by SGLang or TGI"
        )
    if quantization.kv_cache:
        told = "engines are" if quantization.target == "fp8-block" else "vLLM keeps one unasked, other engines are"
        notes.append(
            f"FP8 cache: {told} told to keep one (--kv-cache-dtype, in the launch line of qconv pack); SGLang reads "
            "the scales of compressed-tensors since autumn 2026 (pull request 35455); attention kernels that compute "
            "in float8 (FlashAttention 3) round queries, too, which validation does not"
        )
        if quantization.target == "fp8-block":
            notes.append("transformers knows no FP8 cache of such folders, and reports its scales as unexpected")
    if scheme.is_fp4 or scheme.float8_activations:
        notes.append("vLLM has kernels for this on GPUs alone")
    elif scheme.kind == "int" and scheme.bits == 4 and scheme.rounds_activations:
        notes.append("vLLM rounds inputs on GPUs, and on CPUs with AMX and VLLM_CPU_INT4_W4A8=1 (docs/targets.md)")
    if quantization.target == "w4a8-fp8" and scheme.group_size != 128:
        notes.append(
            f"vLLM's kernel for 4-bit weights beside float8 inputs takes groups of 128, not {scheme.group_size}"
        )
    if scheme.kind == "int" and scheme.group_size not in (-1, 32, 64, 128):
        notes.append(f"Marlin kernels know group sizes -1, 32, 64 and 128, not {scheme.group_size}")
    return notes


def _notes(quantization: QuantizationConfig, layout: Layout, has_adapter: bool) -> list[str]:
    """The notes on every scheme that the output has."""
    schemes = dict.fromkeys(layout.schemes.values()) or [None]
    notes = [note for scheme in schemes for note in reader_notes(quantization, scheme, has_adapter)]
    if quantization.target == "int8" and has_experts(layout.schemes):
        notes.append(
            "transformers (5.23) decodes experts of w4a16, w8a16, fp8 and fp8-block as it loads them, and not of int8"
        )
    if len(layout.layouts) > 1:
        notes.append(
            "several layouts in one folder (mixed-precision), each named by its config group: compressed-tensors and "
            "vLLM read them, SGLang 0.5.23 does but for MXFP4, TGI does not"
        )
    if layout.head is not None:
        notes.append(
            "not every release of a serving engine reads a quantized output head; it was rounded to nearest on a "
            "searched grid, without calibration"
        )
    return list(dict.fromkeys(notes))


def _readers(quantization: QuantizationConfig, layout: Layout) -> str:
    """Of all its schemes: readers of 4-bit floats read integers, too, and fewer read those floats."""
    found, target = set(map(mixed_target, layout.schemes.values())), TARGETS[quantization.target]
    floats = (name for name in reversed(target.mixed_targets) if name in found)  # fewer engines read the last
    return TARGETS[next(floats, target.name)].readers


def _mixture(layout: Layout) -> list[str]:
    """The linears that do not have the scheme of most, by scheme."""
    others: dict[Scheme, list[str]] = {}
    for name, scheme in layout.schemes.items():
        if scheme != layout.scheme:
            others.setdefault(scheme, []).append(name.removesuffix(".weight"))
    return [
        f"{len(names)} in {mixed_target(scheme) or _in_words(scheme)}: {names[0]}"
        + (f" to {names[-1]}" if len(names) > 1 else "")
        for scheme, names in others.items()
    ]


def _in_words(scheme: Scheme) -> str:
    group = "row" if scheme.group_size == -1 else str(scheme.group_size)
    if scheme.block_rows > 1:
        group = f"{scheme.block_rows} x {group}"
    if scheme.kind == "float":
        return f"float{scheme.bits}, group {group}"
    return f"{scheme.bits}-bit {'symmetric' if scheme.symmetric else 'asymmetric'}, group {group}"


def describe_plan(job: MergeJob, reference: Reference, layouts: Sequence[Layout], device: str) -> Iterator[str]:
    """What is about to happen, for the terminal."""
    if job.gpu_memory_limit is not None and device == "cpu":
        yield "note: --gpu-memory limits what is taken of a GPU, and this runs on the CPU"
    if reference.adapter is not None:
        adapter = reference.adapter
        updates = (
            f"{len(adapter.transforms)} {adapter.kind}" if adapter.transforms else f"{len(adapter.deltas)} low-rank"
        )
        rows = f", rows of {' and '.join(adapter.rows)}" if adapter.rows else ""
        yield (
            f"merging {updates} updates and {len(adapter.replacements)} whole tensors{rows} into {job.base}, "
            f"as training saw it ({reference.kind})"
        )
        if adapter.name_rules:
            yield f"note: names that are not peft's were read by rules: {'; '.join(adapter.name_rules)}"
        yield from (f"note: {note}" for note in getattr(reference.merged, "notes", ()))
    if job.combination is not None:
        yield f"combining {job.combination.summary}"
        if reference.adapter is None:
            yield f"note: {NOT_MEASURABLE}"
    for output, layout in zip(job.outputs, layouts, strict=True):
        yield from _describe_output(output, layout, bool(job.adapters))


def combination_facts(reference: Reference, device: str, progress: Progress) -> dict[str, Any]:
    """How adapters that are merged together get in one another's way, for the terminal and the report."""
    combination = reference.combination
    if combination is None:
        return {}
    parts = combined_parts(combination.adapters, combination.config)
    totals, details = measure_interference(combination.adapters, parts, device)
    result: dict[str, Any] = {"method": combination.config.summary}
    if not combination.is_low_rank:
        result["merge budget"] = NOT_MEASURABLE
    pairs: dict[str, dict[str, float]] = {}
    for found in totals:
        pairs[f"adapters {found.first} and {found.second}"] = _interference(found)
        progress.say(
            f"interference of adapters {found.first} and {found.second}: cosine {found.cosine:+.3f}, "
            f"{found.sign_conflicts:.1%} of signs conflict, norms {found.norm_ratio:.2f} to 1"
        )
    result["interference"] = pairs or "the adapters change no weight in common"
    result["interference by weight"] = {
        f"{found.weight} ({found.first}, {found.second})": _interference(found) for found in details
    }
    return result


def _interference(found: Interference) -> dict[str, float]:
    return {"cosine": found.cosine, "sign conflicts": found.sign_conflicts, "norm ratio": found.norm_ratio}


def _describe_output(output: OutputConfig, layout: Layout, has_adapter: bool) -> Iterator[str]:
    if output.quantization is not None and layout.scheme is not None:
        yield (
            f"quantizing {len(layout.quantized)} linears to {output.quantization.target}: {_in_words(layout.scheme)}, "
            f"by {output.quantization.resolved_algorithm}"
        )
        yield from (f"of these: {line}" for line in _mixture(layout))
    elif output.quantization is not None:
        if layout.onnx is not None:
            yield f"building an ONNX graph in {layout.onnx.dtype}"
            return
        rule = "bitsandbytes 4-bit blocks" if layout.gguf is None else "by llama.cpp's rule"
        yield f"quantizing {len(layout.quantized)} linears to {output.quantization.target} ({rule})"
    if output.quantization is not None:
        yield from (f"note: {note}" for note in _notes(output.quantization, layout, has_adapter))
    size = sum(spec.num_bytes for spec in layout.specs)
    yield f"writing {size / 1e6:.0f} MB to {output.out}"


def cache_line(scales: Mapping[str, tuple[float, float]]) -> str:
    """Scales of keys and values, for the terminal."""
    ranges = [
        f"{what} {min(found):.3g} to {max(found):.3g}"
        for what, found in zip(("keys", "values"), zip(*scales.values(), strict=True), strict=True)
    ]
    return f"FP8 cache, scales of {len(scales)} attentions: {', '.join(ranges)}"


def cache_facts(scales: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """The same for the report, each attention with its own."""
    return {
        "dtype": "float8_e4m3fn",
        "scales": "largest magnitude that calibration saw / 448; keys after rotary embedding",
        "attentions": {name: {"keys": keys, "values": values} for name, (keys, values) in scales.items()},
    }


def subject(job: MergeJob, output: OutputConfig) -> dict[str, Any]:
    return {
        "reference": job.base,
        "adapter": adapters_of(job),
        "candidate": str(output.out),
        "candidate_adapter": None,
        "target": output.quantization.target if output.quantization else "plain",
    }


def adapters_of(job: MergeJob) -> str | None:
    """In one line."""
    return " + ".join(job.adapters) or None


def environment(device: str) -> dict[str, str]:
    packages = {"qconv": __version__}
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    hardware = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {**packages, "python": platform.python_version(), "device": f"{device} ({hardware})"}


def stages(
    job: MergeJob,
    output: OutputConfig,
    reference: Reference,
    merged: Checkpoint,
    layout: Layout,
    calibration: torch.Tensor | None,
    calibration_text: str,
    counts: Counter[str],
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if reference.adapter is not None:
        adapter = reference.adapter
        what = f"{adapter.kind} update" if adapter.transforms else "low-rank update"
        result["merge"] = {
            f"weights changed by a {what}": len(adapter.transforms or adapter.deltas),
            "tensors replaced whole": len(adapter.replacements),
            **({"tensors with rows replaced": len(adapter.rows)} if adapter.rows else {}),
            "notes": list(getattr(merged, "notes", ())),
            **({"read as": job.options.summary} if job.options.summary else {}),
            **({"intruder dimensions": reference.dampening.facts()} if reference.dampening else {}),
            **({"names read by rules": list(adapter.name_rules)} if adapter.name_rules else {}),
        }
    if output.quantization is not None and layout.scheme is not None:
        scheme = layout.scheme
        result["quantization"] = {
            "format": "+".join(layout.layouts) if layout.onnx is None else TARGETS[output.quantization.target].format,
            "algorithm": output.quantization.resolved_algorithm,
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "symmetric": scheme.symmetric,
            **({"activations": "static"} if scheme.static_activations else {}),
            **({"block_rows": scheme.block_rows} if scheme.block_rows > 1 else {}),
            "linears quantized": len(layout.quantized),
            "read by": _readers(output.quantization, layout),
            "notes on readers": _notes(output.quantization, layout, bool(job.adapters)),
            **({"linears with other settings": _mixture(layout)} if _mixture(layout) else {}),
            **_asked(output, output.quantization),
            **dict(sorted(counts.items())),
        }
    elif output.quantization is not None and layout.onnx is None:
        result["quantization"] = {
            "format": layout.format,
            "algorithm": output.quantization.resolved_algorithm,
            "bits": TARGETS[output.quantization.target].bits[0],
            "linears quantized": len(layout.quantized),
            "read by": TARGETS[output.quantization.target].readers,
            "notes on readers": reader_notes(output.quantization, None, bool(job.adapters)),
            **_asked(output, output.quantization),
            **dict(sorted(counts.items())),
        }
    if calibration is not None and output.quantization is not None and output.quantization.needs_text:
        result["calibration"] = _describe(job.calibration, calibration, calibration_text)
    return result


def _asked(output: OutputConfig, quantization: QuantizationConfig) -> dict[str, list[str]]:
    """What options say of an output that its numbers do not."""
    said = {"left unquantized by": list(quantization.ignore), "options not taken": list(output.not_taken)}
    return {name: texts for name, texts in said.items() if texts}


def _describe(config: CalibrationConfig, rows: torch.Tensor, text: str) -> dict[str, Any]:
    return {
        "source": " + ".join(config.sources),
        "read": "; ".join(text.splitlines()),
        "samples": config.samples,
        "seq_len": config.seq_len,
        "seed": config.seed,
        "sha256": corpus.calibration_digest(rows),
    }
