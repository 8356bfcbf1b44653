"""QA-LoRA put into the zero points of its base: against the formula of its repository's ``merge.py``, in numpy.

``qzeros -= (B A)^T * scale / scales`` (the sum convention), on float zero points; with whole ones the nearest. What
lies in a GGUF file is decoded by the gguf package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qconv.checkpoint import open_checkpoint
from qconv.cli import main
from qconv.convert import dequantize
from qconv.errors import NumericsError, SchemeError, UsageError
from qconv.quantization_config import QuantizationConfig
from qconv.quantize.zeros import ZeroMoves, moved_zeros
from qconv.types import QuantizedLinear, Scheme
from tests.merge_cases import PREFIX, TINY_LLAMA, write_adapter

R, ALPHA, GROUP = 4, 6, 64
MODULES = [f"model.layers.{layer}.{name}" for layer in range(4) for name in ("self_attn.q_proj", "mlp.down_proj")]
BASES = {"gptq": "--asym", "awq": "--asym", "w4a16": "--asym", "gptq_v2": "--sym"}
ZEROS = {"gptq": "qzeros", "gptq_v2": "qzeros", "awq": "qzeros", "w4a16": "weight_zero_point"}


def quantized(folder: Path, target: str, *options: str) -> Path:
    words = ["quantize", str(TINY_LLAMA), "--to", target, "--algorithm", "rtn", "-o", str(folder), *options]
    main([*words, "--device", "cpu", "--no-validate"])
    return folder


def updates(group: int = GROUP) -> dict[str, tuple[Tensor, Tensor]]:
    """A ``[R, K / g]`` and B ``[N, R]`` by module; of a size that moves some zero points by whole steps."""
    specs, made = open_checkpoint(TINY_LLAMA).specs(), torch.Generator().manual_seed(3)
    found = {}
    for module in MODULES:
        n, k = specs[f"{module}.weight"].shape
        found[module] = (torch.randn(R, k // group, generator=made) * 0.1, torch.randn(n, R, generator=made) * 0.05)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in each format, and the adapter."""
    folder = tmp_path_factory.mktemp("zeros")
    for target, symmetry in BASES.items():
        quantized(folder / target, target, symmetry, "--group-size", str(GROUP))
    tensors = {}
    for module, (a, b) in updates().items():
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    write_adapter(folder / "adapter", tensors, r=R, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"])
    return folder


def run(folders: Path, out: Path, base: str, target: str, *options: str) -> Path:
    words = ["merge", str(folders / base), str(folders / "adapter"), "--qa-lora", "sum", "--requant", target]
    main([*words, "--algorithm", "zeros", "-o", str(out), "--device", "cpu", *(options or ["--no-validate"])])
    return out


def steps(base: QuantizedLinear, module: str) -> np.ndarray:
    """What the repository takes from zero points, ``[N, G]``."""
    a, b = updates()[module]
    found: np.ndarray = (b.double() @ a.double()).numpy() * (ALPHA / R) / base.scales_NG.double().numpy()
    return found


def zeros_of(linear: QuantizedLinear) -> np.ndarray:
    if linear.zeros_NG is None:
        return np.full(linear.scales_NG.shape, 8.0)
    return linear.zeros_NG.double().numpy()


@pytest.mark.parametrize("target", BASES)
def test_only_zero_points_change(target: str, folders: Path, tmp_path: Path) -> None:
    out = run(folders, tmp_path / "out", target, target)
    before, after = (load_file(folder / "model.safetensors") for folder in (folders / target, out))
    changed = set()
    for name, tensor in before.items():
        if name.rpartition(".")[2] == ZEROS[target]:
            changed |= set() if torch.equal(tensor, after[name]) else {name.rpartition(".")[0]}
        else:
            assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    assert before.keys() == after.keys()
    assert changed == set(MODULES)
    stored = [dequantize(open_checkpoint(folder)) for folder in (folders / target, out)]
    least = 1 if target == "gptq" else 0
    for module in stored[0].quantized_modules:
        base, found = (view.read_quantized(module) for view in stored)
        wanted = zeros_of(base) - (steps(base, module) if module in MODULES else 0)
        expected = np.clip(np.round(wanted), least, 15)
        near_half = np.abs(np.abs(wanted - np.floor(wanted)) - 0.5) < 1e-3
        np.testing.assert_array_equal(zeros_of(found)[~near_half], expected[~near_half])


def test_a_symmetric_base_gets_zero_points(folders: Path, tmp_path: Path) -> None:
    assert dequantize(open_checkpoint(folders / "gptq_v2")).scheme.symmetric  # type: ignore[union-attr]
    config = json.loads((run(folders, tmp_path / "out", "gptq_v2", "awq") / "config.json").read_text())
    assert config["quantization_config"]["zero_point"] is True


@pytest.mark.parametrize("base", ["gptq", "awq"])
def test_float_zero_points_are_exact(base: str, folders: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    out = run(folders, tmp_path / "out", base, "gguf-q4_1")
    reader = gguf.GGUFReader(out / "model-Q4_1.gguf")
    names = {
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj",
        "blk.2.ffn_up.weight": "model.layers.2.mlp.up_proj",
    }
    view = dequantize(open_checkpoint(folders / base))
    for tensor in reader.tensors:
        module = names.pop(tensor.name, None)
        if module is None:
            continue
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        linear = view.read_quantized(module)
        zeros = zeros_of(linear) - (steps(linear, module) if module in MODULES else 0)
        scales = linear.scales_NG.double().numpy()
        minima = (-zeros * scales).astype(np.float16).astype(np.float64)
        expected = linear.codes_NK.double().numpy() * scales.repeat(GROUP, 1) + minima.repeat(GROUP, 1)
        ulp = np.abs(minima).repeat(GROUP, 1) * 2.0**-10 + 1e-7
        assert (np.abs(found - expected) <= ulp).all()
        assert (np.abs(found - expected) <= 1e-6).mean() > 0.999  # what float32 put beside another float16
    assert not names


def test_a_run_reports_what_rounding_took(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--eval-tokens", "256", "--eval-seq-len", "64", "--attribution", "never"]
    whole, exact = (
        json.loads((run(folders, tmp_path / target, "gptq", target, *short) / "qconv-report.json").read_text())
        for target in ("gptq", "gguf-q4_1")
    )
    assert "zero points moved" in capsys.readouterr().err
    facts = whole["stages"]["zero points"]
    assert 0 < facts["groups whose zero point moved"] < facts["groups"]
    view = dequantize(open_checkpoint(folders / "gptq"))
    lost = wanted = 0.0
    for module in MODULES:
        linear = view.read_quantized(module)
        before, move, scales = zeros_of(linear), steps(linear, module), linear.scales_NG.double().numpy()
        after = np.clip(np.round(before - move), 1, 15)
        wanted += float(((move * scales) ** 2).sum())
        lost += float((((before - after - move) * scales) ** 2).sum())
    error = facts["relative error of the update by rounding zero points"]
    assert error == pytest.approx((lost / wanted) ** 0.5, rel=1e-2)
    assert exact["stages"]["zero points"]["relative error of the update by rounding zero points"] < 1e-5
    assert exact["verdict"] == "pass"
    assert whole["fidelity"]["total"]["kl"]["mean"] > 5 * exact["fidelity"]["total"]["kl"]["mean"]


def refused(folders: Path, tmp_path: Path, words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["merge", *words, "-o", str(tmp_path / "out"), "--device", "cpu", "--no-validate"])
    assert raised.value.code not in (0, None)
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_updates_that_no_zero_point_makes(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {}
    for module, (a, b) in updates(32).items():
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    narrow = write_adapter(tmp_path / "narrow", tensors, r=R, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"])
    zeros = ["--requant", "gptq", "--algorithm", "zeros"]
    words = [str(folders / "gptq"), str(narrow), "--qa-lora", "sum", *zeros]
    refused(folders, tmp_path, words, "steps inside a group of 64 inputs", capsys)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--requant", "w4a16", "--group-size", "64"], "--group-size: --algorithm zeros keeps"),
        (["--requant", "gptq", "--bits", "8"], "--bits: --algorithm zeros keeps"),
        (["--requant", "gptq", "--ignore", "*.q_proj"], "--ignore: --algorithm zeros keeps"),
        (["--requant", "w8a16"], "4-bit int codes, which w8a16"),
        (["--requant", "fp8"], "fp8 takes --algorithm fp8"),
    ],
)
def test_outputs_that_do_not_keep_codes(
    words: list[str], text: str, folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folders / "gptq"), str(folders / "adapter"), "--qa-lora", "sum", *words, "--algorithm", "zeros"]
    if "w8a16" in words:  # 8 bits beside 4 is what it holds, so a base of 2 bits
        quantized(tmp_path / "base", "gptq", "--bits", "2", "--group-size", "64")
        words[0], text = str(tmp_path / "base"), "2-bit int codes, which w8a16"
    refused(folders, tmp_path, words, text, capsys)


def test_bases_without_codes(folders: Path, tiny_nf4: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tiny_nf4), str(folders / "adapter"), "--qa-lora", "sum", "--requant", "gptq", "--algorithm", "zeros"]
    refused(folders, tmp_path, words, "keeps the integer codes of a GPTQ", capsys)
    with pytest.raises(SystemExit):
        main(["quantize", str(folders / "gptq"), "--to", "gptq", "--algorithm", "zeros", "-o", str(tmp_path / "out")])
    assert "there is no adapter" in capsys.readouterr().err


def linear(**changes: Any) -> QuantizedLinear:
    made = torch.Generator().manual_seed(0)
    fields: dict[str, Any] = {
        "codes_NK": torch.randint(0, 16, (3, 8), dtype=torch.uint8, generator=made),
        "scales_NG": torch.rand(3, 2, generator=made) + 0.5,
        "zeros_NG": torch.full((3, 2), 7, dtype=torch.uint8),
        "group_index_K": None,
        "scheme": Scheme(bits=4, group_size=4, symmetric=False),
    }
    return QuantizedLinear(**{**fields, **changes})


def test_groups_of_an_index_and_without_a_scale() -> None:
    scheme = Scheme(bits=4, group_size=4, symmetric=False)
    indexed = linear(group_index_K=torch.tensor([0, 1] * 4, dtype=torch.int32))
    with pytest.raises(SchemeError, match="group index"):
        moved_zeros(indexed.dequantize(), indexed, scheme, torch.uint8, "m", ZeroMoves())
    flat = linear(scales_NG=torch.tensor([[0.0, 1.0]] * 3))
    same = moved_zeros(flat.dequantize(), flat, scheme, torch.uint8, "m", ZeroMoves())
    assert torch.equal(same.zeros_NG, flat.zeros_NG)  # type: ignore[arg-type]
    with pytest.raises(SchemeError, match="no zero point makes it"):
        moved_zeros(flat.dequantize() + 1, flat, scheme, torch.uint8, "m", ZeroMoves())
    with pytest.raises(NumericsError, match="finite"):
        moved_zeros(flat.dequantize() + torch.nan, flat, scheme, torch.uint8, "m", ZeroMoves())


def test_zero_points_end() -> None:
    base, moves = linear(), ZeroMoves()
    w_NK = base.dequantize() - 20 * base.scales_NG.repeat_interleave(4, 1)
    found = moved_zeros(w_NK, base, Scheme(bits=4, group_size=4, symmetric=False), torch.uint8, "m", moves)
    assert torch.equal(found.zeros_NG, torch.full((3, 2), 15, dtype=torch.uint8))  # type: ignore[arg-type]
    assert (moves.clipped, moves.moved, moves.error) == (6, 6, pytest.approx(12 / 20, rel=1e-4))


def test_the_scheme_is_the_bases() -> None:
    for option in ({"bits": 4}, {"symmetric": False}, {"lm_head": True}):
        with pytest.raises(UsageError, match="keeps the base's codes"):
            QuantizationConfig(target="gptq", algorithm="zeros", **option)  # type: ignore[arg-type]
