"""The kernels that statistics of logits use on a GPU, against the plain PyTorch that they stand for and float64.

Whether Triton interprets is settled when it is first imported, which another test may have done. So the functions named
``check_*`` run in a process of their own: interpreted on a CPU, and compiled where there is CUDA, with more positions.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qconv.errors import NumericsError
from qconv.validate import distribution
from qconv.validate.distribution import Distribution, FiniteChecks, divergences_from, is_fused, top_tokens
from qconv.validate.statistics import Kept, pair_columns
from tests.kernel_cases import run_checks

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
POSITIONS = 6 if DEVICE == "cpu" else 300
VOCABULARIES = [3, 1281, 5000] if DEVICE == "cpu" else [3, 100, 1281, 4096, 50257, 128256]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def test_interpreted_on_a_cpu() -> None:
    run_checks(__file__, interpreted=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_on_cuda() -> None:
    run_checks(__file__, interpreted=False)


def turn_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "available", lambda tensor: False)


def pair_of_logits(vocabulary: int, dtype: torch.dtype, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Two models' logits, some positions confident; the second one's rows are parts of longer ones."""
    generator = torch.Generator().manual_seed(vocabulary)
    reference = torch.randn(POSITIONS, vocabulary, generator=generator) * 3
    reference[::4, min(7, vocabulary - 1)] += 12
    candidate = reference + torch.randn(POSITIONS, vocabulary, generator=generator) * noise
    wide = torch.full((POSITIONS, vocabulary + 5), float("nan"), dtype=dtype, device=DEVICE)  # must not be read
    wide[:, 2 : 2 + vocabulary] = candidate.to(dtype)
    return reference.to(dtype).to(DEVICE), wide[:, 2 : 2 + vocabulary]


