"""Estimates from a reference cache against float64 numpy, the file's integrity, and what a fingerprint tells apart."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from qconv.errors import CheckpointError, NumericsError, QconvError, UsageError
from qconv.records import write_train_record
from qconv.validate.cache import DEFAULT_SAMPLES, DEFAULT_TOP_K, CacheWriter, ReferenceCache
from qconv.validate.cache_format import read_cache, write_cache
from qconv.validate.cached_row import CachedRow, compress, loss_against, stable_top
from qconv.validate.fingerprint import candidate_fingerprint, check_fingerprint, file_digests, fingerprint

EVALUATION = {"source": "default-prose-eval", "seq_len": 6, "seed": 0, "dtype": "bfloat16"}
IDS = torch.arange(12).reshape(2, 6)
ROUNDING = 3e-6  # nats; float32 log-probabilities of up to some 20 nats


def log_probabilities(logits_TV: Tensor) -> Tensor:
    return torch.log_softmax(logits_TV.float(), dim=-1)


def heavy_tailed(seed: int, positions: int, vocab: int, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a reference close to Zipf's law, whose tail holds much of the mass, and of a candidate."""
    rng = np.random.default_rng(seed)
    ranks = rng.permuted(np.tile(np.arange(1, vocab + 1), (positions, 1)), axis=1)
    logits = -np.log(ranks) + rng.normal(size=ranks.shape) * 0.3
    other = logits + rng.normal(size=logits.shape) * noise
    return log_probabilities(torch.from_numpy(logits)), log_probabilities(torch.from_numpy(other))


def keep(logp_TV: Tensor, k: int, samples: int, seed: int = 0, targets_T: Tensor | None = None) -> CachedRow:
    targets_T = torch.zeros(len(logp_TV), dtype=torch.int64) if targets_T is None else targets_T
    return compress(logp_TV, targets_T, k, samples, torch.Generator().manual_seed(seed))


def kl64(p: Tensor, q: Tensor) -> np.ndarray:
    a, b = p.double().numpy(), q.double().numpy()
    return (np.exp(a) * (a - b)).sum(-1)


def grouped64(p: Tensor, q: Tensor, k: int) -> np.ndarray:
    """KL after all tokens but the k most probable of ``p`` became one outcome."""
    a, b = np.exp(p.double().numpy()), np.exp(q.double().numpy())
    order = np.argsort(-a, axis=-1, kind="stable")
    a, b = np.take_along_axis(a, order, -1), np.take_along_axis(b, order, -1)
    a = np.concatenate([a[:, :k], a[:, k:].sum(-1, keepdims=True)], -1)
    b = np.concatenate([b[:, :k], b[:, k:].sum(-1, keepdims=True)], -1)
    return np.where(a > 0, a * np.log(np.where(a > 0, a / np.where(b > 0, b, 1), 1)), 0).sum(-1)


@pytest.mark.parametrize("name", ["kl", "reverse_kl"])
def test_estimates_are_unbiased(name):
    """The mean over many seeds meets the exact value within 4.5 standard errors, computed here from p and q."""
    repeats, k, samples = 400, 8, 16
    p, q = heavy_tailed(1, 6, 500)
    exact = kl64(p, q) if name == "kl" else kl64(q, p)
    values = np.stack([keep(p, k, samples, seed).statistics(q)[name].double().numpy() for seed in range(repeats)])
    a, b = np.exp(p.double().numpy()), np.exp(q.double().numpy())
    for position in range(len(p)):
        tail = np.argsort(-a[position], kind="stable")[k:]
        mass_p, mass_q = a[position, tail].sum(), b[position, tail].sum()
        weight, x = a[position, tail] / mass_p, (b[position, tail] / mass_q) / (a[position, tail] / mass_p)
        term = mass_p * (x - 1 - np.log(x)) if name == "kl" else mass_q * (x * np.log(x) - x + 1)
        deviation = np.sqrt((weight * (term - (weight * term).sum()) ** 2).sum() / samples)
        bound = 4.5 * deviation / np.sqrt(repeats) + ROUNDING
        assert abs(values[:, position].mean() - exact[position]) < bound
        assert bound < 0.15 * exact[position]  # the test can tell a bias of that size
        # The spread over the seeds is the one that was computed: nothing else moves the estimate.
        assert values[:, position].std() == pytest.approx(deviation, rel=0.25)


