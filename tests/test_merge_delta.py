"""The numbers of one merged weight: exactness against float64, layouts, slices, and what is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qconv.errors import NumericsError
from qconv.merge import delta as delta_module
from qconv.merge import delta_weight, merge, merged_weight
from qconv.remembered import Remembered
from qconv.types import Adapter, LoraDelta
from tests.merge_cases import TensorsInMemory


def adapter_of(a_RK: Tensor, b_NR: Tensor, **more: Any) -> tuple[Adapter, LoraDelta]:
    tensors = {"A": a_RK, "B": b_NR}
    for key in ("magnitude", "b_bias"):
        if key in more:
            tensors[key] = more.pop(key)
            more[key] = key
    delta = LoraDelta(weight="x.weight", a="A", b="B", rank=len(a_RK), **{"scaling": 0.75, **more})
    return Adapter(tensors=TensorsInMemory(tensors), deltas={"x.weight": delta}, replacements={}), delta


def exact(w_NK: Tensor, a_RK: Tensor, b_NR: Tensor, scaling: float, magnitude_N: Tensor | None = None) -> Tensor:
    merged = w_NK.double() + scaling * (b_NR.double() @ a_RK.double())
    if magnitude_N is not None:
        merged = merged * (magnitude_N.double() / merged.pow(2).sum(1).sqrt())[:, None]
    return merged


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    r=st.integers(1, 9),
    seed=st.integers(0, 2**20),
    dora=st.booleans(),
    transposed=st.booleans(),
    slice_elements=st.sampled_from([1, 64, 1 << 24]),
)
def test_merged_weight_is_the_formula_in_float32(
    n: int, k: int, r: int, seed: int, dora: bool, transposed: bool, slice_elements: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, a, b = (torch.randn(shape, generator=generator) for shape in ((n, k), (r, k), (n, r)))
    w = w.bfloat16()
    magnitude = torch.rand(n, generator=generator) + 0.5
    adapter, delta = adapter_of(a, b, transposed=transposed, **({"magnitude": magnitude} if dora else {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_module, "SLICE_ELEMENTS", slice_elements)
        found = merged_weight(w.T.contiguous() if transposed else w, adapter, delta)
    expected = exact(w, a, b, 0.75, magnitude if dora else None)
    assert found.dtype is torch.float32
    torch.testing.assert_close((found.T if transposed else found).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_delta_weight_is_what_merging_adds(transposed: bool) -> None:
    torch.manual_seed(1)
    a, b = torch.randn(3, 7), torch.randn(5, 3)
    adapter, delta = adapter_of(a, b, transposed=transposed)
    w = torch.randn(7, 5) if transposed else torch.randn(5, 7)
    update = delta_weight(adapter, delta)
    assert update.shape == w.shape
    assert update.dtype is torch.float32
    torch.testing.assert_close(merged_weight(w, adapter, delta), w + update, rtol=0, atol=2e-6)


def test_update_below_the_resolution_of_16_bits_survives() -> None:
    """An update of 2**-12 of the weight: bfloat16 anywhere on the way would lose it."""
    w = torch.ones(4, 4, dtype=torch.bfloat16)
    adapter, delta = adapter_of(torch.ones(1, 4), torch.full((4, 1), 2.0**-12), scaling=1.0)
    assert torch.equal(merged_weight(w, adapter, delta), torch.full((4, 4), 1 + 2.0**-12))


def test_the_weight_given_is_not_changed() -> None:
    w = torch.ones(4, 4)
    adapter, delta = adapter_of(torch.ones(1, 4), torch.ones(4, 1))
    merged_weight(w, adapter, delta)
    assert torch.equal(w, torch.ones(4, 4))


def test_dora_row_norms_are_the_magnitudes() -> None:
    torch.manual_seed(2)
    magnitude = torch.rand(6) + 0.1
    adapter, delta = adapter_of(torch.randn(2, 9), torch.randn(6, 2), magnitude=magnitude)
    found = merged_weight(torch.randn(6, 9), adapter, delta)
    torch.testing.assert_close(torch.linalg.vector_norm(found, dim=1), magnitude)


def test_dora_row_of_norm_zero() -> None:
    w = torch.ones(3, 4)
    w[1] = 0
    b = torch.ones(3, 1)
    b[1] = 0
    adapter, delta = adapter_of(torch.ones(1, 4), b, magnitude=torch.ones(3))
    with pytest.raises(NumericsError, match=r"'x\.weight'.*norm 0"):
        merged_weight(w, adapter, delta)


def test_factors_that_a_view_remembers_are_not_changed() -> None:
    """AdaLoRA multiplies A by its singular values, every time."""
    tensors = {"a": torch.randn(2, 4), "b": torch.randn(3, 2), "e": torch.tensor([[2.0], [3.0]])}
    adapter = Adapter(tensors=Remembered(TensorsInMemory(tensors)), deltas={}, replacements={})
    delta = LoraDelta(weight="x.weight", a="a", b="b", rank=2, scaling=1.0, singular="e")
    wanted = tensors["b"] @ (tensors["a"] * tensors["e"])
    for _ in range(2):
        torch.testing.assert_close(merged_weight(torch.zeros(3, 4), adapter, delta), wanted)


def test_base_that_is_not_finite() -> None:
    w = torch.ones(3, 4)
    w[2, 3] = float("nan")
    adapter, delta = adapter_of(torch.ones(1, 4), torch.ones(3, 1))
    with pytest.raises(NumericsError, match=r"'x\.weight'.*base"):
        merged_weight(w, adapter, delta)


def test_update_that_overflows() -> None:
    adapter, delta = adapter_of(torch.full((1, 4), 3e38), torch.full((3, 1), 10.0))
    with pytest.raises(NumericsError, match=r"'x\.weight'.*overflows"):
        merged_weight(torch.ones(3, 4), adapter, delta)


def test_view_names_a_bias_that_is_not_finite() -> None:
    adapter, _ = adapter_of(torch.ones(1, 4), torch.ones(3, 1), b_bias=torch.ones(3))
    base = TensorsInMemory({"x.weight": torch.ones(3, 4), "x.bias": torch.tensor([0.0, float("inf"), 0.0])})
    view = merge(base, [adapter])
    assert view.changed == {"x.weight", "x.bias"}
    with pytest.raises(NumericsError, match=r"x\.bias"):
        view.read("x.bias")


def test_base_that_stores_an_equal_head_beside_a_tied_embedding() -> None:
    """Some checkpoints hold both; a LoRA on the head changes the stored head and unties the config."""
    embedding = torch.randn(10, 4)
    base = TensorsInMemory(
        {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}, {"tie_word_embeddings": True}
    )
    delta = LoraDelta(weight="lm_head.weight", a="A", b="B", rank=1, scaling=1.0)
    tensors = TensorsInMemory({"A": torch.ones(1, 4), "B": torch.ones(10, 1)})
    view = merge(base, [Adapter(tensors=tensors, deltas={"lm_head.weight": delta}, replacements={})])
    assert view.config["tie_word_embeddings"] is False
    assert base.config["tie_word_embeddings"] is True
    assert torch.equal(view.read("lm_head.weight"), embedding + 1)
    assert torch.equal(view.read("model.embed_tokens.weight"), embedding)


@pytest.mark.parametrize("says", [{}, {"tie_word_embeddings": None}])
def test_config_silent_about_ties_and_no_head_stored(says: dict[str, Any]) -> None:
    base = TensorsInMemory({"transformer.wte.weight": torch.ones(10, 4)}, says)
    delta = LoraDelta(weight="lm_head.weight", a="A", b="B", rank=1, scaling=1.0)
    tensors = TensorsInMemory({"A": torch.ones(1, 4), "B": torch.ones(10, 1)})
    view = merge(base, [Adapter(tensors=tensors, deltas={"lm_head.weight": delta}, replacements={})])
    assert view.config["tie_word_embeddings"] is False
    assert torch.equal(view.read("lm_head.weight"), torch.full((10, 4), 2.0))


def test_text_part_of_a_composite_config_follows() -> None:
    base = TensorsInMemory(
        {"model.language_model.embed_tokens.weight": torch.ones(10, 4)},
        {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True, "vocab_size": 10}},
    )
    tensors = TensorsInMemory({"E": torch.zeros(12, 4), "H": torch.ones(12, 4)})
    replacements = {"model.language_model.embed_tokens.weight": "E", "lm_head.weight": "H"}
    view = merge(base, [Adapter(tensors=tensors, deltas={}, replacements=replacements)])
    assert view.config == {
        "tie_word_embeddings": False,
        "text_config": {"tie_word_embeddings": False, "vocab_size": 12},
    }
    assert base.config["text_config"]["vocab_size"] == 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_gpu_merges_as_the_cpu_does_also_when_tf32_is_on(precision: str) -> None:
    torch.manual_seed(4)
    a, b, w = torch.randn(16, 512), torch.randn(384, 16), torch.randn(384, 512)
    adapter, delta = adapter_of(a, b, magnitude=torch.rand(384) + 0.5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = merged_weight(w.cuda(), adapter, delta).cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(
        found.double(), exact(w, a, b, 0.75, adapter.tensors.read("magnitude")), rtol=1e-5, atol=1e-5
    )
