"""Prints the peak host memory of a merge beside its bound: 2 shards + 300 MB above the interpreter's own.

    .venv/bin/python benchmarks/memory.py --out build/memory
    .venv/bin/python benchmarks/memory.py --out build/memory --gguf

Two models: SmolLM2-135M (NF4) written in 20 MB shards, and a synthetic 4 GB bfloat16 checkpoint (32 blocks of 4
linears of 4096 x 3840, trained as ``16bit``) written in 500 MB shards. Each merge is its own process; its peak is the
kernel's VmHWM. The interpreter's own memory is that of a process that has imported what a merge imports and run a
merge of a model of a few kilobytes.

``--gguf`` prints that of GGUF files by llama.cpp's rule instead, beside 2 shards of 500 MB + 500 MB: four layers in the
shape of a 1B model (`shapes.py`), whose embedding alone takes 1 GB in float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from shapes import build

from qconv.types import TensorSpec
from qconv.writer import CheckpointWriter

RUN = """
import sys
from pathlib import Path
from qconv import pipeline
from qconv.config import MergeJob, OutputConfig
from qconv.quantization_config import QuantizationConfig
base, adapter, out, shard, kind, target = sys.argv[1:]
if target:
    output = OutputConfig(out=Path(out), quantization=QuantizationConfig(target=target, algorithm="ggml"))
else:
    output = OutputConfig(out=Path(out), max_shard_bytes=int(shard))
pipeline.run(MergeJob(base=base, adapter=adapter, outputs=(output,), validation=None,
                      device="cpu", trained_on=kind or None, overwrite=True))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")


def build_synthetic(folder: Path, blocks: int, n: int, k: int) -> tuple[Path, Path]:
    """A bfloat16 checkpoint of plain linears under Llama's names, and a rank-16 adapter for all of them."""
    base, adapter = folder / "base", folder / "adapter"
    if adapter.exists():
        return base, adapter
    names = [f"model.layers.{i}.self_attn.{name}" for i in range(blocks) for name in LINEARS]
    specs = [TensorSpec(name=f"{name}.weight", shape=(n, k), dtype=torch.bfloat16) for name in names]
    with CheckpointWriter(base, specs, 1_000_000_000, overwrite=True) as writer:
        writer.write_json("config.json", {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False})
        for spec in specs:
            writer.write(spec.name, torch.randn(spec.shape).to(torch.bfloat16))
        writer.commit()
    tensors = {}
    for name in names:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(16, k) * 0.01
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(n, 16) * 0.01
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def peak_kilobytes(base: Path, adapter: Path, out: Path, shard: int, kind: str, target: str = "") -> int:
    arguments = [sys.executable, "-c", RUN, str(base), str(adapter), str(out), str(shard), kind, target]
    return int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/memory"))
    parser.add_argument("--base", type=Path, help="SmolLM2 in NF4 [default: built]")
    parser.add_argument("--adapter", type=Path, help="an adapter for it [default: random]")
    parser.add_argument("--gguf", action="store_true", help="GGUF files of four layers of a 1B model")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    small, small_adapter = build_synthetic(out / "small", 1, 64, 64)
    own = peak_kilobytes(small, small_adapter, out / "candidate", 1_000_000, "16bit") * 1024
    if arguments.gguf:
        print_gguf(out, own)
        return
    smol, smol_adapter = arguments.base, arguments.adapter
    if smol is None:
        smol, smol_adapter = build_smollm2_with_adapter(out)
    large, large_adapter = build_synthetic(out / "large", 32, 4096, 3840)
    print(f"interpreter and libraries: {own / 1e6:.0f} MB\n")
    print("| merge | shard MB | peak MB | above the interpreter MB | bound MB |\n|---|---|---|---|---|")
    rows = [
        ("SmolLM2-135M NF4 -> bf16", smol, smol_adapter, 20_000_000, ""),
        ("synthetic 4 GB bf16 -> bf16", large, large_adapter, 500_000_000, "16bit"),
    ]
    for label, base, adapter, shard, kind in rows:
        peak = peak_kilobytes(base, adapter, out / "candidate", shard, kind) * 1024
        bound = (2 * shard + 300_000_000) / 1e6
        print(
            f"| {label} | {shard / 1e6:.0f} | {peak / 1e6:.0f} | {(peak - own) / 1e6:.0f} | {bound:.0f} |", flush=True
        )


def print_gguf(out: Path, own: int) -> None:
    base, adapter = build("1b", out / "1b", "cpu", layers=4)
    print(f"interpreter and libraries: {own / 1e6:.0f} MB\n")
    print("| merge | peak MB | above the interpreter MB | bound MB |\n|---|---|---|---|")
    for target in ("gguf-f16", "gguf-q8_0", "gguf-q4_0"):
        peak = peak_kilobytes(base, adapter, out / "candidate", 0, "", target) * 1024
        print(f"| 1B NF4, 4 layers -> {target} | {peak / 1e6:.0f} | {(peak - own) / 1e6:.0f} | 1500 |", flush=True)


def build_smollm2_with_adapter(out: Path) -> tuple[Path, Path]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from qconv.demo_model import build_smollm2

    base, adapter = out / "smollm2-nf4", out / "smollm2-adapter"
    if not adapter.exists():
        build_smollm2(base, quantized=True)
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        model.save_pretrained(adapter)
    return base, adapter


if __name__ == "__main__":
    main()
