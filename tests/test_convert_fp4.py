"""Layouts of 4-bit floats: round trips, and the decompressors of compressed-tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qconv.convert import FORMATS
from qconv.errors import CheckpointError, NumericsError, SchemeError
from qconv.types import Scheme
from tests.fp4_cases import LAYOUTS, NVFP4A16, decompressed, random_linear, scheme_of_the_package
from tests.test_convert_formats import assert_same

NVFP4 = FORMATS["nvfp4-pack-quantized"]
CASES = [(name, scheme) for name, schemes in LAYOUTS.items() for scheme in schemes]


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(CASES),
    n=st.integers(1, 40),
    groups=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    divisor=st.one_of(st.sampled_from([1.0, 2.0**-20, 2.0**20]), st.floats(2.0**-10, 2.0**20, width=32)),
)
def test_the_package_decompresses_to_our_weights(
    case: tuple[str, Scheme], n: int, groups: int, seed: int, divisor: float
) -> None:
    """bfloat16 is what the package gives: ours rounded once. Global scales of other tools are no powers of two."""
    name, scheme = case
    q = random_linear(scheme, n, groups * scheme.group_size, seed, divisor)
    fmt = FORMATS[name]
    fmt.check(q, "layer", torch.bfloat16)
    tensors = fmt.pack(q, "layer", torch.bfloat16)
    back = fmt.unpack(tensors, "layer", scheme)
    assert_same(back, q)
    assert torch.equal(decompressed(name, tensors, scheme), q.dequantize().to(torch.bfloat16))


@pytest.mark.parametrize(("name", "scheme"), CASES, ids=str)
def test_the_package_packs_our_tensors(name: str, scheme: Scheme) -> None:
    """Its compressor is given our weights and scales, and stores the same bytes (but for negative zeros)."""
    q = random_linear(scheme, 24, 4 * scheme.group_size, 0)
    q = dataclasses.replace(q, codes_NK=q.codes_NK.where(q.codes_NK != 8, 0))
    ours = {key.removeprefix("layer."): t for key, t in FORMATS[name].pack(q, "layer", torch.bfloat16).items()}
    package = BaseCompressor.get_value_from_registry(name)
    local: dict[str, Tensor] = {"weight": q.dequantize(), "weight_scale": q.scales_NG}
    if q.global_scale is not None:
        local |= {"weight_scale": q.scales_NG * q.global_scale, "weight_global_scale": q.global_scale}
    if q.input_scale is not None:
        local["input_global_scale"] = q.input_scale
    theirs = package.compress(local, scheme_of_the_package(name, scheme))
    assert {key: (t.dtype, t.shape) for key, t in theirs.items()} == {
        key: (t.dtype, t.shape) for key, t in ours.items()
    }
    for key, tensor in theirs.items():
        assert torch.equal(tensor.view(torch.uint8), ours[key].view(torch.uint8)), key


@pytest.mark.parametrize(("name", "scheme"), CASES, ids=str)
def test_layout_is_known_before_the_numbers(name: str, scheme: Scheme) -> None:
    q = random_linear(scheme, 24, 64, 0)
    fmt = FORMATS[name]
    real = fmt.pack(q, "layer", torch.bfloat16)
    on_meta = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in vars(q).items()}
    announced = fmt.pack(type(q)(**on_meta), "layer", torch.bfloat16)
    assert {k: (t.dtype, t.shape) for k, t in real.items()} == {k: (t.dtype, t.shape) for k, t in announced.items()}
    assert all(tensor.is_contiguous() for tensor in real.values())


@pytest.mark.parametrize(("name", "scheme"), CASES, ids=str)
def test_configuration_is_valid_for_the_package(name: str, scheme: Scheme) -> None:
    fmt = FORMATS[name]
    config = fmt.quantization_config(scheme, ["layer"], ["lm_head"])
    theirs = QuantizationConfig.model_validate(config)
    assert (theirs.format, theirs.ignore) == (name, ["lm_head"])
    assert fmt.scheme_of(config, "folder") == scheme
    # and as the package writes it
    assert fmt.scheme_of(theirs.model_dump(mode="json"), "folder") == scheme


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"group_size": 32},
            r"of nvfp4-pack-quantized are read weights with .* found \['float', 4, True, 'tensor_group', 32, False\]",
        ),
        ({"type": "int"}, r".* found \['int', 4, True, 'tensor_group', 16, False\]"),
        ({"strategy": "group"}, r".* found \['float', 4, True, 'group', 16, False\]"),
        ({"symmetric": False}, r".* found \['float', 4, False, 'tensor_group', 16, False\]"),
    ],
)
def test_other_numbers_than_the_layout_has_are_refused(change: dict[str, Any], message: str) -> None:
    config = NVFP4.quantization_config(NVFP4A16, ["layer"], [])
    config["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(CheckpointError, match=f"folder: quantization_config: {message}"):
        NVFP4.scheme_of(config, "folder")


def test_what_cannot_be_stored_is_refused() -> None:
    q = random_linear(NVFP4A16, 4, 32, 0)
    with pytest.raises(NumericsError, match="layer: a scale is no e4m3 number divided by the global scale 64"):
        NVFP4.check(dataclasses.replace(q, scales_NG=q.scales_NG * 1.01), "layer", torch.bfloat16)
    with pytest.raises(
        NumericsError, match="layer: nvfp4-pack-quantized stores a global scale that is finite and positive, found 0"
    ):
        NVFP4.check(dataclasses.replace(q, global_scale=torch.tensor([0.0])), "layer", torch.bfloat16)
    with pytest.raises(NumericsError, match="layer: a code exceeds 15"):
        NVFP4.check(dataclasses.replace(q, codes_NK=q.codes_NK + 1), "layer", torch.bfloat16)
    with pytest.raises(SchemeError, match="layer: nvfp4-pack-quantized needs in_features divisible by the group size"):
        NVFP4.check_shapes("layer", 4, 24, NVFP4A16)
    with pytest.raises(SchemeError, match="holds 4-bit floats in groups of 16 with e4m3 scales, got 4-bit int"):
        NVFP4.check_scheme(Scheme(bits=4, group_size=16))


def test_damaged_tensors_are_named() -> None:
    tensors = NVFP4.pack(random_linear(NVFP4A16, 4, 32, 0), "layer", torch.bfloat16)
    nan = torch.full((4, 2), 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for change, error, message in (
        ({"layer.weight_global_scale": torch.tensor([-1.0])}, CheckpointError, "is -1; a global scale is positive"),
        ({"layer.weight_scale": nan}, NumericsError, "folder: a scale of module 'layer' is NaN or infinite"),
        ({"layer.weight_scale": tensors["layer.weight_scale"][:, :1]}, CheckpointError, r"expected .*\(4, 2\)"),
        ({"layer.weight_packed": torch.zeros(4, 16)}, CheckpointError, "expected torch.uint8"),
    ):
        with pytest.raises(error, match=message):
            NVFP4.unpack(tensors | change, "layer", NVFP4A16, "folder")
    del tensors["layer.weight_global_scale"]
    with pytest.raises(CheckpointError, match=r"no tensor 'layer.weight_global_scale'"):
        NVFP4.unpack(tensors, "layer", NVFP4A16, "folder")
