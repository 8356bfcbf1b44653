"""The options that commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qconv.adapter_configs import COMBINE_METHODS
from qconv.cli_parsing import Choice, devices, files, gates
from qconv.config import BNB_KINDS
from qconv.targets import PLAIN_DTYPES, TARGETS
from qconv.timeline import TIMELINE

Command = Callable[..., Any]


def options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def apply(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


message_options = options(
    click.option("-q", "--quiet", is_flag=True, help="Only errors on stderr."),
    click.option("-v", "--verbose", is_flag=True, help="More on stderr: each GPTQ solve, each training step."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
    click.option("--log-json", is_flag=True, help="Each message on stderr is a line of JSON, for log collectors."),
    click.option(
        "--profile",
        is_flag=True,
        expose_value=False,
        callback=lambda _context, _option, value: TIMELINE.start() if value else None,
        help="Print where the seconds went, on stderr.",
    ),
)
run_options = options(
    message_options,
    click.option(
        "--device",
        default="auto",
        show_default=True,
        shell_complete=devices,
        help="cpu, cuda, or auto: cuda where there is one.",
    ),
)
output_options = options(
    click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Output folder; must not exist."),
    click.option("--overwrite", is_flag=True, help="Replace an existing model folder, once the new one is complete."),
    click.option("--dtype", type=Choice(PLAIN_DTYPES), help="Dtype of what is not quantized [default: the base's]."),
    click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help="Largest shard file."),
    click.option("--revision", help="Branch, tag or commit, when the base is a hub id."),
    click.option("--tp", type=int, help="Refuse what does not divide by this many GPUs as engines split it."),
)
combine_options = options(
    click.option(
        "--combine",
        type=Choice(COMBINE_METHODS),
        help="How several adapters become one change (docs/lora.md). --seed is of what dare drops.",
    ),
    click.option("--weights", help="Of the adapters, such as 0.7,0.3 [default: 1 each]"),
    click.option(
        "--combine-rank",
        type=int,
        help="Rank of the result: svd [default: the largest]; ties, dare and the like [default: not truncated]",
    ),
    click.option(
        "--combine-factors",
        is_flag=True,
        help="linear, ties, dare, dare-ties, magnitude-prune: on A and B apart, as in peft without _svd.",
    ),
    click.option("--density", type=float, help="ties, dare, dare-ties, magnitude-prune: share of elements kept."),
    click.option(
        "--majority-sign",
        type=Choice(["total", "frequency"]),
        help="ties, dare-ties: signs by the sum of updates or by their number [default: total]",
    ),
)
reading_options = options(
    click.option(
        "--rank", metavar="B|auto", help="Merge the first B components (DyLoRA, QDyLoRA); auto: by --task-data."
    ),
    click.option(
        "--rank-scaling",
        type=Choice(["truncated", "trained"]),
        help="With --rank: alpha over B, as DyLoRA trains, or over the rank of training.",
    ),
    click.option(
        "--qa-lora", type=Choice(["sum", "mean", "peft"]), help="A QA-LoRA adapter: how a group's inputs were pooled."
    ),
    click.option(
        "--ir-qlora",
        type=Choice(["calibrated", "plain"]),
        help="An IR-QLoRA adapter: its base was quantized with information calibration, or without.",
    ),
)
adapter_options = options(
    click.option(
        "--dampen-intruders",
        type=float,
        metavar="L",
        help="Scale singular vectors of merged weights that are foreign to the base by L, 0 to 1; needs --task-data.",
    ),
    reading_options,
    click.option(
        "--kasa", type=Choice(["repository"]), help="A KaSA adapter that its authors' code wrote, and not peft."
    ),
)
task_data_option = click.option(
    "--task-data", shell_complete=files, help="Held-out text of the adapter's task: loss there is reported, too."
)
quantize_options = options(
    click.option(
        "--algorithm",
        type=Choice(sorted({name for target in TARGETS.values() for name in target.algorithms})),
        help="How codes are chosen [default: the target's own]",
    ),
    click.option(
        "--bits", type=int, help="gptq, gptq_v2: bits of a weight, 2, 3, 4 or 8 [default: 4]; others have their own."
    ),
    click.option(
        "--group-size",
        type=int,
        help="gptq, gptq_v2, awq, w4a16, w8a16, w4a8, w4a8-fp8: inputs per scale, -1 = row [default: the largest of "
        "128, 64, 32 that divides]",
    ),
    click.option(
        "--sym/--asym",
        "symmetric",
        default=None,
        help="Where --group-size is: without or with zero points [default: sym; awq: asym]",
    ),
    click.option(
        "--activations",
        type=Choice(["dynamic", "static"]),
        help="fp8: scales of inputs for each token as it comes, or calibrated [default: dynamic]",
    ),
    click.option(
        "--desc-act", is_flag=True, help="gptq, gptq_v2: groups in activation order, with a stored group index."
    ),
    click.option(
        "--ignore",
        multiple=True,
        metavar="PATTERN",
        help="Leave linears as they are: a glob such as '*.layers.0.*', or re:REGEX, on module names. Repeatable.",
    ),
    click.option(
        "--override",
        "overrides",
        multiple=True,
        metavar="PATTERN:SETTINGS",
        help="gptq, gptq_v2, w4a16, w8a16: other settings for some linears: '*.down_proj:bits=8,group-size=32,asym'; "
        "w4a16, w8a16: 4-bit floats, '*.down_proj:target=nvfp4a16'. Repeatable; the first that matches one counts.",
    ),
    click.option(
        "--budget",
        metavar="Nbpw",
        help="gptq, gptq_v2, w4a16, w8a16: bits per weight, such as 4.5bpw, scales included; the bits of each linear, "
        "and its groups unless --group-size says them, are chosen by what they are measured to cost.",
    ),
    click.option(
        "--budget-bits",
        metavar="N,N",
        help="Widths that --budget chooses from; w4a16, w8a16: also nvfp4a16, mxfp4a16 (4-bit floats) [default: 4,8]",
    ),
    click.option(
        "--lm-head", is_flag=True, help="gptq, gptq_v2, w4a16, w8a16: quantize the output head too, unless it is tied."
    ),
    click.option(
        "--imatrix",
        is_flag=True,
        help="gguf-f16, gguf-bf16, gguf-f32: write an importance matrix of the calibration text for llama-quantize.",
    ),
    click.option(
        "--kv-cache",
        type=Choice(["fp8"]),
        help="fp8, fp8-block, int8, w4a16 and others (not gptq, awq): calibrated scales of keys and values, for "
        "engines that keep them in float8.",
    ),
    click.option(
        "--damping", type=float, help="Algorithms with gptq: fraction of the mean Gram diagonal [default: 0.03]"
    ),
    click.option(
        "--calibration",
        multiple=True,
        default=["default"],
        show_default=True,
        shell_complete=files,
        help=".txt, .jsonl, .json or .parquet, org/name[:split], or the embedded default; :weight behind. Repeatable.",
    ),
    click.option("--samples", default=128, show_default=True, help="Calibration rows."),
    click.option("--seq-len", default=512, show_default=True, help="Tokens per calibration row."),
    click.option(
        "--gpu-memory",
        metavar="SIZE",
        help="On a GPU: quantize within this much of its memory, e.g. 24GB [default: what is free].",
    ),
    click.option("--seed", default=0, show_default=True, help="Seed of calibration and evaluation sampling."),
)
validate_options = options(
    click.option(
        "--eval-data",
        default="default-eval",
        show_default=True,
        shell_complete=files,
        help="Held-out text: .txt, .jsonl, .json or .parquet, org/name[:split], or the embedded default-eval.",
    ),
    click.option("--eval-tokens", default=16384, show_default=True, help="Tokens to evaluate."),
    click.option("--eval-seq-len", default=512, show_default=True, help="Tokens per evaluated row."),
    click.option(
        "--gate",
        "gates",
        multiple=True,
        metavar="RULE",
        shell_complete=gates,
        help="e.g. kl_p99<=0.5, merge.kl_mean<=5x floor. Repeatable.",
    ),
    click.option("--max-kl", type=float, help="Short for --gate kl_mean<=X (nats per token)."),
    click.option("--min-effect", type=float, help="Short for --gate adapter_effect_retained>=X (0..1)."),
    click.option("--policy", type=click.Path(path_type=Path), help="YAML or JSON file with gates and waivers."),
    click.option("--no-default-gates", is_flag=True, help="Only the gates that are given."),
    click.option(
        "--control-tokens",
        type=int,
        help="Tokens for merge, base and noise floor on their own [default: 1 in 10, all if a gate is about them].",
    ),
    click.option(
        "--attribution",
        type=Choice(["auto", "always", "never"]),
        default="auto",
        show_default=True,
        help="Which block and linear costs how much; auto: when a gate does not pass.",
    ),
    click.option(
        "--prompts",
        shell_complete=files,
        help="Compare greedy answers: default, a .txt (one a line) or a .jsonl with prompt.",
    ),
    click.option("--new-tokens", default=64, show_default=True, help="Tokens of each answer."),
    click.option("--tasks", multiple=True, help="lm-evaluation-harness task, or its YAML file. Repeatable."),
    click.option("--task-folder", type=click.Path(path_type=Path), help="Folder with local task definitions."),
    click.option("--task-limit", type=int, help="Samples per task [default: all]."),
    click.option(
        "--report",
        "report_dir",
        type=click.Path(path_type=Path),
        help="Folder for JSON, Markdown, JUnit and HTML; of several outputs a folder each.",
    ),
)
train_options = options(
    click.option("--rank", default=16, show_default=True, help="LoRA rank r."),
    click.option("--alpha", default=32, show_default=True, help="LoRA alpha; the scale is alpha / r."),
    click.option("--learning-rate", default=2e-4, show_default=True, help="Peak learning rate of AdamW."),
    click.option(
        "--schedule",
        default="constant",
        show_default=True,
        type=Choice(["constant", "cosine"]),
        help="What follows the warm-up of the learning rate.",
    ),
    click.option("--dropout", default=0.0, show_default=True, help="LoRA dropout."),
    click.option("--steps", default=200, show_default=True, help="Optimizer steps."),
    click.option("--batch-size", default=4, show_default=True, help="Rows per forward pass."),
    click.option("--gradient-accumulation", default=1, show_default=True, help="Forward passes per step."),
    click.option("--quantize", type=Choice(BNB_KINDS), help="How a 16-bit base is loaded [default: nf4-dq]."),
    click.option("--seq-len", default=512, show_default=True, help="Tokens per row."),
    click.option("--seed", default=0, show_default=True, help="Seed of the adapter's start and the order of the text."),
)
push_options = options(
    click.option(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="Push what was made, if its gates pass; of several outputs each to ORG/NAME-FOLDER. Private if new.",
    ),
    click.option(
        "--public", is_flag=True, help="--push-to-hub: a new repository is public, and a public one is taken."
    ),
    click.option("--push-rejected", is_flag=True, help="--push-to-hub: also what did not pass its gates."),
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, also for an error.")
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Only print what it would take: stages, bytes, memory, disk, time. Writes nothing."
)
trained_on_option = click.option(
    "--trained-on",
    type=Choice(BNB_KINDS),
    help="How training saw a 16-bit base; needed unless the adapter carries qconv's record.",
)
