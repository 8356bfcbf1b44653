"""Building an ONNX folder with the model builder of ONNX Runtime GenAI, as a program of its own.

The builder is a set of scripts that import one another by top-level names and print as they go, so it runs in a process
of its own, through its command line (https://onnxruntime.ai/docs/genai/howto/build-model.html). It reads a transformers
folder: plain weights become ``MatMul``, codes in the GPTQ layout ``MatMulNBits``. Output head and embedding stay as
they are: what it would do to them is rounding without calibration.

float32 is built for CPUs; float16 and bfloat16 with the operations of the CUDA provider, and without a provider in
``genai_config.json``, so that a program that loads the folder chooses one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconv.errors import CheckpointError

GENAI_CONFIG, MODEL_FILE = "genai_config.json", "model.onnx"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_SAID = 1500  # characters of what the builder said last, for a message


def check_family(config: Mapping[str, Any], location: str) -> None:
    """Raises `CheckpointError` for a model type that is not written."""
    if config.get("model_type") not in FAMILIES:
        raise CheckpointError(
            f"{location}: model type {config.get('model_type')!r} is not written as ONNX; written are "
            f"{', '.join(FAMILIES)}. onnxruntime_genai.models.builder knows more: give it a plain merge"
        )


def build(source: Path, out: Path, dtype: str, bits: int | None) -> None:
    """Writes graph, data and ``genai_config.json`` to the folder ``out``.

    Args:
        source: a transformers folder, plain or in the GPTQ layout.
        dtype: of inputs, outputs and what is not quantized: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        bits: of the codes in ``source``; None = it is plain.

    Raises:
        CheckpointError: the builder failed; quotes it.
    """
    provider = "cpu" if dtype == "fp32" else "cuda"
    options = ["hf_token=false", "fuse_qk_norm_gqa=false"]  # fused norms of heads run on GPUs alone
    precision = dtype
    if bits is not None:
        precision = f"int{bits}"
        options += ["nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"]
        options += ["use_cuda_bf16=true"] if dtype == "bf16" else []
    with tempfile.TemporaryDirectory(prefix="qconv-onnx-") as cache:
        words = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out)]
        words += ["-p", precision, "-e", provider, "-c", cache, "--extra_options", *options]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0 or not (out / MODEL_FILE).is_file():
        said = (done.stderr.strip() or done.stdout.strip())[-_SAID:]
        raise CheckpointError(
            f"{source}: the model builder of onnxruntime-genai failed (exit code {done.returncode}); it said: {said}"
        )
    _without_provider(out / GENAI_CONFIG)


def _without_provider(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["decoder"]["session_options"]["provider_options"] = []
    file.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def take_over(built: Path, folder: Path) -> None:
    """Moves what was built into its folder, but for the tokenizer, which lies there as it came."""
    for file in built.iterdir():
        if file.name in (GENAI_CONFIG, MODEL_FILE, f"{MODEL_FILE}.data"):
            shutil.move(str(file), folder / file.name)
