"""The commands whose output is an adapter, beside training: extract."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qconv import __version__, cli_jobs
from qconv.adapter_configs import ExtractConfig
from qconv.cli_answers import Answer, answers
from qconv.cli_options import json_option, run_options
from qconv.cli_parsing import Choice, Command, folders
from qconv.own_process import begin

if TYPE_CHECKING:
    from qconv.extract import Extracted, ExtractedLinear


@click.command(cls=Command)
@click.argument("base", shell_complete=folders)
@click.argument("tuned", shell_complete=folders)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Adapter folder; must not exist.")
@click.option("--rank", type=int, help="Rank of every module; or")
@click.option("--energy", type=float, help="share of each module's squared difference to keep, such as 0.95.")
@click.option(
    "--others",
    type=Choice(["refuse", "save", "drop"]),
    default="refuse",
    show_default=True,
    help="Tensors that differ and are no linears: refuse, save whole as modules_to_save, or leave as in the base.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing adapter folder.")
@click.option("--revision", help="Branch, tag or commit, when the base is a hub id.")
@json_option
@run_options
@answers
def extract(base: str, tuned: str, **options: Any) -> Answer:
    """Make a LoRA of two full checkpoints: of TUNED minus BASE, by singular value decomposition of every linear.

    \b
    qconv extract ./base ./tuned --rank 32 -o ./adapter
    qconv extract ./base ./tuned --energy 0.95 --others save -o ./adapter
    """
    names = ("out", "rank", "energy", "others", "device", "overwrite", "revision")
    config = ExtractConfig(base=base, tuned=tuned, **{name: options[name] for name in names})
    begin(config.device, [base, tuned], solves=True)
    from qconv.extract import extract as run_extraction

    result = run_extraction(config, cli_jobs.progress_of(options))
    document = asdict(result) | {"tool": f"qconv {__version__}", "command": "extract", "folder": str(result.out)}
    del document["out"]
    return Answer(text=_as_text(result), document=document)


def _as_text(result: Extracted) -> str:
    lines = [
        f"adapter     {result.out}",
        f"rank        {result.rank}, lora_alpha {result.rank}",
        f"energy      {result.energy:.2%} of what changed in {len(result.linears)} linears",
    ]
    blocks: defaultdict[str, list[ExtractedLinear]] = defaultdict(list)
    for linear in result.linears:
        blocks[_block(linear.module)].append(linear)
    width = max(map(len, blocks))
    for block, linears in blocks.items():
        worst = min(linears, key=lambda linear: linear.energy)
        ranks = sorted({linear.rank for linear in linears})
        lines.append(
            f"  {block:<{width}}  lowest {worst.energy:.2%} ({worst.module.removeprefix(block + '.')}), rank "
            f"{ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}, changed by up to "
            f"{max(linear.change for linear in linears):.2%}"
        )
    if result.others:
        size = sum(other.num_bytes for other in result.others) / 1e6
        lines.append(f"others      {len(result.others)} tensors that differ were {result.others_were} ({size:.3f} MB)")
    return "\n".join(lines)


def _block(module: str) -> str:
    """Up to the number of its layer."""
    parts = module.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: at + 1])