def test_estimated_variance_is_that_of_the_draws():
    p, q = heavy_tailed(2, 4, 300, noise=0.15)
    columns = [keep(p, 8, 16, seed).statistics(q) for seed in range(300)]
    spread = torch.stack([one["kl"].double() for one in columns]).var(0)
    said = torch.stack([one["kl_variance"].double() for one in columns]).mean(0)
    torch.testing.assert_close(said, spread, rtol=0.3, atol=0)
    for few in (0, 1):
        assert keep(p, 8, few).statistics(q)["kl_variance"].isnan().all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    vocab=st.integers(6, 400),
    k=st.integers(5, 60),
    samples=st.integers(0, 6),
    noise=st.floats(0, 4),
)
def test_lower_bounds_hold(seed, vocab, k, samples, noise):
    p, q = heavy_tailed(seed, 3, vocab, noise)
    columns = keep(p, k, samples, seed).statistics(q)
    for name, exact in (("kl", kl64(p, q)), ("reverse_kl", kl64(q, p))):
        lower = columns[name + "_lower_bound"].double().numpy()
        assert (lower <= exact + ROUNDING + 1e-6 * exact).all()
        assert (columns[name] >= columns[name + "_lower_bound"]).all()
    np.testing.assert_allclose(columns["kl_lower_bound"], grouped64(p, q, k).clip(0), rtol=1e-5, atol=ROUNDING)


@pytest.mark.parametrize("k", [50, 64, 1000])
def test_all_tokens_kept_is_exact(k):
    p, q = heavy_tailed(3, 5, 50)
    row = keep(p, k, 8)
    columns = row.statistics(q)
    assert row.top_ids_TK.shape == (5, 50)
    assert row.sample_ids_TM.shape == (5, 0)
    assert not row.is_lower_bound
    for name, exact in (("kl", kl64(p, q)), ("reverse_kl", kl64(q, p))):
        np.testing.assert_allclose(columns[name], exact, rtol=1e-5, atol=ROUNDING)
        np.testing.assert_array_equal(columns[name], columns[name + "_lower_bound"])
    assert (columns["kl_variance"] == 0).all()


def test_one_token_in_the_tail_is_exact():
    p, q = heavy_tailed(4, 5, 50)
    columns = keep(p, 49, 2).statistics(q)
    np.testing.assert_allclose(columns["kl"], kl64(p, q), rtol=1e-5, atol=ROUNDING)
    np.testing.assert_allclose(columns["reverse_kl"], kl64(q, p), rtol=1e-5, atol=ROUNDING)


def test_no_samples_leave_lower_bounds():
    p, q = heavy_tailed(5, 5, 200)
    row = keep(p, 8, 0)
    columns = row.statistics(q)
    assert row.is_lower_bound
    assert not keep(p, 8, 1).is_lower_bound
    np.testing.assert_array_equal(columns["kl"], columns["kl_lower_bound"])
    assert (columns["kl"].double().numpy() < kl64(p, q)).all()


def test_tail_far_below_float32_is_kept():
    """A tail of e-200 underflows as a probability; its tokens are still drawn and nothing becomes NaN."""
    logits = torch.full((1, 40), -200.0)
    logits[0, :6] = torch.arange(6.0)
    logits[0, 30] = -198.0
    p = log_probabilities(logits)
    row = keep(p, 6, 64)
    assert row.log_tail_T.item() == pytest.approx(torch.logsumexp(p[0, 6:].double(), 0).item(), rel=1e-9)
    assert (row.sample_ids_TM >= 6).all()
    assert (row.sample_ids_TM == 30).float().mean() > 0.05  # has e^2 / (e^2 + 33) = 18% of the tail
    assert row.statistics(log_probabilities(torch.zeros(1, 40)))["kl"].isfinite().all()


