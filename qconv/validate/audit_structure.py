"""Findings about which tensors there are, from names and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qconv.validate.audit_words import finding, listed

Finding = dict[str, Any]


def structure_findings(
    missing: Sequence[str],
    unexpected: Sequence[str],
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    files: Mapping[str, str],
) -> list[Finding]:
    found: list[Finding] = []
    if missing:
        found.append(
            finding(
                "error",
                "tensors-missing",
                f"{len(missing)} tensors are missing",
                f"the merge has {listed(missing)}, the candidate does not; readers fill them with random numbers: "
                "write the candidate again with all its tensors",
                missing,
                files,
            )
        )
    if unexpected:
        found.append(
            finding(
                "warning",
                "tensors-unexpected",
                f"{len(unexpected)} tensors are not in the merge",
                f"the candidate holds {listed(unexpected)}, which base and adapter do not have; readers ignore them "
                "or load a part that was never trained here",
                unexpected,
                files,
            )
        )
    if reshaped:
        name, (expected, actual) = next(iter(reshaped.items()))
        found.append(
            finding(
                "error",
                "shapes-differ",
                f"{len(reshaped)} tensors have another shape",
                f"{name} is {list(actual)}, the merge gives {list(expected)}"
                + (f", and so {len(reshaped) - 1} more" if len(reshaped) > 1 else "")
                + "; the vocabulary was resized or padded, or this is another model",
                list(reshaped),
                files,
            )
        )
    return found
