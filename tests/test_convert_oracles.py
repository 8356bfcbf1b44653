"""Every layout that is offered, drawn at random, against decoders that share no code with `qconv.convert`.

GPTQ and AWQ: numpy decoders from the published layouts (`cli_cases.decode_gptq`: `QuantLinear.pack` of AutoGPTQ, where
version 1 stores zero points minus one and GPTQModel's ``gptq_v2`` as they are; `cli_cases.decode_awq`:
`WQLinear_GEMM.from_linear` of AutoAWQ). compressed-tensors: the decompressors of the package.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qconv.convert import FORMATS
from qconv.quantization_config import QuantizationConfig
from qconv.targets import TARGETS
from qconv.types import QuantizedLinear, Scheme
from tests.cli_cases import decode_awq, decode_gptq
from tests.test_convert_formats import FP8, INT8, assert_same, random_linear

GROUP_SIZES = (-1, 32, 64, 128)


@st.composite
def offered(draw: st.DrawFn, *targets: str) -> tuple[str, QuantizedLinear]:
    """A target, and a linear with a scheme that it takes, in a size that it holds."""
    target = TARGETS[draw(st.sampled_from(targets))]
    desc_act = target.format in ("gptq", "gptq_v2") and draw(st.booleans())
    config = QuantizationConfig(
        target=target.name,
        algorithm="gptq",
        bits=draw(st.sampled_from(target.bits)),
        group_size=draw(st.sampled_from(GROUP_SIZES)),
        symmetric=draw(st.booleans()),
        desc_act=desc_act,
    )
    n, k = 32 * draw(st.integers(1, 4)), 128 * draw(st.integers(1, 3))
    scheme = config.scheme_for([k], "model")
    q = random_linear(scheme, n, k, draw(st.integers(0, 2**31)), desc_act, lowest_zero=scheme.min_zero)
    return target.format, q


def packed(name: str, q: QuantizedLinear) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration as they would be stored."""
    fmt = FORMATS[name]
    fmt.check(q, "layer", torch.bfloat16)
    tensors = fmt.pack(q, "layer", torch.bfloat16)
    back = fmt.unpack(tensors, "layer", q.scheme)
    if back.group_index_K is None and q.group_index_K is not None:  # it was the trivial one
        back = QuantizedLinear(**{**vars(back), "group_index_K": q.group_index_K})
    assert_same(back, q)
    config = fmt.quantization_config(q.scheme, ["layer"], ["lm_head"], q.group_index_K is not None)
    found = fmt.scheme_of(config, "folder")
    symmetric = q.scheme.symmetric and name != "awq"  # which stores zero points always, and says so
    assert (found.bits, found.group_size, found.symmetric) == (q.scheme.bits, q.scheme.group_size, symmetric)
    return tensors, config


@settings(max_examples=120, deadline=None)
@given(offered("gptq", "gptq_v2"))
def test_gptq_is_what_the_published_layout_says(case: tuple[str, QuantizedLinear]) -> None:
    name, q = case
    tensors, config = packed(name, q)
    assert config["checkpoint_format"] == name
    assert torch.equal(torch.from_numpy(decode_gptq(tensors, "layer", config)), q.dequantize())


@settings(max_examples=60, deadline=None)
@given(offered("awq"))
def test_awq_is_what_the_published_layout_says(case: tuple[str, QuantizedLinear]) -> None:
    name, q = case
    tensors, config = packed(name, q)
    assert torch.equal(torch.from_numpy(decode_awq(tensors, "layer", config)), q.dequantize())


def decompressed(name: str, q: QuantizedLinear) -> Tensor:
    """By the package, with float32 scales: its product is then exact in the dtype of ours."""
    fmt = FORMATS[name]
    tensors = {key.removeprefix("layer."): tensor for key, tensor in fmt.pack(q, "layer", torch.float32).items()}
    group = fmt.quantization_config(q.scheme, ["layer"], [])["config_groups"]["group_0"]
    package = BaseCompressor.get_value_from_registry(name)
    weight: Tensor = package.decompress(tensors, QuantizationScheme(**group))["weight"]
    return weight


@settings(max_examples=80, deadline=None)
@given(offered("w4a16", "w8a16"))
def test_the_package_decompresses_packed_integers_to_our_weights(case: tuple[str, QuantizedLinear]) -> None:
    name, q = case
    packed(name, q)
    assert torch.equal(decompressed(name, q), q.dequantize())


@settings(max_examples=40, deadline=None)
@given(
    named=st.sampled_from([("int-quantized", INT8), ("float-quantized", FP8)]),
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    seed=st.integers(0, 2**31),
)
def test_the_package_decompresses_eight_bit_weights_to_ours(
    named: tuple[str, Scheme], n: int, k: int, seed: int
) -> None:
    name, scheme = named
    assert torch.equal(
        decompressed(name, random_linear(scheme, n, k, seed)), random_linear(scheme, n, k, seed).dequantize()
    )


TAKES_ASYM = [t for t in TARGETS.values() if t.symmetric is not None and t.activations is None]


@pytest.mark.parametrize("target", TAKES_ASYM, ids=lambda target: target.name)
def test_version_1_and_what_is_built_of_it_keep_zero_points_above_0(target: Any) -> None:
    config = QuantizationConfig(target=target.name, group_size=32, symmetric=False)
    assert config.scheme_for([64], "model").min_zero == (1 if target.format in ("gptq", "matmul-nbits") else 0)