def test_draws_follow_the_tail():
    """Chi-squared test of 40000 draws at 0.999 against the tail's conditional distribution."""
    p, _ = heavy_tailed(6, 1, 30)
    row = keep(p, 10, 40000)
    tail = np.setdiff1d(np.arange(30), row.top_ids_TK.numpy())
    assert np.isin(row.sample_ids_TM.numpy(), tail).all()
    weight = np.exp(p.double().numpy()[0, tail])
    expected = 40000 * weight / weight.sum()
    counts = np.bincount(row.sample_ids_TM.numpy()[0], minlength=30)[tail]
    assert ((counts - expected) ** 2 / expected).sum() < 43.82  # chi-squared with 19 degrees of freedom


def test_exact_columns_agree_with_numpy():
    p, q = heavy_tailed(7, 40, 300)
    targets = torch.from_numpy(np.random.default_rng(0).integers(300, size=40))
    targets[:10] = p[:10].argmax(-1)
    columns = keep(p, 16, 4, targets_T=targets).statistics(q)
    a, b = p.numpy(), q.numpy()
    order_a, order_b = np.argsort(-a, -1, kind="stable"), np.argsort(-b, -1, kind="stable")
    share = [len(set(x[:5]) & set(y[:5])) / 5 for x, y in zip(order_a, order_b, strict=True)]
    np.testing.assert_array_equal(columns["top1"], a.argmax(-1) == b.argmax(-1))
    np.testing.assert_allclose(columns["top5"], share, rtol=1e-6)
    np.testing.assert_array_equal(columns["reference_logp"], a[np.arange(40), targets])
    np.testing.assert_array_equal(columns["candidate_logp"], b[np.arange(40), targets])
    np.testing.assert_allclose(columns["confidence"], np.exp(a).max(-1), rtol=1e-6)
    np.testing.assert_array_equal(columns["reference_correct"], a.argmax(-1) == targets.numpy())
    np.testing.assert_array_equal(columns["candidate_correct"], b.argmax(-1) == targets.numpy())
    for who, values, order in (("reference", a, order_a), ("candidate", b, order_b)):
        np.testing.assert_array_equal(columns[f"{who}_top_ids"], order[:, :3])
        np.testing.assert_array_equal(columns[f"{who}_top_logp"], np.take_along_axis(values, order[:, :3], -1))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_equal_log_probabilities_come_in_order_of_id(seed, k):
    coarse = np.round(np.random.default_rng(seed).normal(size=(3, 40)) * 2) / 2
    logp = log_probabilities(torch.from_numpy(coarse).bfloat16())
    ids, values = stable_top(logp, k)
    np.testing.assert_array_equal(ids, np.argsort(-logp.numpy(), -1, kind="stable")[:, :k])
    np.testing.assert_array_equal(values, -np.sort(-logp.numpy(), -1)[:, :k])
    np.testing.assert_array_equal(ids[:, 0], logp.argmax(-1))


def test_identical_models_have_no_distance():
    p, _ = heavy_tailed(8, 7, 3000)
    columns = keep(p, 16, 8).statistics(p)
    assert float(columns["kl"].max()) < 1e-9
    assert float(columns["reverse_kl"].max()) < 1e-9
    assert columns["top1"].all()
    assert (columns["top5"] == 1).all()


def test_pieces_and_slices_give_the_same(monkeypatch):
    p, q = heavy_tailed(9, 12, 300)
    whole = keep(p, 16, 8)
    generator = torch.Generator().manual_seed(0)
    zeros = torch.zeros(12, dtype=torch.int64)
    pieces = [compress(p[part], zeros[part], 16, 8, generator) for part in (slice(0, 5), slice(5, 6), slice(6, 12))]
    monkeypatch.setattr("qconv.validate.cached_row._CHUNK_ELEMENTS", 1000)
    again = keep(p, 16, 8)
    expected = whole.statistics(q)
    for name in ("top_ids_TK", "top_logp_TK", "log_tail_T", "sample_ids_TM", "sample_logp_TM"):
        joined = torch.cat([getattr(piece, name) for piece in pieces])
        assert torch.equal(getattr(whole, name), joined), name
        assert torch.equal(getattr(whole, name), getattr(again, name)), name
    for part in (slice(0, 12), slice(2, 9)):
        for name, column in whole[part].statistics(q[part]).items():
            assert torch.equal(column, expected[name][part]), name


