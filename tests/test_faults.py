"""Release candidates that are wrong in one way each, judged as a release is: by the command line, with default gates.

A fault must end with its exit code and be named in the report and on the terminal; a clean artifact of every kind
must pass. Faults that people make with other tools are made with those tools here (transformers, peft).
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv import corpus
from qconv.cli import main
from qconv.report.document import JSON_NAME, MARKDOWN_NAME
from tests.conftest import ALL_LINEARS, TINY_LLAMA, save_bnb

Make = Callable[..., Path]
Edit = Callable[[dict[str, Tensor]], None]
FAILED, BAD_INPUT = 4, 3
RANK, ALPHA = 8, 16
WEAK, USUAL, STRONG = 5e-4, 1e-2, 1e-1  # ||update|| / ||weight||
BLOCK = "model.layers.2."
SHARD_BYTES = 2_000_000
TARGETS: dict[str, tuple[str, ...]] = {
    "bf16": ("--dtype", "bf16"),
    "fp16": ("--dtype", "fp16"),
    "fp32": ("--dtype", "fp32"),
    "fp8": ("--requant", "fp8"),
    "w4a16": ("--requant", "w4a16"),
    "gptq": ("--requant", "gptq"),
    "awq": ("--requant", "awq"),
}


@dataclass(frozen=True)
class Result:
    code: Any
    out: str
    err: str
    report: Mapping[str, Any] | None = None
    markdown: str = ""

    def findings(self, severity: str = "error") -> dict[str, dict[str, Any]]:
        assert self.report is not None, (self.code, self.err)
        return {f["code"]: f for f in self.report["findings"] if f["severity"] == severity}


def qconv(*arguments: str | Path) -> Result:
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in arguments])
        except SystemExit as stop:
            code = stop.code
    return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    for name, source in (("calibration", "default"), ("evaluation", "default-eval")):
        (folder / name).with_suffix(".txt").write_text("\n\n".join(corpus.load_documents(source)[:6]))
    return {name: folder / f"{name}.txt" for name in ("calibration", "evaluation")}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``adapter(base, strength=1e-2, seed=0, alpha=16)``: a LoRA adapter, updates of that relative norm."""

    @cache
    def make(model: Path = TINY_LLAMA, strength: float = USUAL, seed: int = 0, alpha: int = ALPHA) -> Path:
        folder = tmp_path_factory.mktemp("adapters")
        save_adapter(folder, model, strength, seed)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "target_modules": ALL_LINEARS}
        config |= {"lora_alpha": alpha, "base_model_name_or_path": str(model)}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return make


def save_adapter(folder: Path, model: Path, strength: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, w_NK in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in ALL_LINEARS:
            continue
        a_RK = torch.randn(RANK, w_NK.shape[1], generator=generator)
        b_NR = torch.randn(w_NK.shape[0], RANK, generator=generator)
        norm = torch.linalg.matrix_norm(b_NR @ a_RK) * ALPHA / RANK
        b_NR *= strength * torch.linalg.matrix_norm(w_NK.float()) / norm
        tensors |= {f"base_model.model.{module}.lora_A.weight": a_RK, f"base_model.model.{module}.lora_B.weight": b_NR}
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, texts: Mapping[str, Path]) -> Make:
    """``made("merge", base, adapter, "--dtype", "fp32")``: what that command writes; made once, so never change it."""

    @cache
    def make(command: str, *arguments: str | Path) -> Path:
        out = tmp_path_factory.mktemp("out") / "model"
        options: list[str | Path] = ["-q", "--device", "cpu", "-o", out]
        if command != "convert":
            options += ["--no-validate", "--calibration", texts["calibration"], "--samples", "8", "--seq-len", "128"]
        result = qconv(command, *arguments, *options)
        assert result.code == 0, result.err
        return out

    return make


@pytest.fixture
def validate(tmp_path: Path, texts: Mapping[str, Path]) -> Callable[..., Result]:
    """``validate(reference, adapter, candidate)`` with default gates."""

    def run(reference: Path, adapter: Path | None, candidate: Path | None, *more: str | Path) -> Result:
        models: list[str | Path] = ["--reference", reference]
        models += ["--adapter", adapter] if adapter else []
        models += ["--candidate", candidate] if candidate else []
        report = tmp_path / "report"
        shutil.rmtree(report, ignore_errors=True)
        evaluation = ["--eval-data", texts["evaluation"], "--eval-tokens", "2048", "--eval-seq-len", "128"]
        options = [*evaluation, "--device", "cpu", "-q", "--attribution", "never", "--report", report, *more]
        result = qconv("validate", *models, *options)
        if not (report / JSON_NAME).exists():
            return result
        document = json.loads((report / JSON_NAME).read_text())
        return Result(result.code, result.out, result.err, document, (report / MARKDOWN_NAME).read_text())

    return run


def damaged(source: Path, folder: Path, edit: Edit) -> Path:
    """A copy of a folder with one file of weights, with these edited."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
