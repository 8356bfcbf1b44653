"""Runs the same jobs on the CPU and on a GPU and prints KL, wall seconds and peak memory of each.

    python benchmarks/devices.py --base BASE_NF4 --adapter ADAPTER --out /tmp/devices
    python benchmarks/devices.py --random-1b --devices cuda --out /tmp/devices

``--random-1b`` builds a model of Llama-3.2-1B's shape with random weights: right for speed and memory, meaningless
for quality. The GPU's reference runs bitsandbytes' kernels and peft's adapter, the CPU's is decoded by qconv.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch

from qconv import pipeline
from qconv.config import CalibrationConfig, MergeJob, QuantizationConfig, ValidationConfig
from qconv.progress import quiet_libraries

TARGETS = (None, "fp8", "awq", "gptq", "w4a16")
TOKENIZER = Path(__file__).parent.parent / "tests/data/tiny-llama"


def build_random_1b(folder: Path) -> tuple[Path, Path]:
    """NF4 + double quantization base and r=16 adapter in the shape of Llama-3.2-1B, random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

    plain, base, adapter = folder / "random-bf16", folder / "random-nf4", folder / "random-adapter"
    if adapter.exists():
        return base, adapter
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(plain)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=quantization, dtype="auto")
    model.save_pretrained(base)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, base / file.name)
    lora = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.005)
    lora.save_pretrained(adapter)
    return base, adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--random-1b", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--devices", default="cpu,cuda")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    base, adapter = arguments.base, arguments.adapter
    if arguments.random_1b:
        with quiet_libraries():
            base, adapter = build_random_1b(arguments.out)
    print("| target | device | KL mean | top-1 | ppl (reference) | seconds | peak GPU GB | reference |", flush=True)
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for target in TARGETS:
        for device in arguments.devices.split(","):
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.monotonic()
            job = MergeJob(
                base=str(base),
                adapter=str(adapter),
                out=arguments.out / "candidate",
                quantization=QuantizationConfig(target=target) if target else None,
                calibration=CalibrationConfig(source="default-prose", samples=arguments.samples, seq_len=512),
                validation=ValidationConfig(source="default-prose-eval", tokens=arguments.tokens),
                device=device,
                overwrite=True,
            )
            with quiet_libraries():
                fidelity = pipeline.run(job).fidelity
            assert fidelity is not None
            pair = fidelity["total"]
            peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0
            print(
                f"| {target or 'bf16'} | {device} | {pair['kl']['mean']:.5f} | {pair['top1_agreement']['value']:.1%} "
                f"| {pair['perplexity']:.2f} ({pair['reference_perplexity']:.2f}) "
                f"| {time.monotonic() - start:.1f} | {peak:.2f} | {fidelity['reference']['runs']} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