def test_bad_distributions_are_refused():
    p, q = heavy_tailed(10, 4, 100)
    row = keep(p, 8, 4)
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = p.clone()
        broken[2, 50] = value
        with pytest.raises(NumericsError, match="reference contain NaN or infinity"):
            keep(broken, 8, 4)
        with pytest.raises(NumericsError, match="candidate contain NaN or infinity"):
            row.statistics(broken)
    with pytest.raises(NumericsError, match="expected log-probabilities"):
        keep(p + 1, 8, 4)
    with pytest.raises(CheckpointError, match=r"4 positions of 100 tokens here, the candidate \(4, 99\)"):
        row.statistics(q[:, :99])
    with pytest.raises(UsageError, match="at least 5 top tokens"):
        CacheWriter(k=4)
    with pytest.raises(UsageError, match="no negative number of samples"):
        CacheWriter(samples=-1)


def test_loss_against_is_arithmetic():
    loss = loss_against(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.5, 3.1]), torch.tensor([0.5, 1.0, 1.5]))
    assert loss["kl_mean_exact"] == 2.0
    assert loss["kl_mean_cached"] == pytest.approx(2.2, rel=1e-6)
    assert loss["difference"] == pytest.approx(0.2, rel=1e-6)
    assert loss["rms_per_position"] == pytest.approx((0.26 / 3) ** 0.5, rel=1e-6)
    assert loss["lower_bound_mean"] == 1.0
    assert loss_against(torch.ones(2), torch.ones(2))["lower_bound_mean"] is None
    with pytest.raises(NumericsError, match="2 exact KLs cannot be compared with 3"):
        loss_against(torch.ones(2), torch.ones(3))


# The file


