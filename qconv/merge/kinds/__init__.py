"""Kinds of adapters by ``peft_type``: one entry for each that is merged, one reason for each that is not."""

from __future__ import annotations

import difflib
from typing import Any

from qconv.errors import AdapterError
from qconv.merge.config_values import short
from qconv.merge.kinds.biases import BEFT, GLORA
from qconv.merge.kinds.composed import GRALORA, TINYLORA, UNILORA, VBLORA
from qconv.merge.kinds.decomposed import DEFT, FROD, OSF
from qconv.merge.kinds.kind import Kind, Layer
from qconv.merge.kinds.lycoris import LOHA, LOKR
from qconv.merge.kinds.refused import REFUSED
from qconv.merge.kinds.rotations import BOFT, HRA, OFT
from qconv.merge.kinds.scales import IA3, ROAD
from qconv.merge.kinds.shared_bases import RANDLORA, VERA
from qconv.merge.kinds.structured import C3A, DELORA, FOURIERFT, HIRA, MISS, SHIRA, SUPERTUNING
from qconv.merge.kinds.wavelets import WAVEFT

KINDS: dict[str, Kind] = {
    kind.peft_type: kind
    for kind in (
        *(LOHA, LOKR, IA3, OFT, BOFT, VERA, FOURIERFT, HRA, MISS, SHIRA, HIRA, C3A, RANDLORA, ROAD, DELORA),
        *(GRALORA, VBLORA, UNILORA, TINYLORA, DEFT, OSF, FROD, WAVEFT, SUPERTUNING, GLORA, BEFT),
    )
}
LOW_RANK = ("LORA", "ADALORA")
WHOLE = ("LN_TUNING", "TRAINABLE_TOKENS")
"""Kinds whose values replace the base's: norms (LN tuning, Zhao et al. 2023), rows of the embedding."""


def how_merged(peft_type: Any) -> str:
    """Whether adapters of a kind are merged, in a few words."""
    if peft_type in (*LOW_RANK, *WHOLE, *KINDS):
        return "as an update of each weight" if peft_type not in WHOLE else "as values that replace the base's"
    reason, alternative = REFUSED.get(peft_type, ("is unknown", "update qconv"))
    return f"refused: {reason}; {alternative}"


def check_type(peft_type: Any, where: str) -> None:
    """Refuses what is not merged, with the reason and the alternative.

    Raises:
        AdapterError: a kind that is refused, one that no entry knows, or no kind at all.
    """
    if not isinstance(peft_type, str) or not peft_type:
        raise AdapterError(f"{where}: expected peft_type 'LORA', found {short(peft_type)}; not a peft adapter config?")
    merged = (*LOW_RANK, *WHOLE, *KINDS)
    if peft_type in merged:
        return
    if peft_type in REFUSED:
        reason, alternative = REFUSED[peft_type]
        raise AdapterError(f"{where}: peft_type {peft_type} {reason}; {alternative}")
    near = difflib.get_close_matches(peft_type.upper(), merged, n=1, cutoff=0.7)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise AdapterError(
        f"{where}: unknown peft_type {short(peft_type)}{hint}; expected one of {', '.join(merged)}. Update qconv, or "
        "merge the adapter with peft into the base in 16 bits first"
    )


__all__ = ["KINDS", "LOW_RANK", "WHOLE", "Kind", "Layer", "check_type", "how_merged"]
