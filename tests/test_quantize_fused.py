"""The fused kernels against definitions in float64, and against the plain PyTorch that they replace.

Whether Triton interprets is settled when it is first imported, which another test may have done. So the functions named
``check_*`` run in a process of their own: interpreted on a CPU, and compiled where there is CUDA, with larger shapes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qconv import triton_support
from qconv.quantize import fused, precision
from qconv.quantize.awq import search_block_grid
from qconv.quantize.grid import Grid, encode, groups_of, quantize_dequantize, search_grid
from qconv.types import Scheme
from tests.kernel_cases import run_checks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ROWS, COLUMNS = (20, 150) if INTERPRETED else (4101, 516)  # neither fills its last tile
GROUP = 32
SYMMETRIC = Scheme(group_size=GROUP)
ASYMMETRIC = Scheme(group_size=GROUP, symmetric=False, min_zero=1)
EIGHT_BITS = Scheme(group_size=GROUP, bits=8, symmetric=False)
SCHEMES = [SYMMETRIC, ASYMMETRIC, EIGHT_BITS]


def test_interpreted_on_a_cpu() -> None:
    run_checks(__file__, interpreted=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_on_cuda() -> None:
    run_checks(__file__, interpreted=False)


def test_triton_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, qconv.quantize.fused; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_available_where_there_is_a_device_for_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "_is_installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not triton_support.available(torch.ones(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_support.available(torch.ones(1))
    monkeypatch.setattr(triton_support, "_is_installed", lambda: False)
    assert not triton_support.available(torch.ones(1))


@pytest.mark.parametrize(
    ("group_size", "num_columns", "expected"),
    [(128, 128, True), (32, 100, True), (128, 100, False), (-1, 128, False), (48, 480, False), (256, 512, False)],
)
def test_fits(group_size: int, num_columns: int, expected: bool) -> None:
    assert fused.fits(torch.empty(3, num_columns), Scheme(group_size=group_size)) == expected


@pytest.mark.parametrize(
    ("shared_bytes", "group_size", "expected"), [(232448, 128, True), (101376, 128, False), (101376, 64, True)]
)
def test_fits_the_shared_memory(
    shared_bytes: int, group_size: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(shared_memory_per_block_optin=shared_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    weight = SimpleNamespace(is_cuda=True, shape=(3, 256), device="cuda:0")
    scheme = Scheme(group_size=group_size)
    assert fused.fits(weight, scheme) == expected  # type: ignore[arg-type]
    assert fused.fits(weight, scheme, with_gram=False)  # type: ignore[arg-type]


def test_wrong_arguments_are_refused() -> None:
    ones = torch.ones(64, 64)
    arguments = [ones, ones, ones, ones[0], torch.zeros(64, dtype=torch.int32), ones[:2], ones[:2], SYMMETRIC]
    faults = {
        0: ones.half(),
        1: ones[:, :32],
        2: ones[:32],
        3: ones,
        4: torch.zeros(64),
        5: torch.ones(64, 2).t(),
        6: ones,
        7: Scheme(kind="float", bits=8),
    }
    for position, fault in faults.items():
        with pytest.raises(ValueError, match="expected"):
            fused.sweep(*arguments[:position], fault, *arguments[position + 1 :])  # type: ignore[arg-type]
    for scheme in (Scheme(group_size=48), Scheme(group_size=128), Scheme(group_size=-1)):
        with pytest.raises(ValueError, match="group size"):
            fused.search_grid(ones, scheme)
    with pytest.raises(ValueError, match="importance_K"):
        fused.search_grid(ones, SYMMETRIC, importance_K=torch.ones(63))
    with pytest.raises(ValueError, match="gram_Ggg"):
        fused.search_grid(ones, SYMMETRIC, gram_Ggg=torch.ones(2, 32, 31))
    with pytest.raises(ValueError, match="not by both"):
        fused.search_grid(ones, SYMMETRIC, importance_K=ones[0], gram_Ggg=torch.ones(2, 32, 32))
    with pytest.raises(ValueError, match="int8"):
        fused.normal_equations(ones.long(), ones, 0.0, 32)
    with pytest.raises(ValueError, match="gram_KK"):
        fused.normal_equations(ones, ones[:32], 0.0, 32)


# --- sweep ---


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Problem:
    """Arguments of a sweep: GPTQ (`is_descent` false) or coordinate descent from rounded weights."""

    def __init__(self, scheme: Scheme, is_descent: bool, num_rows: int = ROWS, num_columns: int = COLUMNS):
        self.scheme = scheme
        x_TK = draw(4 * num_columns, num_columns) @ (draw(num_columns, num_columns, seed=1) / num_columns**0.5)
        gram_KK = x_TK.t() @ x_TK / len(x_TK) + 0.1 * torch.eye(num_columns, device=DEVICE)
        w_NK = draw(num_rows, num_columns, seed=2)
        grid = search_grid(groups_of(w_NK, GROUP), scheme)
        # Groups in any order, as act-order visits them.
        order_K = torch.randperm(num_columns, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        self.group_K = (order_K // GROUP).int()
        self.scale_GN, self.zero_GN = grid.scale.t().contiguous(), grid.zero.t().contiguous()
        self.start_KN = w_NK.t()[order_K].contiguous()
        self.pull_KN = torch.zeros_like(self.start_KN)
        self.coupling_KK = torch.linalg.cholesky(gram_KK.flip(0, 1)).flip(0, 1)
        if is_descent:
            w_KN = self.start_KN
            self.start_KN = quantize_dequantize(w_KN, *self.columns(), scheme)
            self.pull_KN = gram_KK @ (w_KN - self.start_KN)
            self.coupling_KK = gram_KK
        self.power_K = self.coupling_KK.diagonal().contiguous()

    def columns(self) -> tuple[Tensor, Tensor]:
        return self.scale_GN[self.group_K.long()], self.zero_GN[self.group_K.long()]

    def sweep(self, coupling_KK: Tensor | None = None, tf32: bool = False) -> Tensor:
        coupling_KK = self.coupling_KK if coupling_KK is None else coupling_KK
        arguments = (coupling_KK, self.power_K, self.group_K, self.scale_GN, self.zero_GN, self.scheme)
        return fused.sweep(self.start_KN, self.pull_KN.clone(), *arguments, tf32=tf32)

    def plain_sweep(self) -> Tensor:
        """The definition, one column after the other."""
        scale_KN, zero_KN = self.columns()
        codes_KN, change_KN = torch.empty_like(self.start_KN), torch.zeros_like(self.start_KN)
        for k in range(len(self.start_KN)):
            pull_N = self.pull_KN[k] + self.coupling_KK[:k, k] @ change_KN[:k]
            codes_KN[k] = encode(self.start_KN[k] + pull_N / self.power_K[k], scale_KN[k], zero_KN[k], self.scheme)
            change_KN[k] = self.start_KN[k] - (codes_KN[k] - zero_KN[k]) * scale_KN[k]
        return codes_KN.to(torch.uint8)

    def places(self, codes_KN: Tensor) -> Tensor:
        """Where each target lies on the axis of codes, in float64, given all codes before it."""
        scale_KN, zero_KN = (part.double() for part in self.columns())
        change_KN = self.start_KN.double() - (codes_KN.double() - zero_KN) * scale_KN
        pull_KN = self.pull_KN.double() + self.coupling_KK.double().triu(1).t() @ change_KN
        return (self.start_KN.double() + pull_KN / self.power_K.double()[:, None]) / scale_KN + zero_KN

    def distance(self, codes_KN: Tensor) -> Tensor:
        """Of each target from its code, in steps; at most a half for the nearest code."""
        return (self.places(codes_KN).clamp(0, self.scheme.max_code) - codes_KN.double()).abs()


@pytest.mark.parametrize(
    ("scheme", "is_descent"), [(SYMMETRIC, False), (SYMMETRIC, True), (ASYMMETRIC, False), (EIGHT_BITS, True)]
)
def check_sweep_takes_the_nearest_code_to_every_target(scheme: Scheme, is_descent: bool) -> None:
    problem = Problem(scheme, is_descent)
    codes_KN = problem.sweep()
    distance_KN = problem.distance(codes_KN)
    assert float(distance_KN.max()) <= 0.5 + 1e-3
    assert float(distance_KN.mean()) > 0.1
    # And the same codes as the plain loop, up to the first target of a row that rounding could move over a border.
    places_KN = problem.places(codes_KN)
    is_close_KN = ((places_KN - places_KN.floor() - 0.5).abs() < 1e-4) & (places_KN > 0) & (places_KN < scheme.max_code)
    is_clear_KN = is_close_KN.cumsum(0) == 0
    assert float(is_clear_KN.float().mean()) > 0.9
    assert torch.equal(codes_KN[is_clear_KN], problem.plain_sweep()[is_clear_KN])
    # The coupling matters: without it other codes would be nearest.
    target_KN = problem.start_KN + problem.pull_KN / problem.power_K[:, None]
    assert not torch.equal(codes_KN, encode(target_KN, *problem.columns(), scheme).to(torch.uint8))


def check_sweep_reads_the_upper_triangle_alone_in_either_layout() -> None:
    problem = Problem(SYMMETRIC, is_descent=True, num_columns=40 if INTERPRETED else COLUMNS)
    codes_KN = problem.sweep()
    nan_KK = torch.full_like(problem.coupling_KK, torch.nan).tril()
    assert torch.equal(codes_KN, problem.sweep(problem.coupling_KK.triu(1) + nan_KK))
    assert torch.equal(codes_KN, problem.sweep(problem.coupling_KK.t().contiguous().t()))


@pytest.mark.parametrize("num_columns", [1, 16, 33])
def check_sweep_of_less_than_a_block(num_columns: int) -> None:
    problem = Problem(SYMMETRIC, is_descent=False, num_rows=1, num_columns=num_columns)
    assert torch.equal(problem.sweep(), problem.plain_sweep())


def check_sweep_of_nothing() -> None:
    problem = Problem(SYMMETRIC, is_descent=False)
    for name in ("start_KN", "pull_KN", "scale_GN", "zero_GN"):
        setattr(problem, name, getattr(problem, name)[:, :0].contiguous())
    assert problem.sweep().shape == (COLUMNS, 0)


@pytest.mark.parametrize("scheme", SCHEMES)
def check_sweep_rounds_ties_as_the_reference(scheme: Scheme) -> None:
    """Weights on the border between two codes, and one unit in the last place beside it; nothing moves them."""
    num_columns, num_rows = (21, 96) if INTERPRETED else (512, 4096)
    scale_GN = (draw(1, num_rows).bfloat16().float() * 2.0**-5).to(DEVICE)  # both signs
    zero_GN = torch.full_like(scale_GN, scheme.mid_code)
    border_KN = torch.arange(num_columns, device=DEVICE)[:, None] % (scheme.max_code + 3) - scheme.mid_code - 1.5
    start_KN = (border_KN * scale_GN).contiguous()
    direction_KN = torch.tensor([-torch.inf, 0.0, torch.inf], device=DEVICE)[
        torch.arange(num_columns * num_rows, device=DEVICE).view(num_columns, num_rows) % 3
    ]
    beside_KN = torch.nextafter(start_KN, direction_KN)
    start_KN = torch.where(direction_KN == 0, start_KN, beside_KN).contiguous()
    start_KN[0, :3] = torch.tensor([3e38, -3e38, 1e-42])
    codes_KN = fused.sweep(
        start_KN,
        torch.zeros_like(start_KN),
        torch.zeros(num_columns, num_columns, device=DEVICE),
        torch.ones(num_columns, device=DEVICE),
        torch.zeros(num_columns, dtype=torch.int32, device=DEVICE),
        scale_GN,
        zero_GN,
        scheme,
    )
    # On the CPU, whose divisions are IEEE's.
    expected_KN = encode(start_KN.cpu(), scale_GN.cpu(), zero_GN.cpu(), scheme)
    assert torch.equal(codes_KN.cpu().float(), expected_KN)
    rounded_up_KN = encode(beside_KN.cpu(), scale_GN.cpu(), zero_GN.cpu(), scheme)
    assert not torch.equal(rounded_up_KN, expected_KN)


def check_sweep_with_tf32_between_blocks() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    problem = Problem(SYMMETRIC, is_descent=False, num_columns=17 if INTERPRETED else COLUMNS)
    codes_KN = problem.sweep(tf32=True)
    assert torch.backends.cuda.matmul.fp32_precision == before
    distance_KN = problem.distance(codes_KN)
    assert float(distance_KN.max()) <= 0.5 + 2e-2
    assert float((distance_KN > 0.5 + 1e-3).float().mean()) < 1e-2


# --- grid search ---


def num_columns(scheme: Scheme) -> int:
    """The last group is a short one."""
    return scheme.group_size + 24 if INTERPRETED else COLUMNS


def awkward_weights(num_columns: int) -> Tensor:
    """Rows of zeros, of one sign, of one outlier, tiny and large ones among plain ones."""
    w_NK = draw(ROWS, num_columns)
    w_NK[0] = 0
    w_NK[1].abs_()
    w_NK[2].abs_().neg_()
    w_NK[3] = 0
    w_NK[3, ::GROUP] = -3.0
    w_NK[4] *= 1e-9
    w_NK[5] *= 1e4
    w_NK[6] *= 2.0**-18  # scales among the subnormals of float16
    w_NK[7, 5] = 100.0
    w_NK[8] = w_NK[8].bfloat16().float()
    return w_NK


def assert_same_choice(found: Grid, expected: Grid, losses: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Equal, but where the two grids' losses (float64) are."""
    differs_NG = (found.scale != expected.scale) | (found.zero != expected.zero)
    assert float(differs_NG.float().mean()) < 0.01
    found_NG, expected_NG = (loss[differs_NG] for loss in losses)
    assert bool(((found_NG - expected_NG).abs() <= tolerance * expected_NG).all())


