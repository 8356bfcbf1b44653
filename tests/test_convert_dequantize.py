"""The dequantized view: what it detects, what it presents, what it refuses."""

from dataclasses import replace

import pytest
import torch

from qconv.checkpoint import open_checkpoint
from qconv.convert import FORMATS, DequantizedCheckpoint, dequantize
from qconv.errors import CheckpointError
from qconv.types import Scheme
from tests.test_convert_bnb import TINY, save_folder, stored, uneven
from tests.test_convert_formats import ONE_SCHEME, assert_same, random_linear

MODULES = ("model.layers.0.up", "model.layers.0.down")


def schemes(name):
    if name in ONE_SCHEME:
        return [ONE_SCHEME[name]]
    return [Scheme(bits=4, group_size=32, symmetric=symmetric) for symmetric in (True, False)]


CASES = [(name, scheme) for name in FORMATS for scheme in schemes(name)]


def quantized_folder(folder, name, scheme, scale_dtype=torch.bfloat16):
    fmt = FORMATS[name]
    linears = {
        module: random_linear(scheme, 32, 64 + 64 * i, seed=i, lowest_zero=1) for i, module in enumerate(MODULES)
    }
    if name == "hqq":  # floats, which readers round once more
        linears = {m: replace(q, zeros_NG=q.zeros_NG.float(), computed_in=scale_dtype) for m, q in linears.items()}
    tensors = {"model.embed_tokens.weight": torch.ones(8, 4, dtype=torch.bfloat16)}
    for module, q in linears.items():
        tensors |= fmt.pack(q, module, scale_dtype)
    tensors["model.norm.weight"] = torch.full((4,), 2.0, dtype=torch.bfloat16)
    config = {
        "model_type": "llama",
        "dtype": "bfloat16",
        "quantization_config": fmt.quantization_config(scheme, MODULES, ["lm_head"]),
    }
    return save_folder(folder, tensors, config), linears


