"""What every on-disk format of quantized linears owes, and the checks that all share.

A format is a frozen value without state. ``pack`` has no data-dependent branches, so it runs on meta
tensors too and tells names, shapes and dtypes of the output before any work is done; conditions on
the numbers are in ``check``, to be called on real tensors before packing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from qconv.errors import CheckpointError, NumericsError, SchemeError
from qconv.finite import put_off
from qconv.types import QuantizedLinear, Scheme, TensorSpec

GROUP_SIZES_TO_SUGGEST = (128, 64, 32)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Format(Protocol):
    """How one on-disk format lays out quantized linears."""

    @property
    def name(self) -> str:
        """The key in `FORMATS`."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """All tensor suffixes the format may store for a module; the first marks a quantized module."""

    def check_scheme(self, scheme: Scheme) -> None:
        """Raises `SchemeError` when the format cannot hold such numbers."""

    def check_shapes(self, module: str, n: int, k: int, scheme: Scheme) -> None:
        """Raises `SchemeError`, naming sizes that would fit, when a weight [n, k] cannot be laid out."""

    def check(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> None:
        """Raises `NumericsError` or `SchemeError` when values would not survive ``pack``. Reads the data."""

    def pack(self, q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors to store, by full name. Runs on meta tensors.

        ``scale_dtype`` is the dtype of stored scales where the format leaves it open
        (compressed-tensors: that of the model); GPTQ and AWQ store float16 always.
        """

    def unpack(
        self, tensors: Mapping[str, Tensor], module: str, scheme: Scheme, location: str = "checkpoint"
    ) -> QuantizedLinear:
        """Inverse of ``pack``, bit for bit.

        A stored group index that equals ``k // group_size`` comes back as None, which means the same.

        Raises:
            CheckpointError: a tensor is missing, or its dtype, shape or content cannot be.
            NumericsError: a scale is NaN or infinite.
        """

    def logical_shape(self, specs: Mapping[str, TensorSpec], module: str, scheme: Scheme) -> tuple[int, int] | None:
        """[N, K] of a stored module from metadata alone, or None when only its tensors tell."""

    def quantization_config(
        self,
        scheme: Scheme,
        quantized_modules: Collection[str],
        ignored_modules: Collection[str],
        has_group_index: bool = False,
    ) -> dict[str, Any]:
        """The ``quantization_config`` of ``config.json``.

        ``ignored_modules`` are the linears that stay unquantized (``lm_head`` and the like; GPTQ excludes them by
        rules, which `mixed_config` adds);
        ``has_group_index`` says that ``group_index_K`` is stored for some module.
        """

    def scheme_of(self, config: Mapping[str, Any], location: str) -> Scheme:
        """Inverse of ``quantization_config``: raises `CheckpointError` for what cannot be read."""

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """JSON files that readers expect beside ``config.json``, from its ``quantization_config``."""


def check_group_size(format_name: str, module: str, k: int, scheme: Scheme) -> None:
    """Readers slice K into whole groups; refuses a last, partial one."""
    size = scheme.group_size
    if size != -1 and k % size:
        fitting = [str(g) for g in GROUP_SIZES_TO_SUGGEST if k % g == 0]
        advice = f"use group size {', '.join(fitting)} or -1 (per channel)" if fitting else "use -1 (per channel)"
        raise SchemeError(f"{module}: {format_name} needs in_features divisible by the group size, got {k} and {size}; "
                          f"{advice}")  # fmt: skip


def check_divisible(format_name: str, module: str, what: str, size: int, unit: int) -> None:
    if size % unit:
        below, above = size // unit * unit, -(-size // unit) * unit
        fitting = f"{below} or {above}" if below else str(above)
        raise SchemeError(
            f"{module}: {format_name} needs {what} divisible by {unit}, got {size}; {fitting} would fit: "
            "leave this module unquantized or choose a compressed-tensors format"
        )


