"""Planted faults are named, clean artifacts raise nothing; peft makes the faulty merges that people make."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv import corpus, pipeline
from qconv.audits import StreamedAudit
from qconv.checkpoint import open_checkpoint
from qconv.config import CalibrationConfig, MergeJob, OutputConfig, ValidationConfig
from qconv.convert import dequantize
from qconv.convert.bnb_kernels import simulate
from qconv.errors import NumericsError
from qconv.fidelity import measure_fidelity
from qconv.lineup import Views
from qconv.merge import load_adapter, merge
from qconv.progress import QUIET
from qconv.quantization_config import QuantizationConfig
from qconv.quantize.folds import (
    FOLDS,
    Heads,
    fold_into_norm,
    fold_into_rows,
    producer_scale,
    share_across_heads,
)
from qconv.quantize.gptq import gptq
from qconv.quantize.rtn import rtn
from qconv.runners import Candidate, Reference
from qconv.types import QuantizedLinear, Scheme, TensorSpec
from qconv.validate.audit import WeightAudit
from tests.conftest import TINY_LLAMA, save_random_adapter
from tests.merge_cases import TensorsInMemory

Finding = dict[str, Any]
Make = Callable[..., Path]
BLOCK = "model.layers.2"
LINEARS_PER_BLOCK = 7
TARGETS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bf16"},
    "fp16": {"dtype": "fp16"},
    "fp32": {"dtype": "fp32"},
    "fp8": {"quantization": QuantizationConfig(target="fp8")},
    "gptq": {"quantization": QuantizationConfig(target="gptq", group_size=64)},
    "gptq-8bit": {"quantization": QuantizationConfig(target="gptq", bits=8, symmetric=False)},
    "rtn": {"quantization": QuantizationConfig(target="gptq", algorithm="rtn")},
    "w4a16-asym": {"quantization": QuantizationConfig(target="w4a16", symmetric=False, group_size=32)},
    "awq": {"quantization": QuantizationConfig(target="awq", algorithm="awq")},
    "awq-8bit": {"quantization": QuantizationConfig(target="w8a16", algorithm="awq")},
}
LOSSY: dict[str, dict[str, Any]] = {"nf4": {"quantization": QuantizationConfig(target="nf4")}}
SIXTEEN_BIT = ("bf16", "fp16", "fp32")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``make(base, adapter, "gptq")``: an output of this package, made once."""
    text = tmp_path_factory.mktemp("texts") / "calibration.txt"
    text.write_text("\n\n".join(corpus.load_documents("default")[:2]), encoding="utf-8")
    calibration = CalibrationConfig(sources=(str(text),), samples=8, seq_len=64)

    @cache
    def make(base: Path, adapter: Path | None, target: str, shard_bytes: int = 5_000_000_000) -> Path:
        out = tmp_path_factory.mktemp("out") / target
        pipeline.run(
            MergeJob(
                base=str(base),
                adapter=None if adapter is None else str(adapter),
                outputs=(OutputConfig(out=out, max_shard_bytes=shard_bytes, **(TARGETS | LOSSY)[target]),),
                calibration=calibration,
                validation=None,
                device="cpu",
            )
        )
        return out

    return make


@pytest.fixture(scope="module")
def dequantized(make: Make, tiny_nf4: Path) -> Path:
    """The base as training saw it, as a plain folder that peft can merge into."""
    return make(tiny_nf4, None, "bf16")


@pytest.fixture(scope="module")
def weak_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_adapter: Path) -> Path:
    """||D|| / ||W|| from 0.0005 to 0.0015."""
    folder = tmp_path_factory.mktemp("adapters") / "weak"
    edited(tiny_adapter, folder, lambda name, t: t * 0.01 if "lora_B" in name else t)
    return folder


def audit(**views: Any) -> WeightAudit:
    """With every tensor added."""
    auditor = WeightAudit(**views)
    for name in auditor.names:
        auditor.add(name)
    return auditor


def audited(base: Path, adapter: Path | None, candidate: Path) -> WeightAudit:
    view = dequantize(open_checkpoint(base))
    expected = view if adapter is None else merge(view, [load_adapter(str(adapter), view)])
    source = open_checkpoint(candidate)
    return audit(
        expected=expected,
        base=view,
        candidate=dequantize(source),
        changed=() if adapter is None else expected.changed,  # type: ignore[union-attr]
        files={name: source.file_of(name).name for name in source.specs()},
        encode=partial(simulate, kind="nf4-dq"),
    )


def findings(base: Path, adapter: Path | None, candidate: Path) -> list[Finding]:
    return audited(base, adapter, candidate).findings()


def errors(found: list[Finding]) -> list[str]:
    return [f["code"] for f in found if f["severity"] == "error"]


def the_error(found: list[Finding], code: str) -> Finding:
    """The one error, which must be this one."""
    assert errors(found) == [code], [f["message"] for f in found]
    return next(f for f in found if f["code"] == code)