@pytest.mark.parametrize(("name", "scheme"), CASES, ids=str)
def test_presents_logical_weights(tmp_path, name, scheme):
    source, linears = quantized_folder(tmp_path / "m", name, scheme)
    view = dequantize(source)
    assert view.kind == name
    assert sorted(view.quantized_modules) == sorted(MODULES)
    assert view.config == {"model_type": "llama", "dtype": "bfloat16"}
    assert view.location == str(tmp_path / "m")
    specs = {key: (spec.shape, spec.dtype) for key, spec in view.specs().items()}
    assert specs == {
        "model.embed_tokens.weight": ((8, 4), torch.bfloat16),
        "model.layers.0.up.weight": ((32, 64), torch.float32),
        "model.layers.0.down.weight": ((32, 128), torch.float32),
        "model.norm.weight": ((4,), torch.bfloat16),
    }
    for module, q in linears.items():
        assert torch.equal(view.read(module + ".weight"), q.dequantize())
        stored_q = view.read_quantized(module)
        if name == "awq" and scheme.symmetric:  # AWQ files say zero_point: true always
            assert torch.equal(stored_q.zeros_NG, torch.full_like(stored_q.zeros_NG, 8))
            assert torch.equal(stored_q.codes_NK, q.codes_NK)
        else:
            assert view.scheme == scheme
            assert_same(stored_q, q)
    assert torch.equal(view.read("model.norm.weight"), torch.full((4,), 2.0, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.0\.up\.qweight'"):
        view.read("model.layers.0.up.qweight")


@pytest.mark.parametrize("name", FORMATS)
def test_reads_only_what_one_weight_needs(tmp_path, name):
    source, _ = quantized_folder(tmp_path / "m", name, schemes(name)[-1])
    read = []
    original = source.read
    source.read = lambda key, device="cpu": read.append(key) or original(key, device)
    view = dequantize(source)
    assert all(key.endswith((".weight_shape", ".shape")) for key in read)
    read.clear()
    view.read(MODULES[1] + ".weight")
    assert read
    assert all(key.startswith(MODULES[1] + ".") for key in read)


def test_group_index_reaches_the_weights(tmp_path):
    scheme = Scheme(bits=4, group_size=32, activation_order=True)
    q = random_linear(scheme, 32, 128, group_index=True)
    for name in ("gptq", "pack-quantized"):
        config = FORMATS[name].quantization_config(scheme, ["layer"], [], has_group_index=True)
        tensors = FORMATS[name].pack(q, "layer", torch.bfloat16)
        view = dequantize(save_folder(tmp_path / name, tensors, {"quantization_config": config}))
        assert_same(view.read_quantized("layer"), q)
        index = q.group_index_K.long()
        assert torch.equal(view.read("layer.weight"), (q.codes_NK.float() - 8) * q.scales_NG[:, index])


def test_plain_checkpoints_pass_through():
    source = open_checkpoint(TINY)
    view = dequantize(source)
    assert (view.kind, view.quantized_modules, view.scheme) == ("plain", (), None)
    assert dict(view.specs()) == dict(source.specs())
    assert list(view.specs()) == list(source.specs())
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(view.read(name), source.read(name))
    with pytest.raises(CheckpointError, match=r"has no integer or float8 codes \(plain\)"):
        view.read_quantized("model.layers.0.mlp.up_proj")


def test_stale_bitsandbytes_configuration_is_dropped(tmp_path):
    """A merged 16-bit model often keeps the base's configuration; the tensors decide."""
    config = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    view = dequantize(save_folder(tmp_path / "m", {"a.weight": torch.ones(2, 2)}, config))
    assert view.kind == "plain"
    assert "quantization_config" not in view.config


def test_bitsandbytes_is_found_without_a_configuration(tmp_path):
    tensors = stored(uneven((8, 64), torch.float16), "fp4") | {"b.weight": torch.ones(2, 2)}
    view = dequantize(save_folder(tmp_path / "m", tensors))
    assert (view.kind, view.quantized_modules) == ("bnb-fp4", ("layer",))
    with pytest.raises(CheckpointError, match="bnb-fp4"):
        view.read_quantized("layer")


def test_dequantizing_twice_changes_nothing(tmp_path):
    once = dequantize(save_folder(tmp_path / "m", stored(uneven((8, 64), torch.float16), "nf4")))
    twice = dequantize(once)
    assert isinstance(twice, DequantizedCheckpoint)
    assert twice.kind == "plain"
    assert torch.equal(twice.read("layer.weight"), once.read("layer.weight"))


PLAIN = {"a.weight": torch.ones(2, 2)}
INT8 = {"a.weight": torch.ones(2, 2, dtype=torch.int8)}
REFUSED = {
    "fp8": (PLAIN, {"quant_method": "fp8"}, "read are weights in blocks, .*found None"),
    "quanto": (PLAIN, {"quant_method": "quanto"}, "quantized with 'quanto', which is not read; read are bitsandbytes"),
    "mxfp4": (PLAIN, {"quant_method": "mxfp4"}, "announces gpt-oss-mxfp4, but no tensor ends in '.weight_blocks'"),
    "gguf": (PLAIN, {"quant_method": "gguf"}, "'gguf'"),
    "int8 of bitsandbytes": (
        INT8 | {"a.SCB": torch.ones(2)},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        r"'a\.(SCB|weight)' belongs to a quantized layout \((bitsandbytes int8|torch\.int8.*)\)",
    ),
    "int8 without a word": (INT8, None, r"'a\.weight' belongs to a quantized layout \(torch\.int8 \(2, 2\)\)"),
    "fp8 without a word": (
        {"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1, 1)},
        None,
        "belongs to a quantized layout",
    ),
    "packed without a word": ({"a.qweight": torch.ones(2, 2, dtype=torch.int32)}, None, "GPTQ or AWQ"),
    "experts without a word": ({"a.experts.up_blocks": torch.ones(2, 2)}, None, "mxfp4"),
    "uint8 experts": ({"a.experts.up": torch.ones(2, 2, 2, dtype=torch.uint8)}, None, r"uint8 \(2, 2, 2\)"),
    "announced, not there": (PLAIN, {"quant_method": "gptq", "bits": 4}, "announces gptq, but no tensor ends in '.qw"),
    "marlin": (PLAIN, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "'marlin' is not read"),
    "marlin-24": (
        PLAIN,
        {"quant_method": "compressed-tensors", "format": "marlin-24"},
        "'marlin-24' is not read; read are pack-quantized",
    ),
    "two methods": (stored(uneven((8, 64), torch.float16), "nf4"), {"quant_method": "gptq"}, "quant_method 'gptq'"),
    "two kinds": (
        stored(uneven((8, 64), torch.float16), "nf4") | stored(uneven((8, 64), torch.float16), "nf4-dq", "b.weight"),
        None,
        "mixes bitsandbytes kinds nf4, nf4-dq",
    ),
    "not an object": (PLAIN, ["gptq"], "is not an object"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused(tmp_path, case):
    tensors, quantization, message = REFUSED[case]
    config = {} if quantization is None else {"quantization_config": quantization}
    source = save_folder(tmp_path / "m", tensors, config)
    with pytest.raises(CheckpointError, match=message) as caught:
        dequantize(source)
    assert str(tmp_path) in str(caught.value)


def test_transposed_conv1d_weights_are_refused(tmp_path):
    tensors = stored(uneven((8, 64), torch.float16), "nf4")
    with pytest.raises(CheckpointError, match="Conv1D weights of gpt2"):
        dequantize(save_folder(tmp_path / "m", tensors, {"model_type": "gpt2"}))


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_piece_is_found_before_or_while_reading(tmp_path, name):
    scheme = schemes(name)[-1]
    source, _ = quantized_folder(tmp_path / "m", name, scheme)
    tensors = {key: source.read(key) for key in source.specs()}
    for missing in [key for key in tensors if key.startswith(MODULES[0])]:
        rest = {key: value for key, value in tensors.items() if key != missing}
        damaged = save_folder(tmp_path / "d", rest, dict(source.config))
        with pytest.raises(CheckpointError, match=MODULES[0].replace(".", r"\.")):
            dequantize(damaged).read(MODULES[0] + ".weight")


def test_a_bad_stored_shape_is_named(tmp_path):
    source, _ = quantized_folder(tmp_path / "m", "pack-quantized", Scheme(group_size=32))
    tensors = {key: source.read(key) for key in source.specs()}
    name = MODULES[0] + ".weight_shape"
    for numbers, message in (([32, -64], "expected .out, in., found"), ([32, 96], "expected torch.int32 .32, 12.")):
        damaged = save_folder(tmp_path / "d", tensors | {name: torch.tensor(numbers)}, dict(source.config))
        with pytest.raises(CheckpointError, match=message):
            dequantize(damaged).read(MODULES[0] + ".weight")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FORMATS)
def test_packing_and_reading_on_cuda_equal_the_cpu(tmp_path, name):
    scheme = schemes(name)[-1]
    source, linears = quantized_folder(tmp_path / "m", name, scheme)
    view = dequantize(source)
    for module, q in linears.items():
        moved = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in vars(q).items()}
        packed = FORMATS[name].pack(type(q)(**moved), module, torch.bfloat16)
        for key, tensor in packed.items():
            assert torch.equal(tensor.cpu().view(torch.uint8), source.read(key).view(torch.uint8)), key
        assert torch.equal(view.read(module + ".weight", "cuda").cpu(), q.dequantize())