def loss_of(w_NK: Tensor, grid: Grid, scheme: Scheme, gram_Ggg: Tensor) -> Tensor:
    w_NGg = groups_of(w_NK, scheme.group_size)
    q_NGg = quantize_dequantize(w_NGg, grid.scale.unsqueeze(-1), grid.zero.unsqueeze(-1), scheme)
    error_NGg = (q_NGg - w_NGg).double()
    return torch.einsum("nga,gab,ngb->ng", error_NGg, gram_Ggg.double(), error_NGg)


@pytest.mark.parametrize(
    ("scheme", "is_weighted", "signed"),
    [
        (SYMMETRIC, True, True),
        (SYMMETRIC, False, False),
        (Scheme(group_size=16, bits=8), True, True),
        (Scheme(group_size=128), False, True),
        (ASYMMETRIC, True, True),
        (ASYMMETRIC, False, False),
        (EIGHT_BITS, True, True),
    ],
)
def check_search_grid_is_that_of_the_reference(scheme: Scheme, is_weighted: bool, signed: bool) -> None:
    w_NK = awkward_weights(num_columns(scheme))
    importance_K = draw(w_NK.shape[1], seed=1).square() if is_weighted else None
    weight_K = torch.ones_like(w_NK[0])
    if importance_K is not None:
        importance_K[: scheme.group_size] = 0
        weight_K = importance_K
    weight_Gg = groups_of(weight_K, scheme.group_size)
    expected = search_grid(groups_of(w_NK, scheme.group_size), scheme, weight_Gg if is_weighted else None, signed)
    found = fused.search_grid(w_NK, scheme, importance_K=importance_K, signed=signed)
    gram_Ggg = torch.diag_embed(weight_Gg)
    losses = (loss_of(w_NK, found, scheme, gram_Ggg), loss_of(w_NK, expected, scheme, gram_Ggg))
    assert_same_choice(found, expected, losses, tolerance=1e-5)
    if scheme.symmetric:
        assert bool((found.scale < 0).any()) == signed


