"""Details of outputs that only some models bring out."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qconv import pipeline
from qconv.checkpoint import open_checkpoint
from qconv.config import CalibrationConfig, MergeJob, OutputConfig
from qconv.convert import dequantize
from qconv.errors import CheckpointError
from qconv.quantization_config import QuantizationConfig
from qconv.quantize.fold_block import FoldContext, Statistics, fold_scales
from qconv.quantize.folds import Fold, Heads
from qconv.types import Scheme
from tests.conftest import copy_tokenizer


def quantize(model: Path, out: Path, target: str | None, **options: Any) -> Path:
    quantization = QuantizationConfig(target=target, **options) if target else None
    calibration = CalibrationConfig(samples=4, seq_len=64)
    job = MergeJob(
        base=str(model),
        outputs=(OutputConfig(out=out, quantization=quantization),),
        calibration=calibration,
        validation=None,
        device="cpu",
    )
    pipeline.run(job)
    return out


def rewrite(source: Path, folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A copy with changed config keys (None removes one) and tensors."""
    shutil.copytree(source, folder)
    merged = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_linears_outside_the_blocks_are_ignored_by_readers(tmp_path: Path) -> None:
    """OPT with a narrow embedding has project_in and project_out beside its blocks."""
    model = tmp_path / "opt"
    sizes = {"vocab_size": 2048, "hidden_size": 128, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("opt", **sizes, word_embed_proj_dim=64, max_position_embeddings=128, dropout=0.0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
    copy_tokenizer(model)
    out = quantize(model, tmp_path / "out", "w4a16", algorithm="rtn")
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    expected = dequantize(open_checkpoint(model)).read("model.decoder.project_in.weight").float()
    assert torch.equal(loaded.get_parameter("model.decoder.project_in.weight").float(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_config_without_dtype_keeps_the_dtype_of_the_tensors(tiny_llama: Path, tmp_path: Path, dtype: Any) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(tiny_llama / "model.safetensors").items()}
    model = rewrite(tiny_llama, tmp_path / "m", {"dtype": None}, tensors)
    out = quantize(model, tmp_path / "out", None)
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {dtype}
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_code_files_that_do_not_travel_are_not_named(tiny_llama: Path, tmp_path: Path) -> None:
    model = rewrite(tiny_llama, tmp_path / "m", {"auto_map": {"AutoConfig": "configuration_x.X"}})
    assert "auto_map" not in json.loads((quantize(model, tmp_path / "out", None) / "config.json").read_text())


@pytest.mark.parametrize("magnitude", [1e-3, 1e-4, 1e-6])
def test_fp8_of_a_float16_model_with_nearly_dead_rows(tiny_llama: Path, tmp_path: Path, magnitude: float) -> None:
    tensors = {name: tensor.half() for name, tensor in load_file(tiny_llama / "model.safetensors").items()}
    name = "model.layers.1.self_attn.v_proj.weight"
    row = torch.linspace(-magnitude, magnitude, tensors[name].shape[1])
    tensors[name][3] = row
    model = rewrite(tiny_llama, tmp_path / "m", {"dtype": "float16"}, tensors)
    stored = dequantize(open_checkpoint(quantize(model, tmp_path / "out", "fp8"))).read(name)[3]
    # One part in 16 of a weight is half a step of float8; the rest is float16's own step at this size.
    assert float((stored - row).abs().max()) <= magnitude / 16 + 2.0**-24


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_before_work(tiny_llama: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_llama / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:512].clone()
    model = rewrite(tiny_llama, tmp_path / "m", {"vocab_size": 512}, tensors)
    with pytest.raises(CheckpointError, match="its tokenizer gives token"):
        quantize(model, tmp_path / "out", "gptq")
    assert not (tmp_path / "out.partial").exists()


def test_shared_head_scales_are_judged_on_the_rows_of_the_search() -> None:
    """A wide o_proj (more rows than the search samples) with grouped queries takes its scale when it gains."""
    torch.manual_seed(0)
    heads = Heads(num_attention=8, num_key_value=4, head_dim=32)
    k = 256
    loud_K = torch.ones(k)
    loud_K.view(4, 2, 32)[:, :, ::8] = 12  # the same channels are loud in both heads of a group
    x_TK = torch.randn(4096, k) * loud_K
    statistics = {"self_attn.o_proj.weight": Statistics(x_TK.T @ x_TK / len(x_TK), x_TK.abs().mean(0))}
    tensors = {"self_attn.o_proj.weight": torch.randn(1024, k), "self_attn.v_proj.weight": torch.randn(128, 64)}
    counts: Counter[str] = Counter()
    context = FoldContext(
        method="awq",
        heads=heads,
        scheme=Scheme(group_size=64, symmetric=False),
        storage=torch.bfloat16,
        counts=counts,
    )
    fold_scales(tensors, statistics, Fold("rows", "self_attn.v_proj", ("self_attn.o_proj",)), context)
    assert counts == {"awq folds applied": 1}
