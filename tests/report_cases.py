"""Report documents for tests: full, minimal, with nasty texts, with 80 blocks."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

NASTY = '<script>alert("x")</script> & | `a` *b* \x1b[31m\x00\u202e\ud800 \n\t</td> "\' é 日本語 🙂 @who #1 $x$'


def pair(mean: float, *, seed: int = 0, positions: int = 16352, documents: int = 24) -> dict[str, Any]:
    """Statistics whose KL per position is log-normal around ``mean``."""
    rng = random.Random(seed)
    kls = sorted(mean * math.exp(rng.gauss(-0.9, 1.4)) for _ in range(4000))

    def distribution(scale: float) -> dict[str, Any]:
        def quantile(q: float) -> float:
            return scale * kls[min(len(kls) - 1, int(q * len(kls)))]

        return {
            "mean": scale * mean,
            "interval_95": [scale * mean * 0.9, scale * mean * 1.12],
            "median": quantile(0.5),
            "p90": quantile(0.9),
            "p95": quantile(0.95),
            "p99": quantile(0.99),
            "p99_9": quantile(0.999),
            "max": scale * kls[-1],
        }

    edges = [-8 + 0.25 * index for index in range(41)]
    counts = [0] * 40
    for kl in kls:
        counts[min(39, max(0, int((math.log10(kl) + 8) / 0.25)))] += positions // 4000
    agreement = 1 - min(0.5, 0.6 * mean**0.5)
    ratio = 1 + mean / 3
    bands = [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 0.9), (0.9, 0.99), (0.99, 1)]
    shares = (0.1, 0.22, 0.26, 0.16, 0.17, 0.09)
    return {
        "positions": positions,
        "documents": documents,
        "kl": distribution(1.0),
        "reverse_kl": distribution(1.07),
        "top1_agreement": {"value": agreement, "interval_95": [agreement - 0.004, agreement + 0.003]},
        "top5_agreement": {"value": agreement - 0.02, "interval_95": [agreement - 0.025, agreement - 0.016]},
        "probability_difference": {"mean": -0.0021, "rms": 0.041},
        "perplexity": 52.56 * ratio,
        "reference_perplexity": 52.56,
        "perplexity_ratio": {"value": ratio, "interval_95": [ratio - 0.004, ratio + 0.004]},
        "log_perplexity_ratio": {"value": math.log(ratio), "interval_95": [math.log(ratio) - 0.004, math.log(ratio)]},
        "flips": {"value": 0.031, "interval_95": [0.028, 0.035], "correct_to_wrong": 295, "wrong_to_correct": 212},
        "by_confidence": [
            {
                "from": low,
                "to": high,
                "positions": int(positions * share),
                "kl_mean": mean * (1.6 - high),
                "top1_agreement": min(1.0, agreement - 0.12 + 0.16 * high),
            }
            for (low, high), share in zip(bands, shares, strict=True)
        ],
        "histogram": {"log10_edges": edges, "counts": counts},
    }


def full(num_blocks: int = 30) -> dict[str, Any]:
    """Everything measured: one gate of each verdict, one finding of each severity."""
    return {
        "format": 2,
        "tool": "qconv 0.1.0",
        "created": "2026-11-22T09:30:00+00:00",
        "command": "merge",
        "verdict": "fail",
        "reasons": [
            "kl_mean <= 0.05 fails: 0.0612, and its whole 95% interval (0.0551 to 0.0685) lies above the limit.",
            "The artifact misses a chat template that the reference has.",
        ],
        "subject": {
            "reference": "./base-nf4",
            "adapter": "./adapter",
            "candidate": "./out",
            "candidate_adapter": None,
            "target": "w4a16",
        },
        "environment": {
            "qconv": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "python": "3.11.7",
            "device": "cuda (NVIDIA H100 80GB HBM3)",
        },
        "provenance": {
            "reference": {"model.safetensors": "3f" * 32, "config.json": "a1" * 32},
            "adapter": {"adapter_model.safetensors": "9c" * 32},
            "candidate": {"model-00001-of-00002.safetensors": "07" * 32, "model-00002-of-00002.safetensors": "e5" * 32},
        },
        "stages": {
            "merge": {"weights changed by a low-rank update": 210, "tensors replaced whole": 0, "notes": []},
            "quantization": {
                "format": "pack-quantized",
                "algorithm": "gptq",
                "bits": 4,
                "group_size": 64,
                "symmetric": True,
                "linears quantized": 210,
                "damping raised": 3,
            },
            "calibration": {"source": "embedded prose", "samples": 128, "seq_len": 512, "sha256": "b2" * 32},
            "budget": {
                "bits per weight": 4.79,
                "linears": {
                    f"model.layers.{i}.mlp.down_proj": {"bits": 4 * (1 + i % 2), "cost at 4 bits": 0.0004 / (1 + i)}
                    for i in range(3)
                },
            },
        },
        "fidelity": fidelity(num_blocks),
        "findings": findings(),
        "tasks": tasks(),
        "gates": gates(),
    }


def fidelity(num_blocks: int) -> dict[str, Any]:
    return {
        "evaluation": {
            "source": "embedded prose (held out)",
            "seq_len": 512,
            "seed": 0,
            "sha256": "c4" * 32,
            "rows": 32,
            "positions": 16352,
            "documents": 24,
        },
        "reference": {
            "runs": "bitsandbytes and peft kernels, adapter unmerged",
            "perplexity": 52.56,
            "cache": {"hit": True, "bytes": 123456789},
        },
        "candidate": {"runs": "stored bytes read back and decoded by qconv"},
        "total": pair(0.0612, seed=1),
        "merge": pair(0.00163, seed=2),
        "requantization": pair(0.0598, seed=3),
        "base_without_adapter": pair(0.392, seed=4),
        "floor": pair(0.000012, seed=5),
        "adapter_effect_retained": {"value": 0.8439, "interval_95": [0.828, 0.857]},
        "blocks": blocks(num_blocks),
        "attribution": attribution(num_blocks),
        "worst_tokens": worst_tokens(),
        "prompts": prompts(),
        "notes": ["The first 16 positions of every row are not counted: they have little context."],
    }


def blocks(num: int) -> list[dict[str, Any]]:
    rng = random.Random(6)
    found = []
    for block in range(num):
        error = 0.02 + 0.11 * (block / num) ** 1.4 + abs(rng.gauss(0, 0.005)) + (0.05 if block == num // 3 else 0)
        found.append(
            {
                "block": block,
                "relative_error": error,
                "sqnr_db": -20 * math.log10(error),
                "cosine": 1 - error**2 / 2,
            }
        )
    return found


def attribution(num_blocks: int) -> dict[str, Any]:
    rng = random.Random(7)
    kinds = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    kinds += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    linears = [
        {"name": f"model.layers.{block}.{kind}", "kl_mean": 0.0001 * math.exp(rng.gauss(0, 1)), "share": 0.0}
        for block in range(num_blocks)
        for kind in kinds
    ]
    units = [
        {"name": f"model.layers.{block}", "kl_mean": 0.0012 * math.exp(rng.gauss(0, 0.7)), "share": 0.0}
        for block in range(num_blocks)
    ]
    units.append({"name": "outside the blocks", "kl_mean": 0.0009, "share": 0.0})
    for group in (linears, units):
        total = sum(unit["kl_mean"] for unit in group)
        for unit in group:
            unit["share"] = unit["kl_mean"] / total
    parts = sum(unit["kl_mean"] for unit in units)
    return {
        "positions": 2044,
        "total_kl": 0.0611,
        "sum_of_parts": parts,
        "additivity": parts / 0.0611,
        "blocks": units,
        "linears": linears,
    }


def worst_tokens() -> list[dict[str, Any]]:
    contexts = [
        (" reached the harbour at dusk, and the captain, who had not slept since\n\nCork, said", " nothing", 4.81),
        ("Chapter XII.\n\nIt was a bright cold day, the clocks were striking", " thirteen", 3.97),
        (" if (a < b && c > d) {\n\treturn", " a", 3.12),
        ("“Indeed,” replied Mr.", " Darcy", 2.88),
        (" x", "\n", 2.41),
        ("It was the best of", " times", 2.2),
        ("", "The", 2.1),
    ]
    return [
        {
            "row": index,
            "position": 40 + 7 * index,
            "document": index,
            "kl": kl,
            "context": context,
            "target": target,
            "reference_top": [[target, 0.81], [" that", 0.06], [" the", 0.02]],
            "candidate_top": [[" that", 0.44], [",", 0.21], [target, 0.0312]],
        }
        for index, (context, target, kl) in enumerate(contexts)
    ]


def prompts() -> dict[str, Any]:
    return {
        "num_prompts": 16,
        "new_tokens": 64,
        "identical": 9,
        "identical_interval_95": [0.332, 0.769],
        "median_first_divergence": 41.0,
        "examples": [
            {
                "prompt": "What is the capital of France?",
                "reference": "The capital of France is Paris.",
                "candidate": "The capital of France is Paris.",
                "first_divergence": None,
            },
            {
                "prompt": "Write one sentence about the sea.",
                "reference": "The sea is a vast body of salt water\nthat covers most of the planet.",
                "candidate": "The sea is a vast expanse of blue\nthat sailors have always feared.",
                "first_divergence": 6,
            },
        ],
    }


def findings() -> list[dict[str, Any]]:
    return [
        {
            "severity": "warning",
            "code": "generation-config-differs",
            "title": "generation_config.json differs",
            "message": "eos_token_id is 2 in the candidate and [2, 32000] in the reference; copy the reference's file.",
            "tensors": [],
            "files": ["generation_config.json"],
        },
        {
            "severity": "error",
            "code": "chat-template-missing",
            "title": "The chat template is missing",
            "message": "The reference has a chat template, the candidate has none; copy chat_template.jinja.",
            "tensors": [],
            "files": ["tokenizer_config.json", "chat_template.jinja"],
        },
        {
            "severity": "error",
            "code": "adapter-not-applied",
            "title": "The adapter did not reach two tensors",
            "message": "These tensors equal the base without the adapter; merge again.",
            "tensors": ["model.layers.3.mlp.down_proj.weight", "model.layers.4.mlp.down_proj.weight"],
            "files": ["model-00001-of-00002.safetensors"],
        },
        {
            "severity": "note",
            "code": "tied-embeddings",
            "title": "Embeddings are tied",
            "message": "lm_head is stored once.",
            "tensors": [],
            "files": [],
        },
    ]


def tasks() -> list[dict[str, Any]]:
    return [
        {
            "name": "multiple choice (embedded)",
            "metric": "accuracy",
            "num_samples": 400,
            "reference": 0.6125,
            "candidate": 0.6,
            "difference": -0.0125,
            "interval_95": [-0.035, 0.01],
            "better_to_worse": 14,
            "worse_to_better": 9,
            "mcnemar_p": 0.4049,
            "higher_is_better": True,
        },
        {
            "name": "questions.jsonl",
            "metric": "exact match",
            "num_samples": 120,
            "reference": 0.341,
            "candidate": 0.333,
            "difference": -0.008,
            "interval_95": [None, None],
            "better_to_worse": 1,
            "worse_to_better": 0,
            "mcnemar_p": 1.0,
            "higher_is_better": True,
        },
        {
            "name": "letters",
            "metric": "word_perplexity",
            "num_samples": 62,
            "reference": 23.41,
            "candidate": 23.97,
            "difference": 0.56,
            "interval_95": [0.31, 0.84],
            "better_to_worse": None,
            "worse_to_better": None,
            "mcnemar_p": None,
            "higher_is_better": False,
        },
    ]


def gates() -> list[dict[str, Any]]:
    return [
        gate("top1_agreement", ">= 0.8", 0.8516, [0.8476, 0.8546], "pass", origin="default"),
        gate("kl_mean", "<= 0.05", 0.0612, [0.0551, 0.0685], "fail", origin="flag"),
        gate("adapter_effect_retained", ">= 0.85", 0.8439, [0.828, 0.857], "inconclusive", settle=125000),
        gate(
            "merge.kl_mean",
            "<= 3 x floor = 3.6e-05",
            0.00163,
            [0.0015, 0.0018],
            "waived",
            waiver={
                "reason": "16-bit merge, accepted for this release",
                "expires": "2026-12-31",
                "approved_by": "R. M.",
            },
        ),
        gate("perplexity_ratio", "<= 1.05", 1.0204, [1.0164, 1.0244], "pass"),
    ]


def gate(
    name: str,
    rule: str,
    value: float | None,
    interval: list[float | None] | None,
    verdict: str,
    *,
    origin: str = "file",
    settle: int | None = None,
    waiver: dict[str, Any] | None = None,
) -> dict[str, Any]:
    return {
        "name": name,
        "rule": rule,
        "value": value,
        "interval_95": interval,
        "verdict": verdict,
        "tokens_to_settle": settle,
        "origin": origin,
        "waiver": waiver,
    }


def passing() -> dict[str, Any]:
    """A release that goes out: every gate passes, nothing found, no tasks or prompts asked for."""
    document = full()
    document["verdict"] = "pass"
    document["reasons"] = ["All 2 gates pass with their whole 95% interval."]
    document["findings"] = []
    document["tasks"] = []
    document["gates"] = [
        gate("kl_mean", "<= 0.1", 0.0612, [0.0551, 0.0685], "pass", origin="flag"),
        gate("top1_agreement", ">= 0.8", 0.8516, [0.8476, 0.8546], "pass"),
    ]
    document["fidelity"]["prompts"] = None
    return document


def minimal() -> dict[str, Any]:
    """Nothing measured."""
    return {
        "format": 2,
        "tool": "qconv 0.1.0",
        "created": "2026-11-22T09:30:00+00:00",
        "command": "convert",
        "verdict": "not gated",
        "reasons": [],
        "subject": {
            "reference": "./model",
            "adapter": None,
            "candidate": "./out",
            "candidate_adapter": None,
            "target": None,
        },
        "environment": {
            "qconv": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "python": "3.11.7",
            "device": "cpu (x86_64)",
        },
        "provenance": {},
        "stages": {},
        "fidelity": None,
        "findings": [],
        "tasks": [],
        "gates": [],
    }


def sparse() -> dict[str, Any]:
    """Measured, with every optional part null and every bound unknown: one row, no adapter."""
    document = minimal() | {"command": "quantize", "verdict": "inconclusive"}
    document["reasons"] = ["kl_mean <= 0.1: one document cannot bound a mean."]
    document["gates"] = [gate("kl_mean", "<= 0.1", None, None, "inconclusive")]
    measured = fidelity(0)
    for key in ("merge", "requantization", "base_without_adapter", "floor", "adapter_effect_retained"):
        measured[key] = None
    measured |= {"attribution": None, "worst_tokens": [], "prompts": None, "notes": [], "blocks": []}
    measured["reference"]["cache"] = None
    measured["total"] = _nulls(measured["total"])
    measured["total"]["by_confidence"] = []
    measured["total"]["histogram"] = {"log10_edges": [], "counts": []}
    document["fidelity"] = measured
    return document


def identical() -> dict[str, Any]:
    """The candidate is the reference: every distance exactly 0, SQNR infinite (null)."""
    document = passing()
    measured = document["fidelity"]
    for key in ("total", "merge", "requantization", "floor"):
        for direction in ("kl", "reverse_kl"):
            measured[key][direction] = {
                name: [0.0, 0.0] if name == "interval_95" else 0.0 for name in measured[key][direction]
            }
        measured[key]["top1_agreement"] = {"value": 1.0, "interval_95": [1.0, 1.0]}
        edges = measured[key]["histogram"]["log10_edges"]
        measured[key]["histogram"]["counts"] = [16352] + [0] * (len(edges) - 2)
    measured["adapter_effect_retained"] = {"value": 1.0, "interval_95": [1.0, 1.0]}
    measured["blocks"] = [{"block": index, "relative_error": 0.0, "sqnr_db": None, "cosine": 1.0} for index in range(4)]
    measured["attribution"] = None
    measured["worst_tokens"] = []
    return document


def nasty() -> dict[str, Any]:
    """The full document with hostile text wherever a text can come from outside."""
    document = _texts(full())
    document |= {key: full()[key] for key in ("format", "tool", "created", "command", "verdict")}
    document["provenance"] = {f"reference {NASTY}": {f"model {NASTY}": "3f" * 32}}
    document["stages"] = {f"merge {NASTY}": {f"fact {NASTY}": [NASTY, {NASTY: NASTY}, 3, True, None]}}
    for finding, severity in zip(document["findings"], ("warning", "error", "error", "note"), strict=True):
        finding["severity"] = severity
    for entry, original in zip(document["gates"], full()["gates"], strict=True):
        entry |= {"verdict": original["verdict"], "origin": original["origin"]}
    return document


def eighty_blocks() -> dict[str, Any]:
    return full(80)


CASES = {
    "full": full,
    "passing": passing,
    "minimal": minimal,
    "sparse": sparse,
    "identical": identical,
    "nasty": nasty,
    "eighty_blocks": eighty_blocks,
}


def _nulls(value: Any) -> Any:
    """A copy in which every number that is not a count is null."""
    if isinstance(value, dict):
        return {key: _nulls(item) if key not in ("positions", "documents") else item for key, item in value.items()}
    if isinstance(value, list):
        return [_nulls(item) for item in value]
    return None if isinstance(value, float) else value


def _texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _texts(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_texts(item) for item in value]
    return f"{value} {NASTY}" if isinstance(value, str) else copy.deepcopy(value)