def check_search_grid_of_a_transposed_weight() -> None:
    w_NK = awkward_weights(num_columns(SYMMETRIC))
    found, transposed = fused.search_grid(w_NK, SYMMETRIC), fused.search_grid(w_NK.t().contiguous().t(), SYMMETRIC)
    assert float((found.scale != transposed.scale).float().mean()) < 1e-3  # the sums may be taken in another order


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC, EIGHT_BITS, Scheme(group_size=128)])
def check_search_grid_with_a_gram_matrix_chooses_as_the_reference(scheme: Scheme) -> None:
    w_NK = awkward_weights(num_columns(scheme))
    x_TK = draw(300, w_NK.shape[1], seed=4) + 2 * draw(300, 1, seed=5)
    gram_KK = x_TK.t() @ x_TK / 300
    num_groups, size = scheme.num_groups(len(gram_KK)), scheme.group_size
    padded_KK = torch.nn.functional.pad(gram_KK, (0, num_groups * size - len(gram_KK)) * 2)
    blocks = padded_KK.view(num_groups, size, num_groups, size).diagonal(dim1=0, dim2=2)
    gram_Ggg = blocks.permute(2, 0, 1).contiguous()
    with precision.tf32(False):
        expected = search_block_grid(w_NK, gram_KK, scheme)
    found = fused.search_grid(w_NK, scheme, gram_Ggg=gram_Ggg)
    losses = (loss_of(w_NK, found, scheme, gram_Ggg), loss_of(w_NK, expected, scheme, gram_Ggg))
    assert_same_choice(found, expected, losses, tolerance=1e-4)
    plain = search_grid(groups_of(w_NK, size), scheme)
    assert not torch.equal(found.scale, plain.scale)