def write(path: Path, vocab: int = 300, k: int = 16, samples: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A cache of 3 rows of 6 tokens; returns its tokens and the log-probabilities of reference and candidate."""
    ids = torch.from_numpy(np.random.default_rng(11).integers(vocab, size=(3, 6)))
    documents = torch.tensor([[0] * 6, [0, 0, 1, 1, 1, 1], [2] * 6], dtype=torch.int32)
    p, q = heavy_tailed(12, 15, vocab)
    writer = CacheWriter(k, samples, seed)
    targets = ids[:, 1:].reshape(-1)
    rows = [writer.add(p[part], targets[part]) for part in (slice(0, 5), slice(5, 8), slice(8, 15))]
    kept = torch.cat([row.statistics(q[i : i + len(row)])["kl"] for row, i in zip(rows, (0, 5, 8), strict=True)])
    loss = loss_against(torch.from_numpy(kl64(p, q)), kept)
    writer.finish(path, ids, documents, {"fingerprint": {"tokens": "x"}, "perplexity": 12.5}, loss)
    return ids, p, q


@pytest.mark.parametrize(
    ("vocab", "k", "samples"), [(300, 16, 4), (300, 16, 0), (300, 1000, 4), (65536, 5, 2), (65537, 5, 2), (3, 64, 2)]
)
def test_round_trip_keeps_every_bit(tmp_path, vocab, k, samples):
    path = tmp_path / "reference.cache"
    ids, p, q = write(path, vocab, k, samples)
    cache = ReferenceCache.open(path)
    assert torch.equal(cache.ids_TS, ids)
    assert cache.documents_TS.tolist() == [[0] * 6, [0, 0, 1, 1, 1, 1], [2] * 6]
    assert (cache.num_rows, cache.num_positions, cache.vocab_size) == (3, 15, vocab)
    assert cache.header == {"perplexity": 12.5}
    assert cache.fingerprint == {"tokens": "x"}
    assert cache.is_lower_bound == (samples == 0)
    expected = keep(p, k, samples, targets_T=ids[:, 1:].reshape(-1))
    for row in range(3):
        part = slice(5 * row, 5 * row + 5)
        for name, value in vars(cache.row(row)).items():
            kept = getattr(expected[part], name)
            assert torch.equal(value, kept) if isinstance(kept, Tensor) else value == kept, name
        columns = cache.row(row).statistics(q[part])
        for name, column in expected[part].statistics(q[part]).items():
            torch.testing.assert_close(columns[name], column, rtol=0, atol=0, equal_nan=True)
    with safe_open(path, "np") as file:
        assert str(file.get_tensor("top_ids").dtype) == ("int32" if vocab > 65536 else "uint16")
    kept_k, kept_samples = min(k, vocab), samples if k < vocab else 0
    size = (6 if vocab <= 65536 else 8) * (kept_k + kept_samples) + 12
    assert cache.storage["bytes_per_position"] == size
    assert path.stat().st_size < 15 * size + 3 * 6 * 8 + 3000
    with pytest.raises(IndexError):
        cache.row(3)


def test_storage_losses_are_measured(tmp_path):
    _, p, q = write(tmp_path / "a")
    storage = ReferenceCache.open(tmp_path / "a").storage
    tail = 1 - np.sort(np.exp(p.double().numpy()), -1)[:, -16:].sum(-1)
    assert storage["tail_mass"]["mean"] == pytest.approx(tail.mean(), rel=1e-5)
    assert storage["tail_mass"]["p99"] == pytest.approx(np.quantile(tail, 0.99), rel=1e-5)
    assert storage["tail_mass"]["max"] == pytest.approx(tail.max(), rel=1e-5)
    assert storage["loss"]["kl_mean_exact"] == pytest.approx(kl64(p, q).mean(), rel=1e-6)


def test_equal_content_gives_equal_bytes_and_the_seed_counts(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write(tmp_path / name, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    drawn = {name: ReferenceCache.open(tmp_path / name).row(0).sample_ids_TM for name in ("a", "c")}
    assert not torch.equal(drawn["a"], drawn["c"])


def test_defaults_are_a_usable_cache():
    assert DEFAULT_TOP_K >= 5
    assert DEFAULT_SAMPLES >= 2  # a variance can be told


def test_positions_must_be_those_of_the_tokens(tmp_path):
    p, _ = heavy_tailed(13, 5, 50)
    ids = torch.arange(6)[None]
    documents = torch.zeros(1, 6, dtype=torch.int32)
    header = {"fingerprint": {}}
    writer = CacheWriter(8, 2, 0)
    with pytest.raises(CheckpointError, match="no position was added"):
        writer.finish(tmp_path / "a", ids[:0], documents[:0], header)
    writer.add(p[:4], ids[0, 1:5])
    with pytest.raises(CheckpointError, match="4 positions were added"):
        writer.finish(tmp_path / "a", ids, documents, header)
    writer.add(p[4:], ids[0, :1])
    with pytest.raises(CheckpointError, match="5 positions were added; they are not those"):
        writer.finish(tmp_path / "a", ids, documents, header)
    with pytest.raises(CheckpointError, match="had 50 tokens in its vocabulary and now has 40"):
        writer.add(log_probabilities(torch.zeros(1, 40)), ids[0, :1])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "cache"
    path.write_text("old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        write(path)
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    assert path.read_text() == "old"
    monkeypatch.undo()
    write(path)
    assert ReferenceCache.open(path).num_rows == 3
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "nowhere" / "cache")


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_truncated_file_is_refused(tmp_path, fraction):
    path = tmp_path / "cache"
    write(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(CheckpointError, match=r"truncated|not valid JSON"):
        ReferenceCache.open(path)


def test_any_flipped_byte_is_refused(tmp_path):
    path = tmp_path / "cache"
    write(path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    places = [*range(0, start, 7), *range(start, len(data), 97), len(data) - 1]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(QconvError) as caught:
            ReferenceCache.open(path)
        assert str(path) in str(caught.value)
        if place >= start:
            assert "does not match its SHA-256" in str(caught.value)
    path.write_bytes(data)
    assert ReferenceCache.open(path).num_positions == 15


def edit(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], sign: bool) -> None:
    """Rewrites a cache with changed metadata or tensors, with a digest that fits (``sign``) or the old one."""
    content, arrays = read_cache(path)
    digest = content.pop("sha256")
    change(content, arrays)
    content = {key: value for key, value in content.items() if value is not None}
    write_cache(path, content, arrays)
    if not sign:
        data = path.read_bytes()
        with safe_open(path, "np") as file:
            new = json.loads(file.metadata()["qconv_reference_cache"])["sha256"]
        path.write_bytes(data.replace(new.encode(), digest.encode()))


def test_edits_are_refused(tmp_path):
    path = tmp_path / "cache"
    write(path)
    original = path.read_bytes()
    edit(path, lambda content, arrays: None, sign=False)
    assert path.read_bytes() == original  # the helper alone damages nothing
    edits: list[Callable[[dict[str, Any], dict[str, Any]], Any]] = [
        lambda content, arrays: content["fingerprint"].update(tokens="y"),
        lambda content, arrays: content["header"].update(perplexity=1.0),
        lambda content, arrays: content["storage"].update(loss=None),
        lambda content, arrays: arrays.pop("sample_logp"),
        lambda content, arrays: arrays.update(extra=np.zeros(2)),
        lambda content, arrays: arrays.update(ids=arrays["ids"].reshape(6, 3)),
        lambda content, arrays: arrays.update(top_logp=arrays["top_logp"] + np.float32(1e-5)),
    ]
    for change in edits:
        path.write_bytes(original)
        edit(path, change, sign=False)
        with pytest.raises(CheckpointError, match="does not match its SHA-256"):
            ReferenceCache.open(path)


def _set(name: str, place: Any, value: float) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(content: dict[str, Any], arrays: dict[str, Any]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c, a: c.update(format=2), CheckpointError, "expected a reference cache of format 1, found 2"),
        (lambda c, a: c.update(format=True), CheckpointError, "format 1, found True"),
        (lambda c, a: c.update(settings=None), CheckpointError, "metadata of the reference cache is incomplete"),
        (lambda c, a: c.update(fingerprint=None), CheckpointError, "metadata of the reference cache is incomplete"),
        (lambda c, a: c["settings"].update(top_k="8"), CheckpointError, "is incomplete"),
        (lambda c, a: c["settings"].update(top_k=15), CheckpointError, "'top_ids': expected"),
        (lambda c, a: c["settings"].update(vocab_size=70000), CheckpointError, "'sample_ids': expected"),
        (lambda c, a: c["settings"].update(vocab_size=100), CheckpointError, "tokens outside the vocabulary"),
        (lambda c, a: c["settings"].update(vocab_size=10), CheckpointError, "16 top tokens of a vocabulary of 10"),
        (lambda c, a: a.pop("sample_logp"), CheckpointError, "'sample_logp': expected .*, found None"),
        (lambda c, a: a.update(extra=np.zeros(2)), CheckpointError, "'extra': expected None"),
        (lambda c, a: a.update(ids=a["ids"][:0]), CheckpointError, "expected rows of two or more tokens"),
        (lambda c, a: a.update(ids=a["ids"][:, :1]), CheckpointError, "expected rows of two or more tokens"),
        (lambda c, a: a.update(ids=a["ids"][:2]), CheckpointError, "'documents': expected"),
        (lambda c, a: a.update(top_logp=a["top_logp"].astype(np.float64)), CheckpointError, "'top_logp': expected"),
        (_set("ids", (0, 0), -1), CheckpointError, "'ids' has tokens outside"),
        (_set("top_logp", (3, 3), np.nan), NumericsError, "'top_logp' has 1 values that are no number"),
        (_set("sample_logp", (3, 3), np.nan), NumericsError, "'sample_logp' has 1 values"),
        (_set("target_logp", 2, -np.inf), NumericsError, "'target_logp' has 1 values"),
        (_set("log_tail", slice(None), -np.inf), NumericsError, "'log_tail' has 15 values"),
        (_set("log_tail", 4, 0.0), NumericsError, "probabilities sum to 1"),
    ],
)
def test_wrong_content_with_a_right_digest_is_refused(tmp_path, change, error, message):
    path = tmp_path / "cache"
    write(path)
    edit(path, change, sign=True)
    with pytest.raises(error, match=message):
        ReferenceCache.open(path)


def test_other_files_are_refused(tmp_path, tiny_llama):
    with pytest.raises(CheckpointError, match="cannot be read as a reference cache"):
        ReferenceCache.open(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="cannot be read as a reference cache"):
        ReferenceCache.open(tmp_path)
    with pytest.raises(CheckpointError, match="not a reference cache of qconv"):
        ReferenceCache.open(tiny_llama / "model.safetensors")


# Fingerprints


@pytest.fixture
def folders(tmp_path, tiny_llama) -> tuple[Path, Path]:
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(tiny_llama, model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    save_file({"base_model.model.lora_A.weight": np.ones((2, 4), np.float32)}, adapter / "adapter_model.safetensors")
    write_train_record(adapter, "nf4", "org/name", "cpu")
    return model, adapter


def _append(file: Path) -> None:
    """Other content that still reads: an object with one more space in it."""
    text = file.read_text()
    file.write_text(text.rstrip()[:-1] + " }")


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, a: _flip(m / "model.safetensors"), "the reference's weights differ: model.safetensors"),
        (lambda m, a: _append(m / "config.json"), "the reference's settings differ: config.json"),
        (lambda m, a: _flip(a / "adapter_model.safetensors"), "the adapter's weights differ: adapter_model.safetens"),
        (lambda m, a: _append(a / "adapter_config.json"), "the adapter's settings differ: adapter_config.json"),
        (lambda m, a: _append(m / "tokenizer.json"), "the tokenizer's files differ: tokenizer.json"),
        (lambda m, a: (m / "merges.txt").write_text(""), "tokenizer's files differ: merges.txt was not there"),
        (lambda m, a: (m / "tokenizer_config.json").unlink(), "files differ: tokenizer_config.json is missing"),
        (lambda m, a: (m / "chat_template.jinja").write_text("other"), "the chat template differs"),
        (lambda m, a: (m / "chat_template.jinja").unlink(), "the chat template differs: there is none now"),
        (lambda m, a: (a / "chat_template.jinja").write_text("other"), "the chat template differs"),
        (
            lambda m, a: write_train_record(a, "nf4-dq", "org/name", "cpu"),
            "how training saw the base differs: trained_on was 'nf4', is 'nf4-dq'",
        ),
        (lambda m, a: write_train_record(a, "nf4", "org/name"), "backend was 'cpu', is 'cuda'"),
    ],
)
def test_fingerprint_names_the_file_that_differs(folders, change, message):
    model, adapter = folders
    expected = json.loads(json.dumps(fingerprint(model, adapter, model, EVALUATION, IDS)))
    check_fingerprint(expected, fingerprint(model, adapter, model, EVALUATION, IDS))
    change(model, adapter)
    with pytest.raises(CheckpointError) as caught:
        check_fingerprint(expected, fingerprint(model, adapter, model, EVALUATION, IDS))
    assert message in str(caught.value)
    assert str(caught.value).count("differ") == 1  # that one thing and nothing else


@pytest.mark.parametrize(
    ("evaluation", "ids", "message"),
    [
        ({"seq_len": 7}, IDS, "the evaluation differs: seq_len was 6, is 7"),
        ({"seed": 1}, IDS, "the evaluation differs: seed was 0, is 1"),
        ({"dtype": "float32"}, IDS, "the evaluation differs: dtype was 'bfloat16', is 'float32'"),
        ({"trained_on": "16bit"}, IDS, "how training saw the base differs: trained_on was 'nf4', is '16bit'"),
        ({}, IDS + 1, "the evaluated tokens differ: 2 x 6 then, 2 x 6 now"),
        ({}, IDS.reshape(3, 4), "the evaluated tokens differ: 2 x 6 then, 3 x 4 now"),
    ],
)
def test_fingerprint_names_the_setting_that_differs(folders, evaluation, ids, message):
    model, adapter = folders
    expected = fingerprint(model, adapter, model, EVALUATION, IDS)
    found = fingerprint(model, adapter, model, EVALUATION | evaluation, ids)
    with pytest.raises(CheckpointError, match=message):
        check_fingerprint(expected, found)


def test_fingerprint_of_an_adapter_is_not_that_of_none(folders):
    model, adapter = folders
    with_it, without = (fingerprint(model, folder, model, EVALUATION, IDS) for folder in (adapter, None))
    with pytest.raises(CheckpointError, match="the cache is of an adapter, now there is none"):
        check_fingerprint(with_it, without)
    with pytest.raises(CheckpointError, match="the cache is of no adapter"):
        check_fingerprint(without, with_it)
    check_fingerprint(without, without)


def test_fingerprint_does_not_depend_on_place_or_source_name(folders, tmp_path):
    model, adapter = folders
    shutil.copytree(model, tmp_path / "copy")
    shutil.copytree(adapter, tmp_path / "adapter-copy")
    (tmp_path / "copy" / "consolidated.safetensors").write_bytes(b"not read by anybody")
    moved = fingerprint(
        tmp_path / "copy", tmp_path / "adapter-copy", tmp_path / "copy", EVALUATION | {"source": "elsewhere.txt"}, IDS
    )
    check_fingerprint(fingerprint(model, adapter, model, EVALUATION, IDS), moved)


def test_template_text_counts_and_not_its_place(folders, tmp_path):
    model, _ = folders
    expected = candidate_fingerprint(model, EVALUATION, IDS)
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    check_fingerprint(expected, candidate_fingerprint(model, EVALUATION, IDS))
    (model / "chat_template.json").unlink()
    settings_file = model / "tokenizer_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"chat_template": "{{ messages }}"}))
    check_fingerprint(expected, candidate_fingerprint(model, EVALUATION, IDS), skip=("tokenizer",))


def test_candidate_alone_is_checked_in_part(folders, tmp_path, tiny_llama):
    model, adapter = folders
    expected = fingerprint(model, adapter, model, EVALUATION, IDS)
    shutil.copytree(model, tmp_path / "candidate")
    _flip(tmp_path / "candidate" / "model.safetensors")  # a candidate has weights of its own
    check_fingerprint(expected, candidate_fingerprint(tmp_path / "candidate", EVALUATION, IDS))
    _append(tmp_path / "candidate" / "tokenizer.json")
    found = candidate_fingerprint(tmp_path / "candidate", EVALUATION, IDS + 1)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json; the evaluated tokens differ"):
        check_fingerprint(expected, found)
    with pytest.raises(CheckpointError, match="does not say what tokenizer it was made with"):
        check_fingerprint({}, {"tokenizer": {}})
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        candidate_fingerprint(tmp_path / "empty", EVALUATION, IDS)


def test_file_digests_are_sha256(folders, tmp_path):
    import hashlib

    for folder in folders:
        digests = file_digests(folder)
        for name, digest in digests.items():
            assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert set(file_digests(folders[0])) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert set(file_digests(folders[1])) == {"adapter_config.json", "adapter_model.safetensors", "qconv-train.json"}
    with pytest.raises(CheckpointError):
        file_digests(tmp_path / "absent")
    known = file_digests(folders[0], known={"model.safetensors": "made before", "another.safetensors": "of nobody"})
    assert known == file_digests(folders[0]) | {"model.safetensors": "made before"}
    stop = threading.Event()
    stop.set()
    with pytest.raises(CheckpointError, match="given up"):
        file_digests(folders[0], stop)
