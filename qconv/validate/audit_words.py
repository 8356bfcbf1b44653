"""How findings are put into words: one shape for all, names grouped so that 210 tensors fit in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qconv.validate.audit_tensor import TensorAudit

MAX_NAMES = 20  # in a finding's list
MAX_WORDS = 4  # in its sentence


def finding(
    severity: Literal["error", "warning", "note"],
    code: str,
    title: str,
    message: str,
    tensors: Sequence[TensorAudit] | Sequence[str] = (),
    files: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """A finding of the report; files come with the tensors, or from the mapping when only names are known."""
    names = [t if isinstance(t, str) else t.name for t in tensors]
    places = [(files or {}).get(t, "") if isinstance(t, str) else t.file for t in tensors]
    return {
        "severity": severity,
        "code": code,
        "title": title,
        "message": message,
        "tensors": names[:MAX_NAMES],
        "files": sorted({place for place in places if place})[:MAX_NAMES],
    }


def listed(names: Sequence[str]) -> str:
    """``a, b, c, d and 17 more``."""
    shown = ", ".join(names[:MAX_WORDS])
    return shown + (f" and {len(names) - MAX_WORDS} more" if len(names) > MAX_WORDS else "")


def where(tensors: Sequence[TensorAudit]) -> str:
    """The tensors by block and by role, whichever is shorter."""
    if len(tensors) <= MAX_WORDS:
        return listed([t.name for t in tensors])
    blocks = list(dict.fromkeys(t.block for t in tensors))
    roles = list(dict.fromkeys(t.role.removesuffix(".weight") for t in tensors))
    if len(blocks) == 1 and blocks[0]:
        return f"{blocks[0]} ({listed(roles)})"
    if len(roles) <= 2:
        return f"{listed(roles)} of {len(blocks)} blocks"
    return f"{len(tensors)} weights in {listed([block or 'outside the blocks' for block in blocks])}"
