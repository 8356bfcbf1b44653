"""From a folder that was written to one of ONNX Runtime GenAI: built, compared with what was written, run against it.

The codes, scales and zero points of the graph must be those of the folder, and its other weights what rounding to the
graph's dtype gives: one that differs is an error. Then ONNX Runtime and PyTorch (which decodes the folder's weights,
and computes in float32) get the same held-out text, in one piece and in two with cached keys and values between. What
ONNX Runtime GenAI makes of the folder in the end is looked at in `onnx_genai.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qconv import corpus
from qconv.checkpoint import open_checkpoint
from qconv.convert import DequantizedCheckpoint, dequantize
from qconv.corpus import TokenRows
from qconv.errors import CheckpointError, NumericsError
from qconv.layout import PLAIN, Layout
from qconv.onnx import MODEL_FILE, OnnxPlan, OnnxSession, build, take_over
from qconv.onnx_genai import Generated, check_genai, generate
from qconv.progress import Progress
from qconv.streaming import StreamedModel
from qconv.timeline import TIMELINE
from qconv.types import QuantizedLinear
from qconv.validate.compare import Entrant, run_candidate
from qconv.work_folder import disk_error

_ROWS, _SEQ_LEN = 4, 256  # of the embedded held-out text
_PROMPT = 32  # tokens of it that are gone on with
_DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def export(folder: Path, layout: Layout, progress: Progress) -> dict[str, Any]:
    """Replaces the weights of a finished work folder by the graph that is built of them.

    Returns:
        How far ONNX Runtime is from PyTorch, for the report.

    Raises:
        CheckpointError: the builder fails, ONNX Runtime cannot load what it made, or a weight is not what was written.
        NumericsError: ONNX Runtime computes something else than PyTorch.
    """
    plan = layout.onnx
    assert plan is not None  # else there is nothing to build
    built = folder / "onnx"
    try:
        with TIMELINE.stage("build the ONNX graph"):
            build(folder, built, plan.dtype, plan.bits)
        content = {key: value for key, value in layout.config.items() if key != "quantization_config"}
        content["dtype"] = _DTYPE_NAMES[plan.dtype]
        (built / "config.json").write_text(json.dumps(content), encoding="utf-8")
        written = dequantize(open_checkpoint(folder))
        with TIMELINE.stage("compare the ONNX graph"):
            _check_weights(written, dequantize(open_checkpoint(built)), plan)
        with TIMELINE.stage("run the ONNX graph"):
            facts, generated = _check_logits(folder, written, built, plan)
        for name in ["config.json", *layout.extra_files]:
            (folder / name).unlink()
        for file in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
            file.unlink()
        take_over(built, folder)
        (folder / "config.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.rmtree(built)
        with TIMELINE.stage("generate with ONNX Runtime GenAI"):
            facts |= check_genai(folder, plan, generated, progress)
    except OSError as error:
        raise disk_error(folder, error) from error
    progress.say(
        f"ONNX Runtime agrees with PyTorch: mean KL {facts['kl_mean']:.2g} nats on {facts['positions']} positions "
        f"(at most {plan.tolerance:g}), {facts['same_top_token']:.1%} of most probable tokens; "
        f"GenAI: {facts['GenAI']}"
    )
    return facts


def _check_weights(written: DequantizedCheckpoint, stored: DequantizedCheckpoint, plan: OnnxPlan) -> None:
    names = [name for name in written.specs() if not name.endswith(".rotary_emb.inv_freq")]
    if stored.config.get("tie_word_embeddings"):
        names = [name for name in names if name != "lm_head.weight"]
    strange = set(names) ^ set(stored.specs())
    if strange:
        raise CheckpointError(
            f"{written.location}: the model builder left out or added {len(strange)} tensors, first {min(strange)!r}; "
            "it does not build this model as it is"
        )
    for name in names:
        expected = written.read(name).float().to(PLAIN[plan.dtype])
        found = stored.read(name)
        module = name.removesuffix(".weight")
        if module in written.schemes:
            _check_codes(written, stored, module)
        elif not torch.equal(found, expected):
            raise CheckpointError(f"{written.location}: the model builder changed the values of {name!r}")


def _check_codes(written: DequantizedCheckpoint, stored: DequantizedCheckpoint, module: str) -> None:
    left, right = written.read_quantized(module), stored.read_quantized(module)
    parts = [(q.codes_NK, q.scales_NG, _zeros(q)) for q in (left, right)]
    if not all(torch.equal(a, b) for a, b in zip(*parts, strict=True)):
        raise CheckpointError(
            f"{written.location}: the model builder changed codes, scales or zero points of {module!r}"
        )


def _zeros(q: QuantizedLinear) -> Tensor:
    """Zero points, also where a symmetric scheme stores none."""
    if q.zeros_NG is not None:
        return q.zeros_NG
    return torch.full_like(q.scales_NG, q.scheme.mid_code, dtype=torch.uint8)


def _check_logits(
    folder: Path, written: DequantizedCheckpoint, built: Path, plan: OnnxPlan
) -> tuple[dict[str, Any], Generated]:
    rows = _rows(folder, written)
    session = OnnxSession(built / MODEL_FILE)
    found: list[tuple[Tensor, Tensor]] = []  # KL and whether the most probable token is the same, of each row

    def visit(row: int, logits_TV: Tensor) -> None:
        ids_BS = rows.ids_TS[row][None]
        expected = logits_TV.double().log_softmax(-1)
        half = ids_BS.shape[1] // 2
        first, cache = session.step(ids_BS[:, :half], {})
        second, _ = session.step(ids_BS[:, half:], cache)
        for other in (session.logits(ids_BS), torch.cat((first, second), dim=1)):
            theirs = other[0, :-1].double().log_softmax(-1)
            kl_T = (expected.exp() * (expected - theirs)).sum(-1)
            found.append((kl_T, expected.argmax(-1) == theirs.argmax(-1)))

    model = StreamedModel(written, "cpu", torch.float32)
    run_candidate(Entrant(name="written", model=model, num_rows=len(rows.ids_TS), rows_per_batch=1), rows, visit)
    one_piece, cached = (float(torch.cat([kl for kl, _ in found[part::2]]).mean()) for part in (0, 1))
    for what, kl in (("", one_piece), (" with cached keys and values", cached)):
        if not kl <= plan.tolerance:
            raise NumericsError(
                f"{folder}: ONNX Runtime computes something else{what} than PyTorch does of the same weights: mean KL "
                f"{kl:.3g} nats per token on held-out text, at most {plan.tolerance:g} expected; nothing was written"
            )
    facts = {
        "built by": "onnxruntime_genai.models.builder",
        "runs": session.runs,
        "kl_mean": one_piece,
        "kl_mean with cached keys and values": cached,
        "largest kl_mean allowed": plan.tolerance,
        "same_top_token": float(torch.cat([same for _, same in found[::2]]).double().mean()),
        "positions": sum(len(kl) for kl, _ in found[::2]),
    }
    return facts, generate(session, rows.ids_TS[0][:_PROMPT])


def _rows(folder: Path, view: DequantizedCheckpoint) -> TokenRows:
    tokenizer = corpus.load_tokenizer(folder)
    documents = corpus.load_documents("default-eval", tokenizer)
    limit = view.config.get("max_position_embeddings")
    seq_len = min(_SEQ_LEN, limit) if isinstance(limit, int) else _SEQ_LEN
    return corpus.pack_rows(documents, tokenizer, _ROWS, seq_len, 0, allow_fewer=True)
