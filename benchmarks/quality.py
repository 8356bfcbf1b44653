"""Prints how far every kind of output is from base + unmerged adapter, on SmolLM2-135M with a real adapter.

    .venv/bin/python benchmarks/quality.py --out build/quality
    make peers && .venv/bin/python benchmarks/quality.py --out build/quality --peers llm-compressor,gptqmodel,auto-round

The first run builds the model (NF4 and 16-bit) and trains an adapter on all seven linears (90 steps of 8 x 256
tokens of prose, the setting of the tables in docs/quality.md); later runs reuse them. About 40 minutes on two cores;
``--rows`` takes a part, e.g. ``--rows gptq,rtn-sym``. ``--peers`` prints another table: other tools and qconv quantize
the same merged model with the same calibration rows (`peer_table`), all judged by qconv.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peer_table

from qconv import judging, pipeline
from qconv.config import CalibrationConfig, MergeJob, OutputConfig, ValidateJob, ValidationConfig
from qconv.progress import Progress, quiet_libraries
from qconv.quantization_config import QuantizationConfig
from qconv.training_config import TrainConfig

CALIBRATION = CalibrationConfig(sources=("default-prose",), samples=32, seq_len=512)


class Bench:
    """Assets in one folder, and the rows of the table."""

    def __init__(self, out: Path, tokens: int, device: str):
        self.out, self.device = out, device
        self.nf4, self.plain, self.adapter = out / "base-nf4", out / "base-bf16", out / "adapter"
        self.validation = ValidationConfig(
            source="default-prose-eval", tokens=tokens, control_tokens=tokens, attribution="never", defaults=False
        )

    def prepare(self) -> None:
        from qconv.demo_model import build_smollm2
        from qconv.train import train

        self.out.mkdir(parents=True, exist_ok=True)
        with quiet_libraries():
            if not self.nf4.exists():
                build_smollm2(self.nf4, quantized=True)
            if not self.plain.exists():
                build_smollm2(self.plain, quantized=False)
        if not self.adapter.exists():
            config = TrainConfig(
                base=str(self.nf4),
                out=self.adapter,
                data="default-prose",
                steps=90,
                batch_size=8,
                seq_len=256,
                device=self.device,
            )
            train(config, Progress(verbosity=1))

    def merge(self, target: str | None = None, dtype: str | None = None, **options: Any) -> dict[str, Any]:
        """One whole job: adapter to validated artifact."""
        job = MergeJob(
            base=str(self.nf4),
            adapter=str(self.adapter),
            outputs=(
                OutputConfig(
                    out=self.out / "candidate",
                    dtype=dtype,
                    quantization=QuantizationConfig(target=target, **options) if target else None,
                ),
            ),
            calibration=CALIBRATION,
            validation=self.validation,
            device=self.device,
            overwrite=True,
        )
        (outcome,) = pipeline.run(job)
        fidelity = outcome.fidelity
        assert fidelity is not None
        return dict(fidelity)

    def judge(self, candidate: Path) -> dict[str, Any]:
        """A folder that somebody else made."""
        job = ValidateJob(
            reference=str(self.nf4),
            adapter=str(self.adapter),
            candidate=str(candidate),
            validation=self.validation,
            device=self.device,
        )
        fidelity = judging.validate(job).fidelity
        assert fidelity is not None
        return dict(fidelity)

    def wrong_base(self) -> dict[str, Any]:
        """The adapter merged into the original 16-bit weights, as many guides say."""
        import shutil

        # A copy without the record of training, which would (rightly) refuse this.
        bare = self.out / "adapter-bare"
        shutil.rmtree(bare, ignore_errors=True)
        shutil.copytree(self.adapter, bare)
        (bare / "qconv-train.json").unlink(missing_ok=True)
        out = self.out / "wrong-base"
        job = MergeJob(
            base=str(self.plain),
            adapter=str(bare),
            outputs=(OutputConfig(out=out),),
            trained_on="16bit",
            validation=None,
            overwrite=True,
        )
        pipeline.run(job)
        return self.judge(out)

    def peft_in_4_bit(self) -> dict[str, Any]:
        """peft's merge_and_unload on the 4-bit model, as many guides do."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        out = self.out / "peft-4bit"
        # Quantized on load, to the same codes: transformers cannot save a merged model that it loaded in 4 bits.
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        with quiet_libraries():
            model = AutoModelForCausalLM.from_pretrained(self.plain, quantization_config=quantization, dtype="auto")
            PeftModel.from_pretrained(model, self.adapter).merge_and_unload().save_pretrained(out)
            AutoTokenizer.from_pretrained(self.nf4).save_pretrained(out)
        return self.judge(out)


