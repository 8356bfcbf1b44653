"""A card for an adapter folder: README.md with the YAML front matter that model hubs read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qconv.report.markdown_text import code
from qconv.report.model_card import is_hub_id, yaml_scalar


def adapter_card(
    *, tool: str, adapter: str, base: str | None, trained_on: str | None, ranks: Sequence[int], rank: int, modules: int
) -> str:
    """README.md of a plain LoRA.

    Args:
        adapter: what it was made of.
        base: that it belongs to; named in the front matter only when it is a hub id.
        trained_on: how training saw that base, where it is recorded.
        ranks: of the modules before.
        rank: of every module now.
    """
    return "\n".join(_lines(tool, adapter, base, trained_on, ranks, rank, modules)) + "\n"


def _lines(
    tool: str, adapter: str, base: str | None, trained_on: str | None, ranks: Sequence[int], rank: int, modules: int
) -> Iterator[str]:
    yield "---"
    if is_hub_id(base):
        yield "base_model:"
        yield f"- {yaml_scalar(base)}"
        yield "base_model_relation: adapter"
    yield "library_name: peft"
    yield "tags:"
    yield "- lora"
    yield "- qconv"
    yield "---"
    yield ""
    yield f"# LoRA of rank {rank}"
    yield ""
    before = ", ".join(map(str, ranks))
    yield (
        f"{code(adapter)} as plain LoRA that serving engines load: {modules} modules of rank {rank} (before: "
        f"{before}), lora_alpha the same, no patterns, no rsLoRA. It computes what the adapter computes."
    )
    yield ""
    if base:
        yield f"- Base: {code(base)}" + (f", as training saw it ({trained_on})" if trained_on else "")
    if trained_on not in (None, "16bit"):
        yield (
            "- It corrects the rounding of that base. Serve it on those values: `qconv convert BASE --to bf16` decodes "
            "them exactly."
        )
    yield f"- vLLM: `vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules NAME=THIS-FOLDER`"
    yield ""
    yield f"Made with {tool}."
