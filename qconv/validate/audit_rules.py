"""From measurements of single tensors to findings: one for each cause, naming its tensors.

Every threshold names the noise that it must survive. Measured on SmolLM2-135M (update 0.2% to 1.4% of the
weight, 210 weights): clean GPTQ g64 leaves a pooled coefficient of 0.996, single weights 0.58 to 2.35 with
standard errors that explain them (largest deviation 6 errors); round to nearest leaves 0.12 to 0.67, because the
base lies on a 4-bit grid itself; bfloat16 0.83 to 0.999; float8 0.85 to 0.99.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from qconv.validate.audit_adapter import absent_names, adapter_findings
from qconv.validate.audit_folds import FoldVerdict
from qconv.validate.audit_structure import structure_findings
from qconv.validate.audit_tensor import TensorAudit
from qconv.validate.audit_words import finding, where

Finding = dict[str, Any]

# A rest beyond this many times the rounding to nearest is no rounding. GPTQ leaves up to 1.8 times as much (it
# rounds to values that are not nearest, on purpose) at any width, more where calibration saw little; float8 and
# 16-bit values are rounded to nearest, twice by tools that merge in 16 bit first (1.5 times).
REST_FACTOR_COARSE, REST_FACTOR_CODES, REST_FACTOR = 4.0, 3.0, 2.0
# ... nor more than two roundings to bfloat16 before a wider storage: 2 * 2**-8 / sqrt(3).
LEAST_REST = 0.0045
MOST_REST = 0.7  # unrelated weights of equal norm leave 1.0 and more; 2-bit codes 0.5
BLOCKS_REST = 0.3  # bitsandbytes 4-bit: NF4 leaves 0.09, FP4 0.13
# Least-squares scale, relative to that of rounding to nearest. GPTQ moved it by up to half the square of the
# rounding error (0.8% at 4 bits); that square comes on top.
SCALE_TOLERANCE_COARSE, SCALE_TOLERANCE = 0.012, 0.005
# The product of channel scales with what feeds them: 2.4% in the worst of 160 folds of 4-bit weights, whose small
# channels shrink more than the others.
FOLD_TOLERANCE_COARSE = 0.03
SCALE_ERRORS = 5.0
# Norms and biases: two roundings to bfloat16 leave 2**-8 of a value, and readers may add another.
VECTOR_TOLERANCE = 2.0**-6
WRONG_BASE_SHARE = 0.8  # of the weights in the blocks: a wrong base shows in all of them
WRONG_BASE_REST = (0.02, 0.5)
ORIGINAL_SHARE = 0.87  # of values that come back to the base: 0.92 and more for its source, 0.82 for other weights


def findings_of(
    tensors: Sequence[TensorAudit],
    folds: Mapping[str, FoldVerdict],
    *,
    missing: Sequence[str] = (),
    unexpected: Sequence[str] = (),
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    files: Mapping[str, str] | None = None,
) -> list[Finding]:
    """Findings, errors first; none when every tensor is what the merge gives, up to its storage rounding.

    Args:
        folds: what `judge_folds` says of each block.
    """
    shards = files or {}
    found = structure_findings(missing, unexpected, reshaped or {}, shards)
    finite = [t for t in tensors if t.is_finite]
    broken = [t for t in tensors if not t.is_finite]
    if broken:
        found.append(
            finding(
                "error",
                "not-finite",
                f"{len(broken)} tensors hold NaN or infinity",
                f"NaN or infinity in {where(broken)}: the files are damaged, or values overflowed their storage "
                "dtype; write the candidate again, with --dtype bf16 if it was fp16",
                broken,
            )
        )
    differing = [t for t in finite if differs(t)]
    found += _swap_findings(differing)
    rest = [t for t in differing if t.resembles is None]
    matrices = [t for t in finite if t.fit is not None and t.block]
    if is_wrong_base(rest, matrices):
        found.append(_wrong_base_finding(rest, matrices))
        sound = [t for t in finite if t.changed and (t in matrices or t not in differing)]
    else:
        sound = [t for t in finite if t.changed and t not in differing]
        # A shard of another merge: its weights are off where that adapter was strong, and lack this one elsewhere.
        absent = absent_names(sound)
        stale = rest + [t for t in sound if t.name in absent]
        if rest and only_shard(stale, finite):
            rest, sound = stale, [t for t in sound if t.name not in absent]
        found += _difference_findings(rest, finite)
    adapter = adapter_findings(sound, [t for t in finite if t.changed])
    found += adapter
    scalable = [t for t in finite if t.fit is not None and t not in differing]
    if any(f["severity"] == "error" for f in adapter):
        # Channel scales were fitted to weights with another update: their products say nothing about a factor.
        folded = {t.block for t in scalable if t.fit is not None and t.fit.is_folded}
        scalable = [t for t in scalable if not (t.changed and t.block in folded)]
    found += _scale_findings(scalable, folds, {t.name: t for t in finite})
    found += _vector_findings(finite, folds)
    found += _unbalanced_findings(finite, folds, differing)
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(found, key=lambda f: order[f["severity"]])


def is_coarse(tensor: TensorAudit) -> bool:
    """Codes of 4 bits or fewer."""
    return tensor.bits is not None and tensor.bits < 8


def differs(tensor: TensorAudit) -> bool:
    """Whether more is left of a weight, beyond its scale and the adapter's, than its storage explains.

    Codes may lose a column (GPTQ drops inputs that calibration never saw), but no row: its scales are its own.
    """
    fit = tensor.fit
    if fit is None:
        return False
    if fit.lost_rows or (fit.lost_columns and tensor.bits is None):
        return True
    if fit.rounding is None:
        return not fit.residual <= BLOCKS_REST
    factor = REST_FACTOR if tensor.bits is None else REST_FACTOR_CODES
    if is_coarse(tensor):
        factor = REST_FACTOR_COARSE
    return not fit.residual <= min(MOST_REST, max(LEAST_REST, factor * fit.rounding))


def is_wrong_base(differing: Sequence[TensorAudit], matrices: Sequence[TensorAudit]) -> bool:
    """Nearly all weights of the blocks are off by about the same small part."""
    low, high = WRONG_BASE_REST
    alike = [t for t in differing if t.fit is not None and t.block and low < t.fit.residual < high]
    return len(alike) >= max(2.0, WRONG_BASE_SHARE * len(matrices))


def _swap_findings(differing: Sequence[TensorAudit]) -> list[Finding]:
    swapped = [t for t in differing if t.resembles is not None]
    if not swapped:
        return []
    pairs = ", ".join(f"{t.name} holds {t.resembles}" for t in swapped[:5])
    return [
        finding(
            "error",
            "tensors-swapped",
            f"{len(swapped)} tensors hold the weights of another",
            f"{pairs}{', ...' if len(swapped) > 5 else ''}: names were mixed up when the candidate was written; "
            "check the mapping of names and write it again",
            swapped,
        )
    ]


def _wrong_base_finding(differing: Sequence[TensorAudit], matrices: Sequence[TensorAudit]) -> Finding:
    rests = [t.fit.residual for t in differing if t.fit is not None]
    encoded = [t.encoded_share for t in matrices if t.encoded_share is not None]
    is_original = bool(encoded) and min(encoded) > ORIGINAL_SHARE
    what = (
        "without the adapter it is what the base was quantized from: the adapter was merged into the original 16-bit "
        "weights, but it was trained on the 4-bit ones and corrects their rounding. Merge into the dequantized base"
        if is_original and any(t.changed for t in matrices)
        else "it was made from the original 16-bit weights, and the reference is their 4-bit copy"
        if is_original
        else "it was made from another base (another checkpoint, or another quantization of it) than the one given: "
        "compare the two, and merge again"
    )
    return finding(
        "error",
        "wrong-base",
        "made from the original 16-bit base" if is_original else "made from another base",
        f"{len(differing)} of {len(matrices)} weights are {min(rests):.1%} to {max(rests):.1%} off, far more than "
        f"their storage rounds, and alike; {what}",
        differing,
    )


def _difference_findings(differing: Sequence[TensorAudit], everything: Sequence[TensorAudit]) -> list[Finding]:
    if not differing:
        return []
    errors = [t.fit.residual for t in differing if t.fit is not None]
    size = f"off by {min(errors):.1%}" + (f" to {max(errors):.1%}" if len(errors) > 1 else "")
    lost = sum(t.fit.lost_rows + t.fit.lost_columns for t in differing if t.fit is not None)
    if lost:
        size = f"damaged ({lost} rows or columns are zero)"
    shard = only_shard(differing, everything)
    if shard:
        return [
            finding(
                "error",
                "stale-shard",
                f"{shard} does not belong to this merge",
                f"the {len(differing)} weights of {shard}, and no others, are {size}: the file is left over from "
                "another run or model; write the candidate again, or fetch this file again",
                differing,
            )
        ]
    return [
        finding(
            "error",
            "weights-differ",
            f"{len(differing)} weights are not what the merge gives",
            f"{where(differing)}: {size}, more than their storage rounds, and neither a scale nor the adapter explains "
            "it; damaged, edited or from another model: write them again",
            differing,
        )
    ]


def only_shard(tensors: Sequence[TensorAudit], everything: Sequence[TensorAudit]) -> str:
    """The shards that hold exactly these weights (of all, or of those that the adapter changes), or ""."""
    files = {t.file for t in tensors}
    if "" in files or len({t.file for t in everything}) <= len(files):
        return ""
    names = {t.name for t in tensors}
    peers = [t for t in everything if t.fit is not None and t.file in files]
    is_whole = names in ({t.name for t in peers}, {t.name for t in peers if t.changed})
    return ", ".join(sorted(files)) if is_whole else ""


def _scale_findings(
    tensors: Sequence[TensorAudit], folds: Mapping[str, FoldVerdict], by_name: Mapping[str, TensorAudit]
) -> list[Finding]:
    factors: dict[str, float] = {}
    for tensor in tensors:
        factor = _scale_of(tensor, folds)
        if factor is not None:
            factors[tensor.name] = factor
    if not factors:
        return []
    scaled = [t for t in tensors if t.name in factors]
    parts, suspects = [], []
    for block, members in _by(scaled, lambda t: t.block or t.name).items():
        values = [factors[t.name] for t in members]
        all_of = [t for t in tensors if t.block == block]
        what = f"{block}: weights" if block and len(members) == len(all_of) else where(members)
        middle = sorted(values)[len(values) // 2]
        norms = [by_name[name] for name in folds[block].scaled_norms] if block in folds else []
        parts.append(
            f"{what} are {middle:.3f}x of the expected" + (f", or {where(norms)} before them is" if norms else "")
        )
        suspects += norms
    return [
        finding(
            "error",
            "weight-scaled",
            f"{len(scaled)} weights have another scale",
            "; ".join(parts[:6])
            + (f"; and {len(parts) - 6} more places" if len(parts) > 6 else "")
            + ". A factor was applied once too often or not at all: check what was done after the merge",
            [*suspects, *scaled],
        )
    ]


def _scale_of(tensor: TensorAudit, folds: Mapping[str, FoldVerdict]) -> float | None:
    """The factor that a weight is off by, or None when it is within its noise or balanced by a neighbour."""
    fit = tensor.fit
    assert fit is not None
    rounding = fit.rounding if fit.rounding is not None else 0.1
    # A grid that is too wide or too narrow moves what rounding to nearest on it leaves by half of the wrong factor.
    # Sound grids only shrink weights (measured: by 0.7 to 2.2 times the square of their rounding error).
    shrunk = min(1.0, max(fit.nearest_scale if fit.nearest_scale is not None else 1.0, 1 - 2.0 * rounding**2))
    verdict = folds.get(tensor.block)
    scale, error = fit.scale, fit.scale_error
    tolerance = SCALE_TOLERANCE_COARSE if is_coarse(tensor) else SCALE_TOLERANCE
    if verdict is not None and tensor.name in verdict.imbalance:
        scale = verdict.imbalance[tensor.name]
        tolerance = FOLD_TOLERANCE_COARSE if is_coarse(tensor) else SCALE_TOLERANCE
    elif fit.is_folded:
        return None  # of a pair whose other half was not found; `_unbalanced_findings` says so
    elif shrunk > 0:
        scale = scale / shrunk
    return None if abs(scale - 1) <= tolerance + rounding**2 + SCALE_ERRORS * error else scale


def _vector_findings(tensors: Sequence[TensorAudit], folds: Mapping[str, FoldVerdict]) -> list[Finding]:
    off = [
        t
        for t in tensors
        if t.deviation is not None
        and not t.deviation <= VECTOR_TOLERANCE
        and not (t.block in folds and t.name in folds[t.block].explained)
    ]
    if not off:
        return []
    worst = max(off, key=lambda t: t.deviation or 0.0)
    is_norm = "norm" in worst.name or ".ln" in worst.name
    return [
        finding(
            "error",
            "norm-differs" if is_norm else "bias-differs",
            f"{len(off)} {'norms' if is_norm else 'vectors'} are not the expected ones",
            f"{where(off)}: values differ by up to {worst.deviation:.2%} ({worst.name}), and no linear layer takes "
            "that back; they must be the base's, or the adapter's where it trained them",
            off,
        )
    ]


def _unbalanced_findings(
    tensors: Sequence[TensorAudit], folds: Mapping[str, FoldVerdict], differing: Sequence[TensorAudit]
) -> list[Finding]:
    names = {name for verdict in folds.values() for name in verdict.unbalanced}
    open_ends = [t for t in tensors if t.name in names and t not in differing]
    if not open_ends:
        return []
    return [
        finding(
            "error",
            "scales-unbalanced",
            f"{len(open_ends)} weights have channel scales that nothing takes back",
            f"{where(open_ends)}: channels are scaled (as AWQ and SmoothQuant do), and neither the norm before it nor "
            "the rows of another linear of the block are divided by the same; one half of the fold was lost",
            open_ends,
        )
    ]


def _by(tensors: Iterable[TensorAudit], key: Callable[[TensorAudit], str]) -> dict[str, list[TensorAudit]]:
    ordered = sorted(tensors, key=key)
    return {name: list(members) for name, members in groupby(ordered, key=key)}
