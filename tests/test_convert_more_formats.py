"""int-quantized, fp8 with block scales, and written bitsandbytes 4-bit: round trips, and the readers themselves."""

import json
import re
import shutil
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.utils.quantization_config import FineGrainedFP8Config

from qconv.checkpoint import open_checkpoint
from qconv.convert import FORMATS, Bnb4bit, dequantize, encode_linear, meta_linear, read_linear
from qconv.errors import CheckpointError, NumericsError, SchemeError
from qconv.quantize.fp8 import quantize_per_block
from qconv.quantize.int8 import fake_quantize_inputs, quantize_per_channel
from qconv.types import Scheme
from tests.cli_cases import logits_of, mean_kl
from tests.test_convert_bnb import save_folder
from tests.test_convert_formats import BLOCKS, FP8, INT8, assert_same, changed, random_linear

TINY = Path(__file__).parent / "data" / "tiny-llama"
NUM_LINEARS = 28
KINDS = ("nf4", "nf4-dq", "fp4", "fp4-dq")


def quantized(w, name, scheme):
    """By the algorithm that the format is for."""
    if name == "fp8-block":
        return quantize_per_block(w, scheme, "w")
    return quantize_per_channel(w, scheme, "w")


def small_model(folder, pack, config, dtype):
    """tiny-llama with what ``pack(weight, module)`` gives for every linear of its blocks."""
    source = open_checkpoint(TINY)
    tensors = {}
    for key in source.specs():
        if key.endswith("_proj.weight"):
            tensors |= pack(source.read(key).float(), key.removesuffix(".weight"))
        else:
            tensors[key] = source.read(key).to(dtype)
    shutil.copytree(TINY, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = dict(source.config) | {"dtype": str(dtype).removeprefix("torch."), "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def integer_or_block_model(folder, name, scheme, dtype):
    fmt = FORMATS[name]

    def pack(w, module):
        q = quantized(w, name, scheme)
        fmt.check(q, module, dtype)
        return fmt.pack(q, module, dtype)

    return small_model(folder, pack, fmt.quantization_config(scheme, [], ["lm_head"]), dtype)


def plain_model_of(view, dtype=torch.float32):
    """tiny-llama with the weights of a view."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype).eval()
    with torch.no_grad():
        for module in view.quantized_modules:
            model.get_submodule(module).weight.copy_(view.read(module + ".weight"))
    return model


def loaded(folder, **options):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] | info["unexpected_keys"] | {key for key, *_ in info["mismatched_keys"]}
    return model.eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.arange(128).view(2, 64) * 31 % 2048


# int-quantized ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 70), k=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_int8_round_trip(n, k, seed):
    q, fmt = random_linear(INT8, n, k, seed), FORMATS["int-quantized"]
    fmt.check(q, "layer", torch.bfloat16)
    tensors = fmt.pack(q, "layer", torch.bfloat16)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()} == {
        "layer.weight": (torch.int8, (n, k)),
        "layer.weight_scale": (torch.bfloat16, (n, 1)),
    }
    assert torch.equal(tensors["layer.weight"].int(), q.codes_NK.int() - 128)
    assert_same(fmt.unpack(tensors, "layer", INT8), q)


def test_int8_tensors_are_the_packages():
    """Its compressor makes our bytes of the weight that ours decode to, and decodes them to our weight."""
    fmt = FORMATS["int-quantized"]
    w = torch.randn(24, 96, generator=torch.Generator().manual_seed(3)) * 0.05
    q = quantize_per_channel(w, INT8, "w")
    ours = {key.removeprefix("layer."): value for key, value in fmt.pack(q, "layer", torch.float32).items()}
    group = fmt.quantization_config(INT8, ["layer"], [])["config_groups"]["group_0"]
    scheme, package = QuantizationScheme(**group), BaseCompressor.get_value_from_registry("int-quantized")
    theirs = package.compress({"weight": q.dequantize(), "weight_scale": q.scales_NG}, scheme)
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert tensor.dtype == ours[key].dtype
        assert torch.equal(tensor, ours[key]), key
    assert torch.equal(package.decompress(dict(ours), scheme)["weight"], q.dequantize())


def test_int8_configuration_is_valid_for_the_package():
    config = FORMATS["int-quantized"].quantization_config(INT8, ["up"], ["lm_head"])
    parsed = QuantizationConfig.model_validate(config)
    group = parsed.config_groups["group_0"]
    assert (parsed.format, parsed.ignore) == ("int-quantized", ["lm_head"])
    weights, inputs = group.weights, group.input_activations
    assert (weights.num_bits, weights.type, weights.strategy, weights.symmetric) == (8, "int", "channel", True)
    assert (inputs.num_bits, inputs.type, inputs.strategy, inputs.symmetric) == (8, "int", "token", True)
    assert (weights.dynamic, inputs.dynamic) == (False, True)
    assert set(config["config_groups"]["group_0"]["input_activations"]) <= set(QuantizationArgs.model_fields)
    assert FORMATS["int-quantized"].scheme_of(config, "folder") == INT8


def test_transformers_loads_int_quantized_and_computes_our_logits(tmp_path, tokens):
    """With inputs rounded as the package rounds them, logits are ours; as engines round them, nearly so."""
    folder = integer_or_block_model(tmp_path / "m", "int-quantized", INT8, torch.float32)
    view = dequantize(open_checkpoint(folder))
    assert (view.kind, view.scheme, len(view.quantized_modules)) == ("int-quantized", INT8, NUM_LINEARS)
    model = loaded(folder, dtype=torch.float32)
    found = logits_of(model, tokens)
    for module in view.quantized_modules:  # the first forward has decompressed the loaded model
        assert torch.equal(model.get_submodule(module).weight, view.read(module + ".weight")), module

    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)

    def as_the_package(x):
        scale, zero = compute_dynamic_scales_and_zp(value=x, args=args, module=None)
        return fake_quantize(x, scale, zero, args)

    def logits_with(round_inputs):
        plain = plain_model_of(view)
        for module in view.quantized_modules:
            linear = plain.get_submodule(module)
            linear.register_forward_pre_hook(lambda _, inputs: (round_inputs(inputs[0]), *inputs[1:]))
        return logits_of(plain, tokens)

    weight_only = logits_of(plain_model_of(view), tokens)
    torch.testing.assert_close(logits_with(as_the_package), found, rtol=0, atol=1e-4)
    assert (weight_only - found).abs().max() > 0.01  # the activations do matter
    # The package divides by absmax / 127.5, vLLM and we by absmax / 127: as far apart as either from no rounding,
    # a KL of 0.00025 here.
    ours = logits_with(lambda x: fake_quantize_inputs(x, INT8))
    assert mean_kl(found, ours) < 2 * mean_kl(found, weight_only) < 0.001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"num_bits": 3}}, r"\('int', 3, 'channel', True\)"),
        ({"weights": {"num_bits": 4, "strategy": "group"}}, "group_size is None"),
        ({"weights": {"strategy": "group", "group_size": 64}}, "'group'"),
        ({"weights": {"symmetric": False}}, r"8, 'channel', False"),
        ({"input_activations": {"symmetric": False}}, r"8, 'token', False"),
        ({"input_activations": {"type": "float"}}, r"\('float', 8, 'token', True\)"),
        ({"input_activations": {"dynamic": False}}, "static input scales are not read"),
        ({"input_activations": None}, "found .type, bits"),
    ],
    ids=str,
)
def test_other_int_quantized_schemes_are_refused(change, message):
    config = FORMATS["int-quantized"].quantization_config(INT8, [], [])
    group = config["config_groups"]["group_0"]
    for key, fields in change.items():
        group[key] = None if fields is None else group[key] | fields
    with pytest.raises(CheckpointError, match=rf"folder: quantization_config: .*{message}"):
        FORMATS["int-quantized"].scheme_of(config, "folder")


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(bits=8, group_size=-1),
        Scheme(bits=4, group_size=-1, dynamic_activations=True),
        Scheme(bits=8, group_size=64, dynamic_activations=True),
        Scheme(bits=8, group_size=-1, symmetric=False, dynamic_activations=True),
        FP8,
    ],
    ids=str,
)
def test_int_quantized_holds_one_scheme(scheme):
    with pytest.raises(SchemeError, match="int-quantized holds symmetric 8-bit integer"):
        FORMATS["int-quantized"].check_shapes("layer", 32, 64, scheme)


# fp8 with block scales ----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 300), k=st.integers(1, 300), rows=st.integers(2, 130), columns=st.integers(2, 130))
def test_block_round_trip_and_values(n, k, rows, columns):
    scheme = Scheme(kind="float", bits=8, group_size=columns, block_rows=rows, dynamic_activations=True)
    q, fmt = random_linear(scheme, n, k, n * k), FORMATS["fp8-block"]
    tensors = fmt.pack(q, "layer", torch.bfloat16)
    assert tensors["layer.weight_scale_inv"].dtype == torch.float32
    assert tensors["layer.weight_scale_inv"].shape == (-(-n // rows), -(-k // columns))
    assert_same(fmt.unpack(tensors, "layer", scheme), q)
    of_row, of_column = torch.arange(n)[:, None] // rows, torch.arange(k)[None] // columns
    assert torch.equal(q.dequantize(), q.codes_NK.float() * q.scales_NG[of_row, of_column])
    first, last = n // 3, max(n // 3 + 1, n - n // 4)
    part = q.rows(slice(first, last))
    assert torch.equal(part.dequantize(), q.dequantize()[first:last])
    assert part.scales_NG.shape[0] == last - first


def test_rows_of_integers_keep_their_zero_points():
    q = random_linear(Scheme(bits=4, group_size=32, symmetric=False), 24, 64)
    assert torch.equal(q.rows(slice(5, 9)).dequantize(), q.dequantize()[5:9])


def test_blocks_decode_as_transformers_decodes_them():
    q = random_linear(BLOCKS, 384, 256)
    decode = Fp8Dequantize(None)._dequantize_one
    assert torch.equal(decode(q.codes_NK, q.scales_NG, output_dtype=torch.float32), q.dequantize())
    assert torch.equal(decode(q.codes_NK, q.scales_NG, output_dtype=torch.bfloat16), q.dequantize().bfloat16())


def test_transformers_misreads_partial_blocks_which_is_why_they_are_not_written():
    q = random_linear(BLOCKS, 192, 256)
    decoded = Fp8Dequantize(None)._dequantize_one(q.codes_NK, q.scales_NG, output_dtype=torch.float32)
    assert not torch.equal(decoded, q.dequantize())
    with pytest.raises(SchemeError, match="layer: fp8-block needs out_features divisible by 128, got 192"):
        FORMATS["fp8-block"].check(q, "layer", torch.bfloat16)
    with pytest.raises(SchemeError, match="layer: fp8-block needs in_features divisible by 128, got 576"):
        FORMATS["fp8-block"].check_shapes("layer", 128, 576, BLOCKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transformers_loads_blocks_and_computes_our_logits(tmp_path, tokens, dtype):
    """On a CPU it decodes while loading, and does not round activations."""
    folder = integer_or_block_model(tmp_path / "m", "fp8-block", BLOCKS, dtype)
    view = dequantize(open_checkpoint(folder))
    assert (view.kind, view.scheme, len(view.quantized_modules)) == ("fp8-block", BLOCKS, NUM_LINEARS)
    model = loaded(folder, dtype=dtype)
    for module in view.quantized_modules:
        weight = model.get_submodule(module).weight
        assert weight.dtype == dtype
        assert torch.equal(weight, view.read(module + ".weight").to(dtype)), module
    expected = logits_of(plain_model_of(view, dtype), tokens)
    assert torch.equal(logits_of(model, tokens), expected)
    assert not torch.equal(expected, logits_of(AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype), tokens))


def test_block_configuration_is_what_transformers_keeps():
    config = FORMATS["fp8-block"].quantization_config(BLOCKS, ["up"], ["lm_head"])
    assert config == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    parsed = FineGrainedFP8Config.from_dict(dict(config))
    assert (parsed.activation_scheme, parsed.weight_block_size, parsed.scale_fmt) == ("dynamic", [128, 128], "float")
    assert parsed.modules_to_not_convert == ["lm_head"]
    assert FORMATS["fp8-block"].scheme_of(config, "folder") == BLOCKS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_block_size": None}, "weight_block_size as two whole numbers above 1, found None"),
        ({"weight_block_size": [128]}, r"found \[128\]"),
        ({"weight_block_size": [128, -128]}, r"found \[128, -128\]"),
        ({"weight_block_size": [128, True]}, "found"),
        ({"activation_scheme": "static"}, "activation_scheme 'dynamic', found 'static'"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt 'float', found 'ue8m0'"),
        ({"fmt": "e5m2"}, "fmt 'e4m3', found 'e5m2'"),
        ({"expert_dtype": "fp4"}, "found 'fp4'"),
    ],
    ids=str,
)
def test_other_fp8_checkpoints_are_refused(change, message):
    config = FORMATS["fp8-block"].quantization_config(BLOCKS, [], []) | change
    with pytest.raises(CheckpointError, match=f"folder: quantization_config: of quant_method fp8, .*{message}"):
        FORMATS["fp8-block"].scheme_of(config, "folder")


def test_schemes_that_fp8_block_does_not_hold():
    for scheme in (FP8, INT8, Scheme(kind="float", bits=8, group_size=128, block_rows=128)):
        with pytest.raises(SchemeError, match="fp8-block holds float8 weights in blocks of"):
            FORMATS["fp8-block"].check_scheme(scheme)
    for fields in ({"block_rows": 0}, {"kind": "int"}, {"group_size": -1}):
        with pytest.raises(SchemeError, match="rows share a scale in float8 blocks only"):
            Scheme(**({"kind": "float", "bits": 8, "group_size": 128, "block_rows": 128} | fields))


def test_values_that_blocks_cannot_store_are_refused():
    q, fmt = random_linear(BLOCKS, 128, 256), FORMATS["fp8-block"]
    fmt.check(changed(q, scales_NG=q.scales_NG + 1e-5), "layer", torch.bfloat16)  # any float32 scale
    with pytest.raises(NumericsError, match="scale is NaN or infinite"):
        fmt.check(changed(q, scales_NG=q.scales_NG * torch.inf), "layer", torch.bfloat16)
    with pytest.raises(NumericsError, match="float8 code is NaN"):
        codes = torch.full((128, 256), torch.nan).to(torch.float8_e4m3fn)
        fmt.check(changed(q, codes_NK=codes), "layer", torch.bfloat16)


def test_blocks_whose_scales_do_not_fit_are_named(tmp_path):
    fmt, q = FORMATS["fp8-block"], random_linear(BLOCKS, 256, 256)
    tensors = fmt.pack(q, "layer", torch.bfloat16)
    config = {"quantization_config": fmt.quantization_config(BLOCKS, [], []) | {"weight_block_size": [64, 128]}}
    view = dequantize(save_folder(tmp_path / "m", tensors, config))
    name = "layer.weight_scale_inv"
    with pytest.raises(CheckpointError, match=re.escape(f"{name!r}: expected") + r".*\(4, 2\), found .*\(2, 2\)"):
        view.read("layer.weight")
    config["quantization_config"]["weight_block_size"] = [128, 128]
    view = dequantize(save_folder(tmp_path / "n", tensors | {name: torch.full((2, 2), torch.inf)}, config))
    with pytest.raises(NumericsError, match="a scale of module 'layer' is NaN or infinite"):
        view.read("layer.weight")
    with pytest.raises(CheckpointError, match=r"a scale 'layer\.weight_scale_inv' but no weight"):
        dequantize(save_folder(tmp_path / "o", {name: tensors[name]}, config))


# bitsandbytes -------------------------------------------------------------------------------------


def library(weight, kind):
    return bnb.quantize_4bit(weight, quant_type=kind[:3], compress_statistics=kind.endswith("-dq"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_written_tensors_are_bitsandbytes_own(kind, dtype):
    w = (torch.randn(48, 448, generator=torch.Generator().manual_seed(1)) * 0.04).to(dtype)
    packed, state = library(w, kind)
    theirs = {"layer.weight": packed}
    theirs |= {f"layer.weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    fmt, q = Bnb4bit(kind), encode_linear(w, kind, dtype, "layer")
    fmt.check(q, "layer")
    ours = fmt.pack(q, "layer")
    assert ours.keys() == theirs.keys()
    assert {"layer" + suffix for suffix in fmt.suffixes} == ours.keys()
    for key, tensor in theirs.items():
        if "quant_state" in key:  # the same words; ours end in blanks
            assert bytes(ours[key].tolist()).rstrip(b" ") == bytes(tensor.tolist()), key
        else:
            assert ours[key].dtype == tensor.dtype
            assert torch.equal(ours[key], tensor), key
    assert torch.equal(q.dequantize(), bnb.dequantize_4bit(packed, state))
    assert torch.equal(bnb.QuantState.from_dict({k.removeprefix("layer.weight."): v for k, v in ours.items()
                                                 if k != "layer.weight"}, "cpu").absmax, state.absmax)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 5), kind=st.sampled_from(KINDS), exponent=st.integers(-30, 30))
def test_layout_is_known_before_the_numbers(n, k, kind, exponent):
    """The JSON has a length that no offset changes."""
    w = torch.randn(n, 64 * k, generator=torch.Generator().manual_seed(n)) * 10.0**exponent
    real = Bnb4bit(kind).pack(encode_linear(w, kind, torch.bfloat16, "w"), "layer")
    announced = Bnb4bit(kind).pack(meta_linear(n, 64 * k, kind, torch.bfloat16), "layer")
    assert list(announced) == list(real)
    for key, tensor in announced.items():
        assert (tensor.shape, tensor.dtype) == (real[key].shape, real[key].dtype), key


@pytest.mark.parametrize("kind", KINDS)
def test_stored_parts_come_back(tmp_path, kind):
    w = torch.randn(48, 448, generator=torch.Generator().manual_seed(2))
    q = encode_linear(w, kind, torch.bfloat16, "layer")
    source = save_folder(tmp_path / "m", Bnb4bit(kind).pack(q, "layer"))
    back = read_linear(source, "layer", kind)
    for field, value in vars(q).items():
        found = getattr(back, field)
        same = torch.equal(found, value) and found.dtype == value.dtype if torch.is_tensor(value) else found == value
        assert same, field
    view = dequantize(source)
    assert view.kind == Bnb4bit(kind).name
    assert torch.equal(view.read("layer.weight"), q.dequantize())
    with pytest.raises(CheckpointError, match=r"no tensor|expected a matrix of"):
        read_linear(source, "layer", next(other for other in KINDS if other != kind))


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq"])
def test_transformers_loads_nf4_that_we_wrote(tmp_path, tokens, kind):
    fmt, dtype = Bnb4bit(kind), torch.bfloat16

    def pack(w, module):
        q = encode_linear(w, kind, dtype, module)
        fmt.check(q, module)
        return fmt.pack(q, module)

    folder = small_model(tmp_path / "m", pack, fmt.quantization_config(dtype, ["lm_head"]), dtype)
    view = dequantize(open_checkpoint(folder))
    model = loaded(folder)
    for module in view.quantized_modules:
        weight = model.get_submodule(module).weight
        decoded = bnb.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(decoded, view.read(module + ".weight")), module
    assert len(view.quantized_modules) == NUM_LINEARS
    # The library's own quantizer gives the same model from the same weights (tiny-llama is stored in bfloat16).
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=kind == "nf4-dq",
        bnb_4bit_compute_dtype=dtype,
    )
    quantized_by_it = AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype, quantization_config=options).eval()
    assert torch.equal(logits_of(model, tokens), logits_of(quantized_by_it, tokens))
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    quantized_by_it.save_pretrained(tmp_path / "theirs")
    saved = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert written | {"llm_int8_skip_modules": None} == saved
    theirs, ours = load_file(tmp_path / "theirs" / "model.safetensors"), load_file(folder / "model.safetensors")
    assert theirs.keys() == ours.keys()


def test_bitsandbytes_refusals():
    fmt = Bnb4bit("nf4-dq")
    with pytest.raises(SchemeError, match="layer: bnb-nf4-dq needs in_features divisible by its blocks of 64, got 96"):
        fmt.check_shapes("layer", 8, 96)
    q = encode_linear(torch.ones(4, 64), "nf4", torch.bfloat16, "w")
    with pytest.raises(SchemeError, match=r"layer: expected nf4-dq .*got nf4"):
        fmt.check(q, "layer")
    with pytest.raises(SchemeError, match="table of values is not that of nf4"):
        Bnb4bit("nf4").check(type(q)(**{**vars(q), "quant_map": q.quant_map * 2}), "layer")
    with pytest.raises(NumericsError, match="layer: a quantization scale is NaN or infinite"):
        Bnb4bit("nf4").check(type(q)(**{**vars(q), "absmax_B": q.absmax_B * torch.inf}), "layer")
    with pytest.raises(NumericsError, match="up_proj: holds NaN"):
        encode_linear(torch.full((2, 64), torch.nan), "nf4", torch.bfloat16, "up_proj")
