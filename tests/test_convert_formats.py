"""Integer and float8 layouts: round trips, and decoders written bit by bit from the published layouts."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qconv.convert import FORMATS, mixed_config
from qconv.convert.bitpack import num_words, pack_last, unpack_last
from qconv.errors import CheckpointError, NumericsError, QconvError, SchemeError
from qconv.types import QuantizedLinear, Scheme
from tests import fp4_cases

INT_FORMATS = ("gptq", "gptq_v2", "awq", "pack-quantized")
BITS = {"gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8), "awq": (4,), "pack-quantized": (3, 4, 5, 6, 8)}
FP8 = Scheme(kind="float", bits=8, group_size=-1, dynamic_activations=True)
INT8 = Scheme(bits=8, group_size=-1, dynamic_activations=True)
STATIC = Scheme(kind="float", bits=8, group_size=-1, static_activations=True)
BLOCKS = Scheme(kind="float", bits=8, group_size=128, block_rows=128, dynamic_activations=True)
ONE_SCHEME = {
    "float-quantized": FP8,
    "int-quantized": INT8,
    "fp8-block": BLOCKS,
    "nvfp4-pack-quantized": fp4_cases.NVFP4,
    "mxfp4-pack-quantized": fp4_cases.MXFP4A16,
    "gpt-oss-mxfp4": fp4_cases.MXFP4A16,
    "hqq": Scheme(bits=4, group_size=32, symmetric=False),
}


def random_linear(scheme, n, k, seed=0, group_index=False, lowest_zero=0):
    if scheme.is_fp4:
        return fp4_cases.random_linear(scheme, n, k, seed)
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.num_groups(k)
    # Eight-bit mantissas within float16's normal range are exact in float16 and bfloat16.
    scales = (torch.rand(scheme.scales_shape(n, k), generator=generator) * 0.1 + 1e-3).to(torch.bfloat16).float()
    if scheme.kind == "float":
        codes = (torch.randn(n, k, generator=generator) * 100).to(torch.float8_e4m3fn)
        fields = {"codes_NK": codes, "scales_NG": scales, "zeros_NG": None, "group_index_K": None, "scheme": scheme}
        if scheme.static_activations:
            fields["scales_NG"] = scales[:1].expand_as(scales).contiguous()
            fields["input_scale"] = scales[1, :1].clone()
        return QuantizedLinear(**fields)
    draw = {"generator": generator, "dtype": torch.uint8}
    zeros = None if scheme.symmetric else torch.randint(lowest_zero, scheme.max_code + 1, (n, groups), **draw)
    index = None
    if group_index:
        index = (torch.randperm(k, generator=generator) // (k // groups)).to(torch.int32)
    return QuantizedLinear(
        codes_NK=torch.randint(0, scheme.max_code + 1, (n, k), **draw),
        scales_NG=scales,
        zeros_NG=zeros,
        group_index_K=index,
        scheme=scheme,
    )


def assert_same(left, right):
    assert left.scheme == right.scheme
    for field in ("codes_NK", "scales_NG", "zeros_NG", "group_index_K", "input_scale", "global_scale"):
        a, b = getattr(left, field), getattr(right, field)
        assert (a is None) == (b is None), field
        if a is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), field
            assert torch.equal(a.view(torch.uint8) if a.dtype == torch.float8_e4m3fn else a,
                               b.view(torch.uint8) if b.dtype == torch.float8_e4m3fn else b), field  # fmt: skip


@st.composite
def cases(draw):
    name = draw(st.sampled_from(INT_FORMATS))
    group_size = draw(st.sampled_from((-1, 32, 64)))
    scheme = Scheme(
        bits=draw(st.sampled_from(BITS[name])),
        group_size=group_size,
        symmetric=draw(st.booleans()),
        activation_order=draw(st.booleans()),
    )
    group_index = scheme.activation_order and name != "awq" and draw(st.booleans())
    n, k = 32 * draw(st.integers(1, 3)), 64 * draw(st.integers(1, 3))
    lowest_zero = 1 if name == "gptq" else 0
    return name, random_linear(scheme, n, k, draw(st.integers(0, 2**31)), group_index, lowest_zero)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_unpack_undoes_pack(case):
    name, q = case
    fmt = FORMATS[name]
    fmt.check(q, "layer", torch.bfloat16)
    tensors = fmt.pack(q, "layer", torch.bfloat16)
    back = fmt.unpack(tensors, "layer", q.scheme)
    if q.scheme.num_groups(q.codes_NK.shape[1]) == 1:  # one group: any index is the trivial one
        assert back.group_index_K is None
        back = QuantizedLinear(**{**vars(back), "group_index_K": q.group_index_K})
    assert_same(back, q)
    assert all(tensor.is_contiguous() for tensor in tensors.values())


@settings(max_examples=60, deadline=None)
@given(cases())
def test_pack_runs_on_meta_and_tells_the_truth(case):
    name, q = case
    real = FORMATS[name].pack(q, "layer", torch.float16)
    on_meta = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in vars(q).items()}
    announced = FORMATS[name].pack(QuantizedLinear(**on_meta), "layer", torch.float16)
    assert list(announced) == list(real)
    for key, tensor in announced.items():
        assert tensor.device.type == "meta"
        assert (tensor.shape, tensor.dtype) == (real[key].shape, real[key].dtype)


def test_float8_round_trip():
    q = random_linear(FP8, 24, 40)
    fmt = FORMATS["float-quantized"]
    fmt.check(q, "layer", torch.bfloat16)
    tensors = fmt.pack(q, "layer", torch.bfloat16)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()} == {
        "layer.weight": (torch.float8_e4m3fn, (24, 40)),
        "layer.weight_scale": (torch.bfloat16, (24, 1)),
    }
    assert_same(fmt.unpack(tensors, "layer", FP8), q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_static_float8_round_trip(dtype):
    q = random_linear(STATIC, 24, 40)
    fmt = FORMATS["float-quantized"]
    fmt.check(q, "layer", dtype)
    tensors = fmt.pack(q, "layer", dtype)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()} == {
        "layer.weight": (torch.float8_e4m3fn, (24, 40)),
        "layer.weight_scale": (dtype, (1,)),
        "layer.input_scale": (dtype, (1,)),
    }
    assert_same(fmt.unpack(tensors, "layer", STATIC), q)
    assert fmt.scheme_of(fmt.quantization_config(STATIC, ["layer"], []), "folder") == STATIC
    on_meta = fmt.pack(
        changed(q, **{key: getattr(q, key).to("meta") for key in ("codes_NK", "scales_NG", "input_scale")}),
        "layer",
        dtype,
    )
    assert {k: (v.dtype, v.shape) for k, v in on_meta.items()} == {k: (v.dtype, v.shape) for k, v in tensors.items()}


def test_float8_scales_of_other_tools():
    """A scale for each channel beside static inputs, and one for a tensor beside dynamic ones, are read, too."""
    fmt, q = FORMATS["float-quantized"], random_linear(FP8, 24, 40)
    channels = fmt.pack(q, "layer", torch.bfloat16) | {"layer.input_scale": torch.tensor([0.25])}
    back = fmt.unpack(channels, "layer", STATIC)
    assert torch.equal(back.scales_NG, q.scales_NG)
    assert torch.equal(back.input_scale, torch.tensor([0.25]))
    whole = random_linear(STATIC, 24, 40)
    tensors = fmt.pack(whole, "layer", torch.bfloat16)
    back = fmt.unpack(tensors, "layer", FP8)
    assert back.input_scale is None
    assert torch.equal(back.dequantize(), whole.dequantize())


def test_input_scales_that_cannot_be():
    fmt, q = FORMATS["float-quantized"], random_linear(STATIC, 24, 40)
    with pytest.raises(SchemeError, match="layer: an input scale belongs to static activations"):
        fmt.check(changed(q, input_scale=None), "layer", torch.bfloat16)
    with pytest.raises(SchemeError, match="layer: an input scale belongs to static activations"):
        fmt.check(changed(q, scheme=FP8), "layer", torch.bfloat16)
    with pytest.raises(SchemeError, match="layer: beside static activations a weight has one scale"):
        fmt.check(changed(q, scales_NG=random_linear(FP8, 24, 40).scales_NG), "layer", torch.bfloat16)
    for value in (0.0, -0.5, 0.1, float("nan")):
        with pytest.raises(NumericsError, match=r"layer: the input scale .* is not positive and exact"):
            fmt.check(changed(q, input_scale=torch.tensor([value])), "layer", torch.bfloat16)
    tensors = fmt.pack(q, "layer", torch.bfloat16)
    for bad, error, message in (
        (torch.tensor([-0.5]), CheckpointError, r"folder: tensor 'layer.input_scale' is -0.5; a scale is positive"),
        (torch.tensor([0.5, 0.5]), CheckpointError, r"'layer.input_scale': expected .*\(1\), found .* \(2,\)"),
        (torch.tensor([float("inf")]), NumericsError, "a scale of module 'layer' is NaN or infinite"),
    ):
        with pytest.raises(error, match=message):
            fmt.unpack(tensors | {"layer.input_scale": bad}, "layer", STATIC, "folder")
    with pytest.raises(CheckpointError, match=r"no tensor 'layer.input_scale'"):
        fmt.unpack({k: v for k, v in tensors.items() if "input" not in k}, "layer", STATIC, "folder")


@pytest.mark.parametrize(
    "fields",
    [{"dynamic_activations": True}, {"kind": "int"}, {"group_size": 128}, {"group_size": 128, "block_rows": 128}],
)
def test_static_activations_are_those_of_float8(fields):
    with pytest.raises(SchemeError, match="static activations are those of float8 with group size -1, and not dynamic"):
        Scheme(**{"kind": "float", "bits": 8, "group_size": -1, "static_activations": True} | fields)


# Independent decoders: explicit bit positions on numpy integers -----------------------------------


def bit_stream(words):
    """All bits of int32 words, lowest first."""
    return [(int(word) & 0xFFFFFFFF) >> bit & 1 for word in words for bit in range(32)]


def number(bits):
    return sum(bit << place for place, bit in enumerate(bits))


def gptq_by_hand(t, bits, version):
    qweight, qzeros, scales, g_idx = (t["layer." + s].numpy() for s in ("qweight", "qzeros", "scales", "g_idx"))
    n, k = qweight.shape[1], len(g_idx)
    weight = np.zeros((n, k), dtype=np.float64)
    for row in range(n):
        stream = bit_stream(qweight[:, row])
        for column in range(k):
            group = g_idx[column]
            zero = number(bit_stream(qzeros[group])[row * bits : (row + 1) * bits]) + (version == 1)
            code = number(stream[column * bits : (column + 1) * bits])
            weight[row, column] = (code - zero) * float(scales[group, row])
    return weight


def awq_by_hand(t, group_size):
    qweight, qzeros, scales = (t["layer." + s].numpy() for s in ("qweight", "qzeros", "scales"))
    k, n = qweight.shape[0], qweight.shape[1] * 8
    # Column c of eight lies at the shift that the gemm kernel's interleaving gives it.
    shift = {0: 0, 1: 16, 2: 4, 3: 20, 4: 8, 5: 24, 6: 12, 7: 28}
    weight = np.zeros((n, k), dtype=np.float64)
    for row in range(n):
        for column in range(k):
            group = column // group_size
            code = int(qweight[column, row // 8]) >> shift[row % 8] & 15
            zero = int(qzeros[group, row // 8]) >> shift[row % 8] & 15
            weight[row, column] = (code - zero) * float(scales[group, row])
    return weight


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_index", [True, False])
def test_gptq_by_hand(version, bits, symmetric, group_index):
    scheme = Scheme(bits=bits, group_size=32, symmetric=symmetric, activation_order=group_index)
    q = random_linear(scheme, 32, 64, seed=bits, group_index=group_index, lowest_zero=1)
    tensors = FORMATS["gptq" if version == 1 else "gptq_v2"].pack(q, "layer", torch.bfloat16)
    assert tensors["layer.scales"].dtype == torch.float16
    assert tensors["layer.qweight"].shape == (64 * bits // 32, 32)
    assert tensors["layer.qzeros"].shape == (2, 32 * bits // 32)
    np.testing.assert_allclose(gptq_by_hand(tensors, bits, version), q.dequantize().numpy(), rtol=1e-6)


def test_three_bits_pack_ten_one_ten_one_ten():
    """The word borders as AutoGPTQ writes them: element 10 and element 21 straddle."""
    codes = torch.randint(0, 8, (1, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    c = [int(value) for value in codes[0]]
    words = [
        sum(c[i] << (3 * i) for i in range(10)) | c[10] << 30,
        c[10] >> 2 | sum(c[11 + i] << (3 * i + 1) for i in range(10)) | c[21] << 31,
        c[21] >> 1 | sum(c[22 + i] << (3 * i + 2) for i in range(10)),
    ]
    packed = pack_last(codes, 3)
    assert [int(word) & 0xFFFFFFFF for word in packed[0]] == [word & 0xFFFFFFFF for word in words]


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_by_hand(symmetric):
    scheme = Scheme(bits=4, group_size=32, symmetric=symmetric)
    q = random_linear(scheme, 24, 64, seed=9)
    tensors = FORMATS["awq"].pack(q, "layer", torch.bfloat16)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()} == {
        "layer.qweight": (torch.int32, (64, 3)),
        "layer.qzeros": (torch.int32, (2, 3)),
        "layer.scales": (torch.float16, (2, 24)),
    }
    np.testing.assert_allclose(awq_by_hand(tensors, 32), q.dequantize().numpy(), rtol=1e-6)


def test_symmetric_zero_words():
    """The constants that serving engines' documents show for 4-bit symmetric weights."""
    q = random_linear(Scheme(bits=4, group_size=32), 32, 64)
    stored = {name: FORMATS[name].pack(q, "layer", torch.float16)["layer.qzeros"] for name in INT_FORMATS[:3]}
    assert {int(word) & 0xFFFFFFFF for word in stored["gptq"].view(-1)} == {0x77777777}
    assert {int(word) & 0xFFFFFFFF for word in stored["gptq_v2"].view(-1)} == {0x88888888}
    assert {int(word) & 0xFFFFFFFF for word in stored["awq"].view(-1)} == {0x88888888}


