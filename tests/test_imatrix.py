"""llama.cpp's importance matrix: read by the gguf package, and held against what transformers' linears are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from qconv import pipeline
from qconv.checkpoint import open_checkpoint
from qconv.config import CalibrationConfig, MergeJob, OutputConfig
from qconv.convert import dequantize
from qconv.errors import UsageError
from qconv.plan import make_plan
from qconv.progress import QUIET
from qconv.quantization_config import QuantizationConfig
from tests.conftest import copy_tokenizer

STORED = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""As llama.cpp calls them."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The tiny Llama in float32, where two orders of the same sums agree closely."""
    folder = tmp_path_factory.mktemp("imatrix") / "base"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).save_pretrained(folder)
    copy_tokenizer(folder)
    return folder


def job_of(base: Path, adapter: Path | None, out: Path, target: str = "gguf-f16") -> MergeJob:
    return MergeJob(
        base=str(base),
        adapter=None if adapter is None else str(adapter),
        trained_on=None if adapter is None else "16bit",
        outputs=(OutputConfig(out=out, quantization=QuantizationConfig(target=target, imatrix=True)),),
        calibration=CalibrationConfig(samples=6, seq_len=96),
        validation=None,
        device="cpu",
    )


def test_sums_are_those_of_the_unmerged_model(base: Path, tiny_adapter: Path, tmp_path: Path) -> None:
    job = job_of(base, tiny_adapter, tmp_path / "out")
    (outcome,) = pipeline.run(job)
    rows = make_plan(job_of(base, tiny_adapter, tmp_path / "nowhere"), QUIET).calibration
    assert rows is not None

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, tiny_adapter).eval()
    expected: dict[str, np.ndarray] = {}

    def listen(name: str, linear: nn.Module) -> None:
        def hear(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x_TK = args[0].double().flatten(0, -2).numpy()
            expected[name] = expected.get(name, 0) + (x_TK**2).sum(0)

        linear.register_forward_pre_hook(hear)

    for block in range(4):
        for part, stored in STORED.items():
            listen(f"blk.{block}.{stored}.weight", model.get_submodule(f"base_model.model.model.layers.{block}.{part}"))
    with torch.no_grad():
        for row_S in rows:
            model(row_S[None])

    reader = GGUFReader(tmp_path / "out" / "model.imatrix")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors.keys() == {f"{name}.{part}" for name in expected for part in ("in_sum2", "counts")}
    for name, sums_K in expected.items():
        found, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
        assert (found.tensor_type.name, counts.tensor_type.name) == ("F32", "F32")
        assert [list(found.shape), list(counts.shape)] == [[len(sums_K), 1], [1, 1]]  # innermost first
        np.testing.assert_allclose(found.data[0], sums_K, rtol=1e-4)
        assert counts.data.item() == 6 * 96
    assert outcome.document["stages"]["quantization"]["tokens of the importance matrix"] == 6 * 96
    assert outcome.document["stages"]["calibration"]["samples"] == 6


def test_keys_are_those_that_llama_cpp_reads(base: Path, tmp_path: Path) -> None:
    """common/imatrix-loader.cpp asks for these three, of these types."""
    pipeline.run(job_of(base, None, tmp_path / "out", "gguf-f32"))
    reader = GGUFReader(tmp_path / "out" / "model.imatrix")
    keys = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert {name: (field.contents(), field.types) for name, field in keys.items()} == {
        "general.type": ("imatrix", [GGUFValueType.STRING]),
        "imatrix.datasets": (["default"], [GGUFValueType.ARRAY, GGUFValueType.STRING]),
        "imatrix.chunk_count": (6, [GGUFValueType.UINT32]),
        "imatrix.chunk_size": (96, [GGUFValueType.UINT32]),
    }
    # The model beside it is read as before.
    assert dequantize(open_checkpoint(tmp_path / "out")).kind == "gguf-f32"


@pytest.mark.parametrize("target", ["gguf-q4_0", "w4a16"])
def test_what_llama_quantize_does_not_start_from_has_none(target: str) -> None:
    with pytest.raises(UsageError, match=f"gguf-f16, gguf-bf16 or gguf-f32, got {target}"):
        QuantizationConfig(target=target, imatrix=True)
