"""The compressed-tensors layouts against the package itself, and through transformers' loader."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import dequantize as library_dequantize
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from qconv.checkpoint import open_checkpoint
from qconv.convert import FORMATS, dequantize
from qconv.types import QuantizedLinear, Scheme
from tests.test_convert_formats import FP8, random_linear

TINY = Path(__file__).parent / "data" / "tiny-llama"
SCHEMES = [
    Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
    for bits in (3, 4, 5, 6, 8)
    for group_size in (-1, 32)
    for symmetric in (True, False)
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.bits}-{s.group_size}-{s.symmetric}")
@pytest.mark.parametrize("shape", [(24, 96), (19, 160)], ids=str)
def test_packed_words_are_the_packages(scheme, shape):
    q = random_linear(scheme, *shape, seed=scheme.bits)
    tensors = FORMATS["pack-quantized"].pack(q, "layer", torch.bfloat16)
    signed = (q.codes_NK.int() - scheme.mid_code).to(torch.int8)
    assert torch.equal(tensors["layer.weight_packed"], pack_to_int32(signed, scheme.bits))
    assert torch.equal(unpack_from_int32(tensors["layer.weight_packed"], scheme.bits, torch.Size(shape)), signed)
    assert tensors["layer.weight_shape"].tolist() == list(shape)
    zero_point = None
    if not scheme.symmetric:
        zero_point = (q.zeros_NG.int() - scheme.mid_code).to(torch.int8)
        packed = pack_to_int32(zero_point, scheme.bits, packed_dim=0)
        assert torch.equal(tensors["layer.weight_zero_point"], packed)
    else:
        assert "layer.weight_zero_point" not in tensors
    config = FORMATS["pack-quantized"].quantization_config(scheme, ["layer"], [])
    args = QuantizationArgs(**config["config_groups"]["group_0"]["weights"])
    expected = library_dequantize(signed, q.scales_NG, zero_point, args)
    assert torch.equal(q.dequantize(), expected)


@pytest.mark.parametrize("columns", [33, 63, 100])
def test_rows_that_end_inside_a_word(columns):
    scheme = Scheme(bits=4, group_size=-1)
    q = random_linear(scheme, 7, columns)
    tensors = FORMATS["pack-quantized"].pack(q, "layer", torch.bfloat16)
    signed = (q.codes_NK.int() - 8).to(torch.int8)
    assert torch.equal(tensors["layer.weight_packed"], pack_to_int32(signed, 4))
    back = FORMATS["pack-quantized"].unpack(tensors, "layer", scheme)
    assert torch.equal(back.codes_NK, q.codes_NK)


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("pack-quantized", scheme) for scheme in SCHEMES]
    + [("pack-quantized", Scheme(activation_order=True)), ("float-quantized", FP8)],
)
def test_configuration_is_valid_for_the_package(name, scheme):
    config = FORMATS[name].quantization_config(scheme, ["model.layers.0.mlp.up_proj"], ["lm_head", "re:.*gate$"])
    json.dumps(config)
    parsed = QuantizationConfig.model_validate(config)
    weights = parsed.config_groups["group_0"].weights
    assert (parsed.format, parsed.ignore, parsed.quantization_status) == (name, ["lm_head", "re:.*gate$"], "compressed")
    assert (weights.num_bits, weights.type, weights.symmetric) == (scheme.bits, scheme.kind, scheme.symmetric)
    assert weights.strategy == ("channel" if scheme.group_size == -1 else "group")
    assert weights.actorder == ("weight" if scheme.activation_order else None)
    activations = parsed.config_groups["group_0"].input_activations
    if name == "float-quantized":
        assert (activations.strategy, activations.dynamic, activations.num_bits) == ("token", True, 8)
    else:
        assert activations is None
    # Every key we write is known to the package: nothing is dropped or invented.
    QuantizationArgs.model_validate(config["config_groups"]["group_0"]["weights"])
    assert set(config["config_groups"]["group_0"]["weights"]) <= set(QuantizationArgs.model_fields)
    assert set(config) <= set(QuantizationConfig.model_fields)


def round_to_nearest(weight, scheme):
    """A plain quantizer for these tests only; scales keep eight bits."""
    n, k = weight.shape
    size = k if scheme.group_size == -1 else scheme.group_size
    grouped = weight.float().view(n, -1, size)
    top = 448.0 if scheme.kind == "float" else scheme.mid_code - 0.5
    scales = (grouped.abs().amax(-1) / top).to(torch.bfloat16).float()
    scaled = grouped / scales[..., None]
    if scheme.kind == "float":
        codes = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        codes = (scaled.round() + scheme.mid_code).clamp(0, scheme.max_code).to(torch.uint8)
    return QuantizedLinear(
        codes_NK=codes.view(n, k), scales_NG=scales, zeros_NG=None, group_index_K=None, scheme=scheme
    )


def save_quantized(folder, name, scheme, scale_dtype):
    """tiny-llama with all linears of its blocks in a compressed-tensors format."""
    source = open_checkpoint(TINY)
    fmt = FORMATS[name]
    tensors, modules = {}, []
    for key, spec in source.specs().items():
        if key.endswith("_proj.weight"):
            module = key.removesuffix(".weight")
            modules.append(module)
            q = round_to_nearest(source.read(key), scheme)
            fmt.check(q, module, scale_dtype)
            tensors |= fmt.pack(q, module, scale_dtype)
        else:
            tensors[key] = source.read(key).to(scale_dtype)
        assert len(spec.shape) in (1, 2)
    config = dict(source.config)
    config["dtype"] = str(scale_dtype).removeprefix("torch.")
    config["quantization_config"] = fmt.quantization_config(scheme, modules, ["lm_head"])
    shutil.copytree(TINY, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("pack-quantized", Scheme(bits=4, group_size=64)),
        ("pack-quantized", Scheme(bits=8, group_size=-1)),
        ("float-quantized", FP8),
    ],
    ids=["w4a16", "w8a16", "fp8"],
)
def test_transformers_loads_the_weights_we_mean(tmp_path, name, scheme):
    """In float32 nothing rounds after the codes, so its weights must be ours exactly.

    Logits agree to 1e-4 where activations stay 16-bit or wider (order of sums); with 8-bit activations only the
    weights are compared, since the loader rounds activations too.
    """
    folder = save_quantized(tmp_path / "m", name, scheme, torch.float32)
    view = dequantize(open_checkpoint(folder))
    assert (view.kind, view.scheme) == (name, scheme)
    assert len(view.quantized_modules) == 28
    plain = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with torch.no_grad():
        for key in view.quantized_modules:
            plain.get_submodule(key).weight.copy_(view.read(key + ".weight"))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(64)[None] * 31 % 2048
    with torch.no_grad():
        expected, found = plain(tokens).logits, loaded(tokens).logits
    # The first forward has decompressed the loaded model.
    for key in view.quantized_modules:
        weight = loaded.get_submodule(key).weight
        assert torch.equal(weight.float(), view.read(key + ".weight")), key
    if name == "pack-quantized":
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    else:
        assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.99


@pytest.mark.parametrize(("name", "scheme"), [("pack-quantized", Scheme(group_size=64)), ("float-quantized", FP8)])
def test_transformers_dequantizes_to_our_weights_rounded_once(tmp_path, name, scheme):
    """With bfloat16 scales the reader multiplies in bfloat16: our float32 product, rounded once."""
    folder = save_quantized(tmp_path / "m", name, scheme, torch.bfloat16)
    view = dequantize(open_checkpoint(folder))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        loaded(torch.arange(8)[None])
    for key in view.quantized_modules:
        weight = loaded.get_submodule(key).weight
        assert torch.equal(weight.to(torch.bfloat16), view.read(key + ".weight").to(torch.bfloat16)), key
