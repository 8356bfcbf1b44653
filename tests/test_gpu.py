"""The whole job on a GPU against the same job on the CPU, and the reference that only a GPU can run."""

from __future__ import annotations

import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from qconv import pipeline
from qconv.checkpoint import open_checkpoint
from qconv.config import CalibrationConfig, MergeJob, OutputConfig, ValidationConfig
from qconv.convert import dequantize
from qconv.corpus import TokenRows
from qconv.inputs import load_reference
from qconv.quantization_config import QuantizationConfig
from qconv.records import write_train_record
from qconv.runners import reference_model, streamed
from qconv.validate.compare import Entrant, Pair, compare

pytestmark = pytest.mark.gpu


def run(
    base: Path, adapter: Path, out: Path, device: str, target: str | None, dtype: str | None = None
) -> dict[str, Any]:
    quantization = QuantizationConfig(target=target) if target else None
    job = MergeJob(
        base=str(base),
        adapter=str(adapter),
        outputs=(OutputConfig(out=out, quantization=quantization, dtype=dtype),),
        calibration=CalibrationConfig(sources=("default",), samples=16, seq_len=128),
        validation=ValidationConfig(tokens=8192, seq_len=128),
        device=device,
    )
    (outcome,) = pipeline.run(job)
    fidelity = outcome.fidelity
    assert fidelity is not None
    return dict(fidelity)


@pytest.mark.parametrize("target", [None, "fp8", "awq", "gptq", "w4a16"])
def test_the_gpu_gives_what_the_cpu_gives(
    tiny_nf4: Path, tiny_adapter: Path, tmp_path: Path, target: str | None
) -> None:
    cpu = run(tiny_nf4, tiny_adapter, tmp_path / "cpu", "cpu", target)
    cuda = run(tiny_nf4, tiny_adapter, tmp_path / "cuda", "cuda", target)
    assert "bitsandbytes and peft kernels" in cuda["reference"]["runs"]
    assert "decoded by qconv" in cpu["reference"]["runs"]
    # A plain merge has nothing but the noise of bfloat16 arithmetic to measure, about 2e-4 here.
    assert cuda["total"]["kl"]["mean"] == pytest.approx(cpu["total"]["kl"]["mean"], rel=0.05, abs=2e-4)
    assert cuda["total"]["reference_perplexity"] == pytest.approx(cpu["total"]["reference_perplexity"], rel=2e-3)
    if target in ("awq", "gptq", "w4a16"):
        return  # calibrated codes follow the last bits of the activations; what must agree is the distance above
    stored = {device: dequantize(open_checkpoint(tmp_path / device)) for device in ("cpu", "cuda")}
    # float32 sums in another order: now and then a number lies on the other side of where the storage dtype rounds.
    spacing = 2.0**-7 if target is None else 2.0**-3
    num_different = 0
    for name in stored["cpu"].specs():
        a, b = (stored[device].read(name).float() for device in ("cpu", "cuda"))
        assert bool(((a - b).abs() <= spacing * a.abs()).all()), name
        num_different += int((a != b).sum())
    assert num_different < 1e-5 * sum(prod(spec.shape) for spec in stored["cpu"].specs().values())


def test_streamed_reference_agrees_with_bitsandbytes_kernels(tiny_nf4: Path, tiny_adapter: Path) -> None:
    reference = load_reference(open_checkpoint(tiny_nf4), str(tiny_adapter), None)
    resident, how = reference_model(reference, reference.base, "cuda", False)
    assert how.startswith("bitsandbytes and peft kernels")
    rows = TokenRows(torch.randint(2048, (8, 128)), torch.arange(8, dtype=torch.int32)[:, None].expand(8, 128))
    ours = streamed(reference.base, reference.adapter, None, "cuda")
    entrants = [
        Entrant(name=name, model=model, num_rows=8, rows_per_batch=4)
        for name, model in (("reference", resident), ("candidate", ours))
    ]
    result = compare(entrants, [Pair(name="total", reference="reference", other="candidate")], rows)
    assert result.pairs["total"].kl_mean < 2e-4


def test_a_16_bit_base_is_rounded_as_bitsandbytes_rounds_on_a_gpu(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    """The reference quantizes on load with bitsandbytes' CUDA kernels; the merge re-creates their rounding."""
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny_adapter, adapter)
    write_train_record(adapter, "nf4-dq", str(tiny_llama), "cuda")
    fidelity = run(tiny_llama, adapter, tmp_path / "out", "cuda", None, dtype="fp32")
    assert "bitsandbytes and peft kernels" in fidelity["reference"]["runs"]
    assert fidelity["total"]["kl"]["mean"] < 2e-4
    assert fidelity["adapter_effect_retained"]["value"] > 0.98
