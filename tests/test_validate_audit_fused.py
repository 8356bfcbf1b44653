"""The kernel that the audit of weights uses on a GPU, against the plain PyTorch that it stands for.

Whether Triton interprets is settled when it is first imported, which another test may have done. So the functions named
``check_*`` run in a process of their own: interpreted on a CPU, and compiled where there is CUDA, with larger shapes.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from qconv.types import QuantizedLinear, Scheme
from qconv.validate import audit_gather, audit_measure
from qconv.validate.audit_gather import Factor, Nearest, fit_channels, gather
from qconv.validate.audit_measure import Fit, measure
from qconv.validate.audit_regression import Sums
from qconv.validate.audit_stored import Stored
from tests.kernel_cases import run_checks

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ROWS, COLUMNS = (70, 192) if DEVICE == "cpu" else (2085, 1152)  # rows do not fill their last tile
SCHEMES = [
    Scheme(bits=4, group_size=64),
    Scheme(bits=4, group_size=32, symmetric=False),
    Scheme(bits=8, group_size=-1),
]


def test_interpreted_on_a_cpu() -> None:
    run_checks(__file__, interpreted=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_on_cuda() -> None:
    run_checks(__file__, interpreted=False)


def example(scheme: Scheme, seed: int = 0) -> tuple[Stored, Tensor, Tensor]:
    """A candidate with noise, scales folded into rows and columns and a few damaged codes; expected weight; base."""
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(ROWS, COLUMNS, generator=generator) * 0.02).to(torch.bfloat16)
    update = torch.randn(ROWS, 4, generator=generator) @ torch.randn(4, COLUMNS, generator=generator) * 2e-4
    expected = base.float() + update
    stored = expected * (1 + 0.3 * torch.rand(COLUMNS, generator=generator))
    size = COLUMNS if scheme.group_size == -1 else scheme.group_size
    groups = stored.view(ROWS, -1, size)
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    zeros = None
    if scheme.symmetric:
        scales = torch.maximum(-low, high) / (scheme.max_code / 2)
        offset: Tensor | float = float(scheme.mid_code)
    else:
        scales = (high - low) / scheme.max_code
        zeros = (-low / scales).round().to(torch.uint8)
        offset = zeros[..., None].float()
    codes = (groups / scales[..., None]).round().add(offset).clamp(0, scheme.max_code)
    codes = codes.to(torch.uint8).view(ROWS, COLUMNS)
    codes[3, 5:9] = scheme.max_code
    scales[4, 0] = 0.0  # a group of zeros, as other tools store it
    scales[5, 0] = -scales[5, 0]
    linear = QuantizedLinear(
        codes_NK=codes.t().contiguous().t().to(DEVICE),  # as formats that store [K, N] give it
        scales_NG=scales.to(DEVICE),
        zeros_NG=None if zeros is None else zeros.to(DEVICE),
        group_index_K=None,
        scheme=scheme,
    )
    return Stored(plain=None, quantized=linear), expected.to(DEVICE), base.to(DEVICE)


def gathered(*arguments: Any) -> tuple[Sums, Nearest | None]:
    found = gather(*arguments)
    return found.on_host([tensor.cpu() for tensor in found.tensors])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("with_factor", [True, False])
def check_sums_are_those_of_plain_pytorch(
    scheme: Scheme, with_base: bool, with_factor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, expected, base = example(scheme)
    factor = None
    if with_factor:
        factor = Factor(
            row_N=torch.linspace(0.5, 2, ROWS, device=DEVICE), column_K=torch.linspace(2, 0.7, COLUMNS, device=DEVICE)
        )
    assert audit_gather.is_fused(stored, expected)
    found, nearest = gathered(stored, expected, base if with_base else None, factor)
    monkeypatch.setattr(audit_gather, "available", lambda tensor: False)
    wanted, wanted_nearest = gathered(stored, expected, base if with_base else None, factor)
    assert found.pairs == wanted.pairs
    for pair in wanted.pairs:
        for part, reference in ((found.row, wanted.row), (found.column, wanted.column)):
            size = reference[pair].abs().max() + 1e-30
            assert float((part[pair] - reference[pair]).abs().max() / size) < 2e-6, pair
    assert nearest is not None
    assert wanted_nearest is not None
    for name, value in vars(wanted_nearest).items():
        # Products of rounding errors with weights nearly cancel: their sum is known to what it is made of.
        size = abs(value) if name in ("zz", "mismatch") else (wanted_nearest.zz * wanted.total("aa")) ** 0.5
        assert abs(getattr(nearest, name) - value) <= 2e-6 * size, name


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def check_folded_scales_are_found_alike(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, expected, base = example(scheme, seed=1)
    factor, fit = fit_channels(stored, expected), measure(stored, expected, base)
    assert fit is not None
    assert fit.is_folded
    monkeypatch.setattr(audit_gather, "available", lambda tensor: False)
    plain_factor, plain_fit = fit_channels(stored, expected), measure(stored, expected, base)
    torch.testing.assert_close(factor.row_N, plain_factor.row_N, rtol=1e-5, atol=1e-6)  # one row is 0
    torch.testing.assert_close(factor.column_K, plain_factor.column_K, rtol=1e-5, atol=0)
    assert plain_fit is not None
    assert_alike(fit, plain_fit)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("is_scaled", [True, False])
def check_deciding_later_is_deciding_at_once(scheme: Scheme, is_scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both rounds given to the device before anything is known, against the second one only where it is needed."""
    stored, expected, base = example(scheme, seed=2)
    if not is_scaled:
        expected = stored.values(slice(None)) + 1e-4 * torch.randn(ROWS, COLUMNS, device=DEVICE)
    later = measure(stored, expected, base)
    monkeypatch.setattr(audit_measure, "is_fused", lambda *_: False)
    at_once = measure(stored, expected, base)
    assert later is not None
    assert at_once is not None
    assert later.is_folded is is_scaled
    for name, value in vars(at_once).items():
        if name != "channels":
            assert getattr(later, name) == value, name
    for name, value in vars(at_once.channels).items():
        found = getattr(later.channels, name)
        assert (found.dtype, found.device.type) == (torch.float32, "cpu"), name
        assert torch.equal(found, value), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def check_a_scale_that_is_not_finite_is_seen(bad: float) -> None:
    stored, expected, base = example(SCHEMES[0])
    assert stored.quantized is not None
    stored.quantized.scales_NG[7, 1] = bad
    assert audit_gather.is_fused(stored, expected)
    assert measure(stored, expected, base) is None


def assert_alike(found: Fit, wanted: Fit) -> None:
    for name in ("relative_error", "residual", "rounding", "scale", "cosine", "update", "coefficient", "fold_gain"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-4), name
    assert (found.is_folded, found.lost_rows, found.lost_columns) == (
        wanted.is_folded,
        wanted.lost_rows,
        wanted.lost_columns,
    )
