"""The model card of an output: what it is of whom, how close, and what runs it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconv.account import adapters_of
from qconv.config import MergeJob, OutputConfig
from qconv.layout import Layout
from qconv.report.model_card import model_card as render_card
from qconv.runners import Reference
from qconv.serving import Served
from qconv.serving.vllm import VLLM
from qconv.targets import TARGETS, gguf_file_name


def model_card(
    document: Mapping[str, Any], job: MergeJob, output: OutputConfig, reference: Reference, layout: Layout
) -> str:
    """``README.md`` of the output: what it is, how to serve it, how close it is to what was trained."""
    recorded = reference.adapter.tensors.config.get("base_model_name_or_path") if reference.adapter else None
    local = Path(job.base).exists()
    kind = None if output.quantization is None else TARGETS[output.quantization.target].gguf_kind
    return render_card(
        document,
        base_model=str(recorded) if local and recorded else job.base,
        adapter=adapters_of(job),
        license=_license(reference.source.folder),
        relation="quantized" if output.is_quantized else "merge",
        tags=["qconv", *([output.quantization.target] if output.quantization else [])],
        gguf_file=None if kind is None else gguf_file_name(kind),
        in_vllm=VLLM.refusal(_as_served(output, layout)) is None,
    )


def _as_served(output: OutputConfig, layout: Layout) -> Served:
    """The folder as engines will meet it."""
    return Served(
        name=output.out.name,
        path=str(output.out),
        layout=layout.format or "plain",
        schemes=tuple(dict.fromkeys(layout.schemes.values())),
        quantization=layout.config.get("quantization_config") or {},
    )


def _license(base: Path) -> str | None:
    """What the base's own model card says, where it has one."""
    try:
        text = (base / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    found = re.match(r"---\n.*?^license:[ \t]*([\w.+-]+)[ \t]*$.*?^---$", text, re.DOTALL | re.MULTILINE)
    return found[1] if found else None
