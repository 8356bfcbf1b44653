"""Prints how far every kind of output is from base + unmerged adapter, on SmolLM2-135M with a real adapter.

    .venv/bin/python benchmarks/quality.py --out build/quality
    make peers && .venv/bin/python benchmarks/quality.py --out build/quality --peers llm-compressor,gptqmodel,auto-round

Model and adapter are made on the first run (`bench.py`). About 40 minutes on two cores; ``--rows`` takes a part, e.g.
``--rows gptq,rtn-sym``. ``--peers`` prints another table: other tools and qconv quantize the same merged model with the
same calibration rows (`peer_table`), all judged by qconv.
"""

from __future__ import annotations

import shutil

import peer_table
from bench import CELLS, Bench, Fidelity, Row, bench_of, chosen_rows, parser_of, print_header, print_row, print_table

from qconv import pipeline
from qconv.config import MergeJob, OutputConfig
from qconv.demo_model import build_smollm2
from qconv.progress import quiet_libraries


def original_base(bench: Bench) -> str:
    """The model in 16 bits; made on first use."""
    folder = bench.out / "base-bf16"
    if not folder.exists():
        with quiet_libraries():
            build_smollm2(folder, quantized=False)
    return str(folder)


def wrong_base(bench: Bench) -> Fidelity:
    """The adapter merged into the original 16-bit weights, as many guides say."""
    # A copy without the record of training, which would (rightly) refuse this.
    bare = bench.out / "adapter-bare"
    shutil.rmtree(bare, ignore_errors=True)
    shutil.copytree(bench.adapter, bare)
    (bare / "qconv-train.json").unlink(missing_ok=True)
    out = bench.out / "wrong-base"
    job = MergeJob(
        base=original_base(bench),
        adapter=str(bare),
        outputs=(OutputConfig(out=out),),
        trained_on="16bit",
        validation=None,
        overwrite=True,
    )
    pipeline.run(job)
    return bench.judge(out)


def peft_in_4_bit(bench: Bench) -> Fidelity:
    """peft's merge_and_unload on the 4-bit model, as many guides do."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    base, out = original_base(bench), bench.out / "peft-4bit"
    # Quantized on load, to the same codes: transformers cannot save a merged model that it loaded in 4 bits.
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with quiet_libraries():
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype="auto")
        PeftModel.from_pretrained(model, bench.adapter).merge_and_unload().save_pretrained(out)
        AutoTokenizer.from_pretrained(bench.nf4).save_pretrained(out)
    return bench.judge(out)


def rows(bench: Bench) -> dict[str, Row]:
    merge = bench.merge
    return {
        "fp32": ("merged into dequantized NF4, fp32", lambda: merge(dtype="fp32")),
        "bf16": ("merged into dequantized NF4, bf16", lambda: merge()),
        "wrong-base": ("merged into the original 16-bit base", lambda: wrong_base(bench)),
        "peft-4bit": ("peft merge_and_unload in 4-bit", lambda: peft_in_4_bit(bench)),
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
    bench.skip_controls()
    cells = {name: CELLS[name] for name in ("KL mean", "95% interval", "top-1", "ppl (reference)")}
    print_header("tool", "4 bits, groups of 64", *cells, "seconds", "peak GB")
    for job in peer_table.jobs(tools, merged, calibration, out):
        if methods and job.method not in methods:
            continue
        cost = peer_table.run(job)
        if cost["status"] != 0:
            print_row(job.tool, job.method, f"failed, see {job.out}.log")
            continue
        if job.tool == peer_table.OURS:
            assert peer_table.rows_of(job) == digest, "qconv calibrated with other rows than those given to the peers"
        fidelity = bench.judge(peer_table.artifact(job))
        measured = [cell(fidelity) for cell in cells.values()]
        print_row(job.tool, job.method, *measured, f"{cost['seconds']:.0f}", f"{cost['host_gb']:.2f}")


def main() -> None:
    parser = parser_of(__doc__, tokens=16384)
    parser.add_argument("--peers", help=f"tools to run beside qconv: {','.join(peer_table.PEERS)}")
    parser.add_argument("--methods", help="of --peers: as the table names them, separated by semicolons [default: all]")
    arguments = parser.parse_args()
    tools = arguments.peers.split(",") if arguments.peers else []
    if unknown := [tool for tool in tools if tool not in peer_table.PEERS]:
        parser.error(f"unknown peers {', '.join(unknown)}; there are {', '.join(peer_table.PEERS)}")
    bench = bench_of(arguments)
    table = chosen_rows(parser, arguments.rows, rows(bench))
    if arguments.peers:
        print_peers(bench, tools, arguments.methods.split(";") if arguments.methods else [])
    else:
        print_table(table, "candidate", CELLS)


if __name__ == "__main__":
    main()