def log_softmax(logits: Tensor) -> np.ndarray[Any, Any]:
    x = logits.double().cpu().numpy()
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("noise", [0.3, 0.003])
def check_divergences(vocabulary: int, dtype: torch.dtype, noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = pair_of_logits(vocabulary, dtype, noise)
    assert all(is_fused(each) for each in logits)
    sums = divergence_sums(*logits)
    log_p, log_q = (log_softmax(each) for each in logits)
    kl, reverse_kl = (values.cpu().numpy() for values in divergences_from(sums))
    np.testing.assert_allclose(kl, (np.exp(log_p) * (log_p - log_q)).sum(-1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(reverse_kl, (np.exp(log_q) * (log_q - log_p)).sum(-1), rtol=1e-6, atol=1e-6)
    turn_off(monkeypatch)
    assert not any(is_fused(each) for each in logits)
    wanted = divergence_sums(*logits)
    assert sums.dtype == wanted.dtype == torch.float64
    assert sums.shape == wanted.shape
    torch.testing.assert_close(sums[:, :2], wanted[:, :2], rtol=1e-6, atol=0)
    torch.testing.assert_close(sums[:, 2:], wanted[:, 2:], rtol=1e-6, atol=1e-6 * float(wanted[:, :2].max()))


def divergence_sums(p_TV: Tensor, q_TV: Tensor) -> Tensor:
    return Distribution(p_TV, "reference").divergence_sums(Distribution(q_TV, "candidate"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def check_totals(vocabulary: int, dtype: torch.dtype) -> None:
    for logits in pair_of_logits(vocabulary, dtype):
        found = Distribution(logits, "x").log_total.cpu().numpy()
        np.testing.assert_allclose(found, -log_softmax(logits).max(-1), rtol=1e-6, atol=1e-6)


def check_weights_of_every_size_are_exact() -> None:
    """A row of one logit at 0 and the rest at ``-depth``: what the rest adds shows the exponential's own error."""
    depth = torch.linspace(0, 86, 12 if DEVICE == "cpu" else 4000)
    logits = -depth[:, None].expand(-1, 2049).clone()
    logits[:, 0] = 0
    logits = logits.to(DEVICE)
    found = Distribution(logits, "x").divergence_sums(Distribution(logits * 0.5, "y")).cpu().numpy()
    deep = logits[:, 1].double().cpu().numpy()
    rest = found[1:, 2] / (2048 * deep[1:] * 0.5)  # sum of p d; exact but for the exponential
    np.testing.assert_allclose(rest, np.exp(deep[1:]), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [3, 100, 1281, 5000] if DEVICE == "cpu" else [3, 5, 100, 1281, 50257, 128256])
def check_top_tokens_with_ties(size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(POSITIONS, size + 3, generator=generator)[:, :size]
    logits[0, -1] = 50.0
    logits[1] = logits[1].sort(descending=True).values  # all in one block
    logits[2:] = (logits[2:] * 2).round()  # nearly all equal; zeros of both signs among them
    logits[3] = -3.0
    logits[4] = float("-inf")
    logits[5, ::2] = -0.0
    logits[5, 1::2] = 0.0
    logits = logits.to(dtype).to(DEVICE)
    assert is_fused(logits)
    k = min(5, size)
    values, ids = top_tokens(logits, k)
    wanted = logits.cpu().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values.cpu(), wanted.values[:, :k])
    assert torch.equal(ids.cpu(), wanted.indices[:, :k])
    turn_off(monkeypatch)
    plain_values, plain_ids = top_tokens(logits, k)
    assert values.dtype == plain_values.dtype
    assert ids.dtype == plain_ids.dtype
    assert torch.equal(values, plain_values)
    assert torch.equal(ids, plain_ids)


def check_top_tokens_put_nan_above_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(POSITIONS, 5000)
    logits[1, 4000] = torch.tensor(-4194304, dtype=torch.int32).view(torch.float32)  # what inf - inf gives on x86
    logits[1, 4500] = float("nan")
    logits[1, 7] = float("inf")
    logits[2, 9] = float("inf")
    logits = logits.to(DEVICE)
    assert is_fused(logits)
    values, ids = top_tokens(logits, 5)
    assert ids[1, :3].tolist() == [4000, 4500, 7]
    assert values[1, :3].isnan().tolist() == [True, True, False]
    assert ids[2, 0] == 9
    turn_off(monkeypatch)
    assert torch.equal(ids, top_tokens(logits, 5)[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("vocabulary", [10, 5000])
def check_bad_logits_are_refused(bad: float, vocabulary: int) -> None:
    logits = torch.randn(3, vocabulary)
    logits[1, 4] = bad
    with pytest.raises(NumericsError, match="the candidate"):
        Distribution(logits.to(DEVICE), "the candidate")


@pytest.mark.parametrize("side", [0, 1])
def check_minus_infinity_has_no_divergence_but_a_total(side: int) -> None:
    logits = [torch.randn(3, 5000) for _ in range(2)]
    logits[side][1, 4] = float("-inf")
    p, q = (Distribution(each.to(DEVICE), name) for each, name in zip(logits, ("reference", "candidate"), strict=True))
    checks = FiniteChecks()
    sums = p.divergence_sums(q, checks)
    assert sums[:, :2].isfinite().all()
    assert sums.isfinite().all(1).tolist() == [True, False, True]
    with pytest.raises(NumericsError, match="reference or candidate"):
        checks.settle()
    with pytest.raises(NumericsError, match="reference or candidate"):
        p.divergences(q)
    total = np.log(np.exp(logits[side].double().numpy()).sum(-1))
    np.testing.assert_allclose(Distribution(logits[side].to(DEVICE), "x").log_z.cpu().numpy(), total, rtol=1e-6)


def check_identical_models_have_no_distance() -> None:
    p = Distribution(pair_of_logits(5000, torch.bfloat16)[0], "same")
    assert all(values.max() == 0 for values in p.divergences(p))


def check_columns_are_those_of_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = pair_of_logits(5000, torch.bfloat16)
    targets = torch.arange(POSITIONS, device=DEVICE)

    def columns() -> dict[str, Tensor]:
        p, q = (Distribution(each, "x") for each in logits)
        return pair_columns(Kept.of(p, targets), Kept.of(q, targets), p.divergence_sums(q), targets)

    found = columns()
    turn_off(monkeypatch)
    for name, wanted in columns().items():
        assert found[name].dtype == wanted.dtype
        torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-6, msg=name)