def check_values(q: QuantizedLinear, module: str, scale_dtype: torch.dtype) -> None:
    """Scales must be finite and exact in the stored dtype; codes and zero points within their bits."""
    if not bool(torch.isfinite(q.scales_NG).all()):
        raise NumericsError(f"{module}: a quantization scale is NaN or infinite")
    if not torch.equal(q.scales_NG.to(scale_dtype).to(torch.float32), q.scales_NG):
        raise NumericsError(
            f"{module}: a quantization scale is not exact in {scale_dtype}; the stored model would differ from the "
            "validated one. Round scales before choosing codes"
        )
    if q.scheme.kind == "float":
        if bool(q.codes_NK.isnan().any()):
            raise NumericsError(f"{module}: a float8 code is NaN")
        return
    for what, values in (("code", q.codes_NK), ("zero point", q.zeros_NG)):
        if values is not None and values.numel() and int(values.max()) > q.scheme.max_code:
            raise NumericsError(f"{module}: a {what} exceeds {q.scheme.max_code}, the largest of {q.scheme.bits} bits")
    check_group_index(q, module)


def check_group_index(q: QuantizedLinear, module: str) -> None:
    index, groups = q.group_index_K, q.scales_NG.shape[1]
    if index is not None and (int(index.min()) < 0 or int(index.max()) >= groups):
        raise NumericsError(f"{module}: the group index must lie in 0 .. {groups - 1}")


def trivial_group_index(k: int, scheme: Scheme, device: torch.device | str) -> Tensor:
    """``k // group_size`` for every input feature, int32 [K]."""
    index = torch.arange(k, dtype=torch.int32, device=device)
    return index // (k if scheme.group_size == -1 else scheme.group_size)


class TensorReader:
    """Takes the tensors of one module, checking presence, dtype and shape on the way."""

    def __init__(self, tensors: Mapping[str, Tensor], module: str, location: str):
        self._tensors, self._module, self._location = tensors, module, location

    def has(self, suffix: str) -> bool:
        return self._module + suffix in self._tensors

    def take(self, suffix: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> Tensor:
        """The tensor; None in ``shape`` leaves that size open."""
        name = self._module + suffix
        if name not in self._tensors:
            raise CheckpointError(
                f"{self._location}: quantized module {self._module!r} has no tensor {name!r}; "
                "the checkpoint is incomplete: save or fetch it again"
            )
        tensor = self._tensors[name]
        fits = tensor.ndim == len(shape) and all(
            want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
        )
        if tensor.dtype not in dtypes or not fits:
            wanted = " or ".join(str(dtype) for dtype in dtypes)
            sizes = ", ".join("any" if size is None else str(size) for size in shape)
            raise CheckpointError(
                f"{self._location}: tensor {name!r}: expected {wanted} ({sizes}), "
                f"found {tensor.dtype} {tuple(tensor.shape)}"
            )
        return tensor

    def take_scales(self, suffix: str, shape: tuple[int | None, ...]) -> Tensor:
        """Scales as float32, checked to be finite (within `finite.putting_off`, maybe later)."""
        scales = self.take(suffix, SCALE_DTYPES, shape).to(torch.float32)
        self.check_scales(scales)
        return scales

    def check_scales(self, scales: Tensor) -> None:
        """Raises NumericsError where one is NaN or infinite (within `finite.putting_off`, maybe later)."""
        are_finite = torch.isfinite(scales).all()
        refuse = partial(_refuse_scales, self._module, self._location)
        if not put_off(are_finite, refuse) and not are_finite:
            refuse()

    def take_group_index(self, suffix: str, k: int, num_groups: int, scheme: Scheme) -> Tensor | None:
        """The stored group index, or None when it says ``k // group_size``."""
        index = self.take(suffix, (torch.int32,), (k,))
        if torch.equal(index, trivial_group_index(k, scheme, index.device)):
            return None
        if int(index.min()) < 0 or int(index.max()) >= num_groups:
            raise self.error(suffix, f"holds a group outside 0 .. {num_groups - 1}")
        return index

    def error(self, suffix: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._location}: tensor {self._module + suffix!r} {problem}")


def _refuse_scales(module: str, location: str) -> NoReturn:
    raise NumericsError(f"{location}: a scale of module {module!r} is NaN or infinite")


def shape_of_weight(specs: Mapping[str, TensorSpec], module: str) -> tuple[int, int] | None:
    """The logical shape where codes are stored one by one, as ``weight``; None where there is none."""
    spec = specs.get(module + ".weight")
    return (spec.shape[0], spec.shape[1]) if spec is not None and len(spec.shape) == 2 else None
