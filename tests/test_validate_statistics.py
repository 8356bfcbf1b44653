"""Statistics against an independent float64 computation in numpy, and intervals against their own claim."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qconv.errors import NumericsError
from qconv.validate.bootstrap import Bootstrap, clusters
from qconv.validate.distribution import Distribution, top_tokens
from qconv.validate.statistics import Kept, PairStatistics, effect_retained, pair_columns

ROWS, POSITIONS, VOCABULARY = 3, 40, 5000


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(ROWS, POSITIONS, VOCABULARY)).astype(np.float32) * 3
    reference[:, ::4, 7] += 12  # some confident positions
    candidate = reference + rng.normal(size=reference.shape).astype(np.float32) * 0.3
    return {
        "reference": reference,
        "candidate": candidate,
        "targets": np.where(rng.random((ROWS, POSITIONS)) < 0.4, 7, rng.integers(VOCABULARY, size=(ROWS, POSITIONS))),
    }


def columns_of(p: Distribution, q: Distribution, targets_T: Tensor) -> dict[str, Tensor]:
    return pair_columns(Kept.of(p, targets_T), Kept.of(q, targets_T), p.divergence_sums(q), targets_T)


@pytest.fixture(scope="module")
def pair(arrays: dict[str, np.ndarray[Any, Any]]) -> PairStatistics:
    pair = PairStatistics("total")
    for row in range(ROWS):
        p, q = (Distribution(torch.from_numpy(arrays[name][row]), name) for name in ("reference", "candidate"))
        pair.add(
            columns_of(p, q, torch.from_numpy(arrays["targets"][row])), torch.arange(POSITIONS) // 4 + 10 * row, row
        )
    return pair


def log_softmax(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


@pytest.fixture(scope="module")
def expected(arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    p, q = log_softmax(arrays["reference"]), log_softmax(arrays["candidate"])
    targets = arrays["targets"][..., None]
    top = {name: np.argsort(-x, axis=-1)[..., :5] for name, x in (("p", p), ("q", q))}
    overlap = [len(set(a) & set(b)) / 5 for a, b in zip(top["p"].reshape(-1, 5), top["q"].reshape(-1, 5), strict=True)]
    return {
        "kl": (np.exp(p) * (p - q)).sum(-1).ravel(),
        "reverse_kl": (np.exp(q) * (q - p)).sum(-1).ravel(),
        "top1": (p.argmax(-1) == q.argmax(-1)).ravel(),
        "top5": np.array(overlap),
        "p_target": np.take_along_axis(p, targets, -1).ravel(),
        "q_target": np.take_along_axis(q, targets, -1).ravel(),
        "confidence": np.exp(p.max(-1)).ravel(),
        "p_right": (p.argmax(-1) == arrays["targets"]).ravel(),
        "q_right": (q.argmax(-1) == arrays["targets"]).ravel(),
    }


@pytest.mark.parametrize("direction", ["kl", "reverse_kl"])
def test_divergences(pair: PairStatistics, expected: dict[str, np.ndarray[Any, Any]], direction: str) -> None:
    summary, values = pair.summary()[direction], expected[direction]
    np.testing.assert_allclose(pair[direction].numpy(), values, rtol=1e-6, atol=1e-6)
    wanted = {"mean": values.mean(), "max": values.max(), "median": np.median(values)}
    wanted |= {
        f"p{str(100 * q).rstrip('0').rstrip('.').replace('.', '_')}": np.quantile(values, q) for q in (0.9, 0.95)
    }
    wanted |= {"p99": np.quantile(values, 0.99), "p99_9": np.quantile(values, 0.999)}
    assert wanted.keys() == summary.keys() - {"interval_95"}
    for name, value in wanted.items():
        assert summary[name] == pytest.approx(value, abs=1e-6, rel=1e-6), name


def test_agreement_and_probabilities(pair: PairStatistics, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    summary = pair.summary()
    assert summary["top1_agreement"]["value"] == expected["top1"].mean()
    assert summary["top5_agreement"]["value"] == pytest.approx(expected["top5"].mean(), abs=1e-7)
    difference = np.exp(expected["q_target"]) - np.exp(expected["p_target"])
    assert summary["probability_difference"]["mean"] == pytest.approx(difference.mean(), abs=1e-6)
    assert summary["probability_difference"]["rms"] == pytest.approx(np.sqrt((difference**2).mean()), abs=1e-6)
    right, was_right = expected["q_right"], expected["p_right"]
    assert summary["flips"]["correct_to_wrong"] == (was_right & ~right).sum()
    assert summary["flips"]["wrong_to_correct"] == (right & ~was_right).sum()
    assert summary["flips"]["value"] == (right != was_right).mean() > 0


def test_perplexity(pair: PairStatistics, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    summary = pair.summary()
    assert summary["perplexity"] == pytest.approx(np.exp(-expected["q_target"].mean()), rel=1e-6)
    assert summary["reference_perplexity"] == pytest.approx(np.exp(-expected["p_target"].mean()), rel=1e-6)
    log_ratio = (expected["p_target"] - expected["q_target"]).mean()
    assert summary["log_perplexity_ratio"]["value"] == pytest.approx(log_ratio, abs=1e-6)
    assert summary["perplexity_ratio"]["value"] == pytest.approx(np.exp(log_ratio), rel=1e-6)


def test_by_confidence_and_histogram(pair: PairStatistics, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    summary = pair.summary()
    assert sum(row["positions"] for row in summary["by_confidence"]) == ROWS * POSITIONS
    for row in summary["by_confidence"]:
        high = row["to"] if row["to"] < 1 else 2
        inside = (expected["confidence"] >= row["from"]) & (expected["confidence"] < high)
        assert row["positions"] == inside.sum()
        if inside.any():
            assert row["kl_mean"] == pytest.approx(expected["kl"][inside].mean(), abs=1e-6)
            assert row["top1_agreement"] == pytest.approx(expected["top1"][inside].mean())
    edges = np.array(summary["histogram"]["log10_edges"])
    counts, _ = np.histogram(np.clip(np.log10(expected["kl"]), edges[0], edges[-1]), edges)
    assert summary["histogram"]["counts"] == counts.tolist()


def test_every_gateable_statistic_has_value_and_interval(pair: PairStatistics) -> None:
    from qconv.gate_metrics import METRICS

    of_pairs = [name.removeprefix("merge.") for name in METRICS if name.startswith("merge.")]
    assert len(of_pairs) > 10
    for name in of_pairs:
        value, (low, high) = pair.measure(name)
        assert low <= value <= high or name == "kl_p99_9", (name, low, value, high)
    with pytest.raises(KeyError):
        pair.measure("kl_p42")


def test_identical_models_have_no_distance() -> None:
    p = Distribution(torch.randn(7, 1000), "same")
    columns = columns_of(p, p, torch.zeros(7, dtype=torch.long))
    assert columns["kl"].max() == columns["reverse_kl"].max() == 0
    assert columns["top1"].all()
    assert columns["top5"].eq(1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("vocabulary", [10, 5000])
def test_bad_logits_are_refused(bad: float, vocabulary: int) -> None:
    logits = torch.randn(3, vocabulary)
    logits[1, 4] = bad
    with pytest.raises(NumericsError, match="the candidate"):
        Distribution(logits, "the candidate")


def test_nan_is_found_whatever_its_sign() -> None:
    logits = torch.randn(3, 5000)
    logits[1, 4] = torch.tensor(-4194304, dtype=torch.int32).view(torch.float32)  # what inf - inf gives on x86
    assert logits[1, 4].isnan()
    with pytest.raises(NumericsError, match="the candidate"):
        Distribution(logits, "the candidate")


def test_a_logit_of_minus_infinity_has_no_divergence() -> None:
    p, q = torch.randn(3, 5000), torch.randn(3, 5000)
    q[1, 4] = float("-inf")
    with pytest.raises(NumericsError, match="candidate"):
        Distribution(p, "reference").divergences(Distribution(q, "candidate"))


@pytest.mark.parametrize("size", [5, 100, 1281, 2048, 49152, 50257])
def test_top_tokens(size: int) -> None:
    logits = torch.randn(6, size)
    logits[0, -1] = 50.0  # in what is left over after whole blocks
    logits[1] = logits[1].sort(descending=True).values  # all in one block
    logits[2:] = (logits[2:] * 2).round()  # nearly all equal: the lowest ids come first
    values, ids = top_tokens(logits, 5)
    wanted = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, wanted.values[:, :5])
    assert torch.equal(ids, wanted.indices[:, :5])


def test_interval_covers_the_true_mean() -> None:
    """The 95% interval must miss the true mean in about 5% of draws, with few and with many documents."""
    generator = torch.Generator().manual_seed(1)
    for documents, length in ((6, 20), (30, 10)):
        misses = 0
        owner = torch.arange(documents).repeat_interleave(length)
        for _ in range(200):
            level = torch.randn(documents, generator=generator)  # tokens of a document go together
            values = 2 + level[owner] + 0.3 * torch.randn(documents * length, generator=generator)
            low, high = Bootstrap(owner, resamples=1000).mean(values)
            misses += not low <= 2 <= high
        assert 2 <= misses <= 20  # binomial(200, 0.05) leaves this range once in a thousand


def test_tokens_of_a_document_do_not_count_as_independent() -> None:
    owner = torch.arange(8).repeat_interleave(100)
    level = torch.randn(8, generator=torch.Generator().manual_seed(0))
    low, high = Bootstrap(owner).mean(level[owner])
    alone_low, alone_high = Bootstrap(torch.arange(800)).mean(level[owner])
    assert high - low > 5 * (alone_high - alone_low)


def test_quantile_interval_agrees_with_explicit_resampling() -> None:
    generator = np.random.default_rng(3)
    owner = np.repeat(np.arange(12), generator.integers(20, 60, 12))
    values = generator.exponential(size=len(owner)) + np.repeat(generator.normal(size=12) ** 2, np.bincount(owner))
    found = Bootstrap(torch.from_numpy(owner), resamples=4000).quantile(torch.from_numpy(values), 0.9)
    draws = []
    for _ in range(4000):
        picked = np.concatenate([values[owner == d] for d in generator.integers(12, size=12)])
        draws.append(np.quantile(picked, 0.9, method="inverted_cdf"))
    # With 12 documents the expanded levels are 1.1% and 98.9% (Hesterberg 2015, section 3.2).
    wanted = np.quantile(draws, [0.0107, 0.9893])
    assert found == pytest.approx(wanted, rel=0.06)


def test_one_document_cannot_be_resampled() -> None:
    low, high = Bootstrap(torch.zeros(50, dtype=torch.long)).mean(torch.rand(50))
    assert (low, high) == (float("-inf"), float("inf"))


def test_rows_stand_in_for_documents_when_those_are_few() -> None:
    rows = torch.arange(12).repeat_interleave(5)
    assert len(clusters(torch.zeros(60, dtype=torch.int32), rows).unique()) == 12
    assert len(clusters(torch.arange(60) % 30, rows).unique()) == 30


def test_effect_retained() -> None:
    def of(kl: list[float]) -> PairStatistics:
        pair = PairStatistics("x")
        for row, value in enumerate(kl):
            pair.add({"kl": torch.full((4,), value)}, torch.full((4,), row), row)
        return pair

    base = of([0.4, 0.2, 0.6] * 3)
    assert effect_retained(of([0.004, 0.002, 0.006] * 3), base)["value"] == pytest.approx(0.99)
    kept = effect_retained(base, base)
    assert kept["value"] == pytest.approx(0.0)
    assert kept["interval_95"] == pytest.approx([0.0, 0.0])  # the same draws on both sides
    longer = of([0.004, 0.002, 0.006] * 3 + [9.0])  # positions that the base has not seen do not count
    assert effect_retained(longer, base)["value"] == pytest.approx(0.99)
    with pytest.raises(NumericsError, match="changes no output"):
        effect_retained(base, of([0.0] * 9))
