"""How an output is quantized: frozen, keyword-only, checked once when built. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from qconv.errors import SchemeError, UsageError
from qconv.overrides import OverrideConfig, check_pattern
from qconv.targets import ONNX_BLOCKS, TARGETS, Algorithm
from qconv.types import Scheme

Folding = Literal["awq", "smoothquant"]
Statistic = Literal["gram", "mean_abs", "sample"]
GROUP_SIZES = (128, 64, 32)
WIDTHS = (4, 8)
"""That every reader of formats with several schemes takes; what a budget chooses from unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How to re-quantize.

    Attributes:
        target: the format to write (`TARGETS`).
        algorithm: how codes are chosen; None = the target's first.
        bits: of a weight; None = the target's first.
        group_size: input features that share a scale, -1 = the whole row; None = the largest of 128, 64, 32 that
            divides every quantized K, or chosen by the budget.
        symmetric: without zero points; None = the target's default.
        desc_act: GPTQ's activation-ordered groups with a stored group index (``desc_act: true``).
            Columns are always visited in activation order; this also regroups them.
        damping: of GPTQ, a fraction of the mean Gram diagonal; None = 0.03. For algorithms with gptq in their name.
        activations: how the engine finds the scales of inputs that it rounds to float8: for each token as it comes, or
            once for all, by calibration; for ``fp8``, where None = dynamic.
        ignore: linears that stay unquantized: patterns of module names, as in ``overrides``.
        lm_head: quantize the output head too, by round-to-nearest on a searched grid.
        overrides: other settings for some linears; the first that matches one counts.
        budget: bits per weight that the quantized linears may take on disk, scales included; the width of each, and its
            group size unless one is given, is then chosen by what it is measured to cost. What ``overrides`` are about
            keeps its settings.
        budget_bits: widths to choose from, and targets of 4-bit floats (nvfp4a16, mxfp4a16) in whose scheme linears may
            be; empty = 4 and 8.
        imatrix: write llama.cpp's importance matrix beside the file, of the calibration text; for kinds without blocks,
            which llama-quantize makes K-quants of.
        kv_cache: store calibrated scales for a cache of keys and values in float8, one of each for an attention; None =
            none.
    """

    target: str
    algorithm: Algorithm | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    desc_act: bool = False
    damping: float | None = None
    activations: Literal["dynamic", "static"] | None = None
    ignore: tuple[str, ...] = ()
    lm_head: bool = False
    overrides: tuple[OverrideConfig, ...] = ()
    budget: float | None = None
    budget_bits: tuple[int | str, ...] = ()
    imatrix: bool = False
    kv_cache: Literal["fp8"] | None = None

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UsageError(f"unknown target {self.target!r}; there are {', '.join(TARGETS)}")
        target = TARGETS[self.target]
        if self.algorithm is not None and self.algorithm not in target.algorithms:
            raise UsageError(f"{self.target} takes --algorithm {' or '.join(target.algorithms)}, got {self.algorithm}")
        if self.bits is not None and self.bits not in target.bits:
            raise UsageError(
                f"{self.target} has --bits {' or '.join(map(str, sorted(target.bits)))}, got {self.bits}"
                f"{self._same_layout_with_these_bits()}"
            )
        if target.symmetric is None and (self.group_size is not None or self.symmetric is not None or self.desc_act):
            raise UsageError(f"{self.target} has one scheme: no --group-size, --sym/--asym or --desc-act")
        if target.activations is not None and self.symmetric is False:
            raise UsageError(f"{self.target}: kernels of rounded inputs take symmetric weights alone; drop --asym")
        if self.desc_act and not (target.format in ("gptq", "gptq_v2") and self.solves):
            raise UsageError(
                "--desc-act belongs to --requant gptq or gptq_v2 with the gptq or awq+gptq algorithm (a stored group "
                "index)"
            )
        if self.group_size is not None and self.group_size != -1 and self.group_size < 8:
            raise SchemeError(f"--group-size must be at least 8, or -1 for one group per row, got {self.group_size}")
        if target.is_onnx and self.group_size not in (None, *ONNX_BLOCKS):
            raise UsageError(
                f"--group-size: {self.target} has blocks of {', '.join(map(str, ONNX_BLOCKS))}, got {self.group_size}"
            )
        if target.is_onnx and self.ignore:
            raise UsageError(f"--ignore: {self.target} quantizes all linears of the decoder blocks alike; drop it")
        if self.activations is not None and self.target != "fp8":
            raise UsageError(f"--activations belongs to --requant fp8, got {self.target}")
        self._check_damping()
        self._check_kept_codes()
        for pattern in self.ignore:
            check_pattern(pattern)
        self._check_mixture()
        self._check_budget()
        self._check_cache()
        if self.imatrix and self.target not in ("gguf-f16", "gguf-bf16", "gguf-f32"):
            raise UsageError(
                "--imatrix is for llama-quantize, which starts from gguf-f16, gguf-bf16 or gguf-f32, got "
                f"{self.target}; drop it"
            )

    def _check_cache(self) -> None:
        if self.kv_cache is not None and not TARGETS[self.target].holds_cache_scales:
            *holding, last = [name for name, target in TARGETS.items() if target.holds_cache_scales]
            raise UsageError(
                f"--kv-cache: no engine reads scales of keys and values from {self.target}; {', '.join(holding)} and "
                f"{last} hold them"
            )

    def _check_damping(self) -> None:
        if self.damping is None:
            return
        if not self.solves:
            solving = [name for name in TARGETS[self.target].algorithms if name.endswith("gptq")]
            raise UsageError(
                f"--damping is of GPTQ, and {self.target} by {self.resolved_algorithm} does not use it; drop it"
                + (f", or take --algorithm {' or '.join(solving)}" if solving else "")
            )
        if not 0 < self.damping < 1:
            raise UsageError(f"--damping is a fraction between 0 and 1, got {self.damping}")

    def _check_kept_codes(self) -> None:
        given = {
            "--bits": self.bits,
            "--group-size": self.group_size,
            "--sym/--asym": self.symmetric is not None,
            "--ignore": self.ignore,
            "--override": self.overrides,
            "--budget": self.budget,
            "--lm-head": self.lm_head,
        }
        if self.keeps_codes and any(given.values()):
            names = ", ".join(name for name, value in given.items() if value)
            raise UsageError(
                f"{names}: --algorithm zeros keeps the base's codes and scales, and so its scheme; drop it"
            )

    def _check_mixture(self) -> None:
        target = TARGETS[self.target]
        mixed = [other.name for other in TARGETS.values() if other.mixed_bits]
        if self.overrides and not target.mixed_bits:
            raise UsageError(
                f"--override: {self.target} has one scheme for all linears, and its config.json no place for others; "
                f"{', '.join(mixed[:-1])} and {mixed[-1]} have"
                + ("; --requant w4a16 --algorithm awq chooses numbers as awq does" if self.target == "awq" else "")
            )
        if self.lm_head and target.gguf_kind is not None:
            raise UsageError(
                f"--lm-head: {self.target} chooses the kind of the output head by llama.cpp's rule; drop it"
            )
        if self.lm_head and target.is_onnx:
            raise UsageError(f"--lm-head: {self.target} keeps the output head unquantized; drop it")
        if self.lm_head and not target.mixed_bits:
            raise UsageError(
                f"--lm-head: readers of {self.target} expect the output head in 16 bits; "
                f"{', '.join(mixed[:-1])} and {mixed[-1]} hold it"
            )
        for override in self.overrides:
            if override.bits is not None and override.bits not in target.mixed_bits:
                raise UsageError(
                    f"--override {override.pattern!r}: {self.target} has bits "
                    f"{' or '.join(map(str, target.mixed_bits))}, got {override.bits}"
                )
            if override.target is not None and override.target not in target.mixed_targets:
                raise UsageError(f"--override {override.pattern!r}: {self._no_such_scheme(override.target)}")

    def _no_such_scheme(self, name: str) -> str:
        """Why no linear can have the scheme of another target."""
        target = TARGETS[self.target]
        if target.mixed_targets:
            known = " or ".join(target.mixed_targets)
            return f"{self.target} holds linears in the schemes of {known} beside its own, got {name!r}"
        holding = [other.name for other in TARGETS.values() if other.mixed_targets]
        return (
            f"{self.target} holds integers alone, got {name!r}; {' and '.join(holding)} hold linears in 4-bit floats "
            "beside others"
        )

    def _check_budget(self) -> None:
        if self.budget is None:
            if self.budget_bits:
                raise UsageError("--budget-bits are the widths that a --budget chooses from, and none is given")
            return
        target = TARGETS[self.target]
        if not target.mixed_bits:
            holding = [other.name for other in TARGETS.values() if other.mixed_bits]
            raise UsageError(
                f"--budget: {self.target} has one scheme for all linears; {', '.join(holding[:-1])} and {holding[-1]} "
                "hold several"
            )
        if self.bits is not None:
            raise UsageError(f"--budget chooses the bits of each linear, and --bits {self.bits} says them; drop one")
        if not 0 < self.budget < 32:
            raise UsageError(f"--budget is a number of bits per weight, such as 4.5bpw, got {self.budget:g}")
        num = len(set(self.budget_bits))
        if self.budget_bits and (num < 2 or num < len(self.budget_bits)):
            given = ",".join(map(str, self.budget_bits))
            raise UsageError(f"--budget-bits takes two widths or more, each once, got {given}")
        odd_target = next((name for name in self.budget_targets if name not in target.mixed_targets), None)
        if odd_target is not None:
            raise UsageError(f"--budget-bits: {self._no_such_scheme(odd_target)}")
        odd = next((bits for bits in self.widths if bits not in target.mixed_bits), None)
        if odd is not None:
            raise UsageError(
                f"--budget-bits: {self.target} has bits {' or '.join(map(str, target.mixed_bits))}, got {odd}"
            )

    def _same_layout_with_these_bits(self) -> str:
        names = [t.name for t in TARGETS.values() if t.format == TARGETS[self.target].format and self.bits in t.bits]
        return f"; {' or '.join(names)} holds {self.bits} bits" if names else ""

    @property
    def resolved_algorithm(self) -> Algorithm:
        return self.algorithm or TARGETS[self.target].algorithms[0]

    @property
    def default_bits(self) -> int:
        """Of weights that no override is about."""
        return self.bits or TARGETS[self.target].bits[0]

    @property
    def widths(self) -> tuple[int, ...]:
        """Those of integers that a budget chooses from, in ascending order."""
        return tuple(sorted(one for one in self.budget_bits if isinstance(one, int))) if self.budget_bits else WIDTHS

    @property
    def budget_targets(self) -> tuple[str, ...]:
        """Those in whose schemes a budget may put linears, too."""
        return tuple(one for one in self.budget_bits if isinstance(one, str))

    @property
    def folding(self) -> Folding | None:
        """What finds the channel scales that move into the operation before, if anything does."""
        match self.resolved_algorithm:
            case "awq" | "awq+gptq":
                return "awq"
            case "smoothquant" | "smoothquant+gptq":
                return "smoothquant"
        return None

    @property
    def keeps_codes(self) -> bool:
        """Codes and scales are the base's, and zero points take the update (QA-LoRA)."""
        return self.resolved_algorithm == "zeros"

    @property
    def solves(self) -> bool:
        """Codes are chosen by GPTQ."""
        return self.resolved_algorithm in ("gptq", "awq+gptq", "smoothquant+gptq")

    @property
    def statistics(self) -> frozenset[Statistic]:
        """What has to be gathered of the inputs of linears."""
        wanted: set[Statistic] = {"gram"} if self.solves else set()
        if self.folding == "awq":
            wanted |= {"gram", "mean_abs"}
        elif self.folding == "smoothquant":
            wanted |= {"sample"}
        own = TARGETS[self.target].scheme
        if self.activations == "static" or (own is not None and own.stores_input_scale):
            wanted |= {"sample"}
        return frozenset(wanted)

    @property
    def needs_calibration(self) -> bool:
        """Codes are chosen by what linears are given, or scales by what attentions keep."""
        return bool(self.statistics) or self.kv_cache is not None

    @property
    def needs_text(self) -> bool:
        """Something is: codes, the widths of a budget, or an importance matrix."""
        return self.needs_calibration or self.budget is not None or self.imatrix

    def scheme_for(self, in_features: Collection[int], location: str) -> Scheme:
        """The scheme for linears with these K.

        Raises:
            SchemeError: the group size does not divide every K; names the sizes that would.
        """
        target = TARGETS[self.target]
        if target.scheme is not None:
            scheme = replace(target.scheme, activation_order=self.solves)
            if self.activations == "static":
                scheme = replace(scheme, dynamic_activations=False, static_activations=True)
            return scheme
        widths = sorted(set(in_features))
        fitting = [g for g in GROUP_SIZES if all(k % g == 0 for k in widths)]
        size = self.group_size
        if size is None:
            size = fitting[0] if fitting else None
        if size is None or (size != -1 and any(k % size for k in widths)):
            wanted = "no group size of 128, 64, 32" if size is None else f"group size {size} does not divide"
            odd = next(k for k in widths if k % (size or GROUP_SIZES[-1]))
            raise SchemeError(
                f"{location}: {wanted}{' divides' if size is None else ''} the {odd} input features of a linear; "
                f"sizes that would: {', '.join(map(str, [*fitting, -1]))} (-1 = one group per row)"
            )
        symmetric = target.symmetric if self.symmetric is None else self.symmetric
        return Scheme(
            kind="int",
            bits=self.default_bits,
            group_size=size,
            symmetric=bool(symmetric),
            activation_order=self.solves,
            dynamic_activations=target.activations is not None,
            float8_activations=target.activations == "float8",
            min_zero=self.min_zero(bool(symmetric)),
        )

    def min_zero(self, symmetric: bool) -> Literal[0, 1]:
        """The smallest zero point, see `Scheme`."""
        return 1 if TARGETS[self.target].format in ("gptq", "matmul-nbits") and not symmetric else 0


def parse_budget(text: str) -> float:
    """``"4.5bpw"``, or the number alone: bits per weight.

    Raises:
        UsageError: not of that form.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*(?:bpw)?", text.strip())
    if found is None:
        raise UsageError(f"--budget takes bits per weight, such as 4.5bpw, got {text!r}")
    return float(found[1])


def parse_widths(text: str) -> tuple[int | str, ...]:
    """``"4,5,8"`` or ``"4,8,nvfp4a16"``: numbers of bits, and names of targets.

    Raises:
        UsageError: not of that form.
    """
    if not re.fullmatch(r"\w+(,\w+)*", text):
        raise UsageError(f"--budget-bits takes widths with commas between, such as 4,8 or 4,5,8,nvfp4a16, got {text!r}")
    return tuple(int(word) if word.isdecimal() else word for word in text.split(","))
