"""The launch script and the page to read."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from qconv import __version__
from qconv.serving.engine import Engine, Served
from qconv.serving.memory import USABLE, ServingMemory


def launch_script(engine: Engine, served: Served) -> str:
    return (
        "#!/bin/sh\n"
        f"# {_comment(served.name)} for {engine.title}; arguments are passed on. Made by qconv {__version__}.\n"
        "set -eu\n"
        'cd -- "$(dirname -- "$0")"\n'
        f'exec {shlex.join(engine.command(served))} "$@"\n'
    )


def read_me(engine: Engine, served: Served, document: Mapping[str, Any], memory: ServingMemory) -> str:
    """README.md of a pack."""
    return "\n".join(_lines(engine, served, document, memory)) + "\n"


def _lines(engine: Engine, served: Served, document: Mapping[str, Any], memory: ServingMemory) -> Iterator[str]:
    yield f"# {served.name} in {engine.title}"
    yield ""
    split = f", split among {served.num_gpus} GPUs" if served.num_gpus > 1 else ""
    yield f"`{served.path}` ({served.layout}){split}."
    yield ""
    yield "## Start it"
    yield ""
    yield from (f"    {line}" for line in engine.steps(served))
    yield ""
    yield "where `./launch.sh` is"
    yield ""
    yield f"    {shlex.join(document['launch'])}"
    yield ""
    for name in engine.files(served):
        yield f"- `{name}` is part of it."
    for adapter in served.adapters:
        yield f"- Adapter `{adapter.name}` (rank {adapter.rank}): `{adapter.path}`."
    if engine.files(served) or served.adapters:
        yield ""
    yield "## Memory, on each GPU" if engine.takes_the_gpu else "## Memory, of the GPU or the host"
    yield ""
    yield from _memory(engine, memory)
    yield ""
    yield "## Try it"
    yield ""
    yield "    ./smoke_test.py --wait 600"
    yield ""
    if document["answers"]:
        yield (
            f"asks a running server, and compares with {document['answers']} answers that qconv recorded. Each is "
            "compared up to the first token that rounding could change."
        )
    else:
        yield "asks a running server; any answer that is not empty passes, since none was recorded."
    for title, texts in (("Warnings", document["warnings"]), ("Notes", document["notes"])):
        if texts:
            yield from ("", f"## {title}", "")
            yield from (f"- {text}" for text in texts)
    yield from ("", "## Sources", "")
    yield from (f"- <{source}>" for source in engine.sources)
    yield from ("", f"Made with qconv {__version__}.")


def _memory(engine: Engine, memory: ServingMemory) -> Iterator[str]:
    yield "| | bytes | |"
    yield "|---|---:|---|"
    yield f"| weights | {memory.weights:,} | {_gb(memory.weights)} |"
    if memory.adapters:
        yield f"| adapters | {memory.adapters:,} | {_gb(memory.adapters)} |"
    yield f"| keys and values, a token | {memory.per_token:,} | |"
    yield f"| a sequence of {memory.context:,} tokens | {memory.per_sequence:,} | {_gb(memory.per_sequence)} |"
    yield f"| {memory.concurrency} of them | {memory.cache:,} | {_gb(memory.cache)} |"
    yield f"| together | {memory.total:,} | {_gb(memory.total)} |"
    yield ""
    if engine.takes_the_gpu:
        yield (
            "Computed from the files and the config. Activations, CUDA graphs and the engine itself come on top; it "
            f"measures them when it starts, and uses {USABLE:.0%} of a GPU by itself."
        )
    else:
        yield "Computed from the files and the config. Activations and the engine itself come on top."
    if memory.gpu is not None:
        yield f"Beside the weights {memory.fitting_sequences} whole sequences fit on a GPU of {_gb(memory.gpu)}."


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def _comment(text: str) -> str:
    return " ".join(text.split())
