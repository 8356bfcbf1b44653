"""The command that brings a model to what serves it: pack."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qconv import cli_jobs
from qconv.cli_answers import Answer, answers
from qconv.cli_options import json_option, run_options
from qconv.cli_parsing import Choice, Command, files, folders
from qconv.config import parse_size
from qconv.errors import UsageError
from qconv.own_process import begin
from qconv.serving import ENGINES
from qconv.serving.oci import TAG
from qconv.serving_config import OciConfig, PackConfig, parse_adapter

if TYPE_CHECKING:
    from qconv.pack_place import Packed

OCI = "oci"


@click.command(cls=Command)
@click.argument("model", shell_complete=folders)
@click.option(
    "--for",
    "engine",
    required=True,
    type=Choice([*ENGINES, OCI]),
    help="What will serve the model; oci: an artifact for registries of containers.",
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Folder for what is written [default: MODEL-ENGINE, beside it]"
)
@click.option(
    "--adapter", "adapters", multiple=True, metavar="[NAME=]ADAPTER", help="Serve a plain LoRA beside it. Repeatable."
)
@click.option("--tp", default=1, show_default=True, help="GPUs that the engine splits the model among.")
@click.option("--context", type=int, help="Tokens of a sequence at most [default: the model's, at most 8192]")
@click.option("--concurrency", type=int, help="Sequences at a time [default: 16; ort-genai, ollama: 1]")
@click.option(
    "--kv-dtype",
    type=Choice(["auto", "fp8"]),
    default="auto",
    show_default=True,
    help="Dtype of keys and values; auto: the model's.",
)
@click.option("--gpu-memory", help="Of each GPU, e.g. 24GB: says how many sequences fit, refuses what does not.")
@click.option("--name", help="What requests call the model [default: its folder's name]")
@click.option("--port", type=int, help="Port to listen on [default: the engine's own]")
@click.option("--model-path", help="Where the engine finds the model, if not where it lies (in a container).")
@click.option(
    "--answers/--no-answers",
    "with_answers",
    default=True,
    help="Record greedy answers, which the smoke test compares with; needs the decoded model in memory [default: yes]",
)
@click.option("--prompts", shell_complete=files, help="For these answers: default, a .txt (one a line) or a .jsonl.")
@click.option("--overwrite", is_flag=True, help="Replace an existing pack.")
@json_option
@run_options
@answers
def pack(model: str, engine: str, with_answers: bool, adapters: tuple[str, ...], **options: Any) -> Answer:
    """Write what an engine needs beside MODEL: launch line, memory, smoke test, further files. Copies no weights.

    \b
    qconv pack ./out --for vllm --tp 2 --context 8192 --gpu-memory 24GB
    qconv pack ./out --for triton -o ./triton --model-path /models/out
    qconv pack ./base-bf16 --for lorax --adapter support=./lora-1 --adapter ./lora-2
    qconv pack ./out --for oci
    """
    if engine == OCI:
        return _pack_oci(model, with_answers, adapters, options)
    config = PackConfig(
        model=model,
        engine=engine,
        out=options["out"],
        adapters=tuple(map(parse_adapter, adapters)),
        num_gpus=options["tp"],
        context=options["context"],
        concurrency=options["concurrency"],
        cache_dtype=options["kv_dtype"],
        gpu_memory=None if options["gpu_memory"] is None else parse_size(options["gpu_memory"]),
        name=options["name"],
        port=options["port"],
        model_path=options["model_path"],
        answers=with_answers,
        prompts=options["prompts"],
        device=options["device"],
        overwrite=options["overwrite"],
    )
    begin(config.device, [model])
    from qconv.pack import pack as run_pack

    packed = run_pack(config, cli_jobs.progress_of(options))
    document = packed.document | {"folder": str(packed.out)}
    return Answer(text=_as_text(packed), document=document, following=(str(packed.out / "launch.sh"),))


def _pack_oci(model: str, with_answers: bool, adapters: tuple[str, ...], options: dict[str, Any]) -> Answer:
    """Raises `UsageError` for options of engines: nothing is served here."""
    given = ["--adapter"] if adapters else []
    given += [] if with_answers else ["--no-answers"]
    given += ["--tp"] if options["tp"] != 1 else []
    given += ["--kv-dtype"] if options["kv_dtype"] != "auto" else []
    names = ("context", "concurrency", "gpu_memory", "port", "model_path", "prompts")
    given += [f"--{name.replace('_', '-')}" for name in names if options[name] is not None]
    if given:
        raise UsageError(f"{', '.join(given)}: --for oci packs files for registries and serves none; drop it")
    config = OciConfig(model=model, out=options["out"], name=options["name"], overwrite=options["overwrite"])
    begin(options["device"], [model])
    from qconv.oci import pack_oci

    packed = pack_oci(config, cli_jobs.progress_of(options))
    document = packed.document
    text = [
        f"pack        {packed.out}",
        f"manifest    {document['manifest']}, {len(document['layers'])} layers",
        f"bytes       {document['bytes'] / 1e6:,.1f} MB, {document['bytes linked'] / 1e6:,.1f} MB of them hard links",
        *([f"left out    {', '.join(document['left out'])}"] if document["left out"] else []),
    ]
    push = f"oras cp --from-oci-layout {shlex.quote(str(packed.out))}:{TAG} REGISTRY/REPOSITORY:TAG"
    return Answer(text="\n".join(text), document=document | {"folder": str(packed.out)}, following=(push,))


def _as_text(packed: Packed) -> str:
    memory, gpus = packed.document["memory"], packed.document["gpus"]
    each = f" on each of {gpus} GPUs" if gpus > 1 else ""
    rows = [
        f"pack        {packed.out}",
        f"launch      {packed.out / 'launch.sh'}",
        f"memory      {memory['total_bytes'] / 1e9:.2f} GB{each}: weights "
        f"{memory['weights_bytes'] / 1e9:.2f} GB, keys and values {memory['cache_bytes'] / 1e9:.2f} GB for "
        f"{memory['concurrency']} x {memory['context']} tokens ({memory['cache_bytes_per_token']:,} bytes a token)",
    ]
    if memory["fitting_sequences"] is not None:
        rows.append(f"fits        {memory['fitting_sequences']} sequences of {memory['context']} tokens")
    rows.append(f"smoke test  {packed.out / 'smoke_test.py'}, {packed.document['answers']} recorded answers")
    return "\n".join(rows + [f"note        {note}" for note in packed.document["notes"]])
