"""Grids against compressed-tensors' own arithmetic, and the rounding rules of scales."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from hypothesis import strategies as st

from qconv.errors import NumericsError, SchemeError
from qconv.quantize.grid import (
    MAX_SCALE,
    MIN_SCALE,
    check_finite,
    check_scale,
    grid_of_range,
    groups_of,
    quantize_dequantize,
    range_of,
    round_scale,
    search_grid,
    ungroup,
)
from qconv.quantize.rtn import rtn
from qconv.types import Scheme


def weight(rows: int = 24, columns: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    return 0.02 * normal * (1 + 5 * (torch.rand(rows, columns, generator=generator) < 0.01))


def assert_exact_scales(scale: torch.Tensor) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(scale.to(dtype).float(), scale)
    assert bool((scale != 0).all())
    assert bool(torch.isfinite(scale).all())


@given(st.floats(min_value=1e-12, max_value=60000.0, allow_nan=False))
def test_rounded_scales_survive_every_cast(value: float) -> None:
    scale = round_scale(torch.tensor([value, -value]))
    assert_exact_scales(scale)
    assert scale[0] == -scale[1]
    if value >= 2.0**-14:  # float16 is normal here: only bfloat16's 8 bits round
        assert abs(float(scale[0]) - value) <= value * 2.0**-8
    else:
        assert abs(float(scale[0]) - value) <= max(value * 2.0**-8 + 2.0**-25, MIN_SCALE)


def test_every_bfloat16_scale_in_range_is_left_alone_where_float16_holds_it() -> None:
    codes = torch.arange(0x0080, 0x7F80, dtype=torch.int16).view(torch.bfloat16).float()
    held = codes[codes.half().float() == codes]
    assert len(held) > 3000
    assert torch.equal(round_scale(held), held)
    assert float(held.max()) == MAX_SCALE
    assert float(held.min()) == MIN_SCALE


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mse", [True, False])
@pytest.mark.parametrize("magnitude", [1e-7, 1.0, 1e4])
def test_error_is_half_a_step_inside_the_range(bits: int, symmetric: bool, mse: bool, magnitude: float) -> None:
    scheme = Scheme(bits=bits, group_size=64, symmetric=symmetric)
    w = weight() * magnitude
    q = rtn(w, scheme, "w", mse=mse)
    assert_exact_scales(q.scales_NG)
    assert int(q.codes_NK.max()) <= scheme.max_code
    scale = q.scales_NG.unsqueeze(-1)
    zero = scheme.mid_code if q.zeros_NG is None else q.zeros_NG.float().unsqueeze(-1)
    ends = torch.stack(((0 - zero) * scale, (scheme.max_code - zero) * scale))
    grouped, back = groups_of(w, 64), groups_of(q.dequantize(), 64)
    inside = (grouped >= ends.amin(0)) & (grouped <= ends.amax(0))
    assert float(inside.float().mean()) > 0.3
    slack = scale.abs() * (0.5 + 1e-4)
    assert bool(((grouped - back).abs() <= slack)[inside].all())
    # Outside, a weight saturates at the nearer end.
    nearest = torch.minimum(torch.maximum(grouped, ends.amin(0)), ends.amax(0))
    assert torch.allclose(back[~inside], nearest[~inside], rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_min_max_agrees_with_compressed_tensors(bits: int, symmetric: bool, group_size: int) -> None:
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
    w = weight()
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **strategy)
    grouped = groups_of(w, group_size)
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    ours = rtn(w, scheme, "w")
    torch.testing.assert_close(ours.scales_NG, scale, rtol=2.0**-8, atol=0)  # one rounding to bfloat16
    if symmetric:
        assert ours.zeros_NG is None
        theirs_zero = torch.zeros_like(ours.scales_NG)
    else:
        assert ours.zeros_NG is not None
        # The rounded scale may move a zero point that lies near the middle of two integers.
        theirs_zero = zero.float() + scheme.mid_code
        assert float((ours.zeros_NG.float() - theirs_zero).abs().max()) <= 1
        theirs_zero = ours.zeros_NG.float() - scheme.mid_code
    reference = fake_quantize(w, ours.scales_NG, theirs_zero, args)
    assert torch.equal(ours.dequantize(), reference)


def test_absmax_convention_is_seven_and_a_half() -> None:
    scheme = Scheme(bits=4, group_size=4)
    q = rtn(torch.tensor([[-7.5, 3.0, 1.0, 0.0]]), scheme, "w")
    assert q.scales_NG.tolist() == [[1.0]]
    assert q.codes_NK.tolist() == [[0, 11, 9, 8]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mse", [True, False])
def test_zero_and_constant_groups(symmetric: bool, mse: bool) -> None:
    scheme = Scheme(bits=4, group_size=32, symmetric=symmetric)
    w = torch.zeros(3, 96)
    w[1, 32:64] = 0.3
    w[2, 64:] = -0.3
    q = rtn(w, scheme, "w", mse=mse)
    zero_groups = (groups_of(w, 32) == 0).all(-1)
    assert bool((q.scales_NG[zero_groups] == 1).all())
    back = q.dequantize()
    assert torch.equal(back[w == 0], torch.zeros_like(back[w == 0]))
    tolerance = 0.3 * 2.0**-7 if mse or not symmetric else 0.3 / 15 * 1.01
    assert float((back - w).abs().max()) <= tolerance


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_named(value: float) -> None:
    w = weight()
    w[3, 5] = value
    with pytest.raises(NumericsError, match=r"model\.layers\.7\.q_proj.*found 1 of 6144"):
        rtn(w, Scheme(), "model.layers.7.q_proj")


def test_large_finite_numbers_are_not_mistaken_for_infinity() -> None:
    check_finite(torch.full((64, 64), 3e38), "w")
    check_finite(torch.tensor([3e38, 3e38, -3e38]), "w")


def test_weights_too_large_for_float16_scales() -> None:
    with pytest.raises(NumericsError, match=r"lm_head.*too large"):
        rtn(torch.full((2, 128), 1e7), Scheme(), "lm_head")
    check_scale(rtn(torch.full((2, 128), 4e5), Scheme(), "w").scales_NG, "w")


def test_float_scheme_is_refused() -> None:
    with pytest.raises(SchemeError, match="integer"):
        rtn(weight(), Scheme(kind="float", bits=8, group_size=-1), "w")


def test_short_last_group() -> None:
    scheme = Scheme(bits=4, group_size=128, symmetric=False)
    w = weight(8, 200)
    q = rtn(w, scheme, "w", mse=True)
    assert q.scales_NG.shape == (8, 2)
    assert torch.equal(q.codes_NK[:, 128:], rtn(w[:, 128:].clone(), scheme, "w", mse=True).codes_NK)
    assert torch.equal(ungroup(groups_of(w, 128), 200), w)
    assert float((q.dequantize() - w).abs().max()) < 0.02


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_search_lowers_the_error_it_weighs(bits: int, symmetric: bool) -> None:
    scheme = Scheme(bits=bits, group_size=64, symmetric=symmetric)
    w = groups_of(weight(64), 64)
    importance = torch.rand(4, 64, generator=torch.Generator().manual_seed(1)) ** 4

    def loss(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        back = quantize_dequantize(w, scale.unsqueeze(-1), zero.unsqueeze(-1), scheme)
        return ((back - w).square() * importance).sum(-1)

    plain = loss(*grid_of_range(*range_of(w), scheme))
    searched = loss(*search_grid(w, scheme, importance))
    unsigned = search_grid(w, scheme, importance, signed=False)
    assert bool((searched <= plain).all())
    assert float(searched.sum()) < 0.95 * float(plain.sum())
    assert bool((unsigned.scale > 0).all())
    assert float(loss(*unsigned).sum()) < float(plain.sum())
    if symmetric:  # the extra code on the far side pays
        assert float(searched.sum()) < float(loss(*unsigned).sum())


def test_negative_scales_mean_the_same_to_compressed_tensors() -> None:
    q = rtn(weight(), Scheme(group_size=128), "w", mse=True)
    assert bool((q.scales_NG < 0).any())
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
    reference = fake_quantize(weight(), q.scales_NG, torch.zeros_like(q.scales_NG), args)
    assert torch.equal(q.dequantize(), reference)


def test_groups_without_importance_keep_their_range() -> None:
    w = weight()
    scheme = Scheme(group_size=64)
    importance = torch.ones(256)
    importance[64:128] = 0
    q = rtn(w, scheme, "w", mse=True, column_importance_K=importance)
    assert torch.equal(q.scales_NG[:, 1], rtn(w, scheme, "w").scales_NG[:, 1])


def test_a_given_grid_is_used_as_it_is() -> None:
    w = weight()
    scheme = Scheme(group_size=64, symmetric=False)
    low, high = range_of(groups_of(w, 64))
    half = rtn(w, scheme, "w", grid=grid_of_range(low / 2, high / 2, scheme))
    back = groups_of(half.dequantize(), 64)
    assert bool((back.amax(-1) <= high / 2 + half.scales_NG).all())
    whole = rtn(w, scheme, "w", grid=grid_of_range(low, high, scheme))
    assert torch.equal(whole.codes_NK, rtn(w, scheme, "w").codes_NK)
    with pytest.raises(ValueError, match="grid"):
        rtn(w, scheme, "w", mse=True, grid=grid_of_range(low, high, scheme))


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_min_zero_keeps_zero_points_off_zero(bits: int, searched: bool) -> None:
    """GPTQ v1 stores zero - 1: groups without a negative weight must still get a zero point of 1 or more."""
    w = weight()
    w[:4] = w[:4].abs() + 0.01
    w[4] = 0
    scheme = Scheme(bits=bits, group_size=64, symmetric=False, min_zero=1)
    q = rtn(w, scheme, "w", mse=searched)
    assert q.zeros_NG is not None
    assert int(q.zeros_NG.min()) == 1
    error = groups_of((q.dequantize() - w).abs(), 64).amax(-1)
    if not searched:
        # half a step, half for the rounded zero point, half for the rounded scale at 255 steps from zero
        assert bool((error <= 1.51 * q.scales_NG).all())
    assert int(rtn(w, Scheme(bits=bits, group_size=64, symmetric=False), "w").zeros_NG.min()) == 0  # type: ignore[union-attr]