def edited(source: Path, folder: Path, edit: Callable[[str, Tensor], Tensor]) -> Path:
    """A copy of a folder whose tensors went through ``edit(name, tensor)``."""
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        tensors = {name: edit(name, t).to(t.dtype).contiguous() for name, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def with_config(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of an adapter with other settings."""
    shutil.copytree(source, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def peft_merge(base: Path, adapter: Path, out: Path, **load: Any) -> Path:
    """What peft's ``merge_and_unload`` saves. No forward pass comes before it: on some CPUs bitsandbytes repacks
    the weights in the first one, and merging then gives garbage."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, **({"dtype": torch.bfloat16} | load))
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    merged.save_pretrained(out)
    return out


# Clean artifacts.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("strength", ["strong", "weak"])
def test_clean_artifacts_raise_no_error(
    target: str, strength: str, make: Make, tiny_nf4: Path, tiny_adapter: Path, weak_adapter: Path
) -> None:
    adapter = tiny_adapter if strength == "strong" else weak_adapter
    found = findings(tiny_nf4, adapter, make(tiny_nf4, adapter, target))
    assert errors(found) == [], [f["message"] for f in found]
    if strength == "strong":
        assert found == []


@pytest.mark.parametrize("target", ["bf16", "gptq", "awq"])
def test_clean_artifacts_without_adapter(target: str, make: Make, tiny_nf4: Path) -> None:
    assert findings(tiny_nf4, None, make(tiny_nf4, None, target)) == []


def test_a_merge_by_peft_is_clean(tmp_path: Path, dequantized: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    """It rounds the update to bfloat16 before it adds it."""
    out = peft_merge(dequantized, tiny_adapter, tmp_path / "peft")
    result = audited(tiny_nf4, tiny_adapter, out)
    assert result.findings() == []
    fits = [t.fit for t in result.tensors.values() if t.changed]
    assert len(fits) == 4 * LINEARS_PER_BLOCK
    for fit in fits:
        assert fit is not None
        assert fit.coefficient == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3", "llama"])
def test_clean_awq_of_other_families(
    family: str, make: Make, random_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Biases, norms that multiply by 1 + weight, fused projections, as many value heads as heads."""
    plain = random_model(family, **({"num_key_value_heads": 4} if family == "llama" else {}))
    generator = torch.Generator().manual_seed(2)

    def trained(name: str, t: Tensor) -> Tensor:
        is_vector = "norm" in name or name.endswith("bias")
        return t + 0.2 * torch.randn(t.shape, generator=generator) if is_vector else t

    base = edited(plain, tmp_path_factory.mktemp("models") / family, trained)
    out = make(base, None, "awq")
    result = audited(base, None, out)
    assert any(t.fit is not None and t.fit.is_folded for t in result.tensors.values())
    assert result.findings() == []


# Faults of the whole merge.


@pytest.mark.parametrize("target", ["bf16", "fp16", "fp8", "gptq", "awq", "gptq-8bit"])
def test_adapter_not_applied(target: str, make: Make, tiny_nf4: Path, tiny_adapter: Path) -> None:
    found = findings(tiny_nf4, tiny_adapter, make(tiny_nf4, None, target))
    assert len(the_error(found, "adapter-not-applied")["tensors"]) == 20  # of 28: a finding lists at most 20


@pytest.mark.parametrize("target", ["bf16", "fp16", "gptq-8bit"])
def test_a_very_weak_adapter_not_applied(target: str, make: Make, tiny_nf4: Path, weak_adapter: Path) -> None:
    the_error(findings(tiny_nf4, weak_adapter, make(tiny_nf4, None, target)), "adapter-not-applied")


def test_a_weak_adapter_in_four_bits_is_said_to_be_invisible(make: Make, tiny_nf4: Path, weak_adapter: Path) -> None:
    """0.1% of weights that are rounded by 12%, in 28 small weights: neither its presence nor its absence shows."""
    for adapter in (weak_adapter, None):
        found = findings(tiny_nf4, weak_adapter, make(tiny_nf4, adapter, "gptq"))
        assert [f["code"] for f in found] == ["adapter-not-visible"]


@pytest.mark.parametrize(
    ("changes", "factor"), [({"lora_alpha": 32}, 2.0), ({"lora_alpha": 8}, 0.5), ({"use_rslora": True}, 8**0.5)]
)
def test_wrong_scaling_as_peft_merges_it(
    changes: Mapping[str, Any], factor: float, tmp_path: Path, dequantized: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    wrong = with_config(tiny_adapter, tmp_path / "adapter", **changes)
    found = findings(tiny_nf4, tiny_adapter, peft_merge(dequantized, wrong, tmp_path / "out"))
    assert f"with {factor:.2f}x its scaling" in the_error(found, "adapter-scale")["title"]


@pytest.mark.parametrize("target", ["gptq", "awq", "rtn", "fp8"])
@pytest.mark.parametrize("alpha", [8, 32])
def test_wrong_scaling_in_quantized_artifacts(
    target: str, alpha: int, make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    wrong = with_config(tiny_adapter, tmp_path / "adapter", lora_alpha=alpha)
    finding = the_error(findings(tiny_nf4, tiny_adapter, make(tiny_nf4, wrong, target)), "adapter-scale")
    words = finding["title"].split()
    assert float(words[words.index("with") + 1].rstrip("x")) == pytest.approx(alpha / 16, rel=0.1)


def test_scaling_of_one_module_kind(tmp_path: Path, dequantized: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    wrong = with_config(tiny_adapter, tmp_path / "adapter", alpha_pattern={"up_proj": 48})
    found = findings(tiny_nf4, tiny_adapter, peft_merge(dequantized, wrong, tmp_path / "out"))
    finding = the_error(found, "adapter-scale")
    assert finding["tensors"] == [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)]
    assert "alpha_pattern" in finding["message"]


@pytest.mark.parametrize("saved", ["4-bit", "decoded"])
def test_merge_in_four_bits_as_peft_does_it(
    saved: str, make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path, weak_adapter: Path
) -> None:
    """The weights are rounded back to the grid of the base; decoding the result afterwards brings nothing back."""
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    # Quantized on load, to the same codes: transformers cannot save a merged model that it loaded in 4 bits.
    out = peft_merge(TINY_LLAMA, weak_adapter, tmp_path / "out", quantization_config=quantization)
    if saved == "decoded":
        out = make(out, None, "bf16")
    found = findings(tiny_nf4, weak_adapter, out)
    assert "4-bit grid" in the_error(found, "adapter-rounded-away")["message"]


def test_rounding_to_blocks_that_takes_a_part_back(
    make: Make, tmp_path: Path, dequantized: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    """bitsandbytes decodes what was written, peft merges what should be: the named weights hold the least of it."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    out = make(tiny_nf4, tiny_adapter, "nf4")
    base = load_file(next(dequantized.glob("*.safetensors")))
    merged = load_file(next(peft_merge(dequantized, tiny_adapter, tmp_path / "merged").glob("*.safetensors")))
    stored = load_file(next(out.glob("*.safetensors")))
    share = {}
    for name in (f"model.layers.{i}.mlp.{role}_proj.weight" for i in range(4) for role in ("gate", "up", "down")):
        parts = {key.removeprefix(f"{name}."): t for key, t in stored.items() if key.startswith(f"{name}.")}
        update = (merged[name].float() - base[name].float()).flatten()
        left = dequantize_4bit(stored[name], QuantState.from_dict(parts, "cpu")).flatten() - base[name].flatten()
        share[name] = float(left.float() @ update / update.square().sum())
    finding = the_error(findings(tiny_nf4, tiny_adapter, out), "adapter-rounded-away")
    assert set(finding["tensors"]) == set(sorted(share, key=share.__getitem__)[:4])
    assert max(share[name] for name in finding["tensors"]) < 0.6
    assert "w4a16" in finding["message"]


def test_weights_in_blocks_that_are_the_bases_own(
    make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    own = load_file(next(make(tiny_nf4, None, "nf4").glob("*.safetensors")))
    out = edited(
        make(tiny_nf4, tiny_adapter, "nf4"),
        tmp_path / "out",
        lambda name, t: own[name] if ".1.mlp.up_proj" in name else t,
    )
    found = {f["code"]: f for f in findings(tiny_nf4, tiny_adapter, out)}
    assert found.keys() == {"adapter-partly-applied", "adapter-rounded-away"}
    assert found["adapter-partly-applied"]["tensors"] == ["model.layers.1.mlp.up_proj.weight"]


@pytest.mark.parametrize("target", ["bf16", "fp8", "gptq-8bit"])
def test_merge_into_the_original_weights(target: str, make: Make, tiny_nf4: Path, tiny_adapter: Path) -> None:
    found = findings(tiny_nf4, tiny_adapter, make_16bit(make, tiny_adapter, target))
    finding = the_error(found, "wrong-base")
    assert "28 of 28 weights" in finding["message"]
    assert finding["title"] == "made from the original 16-bit base"


def make_16bit(make: Make, adapter: Path, target: str) -> Path:
    """The adapter merged into the unquantized base."""
    folder = make(TINY_LLAMA, None, "bf16").parent / f"original-{target}"
    if not folder.exists():
        job = MergeJob(
            base=str(TINY_LLAMA),
            adapter=str(adapter),
            trained_on="16bit",
            outputs=(OutputConfig(out=folder, **TARGETS[target]),),
            calibration=CalibrationConfig(samples=8, seq_len=64),
            validation=None,
            device="cpu",
        )
        pipeline.run(job)
    return folder


def test_peft_merge_into_the_original_weights(tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    found = findings(tiny_nf4, tiny_adapter, peft_merge(TINY_LLAMA, tiny_adapter, tmp_path / "out"))
    assert "original 16-bit base" in the_error(found, "wrong-base")["title"]


def test_another_base_is_not_called_the_original(
    make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    generator = torch.Generator().manual_seed(1)

    def shift(name: str, t: Tensor) -> Tensor:
        return t + 0.1 * t.std() * torch.randn(t.shape, generator=generator) if "layers" in name and t.ndim > 1 else t

    out = edited(make(tiny_nf4, tiny_adapter, "bf16"), tmp_path / "out", shift)
    finding = the_error(findings(tiny_nf4, tiny_adapter, out), "wrong-base")
    assert "another base" in finding["title"]


# Faults of single tensors.


@pytest.mark.parametrize("target", ["bf16", "fp8"])
def test_one_module_kind_without_the_adapter(
    target: str, make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    base = load_file(next(make(tiny_nf4, None, target).glob("*.safetensors")))
    out = edited(
        make(tiny_nf4, tiny_adapter, target), tmp_path / "out", lambda name, t: base[name] if "down_proj" in name else t
    )
    finding = the_error(findings(tiny_nf4, tiny_adapter, out), "adapter-partly-applied")
    assert finding["tensors"] == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(4)]


@pytest.mark.parametrize("target", ["bf16", "gptq"])
def test_a_shard_from_before_the_merge(
    target: str, make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    small = 1_000_000
    out = tmp_path / "out"
    shutil.copytree(make(tiny_nf4, tiny_adapter, target, small), out)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    shard = next(file for name, file in index.items() if name.startswith(f"{BLOCK}.mlp.up_proj"))
    shutil.copyfile(make(tiny_nf4, None, target, small) / shard, out / shard)
    finding = the_error(findings(tiny_nf4, tiny_adapter, out), "adapter-partly-applied")
    assert finding["files"] == [shard]
    assert f"exactly the weights of {shard}" in finding["message"]


def test_a_shard_of_another_merge(
    make: Make, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    """Some of its weights are off, in others only this adapter is missing: still one cause."""
    generator = torch.Generator().manual_seed(9)

    def other(name: str, t: Tensor) -> Tensor:
        strength = 0.1 if "up_proj" in name else 0.001
        return strength * 0.2 * torch.randn(t.shape, generator=generator) if "lora_B" in name else t

    adapter = edited(tiny_adapter, tmp_path_factory.mktemp("adapters") / "other", other)
    out = tmp_path / "out"
    shutil.copytree(make(tiny_nf4, tiny_adapter, "bf16", 2_000_000), out)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    shard = index[f"{BLOCK}.mlp.up_proj.weight"]
    assert sum(file == shard and "_proj" in name for name, file in index.items()) > 1
    shutil.copyfile(make(tiny_nf4, adapter, "bf16", 2_000_000) / shard, out / shard)
    finding = the_error(findings(tiny_nf4, tiny_adapter, out), "stale-shard")
    assert finding["files"] == [shard]


def test_an_embedding_that_was_trained_and_left_out(
    make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    adapter = tmp_path_factory.mktemp("adapters") / "embedding"
    save_random_adapter(
        TINY_LLAMA, adapter, str(tiny_nf4), modules_to_save=["embed_tokens", "lm_head"], target_modules=["q_proj"]
    )
    generator = torch.Generator().manual_seed(9)
    trained = edited(
        adapter,
        tmp_path / "trained",
        lambda name, t: t if "lora" in name else t + 0.01 * torch.randn(t.shape, generator=generator),
    )
    out = make(tiny_nf4, trained, "bf16")
    assert findings(tiny_nf4, trained, out) == []
    base = load_file(TINY_LLAMA / "model.safetensors")
    left_out = edited(out, tmp_path / "out", lambda name, t: base[name] if name == "model.embed_tokens.weight" else t)
    finding = the_error(findings(tiny_nf4, trained, left_out), "adapter-partly-applied")
    assert finding["tensors"] == ["model.embed_tokens.weight"]


def test_a_weight_of_zeros() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    zeros = TensorsInMemory({name: torch.zeros(16, 16)})
    assert audit(expected=zeros, base=zeros, candidate=dequantize(zeros)).findings() == []
    other = dequantize(TensorsInMemory({name: torch.ones(16, 16)}))
    assert errors(audit(expected=zeros, base=zeros, candidate=other).findings()) == ["weights-differ"]


@pytest.mark.gpu
def test_a_gpu_measures_the_same() -> None:
    generator = torch.Generator().manual_seed(1)
    name = "model.layers.0.mlp.up_proj.weight"
    base = {name: simulate(torch.randn(256, 512, generator=generator).bfloat16(), "nf4-dq")}
    update = torch.randn(256, 4, generator=generator) @ torch.randn(4, 512, generator=generator)
    merged = {name: base[name].float() + 0.01 * update}
    linear = rtn(merged[name], Scheme(group_size=64), name)
    for candidate in (
        dequantize(TensorsInMemory({name: merged[name].bfloat16()})),
        QuantizedInMemory({name.removesuffix(".weight"): linear}, {}),
    ):
        fits = []
        for device in ("cpu", "cuda"):
            auditor = WeightAudit(
                expected=TensorsInMemory(merged),
                base=TensorsInMemory(base),
                candidate=candidate,  # type: ignore[arg-type]
                changed=[name],
            )
            fits.append(auditor.add(name, device).as_dict())
        for key, value in fits[0].items():
            assert fits[1][key] == (pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value)


def test_a_shard_of_another_model(make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    whole = make(tiny_nf4, tiny_adapter, "bf16", 1_000_000)
    index = json.loads((whole / "model.safetensors.index.json").read_text())["weight_map"]
    shard = index[f"{BLOCK}.mlp.up_proj.weight"]
    stale = {name for name, file in index.items() if file == shard and "norm" not in name}
    generator = torch.Generator().manual_seed(1)
    out = edited(
        whole,
        tmp_path / "out",
        lambda name, t: t.std() * torch.randn(t.shape, generator=generator) if name in stale else t,
    )
    finding = the_error(findings(tiny_nf4, tiny_adapter, out), "stale-shard")
    assert finding["files"] == [shard]
    assert set(finding["tensors"]) == stale


@pytest.mark.parametrize("target", ["bf16", "fp8", "gptq", "awq", "gptq-8bit"])
def test_a_block_at_another_scale(target: str, make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    """Scaled where the format keeps its scale, so that codes stay as they are."""

    def scale(name: str, t: Tensor) -> Tensor:
        is_scale = name.endswith(".scales" if target not in ("bf16", "fp8") else ("_scale", "_proj.weight"))
        return t * 1.05 if name.startswith(BLOCK) and is_scale and t.dtype != torch.float8_e4m3fn else t

    out = edited(make(tiny_nf4, tiny_adapter, target), tmp_path / "out", scale)
    finding = the_error(findings(tiny_nf4, tiny_adapter, out), "weight-scaled")
    factor = float(finding["message"].split("are ")[1].split("x")[0])
    assert factor == pytest.approx(1.05, abs=0.015)
    assert all(name.startswith(BLOCK) for name in finding["tensors"])
    if target != "awq":  # there a factor of v and o, or of up and down, is one of their product
        assert len(finding["tensors"]) == LINEARS_PER_BLOCK
        assert f"{BLOCK}: weights" in finding["message"]


@pytest.mark.parametrize("target", ["bf16", "gptq"])
def test_swapped_projections(
    target: str,
    make: Make,
    random_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    base = random_model("llama", num_key_value_heads=4)
    out = make(base, None, target)
    one, other = "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
    tensors = load_file(next(out.glob("*.safetensors")))

    def swap(name: str, t: Tensor) -> Tensor:
        module, _, part = name.rpartition(".")
        return tensors[f"{ {one: other, other: one}.get(module, module) }.{part}"]

    swapped = edited(out, tmp_path_factory.mktemp("out") / "swapped", swap)
    finding = the_error(findings(base, None, swapped), "tensors-swapped")
    assert set(finding["tensors"]) == {f"{one}.weight", f"{other}.weight"}
    assert f"{one}.weight holds {other}.weight" in finding["message"]


def test_swapped_blocks(make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    out = make(tiny_nf4, tiny_adapter, "bf16")
    tensors = load_file(next(out.glob("*.safetensors")))
    names = [f"model.layers.{i}.mlp.gate_proj.weight" for i in (1, 2)]
    swap = dict(zip(names, reversed(names), strict=True))
    swapped = edited(out, tmp_path / "out", lambda name, t: tensors[swap.get(name, name)])
    assert sorted(the_error(findings(tiny_nf4, tiny_adapter, swapped), "tensors-swapped")["tensors"]) == names


@pytest.mark.parametrize("target", ["bf16", "gptq", "awq"])
def test_a_norm_that_differs(target: str, make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    norm = f"{BLOCK}.input_layernorm.weight"

    def edit(name: str, t: Tensor) -> Tensor:
        return t * torch.linspace(0.5, 1.5, len(t)) if name == norm else t

    found = findings(tiny_nf4, tiny_adapter, edited(make(tiny_nf4, tiny_adapter, target), tmp_path / "out", edit))
    # In an AWQ artifact the linears behind it keep scales that nothing takes back any more.
    assert errors(found) == ["norm-differs"] or (target == "awq" and set(errors(found)) >= {"norm-differs"})
    assert norm in next(f for f in found if f["code"] == "norm-differs")["tensors"]


@pytest.mark.parametrize("target", ["bf16", "gptq", "w4a16-asym"])
@pytest.mark.parametrize("factor", [1.5, 0.95])
def test_a_norm_at_another_scale(
    factor: float, target: str, make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    """An even factor leaves no pattern among channels that noise could hide: the linears behind have it, or not."""
    norm = f"{BLOCK}.input_layernorm.weight"
    out = edited(
        make(tiny_nf4, tiny_adapter, target), tmp_path / "out", lambda name, t: t * factor if name == norm else t
    )
    assert the_error(findings(tiny_nf4, tiny_adapter, out), "norm-differs")["tensors"] == [norm]


def test_a_norm_at_another_scale_whose_linears_are_folded(
    make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    """Bytes do not tell whether the norm is off or all that it feeds: both are named, the one cause first."""
    norm = f"{BLOCK}.input_layernorm.weight"
    out = edited(
        make(tiny_nf4, tiny_adapter, "awq-8bit"), tmp_path / "out", lambda name, t: t * 1.5 if name == norm else t
    )
    finding = the_error(findings(tiny_nf4, tiny_adapter, out), "weight-scaled")
    assert finding["tensors"] == [norm, *(f"{BLOCK}.self_attn.{role}_proj.weight" for role in "kqv")]
    assert f"1.500x of the expected, or {norm} before them is" in finding["message"]


@pytest.mark.parametrize("factor", [1.5, 0.9])
def test_an_even_factor_that_linears_take_back_is_no_fault(
    factor: float, make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    behind = tuple(f"{BLOCK}.self_attn.{role}_proj.scales" for role in "qkv")

    def move(name: str, t: Tensor) -> Tensor:
        return t / factor if name == f"{BLOCK}.input_layernorm.weight" else t * factor if name in behind else t

    out = edited(make(tiny_nf4, tiny_adapter, "gptq"), tmp_path / "out", move)
    assert findings(tiny_nf4, tiny_adapter, out) == []


def test_a_bias_at_another_scale(make: Make, random_model: Callable[..., Path], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)

    def trained(name: str, t: Tensor) -> Tensor:
        return t + 0.2 * torch.randn(t.shape, generator=generator) if name.endswith("bias") else t

    base = edited(random_model("qwen2"), tmp_path / "base", trained)
    bias = "model.layers.1.self_attn.k_proj.bias"
    clean = make(base, None, "gptq")
    assert findings(base, None, clean) == []
    out = edited(clean, tmp_path / "out", lambda name, t: t * 1.5 if name == bias else t)
    assert the_error(findings(base, None, out), "bias-differs")["tensors"] == [bias]


def test_half_of_a_fold_is_lost(make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    """AWQ's linears with the norm of the unscaled model: every tensor is plausible by itself."""
    plain = load_file(next(make(tiny_nf4, tiny_adapter, "bf16").glob("*.safetensors")))
    norm = f"{BLOCK}.post_attention_layernorm.weight"
    out = edited(
        make(tiny_nf4, tiny_adapter, "awq"), tmp_path / "out", lambda name, t: plain[name] if name == norm else t
    )
    finding = the_error(findings(tiny_nf4, tiny_adapter, out), "scales-unbalanced")
    assert set(finding["tensors"]) >= {f"{BLOCK}.mlp.gate_proj.weight"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(bad: float, make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    name = f"{BLOCK}.mlp.up_proj.weight"

    def damage(own: str, t: Tensor) -> Tensor:
        if own == name:
            t[3, 4] = bad
        return t

    out = edited(make(tiny_nf4, tiny_adapter, "bf16"), tmp_path / "out", damage)
    assert the_error(findings(tiny_nf4, tiny_adapter, out), "not-finite")["tensors"] == [name]


def test_damaged_rows(make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    name = f"{BLOCK}.mlp.up_proj.weight"

    def damage(own: str, t: Tensor) -> Tensor:
        if own == name:
            t[:32] = 0
        return t

    out = edited(make(tiny_nf4, tiny_adapter, "bf16"), tmp_path / "out", damage)
    finding = the_error(findings(tiny_nf4, tiny_adapter, out), "weights-differ")
    assert finding["tensors"] == [name]
    assert "32 rows or columns are zero" in finding["message"]


def test_missing_unexpected_and_reshaped(make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(make(tiny_nf4, tiny_adapter, "bf16"), out)
    file = next(out.glob("*.safetensors"))
    tensors = load_file(file)
    del tensors[f"{BLOCK}.mlp.up_proj.weight"]
    tensors["model.extra.weight"] = torch.zeros(2, 2)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-8].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    found = {f["code"]: f for f in findings(tiny_nf4, tiny_adapter, out)}
    assert found.keys() == {"tensors-missing", "tensors-unexpected", "shapes-differ"}
    assert found["tensors-missing"]["tensors"] == [f"{BLOCK}.mlp.up_proj.weight"]
    assert found["tensors-unexpected"]["severity"] == "warning"
    assert found["shapes-differ"]["tensors"] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("is_right", [True, False])
def test_a_tied_head_that_is_stored(
    is_right: bool, make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(make(tiny_nf4, tiny_adapter, "bf16"), out)
    file = next(out.glob("*.safetensors"))
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if is_right else embedding.flip(0).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    found = findings(tiny_nf4, tiny_adapter, out)
    if is_right:
        assert found == []
    else:
        assert the_error(found, "weights-differ")["tensors"] == ["lm_head.weight"]


# No false alarms: twenty draws of everything that is random.


class QuantizedInMemory(TensorsInMemory):
    """A candidate view over linears that were quantized here."""

    kind = "gptq"

    def __init__(self, linears: Mapping[str, QuantizedLinear], config: Mapping[str, Any]):
        super().__init__({f"{name}.weight": q.dequantize() for name, q in linears.items()}, config)
        self.linears = dict(linears)
        self.schemes = {module: linear.scheme for module, linear in linears.items()}
        self.quantized_modules = tuple(linears)

    def read_quantized(self, module: str, device: str = "cpu") -> QuantizedLinear:
        q = self.linears[module]
        zeros = None if q.zeros_NG is None else q.zeros_NG.to(device)
        return dataclasses.replace(q, codes_NK=q.codes_NK.to(device), scales_NG=q.scales_NG.to(device), zeros_NG=zeros)


@pytest.mark.parametrize("algorithm", ["gptq", "rtn"])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
@pytest.mark.parametrize("strength", [0.0005, 0.01, 0.1])
def test_no_false_alarm_in_twenty_draws(algorithm: str, bits: int, symmetric: bool, strength: float) -> None:
    """Random bases on the NF4 grid, adapters and inputs with strong channels; what is applied must pass."""
    scheme = Scheme(bits=bits, group_size=64, symmetric=symmetric)

    def quantize(w_NK: Tensor, x_TK: Tensor) -> QuantizedLinear:
        return (
            gptq(w_NK, x_TK.T @ x_TK / len(x_TK), scheme, "w").linear if algorithm == "gptq" else rtn(w_NK, scheme, "w")
        )

    alarms = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        base, merged, linears = {}, {}, {}
        for i in range(4):
            name = f"model.layers.{i // 2}.mlp.{('up', 'gate')[i % 2]}_proj"
            w_NK = simulate(torch.randn(96, 128, generator=generator).mul_(0.05).bfloat16(), "nf4-dq")
            d_NK = torch.randn(96, 4, generator=generator) @ torch.randn(4, 128, generator=generator)
            m_NK = w_NK.float() + d_NK * (strength * w_NK.float().norm() / d_NK.norm())
            x_TK = torch.randn(512, 128, generator=generator) * torch.rand(128, generator=generator).mul_(2).exp_()
            linears[name] = quantize(m_NK, x_TK)
            base[f"{name}.weight"], merged[f"{name}.weight"] = w_NK, m_NK
        config = {"model_type": "llama", "tie_word_embeddings": False}
        auditor = audit(
            expected=TensorsInMemory(merged, config),
            base=TensorsInMemory(base, config),
            candidate=QuantizedInMemory(linears, config),
            changed=merged,
        )
        alarms += [(seed, f["code"], f["message"]) for f in auditor.findings() if f["severity"] == "error"]
    assert alarms == []


@pytest.mark.parametrize("spread", [0.01, 0.03, 0.1, 0.4])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_false_alarm_in_twenty_folds(bits: int, spread: float) -> None:
    """Blocks with grouped queries whose scales were moved as AWQ moves them, one channel strongly, and rounded."""
    num_heads, num_groups, width, inner = 4, 2, 32, 256
    hidden = num_heads * width
    config = {"num_attention_heads": num_heads, "num_key_value_heads": num_groups, "hidden_size": hidden}
    rows_of = {
        **{"self_attn.q_proj": hidden, "self_attn.k_proj": num_groups * width, "self_attn.v_proj": num_groups * width},
        **{"self_attn.o_proj": hidden, "mlp.gate_proj": inner, "mlp.up_proj": inner, "mlp.down_proj": hidden},
    }
    alarms = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        expected: dict[str, Tensor] = {}
        for module, rows in rows_of.items():
            columns = inner if module == "mlp.down_proj" else hidden
            expected[f"model.layers.0.{module}.weight"] = torch.randn(rows, columns, generator=generator) * 0.05
        for norm in ("input_layernorm", "post_attention_layernorm"):
            expected[f"model.layers.0.{norm}.weight"] = (torch.rand(hidden, generator=generator) + 0.3).bfloat16()
        stored = {name.removeprefix("model.layers.0."): t.clone() for name, t in expected.items()}
        for fold in FOLDS["llama"]:
            heads = Heads.of(config)
            targets = [f"{target}.weight" for target in fold.targets]
            scale_K = (spread * torch.randn(stored[targets[0]].shape[1], generator=generator)).exp()
            scale_K[3] *= 1 + 5 * spread
            source = f"{fold.source}.weight"
            if fold.kind == "norm":
                stored[source], scale_K = fold_into_norm(stored[source], scale_K, torch.bfloat16, False)
            else:
                if fold.targets[0].endswith("o_proj"):
                    scale_K = share_across_heads(scale_K, heads)
                stored[source], _ = fold_into_rows(stored[source], None, producer_scale(scale_K, fold, heads))
            for target in targets:
                stored[target] = stored[target] * scale_K
        scheme = Scheme(bits=bits, group_size=32, symmetric=False)
        linears = {f"model.layers.0.{m}": rtn(stored[f"{m}.weight"], scheme, m) for m in rows_of}
        candidate = QuantizedInMemory(linears, config)
        candidate.tensors |= {f"model.layers.0.{n}": t.bfloat16() for n, t in stored.items() if "norm" in n}
        base = TensorsInMemory(expected, config)
        found = audit(expected=base, base=base, candidate=candidate).findings()
        alarms += [(seed, f["code"], f["message"]) for f in found]
    assert alarms == []


# The interface.


def test_tensors_can_be_added_one_by_one_in_any_order(make: Make, tiny_nf4: Path, tiny_adapter: Path) -> None:
    candidate = make(tiny_nf4, None, "bf16")
    whole = audited(tiny_nf4, tiny_adapter, candidate)
    auditor = WeightAudit(
        expected=whole.expected, base=whole.base, candidate=whole.candidate, changed=whole.changed, files=whole.files
    )
    for name in reversed(auditor.names):
        result = auditor.add(name)
        assert result.as_dict()["name"] == name
        json.dumps(result.as_dict(), allow_nan=False)
    first, second = whole.findings(), auditor.findings()
    assert [f["code"] for f in first] == [f["code"] for f in second] == ["adapter-not-applied"]


def streamed(base: Path, adapter: Path, candidate: Path) -> StreamedAudit:
    view = dequantize(open_checkpoint(base))
    reference = Reference(
        source=open_checkpoint(base), base=view, adapter=load_adapter(str(adapter), view), kind="nf4-dq"
    )
    other = Candidate.of(open_checkpoint(candidate))
    return StreamedAudit(reference, other, Views.of(reference, other, "cpu"), "cpu")


@pytest.mark.parametrize("target", ["awq", "gptq"])
def test_beside_a_comparison_the_findings_are_the_same(
    make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path, target: str
) -> None:
    """Judged block by block in a thread, as one by one: of a candidate with a norm and a block that are not its own."""
    plain = load_file(next(make(tiny_nf4, tiny_adapter, "bf16").glob("*.safetensors")))
    norm, other = f"{BLOCK}.post_attention_layernorm.weight", "model.layers.1."
    stored = make(tiny_nf4, tiny_adapter, target)
    tensors = load_file(next(stored.glob("*.safetensors")))

    def damage(name: str, t: Tensor) -> Tensor:
        if name.startswith(other) and "mlp" in name:
            return tensors[name.replace(other, "model.layers.0.")]
        return plain[name] * torch.linspace(0.5, 2, len(t)) if name == norm else t

    out = edited(stored, tmp_path / "out", damage)
    wanted = audited(tiny_nf4, tiny_adapter, out)
    with streamed(tiny_nf4, tiny_adapter, out) as audit:
        for block in range(4):
            audit.block(f"model.layers.{block}.")
        audit.rest()
        found = audit.findings()
        tensors_found = audit._audit.tensors
    assert {"awq": "scales-unbalanced", "gptq": "norm-differs"}[target] in {f["code"] for f in found}
    assert "tensors-swapped" in {f["code"] for f in found}
    assert [f for f in found if f["code"] != "wrong-base"] == [
        f for f in wanted.findings() if f["code"] != "wrong-base"
    ]
    for name, tensor in tensors_found.items():
        assert tensor.as_dict() == wanted.tensors[name].as_dict()
    assert {t.name for t in wanted.tensors.values() if t.fit is not None} - tensors_found.keys() <= {
        "model.embed_tokens.weight", "lm_head.weight"
    }  # fmt: skip


def test_what_the_thread_runs_into_is_raised(
    make: Make, tiny_nf4: Path, tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise NumericsError("the thread's own")

    monkeypatch.setattr("qconv.validate.audit.judge_folds", fail)
    with streamed(tiny_nf4, tiny_adapter, make(tiny_nf4, tiny_adapter, "gptq")) as audit:
        audit.block("model.layers.0.")
        with pytest.raises(NumericsError, match="the thread's own"):
            audit.findings()
        audit.block("model.layers.1.")
        wait(audit._coming)
        with pytest.raises(NumericsError, match="the thread's own"):
            audit.block("model.layers.2.")


def test_a_scale_that_is_not_finite_ends_the_comparison(
    make: Make, tmp_path: Path, tiny_nf4: Path, tiny_adapter: Path
) -> None:
    """Named as what it is, although the GPU is not asked when it is read: not as hidden states that are not finite."""

    def damage(name: str, t: Tensor) -> Tensor:
        if name == f"{BLOCK}.mlp.up_proj.scales":
            t[0, 3] = float("nan")
        return t

    out = edited(make(tiny_nf4, tiny_adapter, "gptq"), tmp_path / "out", damage)
    view = dequantize(open_checkpoint(tiny_nf4))
    adapter = load_adapter(str(tiny_adapter), view)
    reference = Reference(source=open_checkpoint(tiny_nf4), base=view, adapter=adapter, kind="nf4-dq")
    config = ValidationConfig(tokens=512, seq_len=128)
    with pytest.raises(NumericsError, match=f"a scale of module '{BLOCK}.mlp.up_proj' is NaN or infinite"):
        measure_fidelity(reference, Candidate.of(open_checkpoint(out)), config, "cpu", QUIET)


def test_findings_are_the_reports_own_kind(make: Make, tiny_nf4: Path, tiny_adapter: Path) -> None:
    (finding,) = findings(tiny_nf4, tiny_adapter, make(tiny_nf4, None, "bf16"))
    assert finding.keys() == {"severity", "code", "title", "message", "tensors", "files"}
    assert finding["files"] == ["model.safetensors"]
    json.dumps(finding, allow_nan=False)


def test_reading_does_not_change_what_views_remember(make: Make, tiny_nf4: Path, tiny_adapter: Path) -> None:
    """A view may hand out the tensor that it keeps."""

    class Remembering:
        def __init__(self, view: Any):
            self.view, self.kept = view, {}  # type: ignore[var-annotated]
            self.location, self.config = view.location, view.config

        def specs(self) -> Mapping[str, TensorSpec]:
            return self.view.specs()  # type: ignore[no-any-return]

        def read(self, name: str, device: str = "cpu") -> Tensor:
            return self.kept.setdefault(name, self.view.read(name, device))

    base = dequantize(open_checkpoint(tiny_nf4))
    expected = merge(base, [load_adapter(str(tiny_adapter), base)])
    views = Remembering(expected), Remembering(base)
    candidate = dequantize(open_checkpoint(make(tiny_nf4, tiny_adapter, "fp32")))
    name = f"{BLOCK}.mlp.up_proj.weight"
    auditor = WeightAudit(expected=views[0], base=views[1], candidate=candidate, changed=expected.changed)
    auditor.add(name)
    assert torch.equal(views[0].kept[name], expected.read(name))
    assert torch.equal(views[1].kept[name], base.read(name))


def test_random_adapter_seeds(make: Make, tmp_path_factory: pytest.TempPathFactory, tiny_nf4: Path) -> None:
    """Only two kinds of modules, another rank, rsLoRA."""
    adapter = tmp_path_factory.mktemp("adapters") / "qv"
    save_random_adapter(TINY_LLAMA, adapter, str(tiny_nf4), target_modules=["q_proj", "v_proj"], r=4, use_rslora=True)
    result = audited(tiny_nf4, adapter, make(tiny_nf4, adapter, "gptq"))
    assert sum(t.changed for t in result.tensors.values()) == 8
    assert result.findings() == []
    the_error(findings(tiny_nf4, adapter, make(tiny_nf4, None, "gptq")), "adapter-not-applied")
