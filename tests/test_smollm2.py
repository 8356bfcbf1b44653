"""The promises of the README on a real model: SmolLM2-135M-Instruct, NF4 with double quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qconv import pipeline
from qconv.config import CalibrationConfig, MergeJob, OutputConfig, ValidationConfig
from qconv.quantization_config import QuantizationConfig
from tests.conftest import save_random_adapter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, and about as strong as a trained one: it moves the model by a KL of more than 0.1."""
    folder = tmp_path_factory.mktemp("adapters") / "smollm2"
    save_random_adapter(smollm2, folder, base_name=str(smollm2), r=16, lora_alpha=96)
    return folder


def measure(base: Path, adapter: Path, out: Path, target: str | None, **options: Any) -> dict[str, Any]:
    (report,) = pipeline.run(
        MergeJob(
            base=str(base),
            adapter=str(adapter),
            outputs=(
                OutputConfig(out=out, quantization=QuantizationConfig(target=target, **options) if target else None),
            ),
            calibration=CalibrationConfig(sources=("default-prose",), samples=8, seq_len=256),
            validation=ValidationConfig(source="default-prose-eval", tokens=1024, seq_len=128),
            device="cpu",
        )
    )
    assert report.fidelity is not None
    return dict(report.fidelity)


def test_a_plain_merge_is_the_model_that_was_trained(smollm2: Path, adapter: Path, tmp_path: Path) -> None:
    fidelity = measure(smollm2, adapter, tmp_path / "out", None)
    assert fidelity["total"]["kl"]["mean"] < 0.003
    assert fidelity["base_without_adapter"]["kl"]["mean"] > 0.1
    assert fidelity["adapter_effect_retained"]["value"] > 0.98


def test_calibrated_4_bits_beat_round_to_nearest(smollm2: Path, adapter: Path, tmp_path: Path) -> None:
    nearest = measure(smollm2, adapter, tmp_path / "rtn", "w4a16", algorithm="rtn")["total"]["kl"]["mean"]
    calibrated = measure(smollm2, adapter, tmp_path / "gptq", "w4a16")["total"]["kl"]["mean"]
    assert calibrated < nearest / 3
