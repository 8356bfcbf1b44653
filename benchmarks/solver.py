"""The GPTQ solve alone: each part of it, against a loop over columns in PyTorch and against what the device can do.

    python benchmarks/solver.py
    python benchmarks/solver.py --shapes 4096x4096 --runs 3
    python benchmarks/solver.py --shapes 256x512 --tokens 1024 --device cpu   # the columns, without a GPU

Random weights; Gram matrix of correlated random tokens with channels of very different power; 4 bits, symmetric,
groups of 128, columns by activation power, one refine pass: what ``--requant w4a16`` does. Default shapes (rows x
columns): an attention projection, gate and up of one block stacked, and down, of an 8B Llama. Events on the stream,
two runs to warm up, median of ten.

- sweep: codes by GPTQ; refit: scales by least squares; descent: one pass over the codes. The parts are measured on
  their own; total is the whole function, with its checks and its statistics.
- loop: the same function in plain PyTorch, float32, one step per column (``fuse=False``); median of three.
- limit: the products that the method cannot do without, at the speed of an 8192-cubed product on this device in TF32:
  the updates between blocks of columns of sweep and descent (N K^2 each), two products with the Gram matrix (2 N K^2
  each) and the normal equations (N K^2, one triangle); and a Cholesky factorisation, measured.
- codes that differ: between total and loop. Error: what is left of the output, ``tr(E G E^T) / tr(W G W^T)``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qconv.quantize.gptq import DAMPING, gptq
from qconv.quantize.gptq import factorise as factorise_gram
from qconv.quantize.grid import Grid
from qconv.quantize.precision import tf32
from qconv.quantize.refine import descend, refit_scales
from qconv.quantize.sweep import BLOCK_COLUMNS, Kernels
from qconv.types import Scheme

SHAPES = "4096x4096,28672x4096,4096x14336"
SCHEME = Scheme(bits=4, group_size=128, activation_order=True)
WARM_UP = 2
LOOP_RUNS = 3
HEADER = (
    "shape (N x K)",
    "factorisation ms",
    "grid search ms",
    "sweep ms",
    "refit ms",
    "descent ms",
    "total ms",
    "per-column loop ms",
    "limit ms",
    "total / limit",
    "codes that differ",
    "error (loop)",
)


def milliseconds(function: Callable[[], object], device: str, runs: int, warm_up: int = WARM_UP) -> float:
    """Median over ``runs`` calls."""
    for _ in range(warm_up):
        function()
    times = []
    for _ in range(runs):
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def flops_per_second(device: str, is_tf32: bool) -> float:
    size = 8192 if device == "cuda" else 1024
    factor = torch.randn(size, size, device=device)
    with tf32(is_tf32):
        return 2 * size**3 / (milliseconds(lambda: factor @ factor, device, 10) / 1e3)


def gram_of_tokens(num_tokens: int, num_columns: int, device: str) -> Tensor:
    """``[K, K]`` float32, mean of ``x x^T`` over bfloat16 tokens ``[T, K]`` that share 256 directions."""
    power_K = torch.logspace(-1, 1, num_columns, device=device)[torch.randperm(num_columns, device=device)]
    mix_RK = torch.randn(256, num_columns, device=device) / 16
    x_TK = torch.randn(num_tokens, 256, device=device) @ mix_RK
    x_TK = (x_TK.add_(torch.randn_like(x_TK), alpha=0.5) * power_K).bfloat16().float()
    return (x_TK.t() @ x_TK).div_(num_tokens)


class Solve:
    """One weight and its Gram matrix, with what each part of the solve needs from those before it."""

    def __init__(self, num_rows: int, num_columns: int, num_tokens: int, device: str):
        torch.manual_seed(0)
        self.w_NK = torch.randn(num_rows, num_columns, device=device) * 0.02
        self.gram_KK = gram_of_tokens(num_tokens, num_columns, device)
        self.order_K = torch.argsort(self.gram_KK.diagonal(), descending=True, stable=True)
        self.kernels = Kernels.of(self.w_NK, True)
        factor = factorise_gram(self.gram_KK, DAMPING, "weight", self.order_K)
        self.u_KK, self.shift = factor.u_KK, factor.shift
        self.power_K = self.u_KK.diagonal().contiguous()
        self.importance_K = torch.empty_like(self.power_K)
        self.importance_K[self.order_K] = self.power_K.square()
        self.group_K = (self.order_K // SCHEME.group_size).to(torch.int32)
        self.grid = self.search_grid()
        self.w_KN = self.w_NK.t().index_select(0, self.order_K)
        self.grid_GN = Grid(self.grid.scale.t().contiguous(), self.grid.zero.t().contiguous())
        self.pull_KN = torch.zeros_like(self.w_KN)
        self.codes_NK = torch.empty_like(self.w_NK, dtype=torch.uint8)
        self.codes_NK[:, self.order_K] = self.sweep().t()
        self.refitted = self.refit()

    def factorise(self) -> object:
        return factorise_gram(self.gram_KK, DAMPING, "weight", self.order_K)

    def search_grid(self) -> Grid:
        return self.kernels.search_grid(self.w_NK, SCHEME, self.importance_K, True)

    def sweep(self) -> Tensor:
        pull_KN = self.pull_KN.zero_()  # the sweep overwrites it
        arguments = (self.w_KN, pull_KN, self.u_KK, self.power_K, self.group_K, self.grid_GN, SCHEME)
        return self.kernels.sweep(*arguments)

    def refit(self) -> Grid:
        return refit_scales(self.w_NK, self.gram_KK, self.shift, self.codes_NK, self.grid, SCHEME, self.kernels)

    def descend(self) -> Tensor:
        return descend(self.w_NK, self.gram_KK, self.shift, self.codes_NK, self.refitted, SCHEME, self.kernels)

    def cholesky(self) -> object:
        return torch.linalg.cholesky_ex(
            self.gram_KK + self.shift * torch.eye(len(self.gram_KK), device=self.w_NK.device)
        )


def limit_ms(solve: Solve, device: str, runs: int, speed: float) -> float:
    num_rows, num_columns = solve.w_NK.shape
    later = sum(num_columns - min(start, num_columns) for start in range(BLOCK_COLUMNS, num_columns, BLOCK_COLUMNS))
    updates = 2 * (2 * num_rows * BLOCK_COLUMNS * later)
    products = (2 * 2 + 1) * num_rows * num_columns**2
    return (updates + products) / speed * 1e3 + milliseconds(solve.cholesky, device, runs)


def row(solve: Solve, device: str, runs: int, speed: float) -> list[str]:
    parts = (solve.factorise, solve.search_grid, solve.sweep, solve.refit, solve.descend)
    cells = [f"{milliseconds(part, device, runs):.1f}" for part in parts]
    fused = gptq(solve.w_NK, solve.gram_KK, SCHEME, "weight")
    loop = gptq(solve.w_NK, solve.gram_KK, SCHEME, "weight", fuse=False)
    total = milliseconds(lambda: gptq(solve.w_NK, solve.gram_KK, SCHEME, "weight"), device, runs)
    per_column = milliseconds(
        lambda: gptq(solve.w_NK, solve.gram_KK, SCHEME, "weight", fuse=False), device, min(runs, LOOP_RUNS), warm_up=0
    )
    limit = limit_ms(solve, device, runs, speed)
    differ = (fused.linear.codes_NK != loop.linear.codes_NK).float().mean().item()
    cells += [f"{total:.1f}", f"{per_column:.0f}", f"{limit:.1f}", f"{total / limit:.1f}", f"{differ:.3%}"]
    return [*cells, f"{fused.stats.relative_error:.3e} ({loop.stats.relative_error:.3e})"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="rows x columns, separated by commas [default: %(default)s]")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device, runs = arguments.device, arguments.runs
    speed = {name: flops_per_second(device, name == "TF32") for name in ("float32", "TF32")}
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"{name}: " + ", ".join(f"{value / 1e12:.1f} TFLOP/s in {kind}" for kind, value in speed.items()) + "\n")
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER), flush=True)
    for shape in arguments.shapes.split(","):
        num_rows, num_columns = map(int, shape.split("x"))
        solve = Solve(num_rows, num_columns, arguments.tokens, device)
        print("| " + " | ".join([shape, *row(solve, device, runs, speed["TF32"])]) + " |", flush=True)


if __name__ == "__main__":
    main()