@settings(max_examples=100, deadline=None)
@given(st.sampled_from((2, 3, 4, 5, 6, 8)), st.integers(1, 100), st.integers(0, 2**31))
def test_bits_of_any_count(bits, count, seed):
    values = torch.randint(0, 2**bits, (3, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    words = pack_last(values, bits)
    assert words.shape == (3, num_words(count, bits))
    for row in range(3):
        stream = bit_stream(words[row])
        assert [number(stream[i * bits : (i + 1) * bits]) for i in range(count)] == values[row].tolist()
        assert not any(stream[count * bits :])
    assert torch.equal(unpack_last(words, bits, count), values)


# What does not fit --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "n", "k", "scheme", "message"),
    [
        ("gptq", 30, 64, Scheme(group_size=32), "out_features divisible by 8, got 30; 24 or 32"),
        ("gptq", 32, 60, Scheme(group_size=-1), "in_features divisible by 8, got 60; 56 or 64"),
        ("gptq_v2", 48, 64, Scheme(bits=3, group_size=32), "out_features divisible by 32, got 48; 32 or 64"),
        ("awq", 12, 64, Scheme(group_size=32), "out_features divisible by 8, got 12; 8 or 16"),
        ("awq", 16, 576, Scheme(group_size=128), "group size, got 576 and 128; use group size 64, 32 or -1"),
        ("pack-quantized", 16, 100, Scheme(group_size=64), r"got 100 and 64; use -1 \(per channel\)"),
        ("awq", 16, 64, Scheme(bits=8), "awq holds 4-bit"),
        ("gptq", 16, 64, FP8, "integer codes only"),
        ("pack-quantized", 16, 64, Scheme(bits=2), "3, 4, 5, 6 or 8"),
        ("gptq", 32, 64, Scheme(bits=5), "2, 3, 4 or 8"),
        ("float-quantized", 16, 64, Scheme(bits=8), "float8 weights with one scale per channel"),
        ("float-quantized", 16, 64, Scheme(kind="float", bits=8, group_size=-1), "dynamic activations False"),
    ],
)
def test_sizes_and_schemes_are_refused_with_advice(name, n, k, scheme, message):
    with pytest.raises(SchemeError, match=message):
        FORMATS[name].check_shapes("model.layer", n, k, scheme)


@pytest.mark.parametrize("name", INT_FORMATS)
def test_sizes_that_fit_pass(name):
    FORMATS[name].check_shapes("layer", 64, 128, Scheme(group_size=64))


def test_zero_point_zero_has_no_version_1_spelling():
    q = random_linear(Scheme(bits=4, group_size=32, symmetric=False), 32, 64)
    q.zeros_NG[3, 1] = 0
    with pytest.raises(SchemeError, match=r"layer: \d+ groups have zero point 0.*use gptq_v2"):
        FORMATS["gptq"].check(q, "layer", torch.float16)
    FORMATS["gptq_v2"].check(q, "layer", torch.float16)
    with pytest.raises(CheckpointError, match=r"stores 15, which readers"):
        FORMATS["gptq"].unpack(FORMATS["gptq"].pack(q, "layer", torch.float16), "layer", q.scheme)


def changed(q, **fields):
    return QuantizedLinear(**{**vars(q), **fields})


@pytest.mark.parametrize("name", INT_FORMATS)
def test_values_that_would_not_survive_are_refused(name):
    q = random_linear(Scheme(bits=4, group_size=32, symmetric=False), 32, 64, lowest_zero=1)
    fmt, scales = FORMATS[name], q.scales_NG
    spoiled = scales.clone()
    spoiled[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="layer: a quantization scale is NaN"):
        fmt.check(changed(q, scales_NG=spoiled), "layer", torch.bfloat16)
    with pytest.raises(NumericsError, match="not exact in"):
        fmt.check(changed(q, scales_NG=scales + 1e-5), "layer", torch.bfloat16)
    with pytest.raises(NumericsError, match="a code exceeds 15"):
        fmt.check(changed(q, codes_NK=q.codes_NK + 16), "layer", torch.bfloat16)
    with pytest.raises(NumericsError, match="a zero point exceeds 15"):
        fmt.check(changed(q, zeros_NG=q.zeros_NG + 16), "layer", torch.bfloat16)
    index = torch.full((64,), 2, dtype=torch.int32)
    with pytest.raises(QconvError, match=r"group index"):
        fmt.check(changed(q, group_index_K=index), "layer", torch.bfloat16)


def test_nan_float8_codes_are_refused():
    q = random_linear(FP8, 8, 16)
    codes = q.codes_NK.float()
    codes[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="float8 code is NaN"):
        FORMATS["float-quantized"].check(changed(q, codes_NK=codes.to(torch.float8_e4m3fn)), "layer", torch.bfloat16)


def stored(name, symmetric=True, group_index=False):
    scheme = Scheme(bits=4, group_size=32, symmetric=symmetric, activation_order=group_index)
    scheme = ONE_SCHEME.get(name, scheme)
    n = 129 if name == "fp8-block" else 32  # one row less is one block less
    q = random_linear(scheme, n, 64, group_index=group_index, lowest_zero=1)
    return FORMATS[name].pack(q, "layer", torch.float16), scheme


@pytest.mark.parametrize("name", FORMATS)
def test_every_missing_tensor_is_named(name):
    tensors, scheme = stored(name)
    for missing in tensors:
        rest = {key: value for key, value in tensors.items() if key != missing}
        with pytest.raises(CheckpointError, match=f"folder: quantized module 'layer' has no tensor '{missing}'"):
            FORMATS[name].unpack(rest, "layer", scheme, "folder")


@pytest.mark.parametrize("name", FORMATS)
def test_every_misshapen_tensor_is_named(name):
    tensors, scheme = stored(name)
    for bad in tensors:
        cut = tensors | {bad: tensors[bad][:-1] if tensors[bad].ndim else tensors[bad].view(1)}
        with pytest.raises(CheckpointError, match=r"folder: tensor 'layer"):
            FORMATS[name].unpack(cut, "layer", scheme, "folder")
        typed = tensors | {bad: tensors[bad].to(torch.float64)}
        with pytest.raises(CheckpointError, match=f"folder: tensor '{re.escape(bad)}': expected .*found torch.float64"):
            FORMATS[name].unpack(typed, "layer", scheme, "folder")


@pytest.mark.parametrize("name", FORMATS)
def test_infinite_scales_are_refused(name):
    tensors, scheme = stored(name)
    scales = next(key for key in tensors if key.endswith(("scale", "scales", "scale_inv")))
    bad = {torch.uint8: 255, torch.float8_e4m3fn: float("nan")}.get(tensors[scales].dtype, float("inf"))
    tensors[scales] = torch.full_like(tensors[scales], bad)
    with pytest.raises(NumericsError, match="a scale of module 'layer' is NaN or infinite"):
        FORMATS[name].unpack(tensors, "layer", scheme)


def test_group_index_out_of_range():
    for name, suffix in (("gptq", "g_idx"), ("pack-quantized", "weight_g_idx")):
        tensors, scheme = stored(name, group_index=True)
        tensors["layer." + suffix][5] = 2
        with pytest.raises(CheckpointError, match=rf"'layer\.{suffix}' holds a group outside 0 \.\. 1"):
            FORMATS[name].unpack(tensors, "layer", scheme)


def test_symmetric_says_the_config_but_not_the_tensors():
    for name in ("gptq", "gptq_v2", "awq"):
        tensors, _ = stored(name, symmetric=False)
        with pytest.raises(CheckpointError, match="zero points other than 8"):
            FORMATS[name].unpack(tensors, "layer", Scheme(bits=4, group_size=32))
    tensors, _ = stored("pack-quantized", symmetric=False)
    with pytest.raises(CheckpointError, match="weight_zero_point' is stored though"):
        FORMATS["pack-quantized"].unpack(tensors, "layer", Scheme(bits=4, group_size=32))
    version_1, scheme = stored("gptq")
    with pytest.raises(CheckpointError, match="'checkpoint_format'"):
        FORMATS["gptq_v2"].unpack(version_1, "layer", scheme)


# Configurations -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_scheme_comes_back_from_the_configuration(case):
    name, q = case
    has_index = q.group_index_K is not None
    config = FORMATS[name].quantization_config(q.scheme, ["a"], ["lm_head"], has_index)
    back = FORMATS[name].scheme_of(config, "folder")
    assert (back.kind, back.bits, back.group_size) == (q.scheme.kind, q.scheme.bits, q.scheme.group_size)
    if name == "awq":
        assert not back.symmetric  # AWQ files store zero points always
    else:
        assert back.symmetric == q.scheme.symmetric
    if name.startswith("gptq"):
        assert back.activation_order == has_index
    if name == "pack-quantized":
        assert back.activation_order == q.scheme.activation_order


def test_gptq_configuration_is_what_readers_require():
    config = mixed_config(FORMATS["gptq"], Scheme(), {"a": Scheme()}, ["lm_head", "model.layers.0.mlp.gate"], False)
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "true_sequential": False,
        "pack_dtype": "int32",
        "checkpoint_format": "gptq",
        "dynamic": {r"-:^model\.layers\.\d+\.mlp\.gate$": {}},
    }
    assert FORMATS["gptq"].extra_files(config) == {"quantize_config.json": config}
    assert FORMATS["gptq_v2"].quantization_config(Scheme(), [], [])["checkpoint_format"] == "gptq_v2"