def check_search_grid_leaves_scales_that_overflow_for_the_caller_to_report() -> None:
    w_NK = awkward_weights(GROUP)
    w_NK[0, 0] = 1e6
    found = fused.search_grid(w_NK, SYMMETRIC)
    assert torch.equal(found.scale, search_grid(groups_of(w_NK, GROUP), SYMMETRIC).scale)
    assert torch.isinf(found.scale).nonzero().tolist() == [[0, 0]]


# --- normal equations ---


@pytest.mark.parametrize(("group_size", "dtype"), [(32, torch.int8), (64, torch.int16), (128, torch.float32)])
def check_normal_equations(group_size: int, dtype: torch.dtype) -> None:
    limit = 127 if dtype == torch.int8 else 255
    codes_NK = torch.randint(-limit, limit + 1, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(6))
    centred_NK = codes_NK.to(DEVICE, dtype)
    x_TK = draw(300, COLUMNS, seed=4) + 2 * draw(300, 1, seed=5)
    gram_KK = x_TK.t() @ x_TK / 300
    gram_KK = (gram_KK + gram_KK.t()) / 2
    shift = torch.tensor(0.25, device=DEVICE)
    found_NGG = fused.normal_equations(centred_NK, gram_KK, shift, group_size)
    damped_KK = gram_KK.double() + 0.25 * torch.eye(COLUMNS, device=DEVICE)
    num_groups = -(-COLUMNS // group_size)
    parts_NGK = torch.zeros(ROWS, num_groups, COLUMNS, dtype=torch.float64, device=DEVICE)
    for g in range(num_groups):
        columns = slice(g * group_size, (g + 1) * group_size)
        parts_NGK[:, g, columns] = centred_NK[:, columns].double()
    expected_NGG = parts_NGK @ damped_KK @ parts_NGK.mT
    diagonal_NG = expected_NGG.diagonal(dim1=1, dim2=2).sqrt()
    error_NGG = (found_NGG - expected_NGG).abs() / (diagonal_NG.unsqueeze(1) * diagonal_NG.unsqueeze(2))
    assert float(error_NGG.max()) < 2e-5
    assert torch.equal(found_NGG, found_NGG.mT)
    if dtype == torch.float32:
        assert torch.equal(found_NGG, fused.normal_equations(centred_NK, gram_KK, 0.25, group_size))