def rows(bench: Bench) -> dict[str, tuple[str, Callable[[], dict[str, Any]]]]:
    merge = bench.merge
    return {
        "fp32": ("merged into dequantized NF4, fp32", lambda: merge(dtype="fp32")),
        "bf16": ("merged into dequantized NF4, bf16", lambda: merge()),
        "wrong-base": ("merged into the original 16-bit base", bench.wrong_base),
        "peft-4bit": ("peft merge_and_unload in 4-bit", bench.peft_in_4_bit),
        "base": ("NF4 base, no adapter", lambda: bench.judge(bench.nf4)),
        "fp8": ("`--requant fp8`", lambda: merge("fp8")),
        "gptq": ("`--requant gptq` (4-bit sym)", lambda: merge("gptq")),
        "w4a16": ("`--requant w4a16` (4-bit sym, gptq)", lambda: merge("w4a16")),
        "awq": ("`--requant awq` (4-bit asym)", lambda: merge("awq")),
        "awq-gptq": ("`--requant awq --algorithm gptq` (asym)", lambda: merge("awq", algorithm="gptq")),
        "rtn-sym": ("round-to-nearest, 4-bit sym", lambda: merge("w4a16", algorithm="rtn")),
        "rtn-asym": ("round-to-nearest, 4-bit asym", lambda: merge("awq", algorithm="rtn")),
        "gptq-asym": ("`--requant gptq --asym`", lambda: merge("gptq", symmetric=False)),
        "gptq-desc": ("`--requant gptq --desc-act`", lambda: merge("gptq", desc_act=True)),
        "awq-sym": ("`--requant awq --sym`", lambda: merge("awq", symmetric=True)),
        "awq+gptq-sym": ("`--requant w4a16 --algorithm awq+gptq` (sym)", lambda: merge("w4a16", algorithm="awq+gptq")),
        "awq+gptq": ("`--requant awq --algorithm awq+gptq` (asym)", lambda: merge("awq", algorithm="awq+gptq")),
        "int8": ("`--requant int8`", lambda: merge("int8")),
        "int8-plain": ("`--requant int8 --algorithm int8`", lambda: merge("int8", algorithm="int8")),
        "fp8-static": ("`--requant fp8 --activations static`", lambda: merge("fp8", activations="static")),
        "gptq-8bit": ("`--requant gptq --bits 8`", lambda: merge("gptq", bits=8)),
    }


def print_table(bench: Bench, names: list[str]) -> None:
    table = rows(bench)
    header = "| candidate | KL mean | 95% interval | KL p99 | top-1 | ppl (reference) | effect retained | seconds |"
    print(header + "\n|---|---|---|---|---|---|---|---|", flush=True)
    for name in names or table:
        label, measure = table[name]
        start = time.monotonic()
        fidelity = measure()
        pair = fidelity["total"]
        low, high = pair["kl"]["interval_95"]
        print(
            f"| {label} | {pair['kl']['mean']:.5f} | {low:.5f} to {high:.5f} | {pair['kl']['p99']:.4f} "
            f"| {pair['top1_agreement']['value']:.1%} | {pair['perplexity']:.2f} ({pair['reference_perplexity']:.2f}) "
            f"| {fidelity['adapter_effect_retained']['value']:.1%} | {time.monotonic() - start:.0f} |",
            flush=True,
        )


def print_peers(bench: Bench, tools: list[str], methods: list[str]) -> None:
    merged, out, calibration = bench.out / "merged", bench.out / "peers", bench.out / "peers" / "rows.json"
    out.mkdir(exist_ok=True)
    pipeline.run(
        MergeJob(
            base=str(bench.nf4),
            adapter=str(bench.adapter),
            outputs=(OutputConfig(out=merged),),
            validation=None,
            overwrite=True,
        )
    )
    digest = peer_table.write_rows(merged, calibration)
    # Nothing is shown of base, merge and noise floor on their own.
    bench.validation = replace(bench.validation, control_tokens=bench.validation.seq_len)
    header = "| tool | 4 bits, groups of 64 | KL mean | 95% interval | top-1 | ppl (reference) | seconds | peak GB |"
    print(header + "\n|---|---|---|---|---|---|---|---|", flush=True)
    for job in peer_table.jobs(tools, merged, calibration, out):
        if methods and job.method not in methods:
            continue
        cost = peer_table.run(job)
        if cost["status"] != 0:
            print(f"| {job.tool} | {job.method} | failed, see {job.out}.log |", flush=True)
            continue
        if job.tool == peer_table.OURS:
            assert peer_table.rows_of(job) == digest, "qconv calibrated with other rows than those given to the peers"
        pair = bench.judge(peer_table.artifact(job))["total"]
        low, high = pair["kl"]["interval_95"]
        print(
            f"| {job.tool} | {job.method} | {pair['kl']['mean']:.4f} | {low:.4f} to {high:.4f} "
            f"| {pair['top1_agreement']['value']:.1%} | {pair['perplexity']:.2f} ({pair['reference_perplexity']:.2f}) "
            f"| {cost['seconds']:.0f} | {cost['host_gb']:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/quality"))
    parser.add_argument("--rows", help="names, separated by commas [default: all]")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--peers", help=f"tools to run beside qconv: {','.join(peer_table.PEERS)}")
    parser.add_argument("--methods", help="of --peers: as the table names them, separated by semicolons [default: all]")
    arguments = parser.parse_args()
    tools = arguments.peers.split(",") if arguments.peers else []
    if unknown := [tool for tool in tools if tool not in peer_table.PEERS]:
        parser.error(f"unknown peers {', '.join(unknown)}; there are {', '.join(peer_table.PEERS)}")
    bench = Bench(arguments.out, arguments.tokens, arguments.device)
    bench.prepare()
    if arguments.peers:
        print_peers(bench, tools, arguments.methods.split(";") if arguments.methods else [])
    else:
        print_table(bench, arguments.rows.split(",") if arguments.rows else [])


if __name__ == "__main__":
    main()