def test_awq_configuration_is_what_readers_require():
    config = FORMATS["awq"].quantization_config(Scheme(symmetric=False), ["a"], ["lm_head"])
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    with pytest.raises(SchemeError, match="no group index"):
        FORMATS["awq"].quantization_config(Scheme(), ["a"], [], has_group_index=True)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("gptq", {"bits": 5}, "bits 5"),
        ("gptq", {"bits": 4, "pack_dtype": "int64"}, "words of 'int64'"),
        ("gptq", {"bits": 4, "dynamic": {"+:down": {"bits": 8}}}, r"per-module GPTQ settings \('\+:down'\)"),
        ("awq", {"bits": 4, "version": "gemv"}, "version 'gemv'"),
        ("awq", {"bits": 3}, "bits 3"),
        ("pack-quantized", {"config_groups": {}}, "exactly one config group"),
        ("pack-quantized", {"config_groups": {"a": {}, "b": {}}}, r"found \['a', 'b'\]"),
        ("pack-quantized", {"config_groups": {"a": {"weights": {"num_bits": 4, "strategy": "tensor"}}}}, "'tensor'"),
        ("float-quantized", {"config_groups": {"a": {"weights": {"num_bits": 8}}}}, "float 8-bit weights by channel"),
    ],
)
def test_configurations_that_are_not_read(name, config, message):
    with pytest.raises(CheckpointError, match=message):
        FORMATS[name].scheme_of(config, "folder")
