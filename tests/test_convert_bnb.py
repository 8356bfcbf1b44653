"""bitsandbytes 4-bit: the oracle is bitsandbytes itself, on its own quantizer and its own files."""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qconv.checkpoint import open_checkpoint
from qconv.convert import bnb_kernels, dequantize, simulate_training_base
from qconv.convert.bnb_kernels import decode_absmax, decode_codes, encode, simulate
from qconv.errors import CheckpointError, NumericsError, QconvError, SchemeError

TINY = Path(__file__).parent / "data" / "tiny-llama"
KINDS = ("nf4", "nf4-dq", "fp4", "fp4-dq")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
STATE = ".quant_state.bitsandbytes__"


def library(weight, kind, block_size=64, storage=torch.uint8):
    return bnb.quantize_4bit(
        weight,
        blocksize=block_size,
        quant_type=kind[:3],
        compress_statistics=kind.endswith("-dq"),
        quant_storage=storage,
    )


def uneven(shape, dtype, seed=0):
    """Rows of very different size, one of zeros, one on a coarse grid so that ties occur."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-4, 1, shape[0])[:, None]
    weight[-1] = torch.round(weight[-1] / weight[-1].abs().max() * 192) / 192
    if shape[0] > 2:
        weight[shape[0] // 2] = 0
    return weight.to(dtype)


def assert_like_library(weight, kind, block_size=64):
    packed, state = library(weight, kind, block_size)
    parts = encode(weight, kind, block_size)
    assert torch.equal(parts["codes"], packed)
    assert torch.equal(parts["absmax"], state.absmax)
    assert torch.equal(parts["quant_map"], state.code)
    absmax = parts["absmax"]
    if state.nested:
        assert torch.equal(parts["nested_absmax"], state.state2.absmax)
        assert torch.equal(parts["nested_quant_map"], state.state2.code)
        assert torch.equal(parts["nested_offset"], state.offset)
        absmax = decode_absmax(
            absmax, state.state2.code, state.state2.absmax, state.offset.item(), state.state2.blocksize
        )
    decoded = decode_codes(packed.view(-1), absmax, state.code, block_size, tuple(weight.shape), weight.dtype)
    assert torch.equal(decoded, bnb.dequantize_4bit(packed, state).view(weight.shape))
    if block_size == 64:
        assert torch.equal(simulate(weight, kind), decoded)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 320), (21, 1600), (33, 64), (1, 64), (150, 448)], ids=str)
def test_codes_absmax_and_values_are_the_librarys(shape, kind, dtype):
    assert_like_library(uneven(shape, dtype), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_other_block_sizes(kind, block_size):
    assert_like_library(uneven((40, 4096), torch.bfloat16), kind, block_size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 63, 65, 129, 4097])
def test_odd_sizes_and_partial_blocks(kind, count):
    """The library's scalar path takes over when the last dimension is odd; codes must still agree."""
    weight = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(torch.float16)[None]
    packed, state = library(weight, kind)
    parts = encode(weight, kind)
    assert torch.equal(parts["codes"], packed)
    assert torch.equal(parts["absmax"], state.absmax)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    blocks=st.integers(1, 5),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**31),
)
def test_any_weight_like_the_library(rows, blocks, kind, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    assert_like_library(torch.randn(rows, 64 * blocks, generator=generator).to(dtype), kind)


def test_every_pair_of_bfloat16_values_like_the_library():
    """Exhaustive: every quotient of a bfloat16 weight and its absmax within eight octaves."""
    absmax = torch.arange(128, 256) / 128
    values = torch.cat([absmax * 2.0**-octave for octave in range(9)])
    values = torch.nn.functional.pad(values, (0, -values.numel() % 63)).view(-1, 63)
    weight = torch.empty(128, values.shape[0], 64)
    weight[:, :, 0] = absmax[:, None]
    weight[:, :, 1:] = torch.minimum(values[None], absmax[:, None, None])
    weight = weight.view(128, -1).to(torch.bfloat16)
    for kind in ("nf4", "fp4"):
        assert_like_library(weight, kind)
        assert_like_library(-weight, kind)
    # The claim of bnb_kernels that NF4 codes of bfloat16 weights do not depend on the device.
    assert torch.equal(encode(weight, "nf4", backend="cuda")["codes"], encode(weight, "nf4")["codes"])
    thresholds = torch.tensor(bnb_kernels.NF4_TABLE).float()
    thresholds = ((thresholds[:-1] + thresholds[1:]) / 2).double()
    quotients = (values.view(1, -1).double() / absmax.double()[:, None]).view(-1).sort().values
    for threshold in thresholds.abs():
        place = int(torch.searchsorted(quotients, threshold))
        near = quotients[max(place - 1, 0) : place + 1]
        assert float(((near - threshold) / threshold).abs().min()) > 19 * 2.0**-24


def test_slices_join_without_a_seam(monkeypatch):
    weight = uneven((37, 4480), torch.bfloat16)
    whole = simulate(weight, "nf4-dq")
    monkeypatch.setattr(bnb_kernels, "SLICE_ELEMENTS", 8192)
    assert torch.equal(simulate(weight, "nf4-dq"), whole)
    assert_like_library(weight, "nf4-dq")


def test_encoding_leaves_the_weight_alone():
    weight = uneven((8, 128), torch.float32)
    before = weight.clone()
    simulate(weight, "nf4-dq")
    assert torch.equal(weight, before)


def test_decode_is_the_published_formula():
    """An independent decoder, element by element: NF4, 2i high, blocks over the flattened tensor."""
    weight = torch.randn(3, 96, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    packed, state = library(weight, "nf4")
    expected = []
    for i in range(weight.numel()):
        byte = int(packed[i // 2])
        code = byte >> 4 if i % 2 == 0 else byte & 15
        expected.append(state.code[code] * state.absmax[i // 64])
    decoded = decode_codes(packed.view(-1), state.absmax, state.code, 64, (3, 96), torch.bfloat16)
    assert torch.equal(decoded.view(-1), torch.stack(expected).to(torch.bfloat16))


def test_cuda_rules_differ_only_where_documented():
    weight = uneven((64, 640), torch.bfloat16)
    weight[32] = 1.5  # blocks of zeros have their own test
    cpu, cuda = encode(weight, "nf4", backend="cpu"), encode(weight, "nf4", backend="cuda")
    assert torch.equal(cpu["codes"], cuda["codes"])
    tie = torch.tensor([[1.0, -0.0859375, 0.0859375, -0.5] + [0.0] * 60])
    assert encode(tie, "fp4", backend="cpu")["codes"][:2, 0].tolist() == [0x3E, 0x1D]
    assert encode(tie, "fp4", backend="cuda")["codes"][:2, 0].tolist() == [0x39, 0x1D]


def test_blocks_of_zeros_under_the_cuda_rules():
    """0 * inf ends at code 0 there, and double quantization turns that into small negatives."""
    weight = torch.randn(8, 100, generator=torch.Generator().manual_seed(6)).to(torch.bfloat16)
    weight.view(-1)[64:192] = 0
    weight.view(-1)[768:] = 0
    codes = encode(weight, "nf4", backend="cuda")["codes"].view(-1)
    assert not codes[32:96].any()
    assert not codes[384:].any()
    assert encode(weight, "nf4", backend="cpu")["codes"].view(-1)[32:96].eq(0x77).all()
    assert torch.equal(simulate(weight, "nf4", backend="cuda"), simulate(weight, "nf4", backend="cpu"))
    assert simulate(weight, "nf4-dq", backend="cuda").view(-1)[64:192].ne(0).any()
    assert not simulate(weight, "nf4-dq", backend="cpu").view(-1)[64:192].any()


def test_kinds_and_dtypes_that_the_library_lacks():
    with pytest.raises(SchemeError, match="no 4-bit kind 'int4'"):
        encode(torch.zeros(2, 2), "int4")
    with pytest.raises(SchemeError, match=r"float64"):
        encode(torch.zeros(2, 2, dtype=torch.float64), "nf4")
    with pytest.raises(NumericsError, match="q_proj: holds NaN or infinity"):
        encode(torch.tensor([[1.0, float("inf")]]), "nf4", name="q_proj")
    with pytest.raises(NumericsError, match="NaN"):
        encode(torch.tensor([[1.0, float("nan")]]), "fp4-dq")


# Files --------------------------------------------------------------------------------------------


def stored(weight, kind, name="layer.weight", storage=torch.uint8):
    packed, state = library(weight, kind, storage=storage)
    return {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def save_folder(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return open_checkpoint(folder)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_storage_dtype_reads_alike(tmp_path, kind, storage):
    weight = uneven((16, 192), torch.bfloat16)
    view = dequantize(save_folder(tmp_path / "m", stored(weight, kind, storage=storage)))
    packed, state = library(weight, kind)
    assert view.kind == "bnb-" + kind
    assert view.quantized_modules == ("layer",)
    assert torch.equal(view.read("layer.weight"), bnb.dequantize_4bit(packed, state))


def test_odd_element_count_reads(tmp_path):
    weight = torch.randn(5, 13, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    packed, state = library(weight, "nf4")
    view = dequantize(save_folder(tmp_path / "m", stored(weight, "nf4")))
    assert view.specs()["layer.weight"].shape == (5, 13)
    assert torch.equal(view.read("layer.weight"), bnb.dequantize_4bit(packed, state))


def test_rows_shorter_than_a_block_follow_the_flat_blocks(tmp_path):
    """The library's AVX512 path misreads such rows; its quantizer and CUDA kernel run over the flat tensor."""
    weight = torch.randn(4, 96, generator=torch.Generator().manual_seed(2)).to(torch.float32)
    packed, state = library(weight, "nf4")
    flat = bnb.dequantize_4bit(
        packed,
        bnb.QuantState(absmax=state.absmax, shape=torch.Size([384]), code=state.code, blocksize=64,
                       quant_type="nf4", dtype=torch.float32),
    )  # fmt: skip
    view = dequantize(save_folder(tmp_path / "m", stored(weight, "nf4")))
    assert torch.equal(view.read("layer.weight").view(-1), flat.view(-1))


@pytest.fixture(scope="module", params=["nf4-dq", "fp4"])
def saved_by_transformers(request, tmp_path_factory):
    kind = request.param
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind[:3], bnb_4bit_use_double_quant=kind.endswith("-dq")
    )
    model = AutoModelForCausalLM.from_pretrained(TINY, quantization_config=config, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp(kind)
    model.save_pretrained(folder)
    # No forward has run, so the parameters still hold what was saved.
    oracle = {
        name: bnb.dequantize_4bit(parameter.data, parameter.quant_state)
        for name, parameter in model.named_parameters()
        if getattr(parameter, "quant_state", None) is not None
    }
    return kind, folder, oracle


def test_reads_what_transformers_saved(saved_by_transformers):
    kind, folder, oracle = saved_by_transformers
    view = dequantize(open_checkpoint(folder))
    plain = open_checkpoint(TINY)
    assert view.kind == "bnb-" + kind
    assert "quantization_config" not in view.config
    assert {name + ".weight" for name in view.quantized_modules} == oracle.keys()
    assert len(oracle) == 28
    assert {n: (s.shape, s.dtype) for n, s in view.specs().items()} == {
        n: (s.shape, s.dtype) for n, s in plain.specs().items()
    }
    for name, weight in oracle.items():
        assert torch.equal(view.read(name), weight), name
    assert torch.equal(view.read("model.norm.weight"), plain.read("model.norm.weight"))


def test_simulated_base_is_what_transformers_quantizes(saved_by_transformers):
    kind, _, oracle = saved_by_transformers
    base = open_checkpoint(TINY)
    view = simulate_training_base(base, kind, oracle.keys())
    for name, weight in oracle.items():
        assert torch.equal(view.read(name), weight), name
    untouched = "model.embed_tokens.weight"
    assert torch.equal(view.read(untouched), base.read(untouched))
    assert view.specs() == base.specs()


def test_simulating_16bit_is_the_identity():
    base = open_checkpoint(TINY)
    assert simulate_training_base(base, "16bit", ["no.such.weight"]) is base


def test_simulation_refuses_unknown_and_quantized(tmp_path):
    with pytest.raises(CheckpointError, match=r"'no\.such\.weight'.*no such tensor"):
        simulate_training_base(open_checkpoint(TINY), "nf4", ["no.such.weight"])
    view = dequantize(save_folder(tmp_path / "m", stored(uneven((4, 64), torch.float16), "nf4")))
    with pytest.raises(CheckpointError, match="quantized already"):
        simulate_training_base(view, "nf4", ["layer.weight"])


# Damage -------------------------------------------------------------------------------------------

ABSMAX, MAP, NESTED = "layer.weight.absmax", "layer.weight.quant_map", "layer.weight.nested_absmax"
JSON = "layer.weight" + STATE + "nf4"


def edited(tensors, **changes):
    state = json.loads(bytes(tensors[JSON].tolist())) | changes
    return tensors | {JSON: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


def raw_json(tensors, text):
    return tensors | {JSON: torch.tensor(list(text), dtype=torch.uint8)}


DAMAGE = {
    "no absmax": (lambda t: without(t, ABSMAX), CheckpointError, r"has no tensor 'layer\.weight\.absmax'"),
    "no map": (lambda t: without(t, MAP), CheckpointError, r"has no tensor 'layer\.weight\.quant_map'"),
    "no nested": (lambda t: without(t, NESTED), CheckpointError, r"has no tensor 'layer\.weight\.nested_absmax'"),
    "no weight": (lambda t: without(t, "layer.weight"), CheckpointError, r"no weight 'layer\.weight'"),
    "no state": (lambda t: without(t, JSON), CheckpointError, "without its quant_state"),
    "short absmax": (lambda t: t | {ABSMAX: t[ABSMAX][:-1]}, CheckpointError, r"absmax'.*48 elements.*found"),
    "float absmax": (lambda t: t | {ABSMAX: t[ABSMAX].float()}, CheckpointError, r"absmax'.*expected torch\.uint8"),
    "short weight": (
        lambda t: t | {"layer.weight": t["layer.weight"][:-1]},
        CheckpointError,
        r"'layer\.weight': expected 1536 bytes.*found 1535",
    ),
    "short map": (lambda t: t | {MAP: t[MAP][:15]}, CheckpointError, r"quant_map'.*16 elements"),
    "wrong map": (lambda t: t | {MAP: t[MAP].flip(0)}, CheckpointError, "not the nf4 table"),
    "unknown type": (lambda t: edited(t, quant_type="int4"), CheckpointError, "quant_type is 'int4'"),
    "other type": (lambda t: edited(t, quant_type="fp4"), CheckpointError, "quant_type is 'fp4'"),
    "block size": (lambda t: edited(t, blocksize=63), CheckpointError, "blocksize is 63"),
    "block type": (lambda t: edited(t, blocksize="64"), CheckpointError, "blocksize is '64'"),
    "dtype": (lambda t: edited(t, dtype="float8"), CheckpointError, "dtype is 'float8'"),
    "shape": (lambda t: edited(t, shape=[16, -192]), CheckpointError, r"shape is \[16, -192\]"),
    "no shape": (lambda t: edited(t, shape=None), CheckpointError, "shape is None"),
    "other shape": (lambda t: edited(t, shape=[16, 191]), CheckpointError, "expected 1528 bytes"),
    "nested size": (lambda t: edited(t, nested_blocksize=0), CheckpointError, "nested_blocksize is 0"),
    "nested dtype": (lambda t: edited(t, nested_dtype="bfloat16"), CheckpointError, "nested_dtype is 'bfloat16'"),
    "offset": (lambda t: edited(t, nested_offset="1"), CheckpointError, "nested_offset is '1'"),
    "NaN offset": (lambda t: edited(t, nested_offset=float("nan")), CheckpointError, "NaN is not JSON"),
    "not JSON": (lambda t: raw_json(t, b"\xff\x00{"), CheckpointError, "not valid JSON"),
    "JSON list": (lambda t: raw_json(t, b"[1]"), CheckpointError, "expected a JSON object"),
    "cut JSON": (lambda t: t | {JSON: t[JSON][:-3]}, CheckpointError, "not valid JSON"),
    "JSON dtype": (lambda t: t | {JSON: t[JSON].float()}, CheckpointError, "expected bytes of JSON"),
    "infinite absmax": (
        lambda t: t | {NESTED: torch.full_like(t[NESTED], float("inf"))},
        NumericsError,
        r"nested_absmax' holds NaN or infinity",
    ),
    "NaN map": (lambda t: t | {MAP: t[MAP] * float("nan")}, NumericsError, r"quant_map' holds NaN"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(tmp_path, case):
    edit, error, message = DAMAGE[case]
    tensors = edit(stored(uneven((16, 192), torch.bfloat16), "nf4-dq"))
    # The case count is 48 blocks: 16 * 192 / 64.
    with pytest.raises(error, match=message) as caught:
        dequantize(save_folder(tmp_path / "m", tensors)).read("layer.weight")
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value, QconvError)


def test_non_finite_plain_absmax(tmp_path):
    tensors = stored(uneven((16, 192), torch.bfloat16), "nf4")
    tensors[ABSMAX][3] = float("nan")
    with pytest.raises(NumericsError, match=r"absmax' holds NaN or infinity"):
        dequantize(save_folder(tmp_path / "m", tensors)).read("layer.weight")


def test_reading_one_weight_reads_only_its_tensors(tmp_path):
    tensors = stored(uneven((8, 128), torch.bfloat16), "nf4", "a.weight")
    tensors |= stored(uneven((8, 128), torch.bfloat16, 1), "nf4", "b.weight")
    source = save_folder(tmp_path / "m", tensors)
    read = []
    original = source.read
    source.read = lambda name, device="cpu": read.append(name) or original(name, device)
    view = dequantize(source)
    assert all(STATE in name for name in read)
    read.clear()
    view.read("b.weight")
    assert sorted(read) == ["b.weight", "b.weight.absmax", "b.weight.quant_map"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(256, 1024), (33, 96), (7, 65)], ids=str)
def test_cuda_decoding_equals_the_cuda_kernel(kind, dtype, shape):
    weight = uneven(shape, dtype).cuda()
    packed, state = library(weight, kind)
    absmax = state.absmax
    if state.nested:
        absmax = decode_absmax(absmax, state.state2.code, state.state2.absmax, state.offset.item(), 256)
    decoded = decode_codes(packed.view(-1), absmax, state.code, 64, tuple(shape), dtype)
    assert torch.equal(decoded, bnb.dequantize_4bit(packed, state).view(shape))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_encoding_equals_the_cuda_kernel_for_bfloat16(kind):
    """FP4 ties and single 8-bit absmax codes may differ, since the kernel's reciprocal is off by an ulp."""
    weight = (torch.randn(1024, 1024, generator=torch.Generator().manual_seed(3)) * 0.02).to(torch.bfloat16)
    weight[7] = 0
    weight = weight.cuda()
    packed, state = library(weight, kind)
    parts = encode(weight, kind)
    different = int((parts["codes"] != packed).sum())
    assert different == 0 if kind.startswith("nf4") else different <= 1e-3 * packed.numel()
    if state.nested:
        assert torch.equal(parts["nested_offset"], state.offset)
        assert torch.equal(parts["nested_absmax"], state.state2.absmax)
        assert int((parts["absmax"] != state.absmax).sum()) <= 2
    else:
        assert torch.equal(parts["absmax"], state.absmax)


def test_the_librarys_own_loader_agrees(saved_by_transformers):
    _, folder, _ = saved_by_transformers
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    state = bnb.QuantState.from_dict(
        {key: value for key, value in tensors.items() if key.startswith(name + ".")}, torch.device("cpu")
    )
    assert torch.equal(dequantize(open_checkpoint(folder)).read(name), bnb.dequantize_4bit(tensors[name], state))
