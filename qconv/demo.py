"""The whole story on a real model, for somebody who has just installed qconv."""

from __future__ import annotations

import time
from pathlib import Path

from qconv import pipeline
from qconv.config import CalibrationConfig, MergeJob, OutputConfig, ValidationConfig
from qconv.demo_model import build_smollm2
from qconv.outcome import Outcome
from qconv.progress import Progress, quiet_libraries
from qconv.quantization_config import QuantizationConfig
from qconv.report.document import HTML_NAME, JSON_NAME
from qconv.train import train
from qconv.training_config import TrainConfig
from qconv.work_folder import check_output


def run_demo(out: Path, target: str, steps: int, device: str, progress: Progress) -> Outcome:
    """SmolLM2-135M-Instruct in NF4, a short QLoRA training on prose, merge, re-quantize, validate.

    Args:
        out: new folder that gets ``base-nf4``, ``adapter`` and the quantized model.
        target: a key of `config.TARGETS`.
        steps: optimizer steps of 4 x 256 tokens.

    Raises:
        CheckpointError: ``out`` exists, or the package with the model is not installed.
    """
    started = time.monotonic()

    def stage(text: str) -> None:
        progress.say(f"[{time.monotonic() - started:4.0f} s] {text}")

    check_output(out, overwrite=False)
    base, adapter, result = out / "base-nf4", out / "adapter", out / f"merged-{target}"
    stage("SmolLM2-135M-Instruct -> bitsandbytes NF4 with double quantization")
    with quiet_libraries():
        build_smollm2(base, quantized=True)
    stage(f"QLoRA: {steps} steps on the embedded prose")
    train(
        TrainConfig(
            base=str(base), out=adapter, data="default-prose", steps=steps, batch_size=4, seq_len=256, device=device
        ),
        progress,
    )
    stage(f"merge, re-quantize to {target}, validate against the unmerged model")
    (outcome,) = pipeline.run(
        MergeJob(
            base=str(base),
            adapter=str(adapter),
            outputs=(OutputConfig(out=result, quantization=QuantizationConfig(target=target)),),
            calibration=CalibrationConfig(sources=("default-prose",), samples=32, seq_len=512),
            validation=ValidationConfig(source="default-prose-eval", tokens=8192),
            device=device,
        ),
        progress,
    )
    stage("done")
    print(outcome.summary())
    print(f"base       {base}\nadapter    {adapter}")
    print(f"report     {result / HTML_NAME}\n           {result / JSON_NAME}")
    print(f"again      qconv merge {base} {adapter} --requant {target} -o OUT")
    print(f"serve      vllm serve {result}")
    return outcome
