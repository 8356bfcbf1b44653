"""HQQ's layout: against its formula in numpy, against hqq itself where it is installed, and with zero points moved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.checkpoint import open_checkpoint
from qconv.cli import main
from qconv.convert import FORMATS, dequantize, mixed_config
from qconv.errors import CheckpointError, NumericsError, SchemeError
from qconv.types import Scheme
from tests.merge_cases import TINY_LLAMA, write_adapter
from tests.test_zeros import ALPHA, GROUP, MODULES, PREFIX, R, updates

HQQ = FORMATS["hqq"]
PACKINGS = {
    8: ("8bit_u8", 8, 1),
    6: ("8bit_u8", 8, 1),
    5: ("8bit_u8", 8, 1),
    4: ("4bit_u8", 4, 2),
    3: ("3bit_32", 3, 10),
    2: ("2bit_u8", 2, 4),
}


def letters(word: str) -> Tensor:
    return torch.tensor([ord(letter) for letter in word], dtype=torch.uint8)


def stored(w_NK: Tensor, bits: int, size: int, axis: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """A weight rounded to nearest as hqq stores it, and the weight that hqq makes of it."""
    n, k = w_NK.shape
    grouped = w_NK.double().reshape((-1, size) if axis == 1 else (size, -1))
    low, high = grouped.amin(axis, keepdim=True), grouped.amax(axis, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).to(dtype)
    zero = (-low / scale.double()).to(dtype)
    codes = (grouped / scale.double() + zero.double()).round().clamp(0, 2**bits - 1).to(torch.int64)
    name, width, count = PACKINGS[bits]
    rows = -(-len(codes) // count)
    padded = np.zeros((rows * count, codes.shape[1]), dtype=np.int64)
    padded[: len(codes)] = codes.numpy()
    parts = padded.reshape(count, rows, -1)
    packed = sum(part << width * (count - 1 - i) for i, part in enumerate(parts))
    word = torch.int32 if bits == 3 else torch.uint8
    one, none = torch.tensor(1, dtype=torch.uint8), torch.tensor(0, dtype=torch.uint8)
    tensors = {
        "W_q": torch.from_numpy(packed).to(word),
        "scale": scale,
        "zero": zero,
        "shape": torch.tensor([n, k]),
        "nbits": torch.tensor(bits, dtype=torch.int32),
        "group_size": torch.tensor(size, dtype=torch.int32),
        "axis": torch.tensor(axis, dtype=torch.int32),
        "packing": letters(name),
        "unpack_view_dtype": letters(str(word)),
        "compute_dtype": letters(str(dtype)),
        **dict.fromkeys(("view_as_float", "quant_scale", "quant_zero", "offload_meta", "round_zero"), none),
        **dict.fromkeys(("channel_wise", "optimize", "encoded_state_dict", "stores_quant_config"), one),
    }
    weight = ((codes.to(dtype) - zero) * scale).reshape(n, k)  # each rounded
    return {f"layer.{name}": tensor.clone() for name, tensor in tensors.items()}, weight


def settings(bits: int, size: int | None, axis: int) -> dict[str, Any]:
    return {"weight_quant_params": {"nbits": bits, "group_size": size, "axis": axis, "channel_wise": True}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", PACKINGS)
def test_weights_are_those_of_its_formula(bits: int, axis: int, dtype: torch.dtype) -> None:
    torch.manual_seed(bits)
    tensors, weight = stored(torch.randn(24, 64), bits, 32, axis, dtype)
    scheme = HQQ.scheme_of({"quant_config": settings(bits, 32, axis)}, "folder")
    found = HQQ.unpack(tensors, "layer", scheme)
    assert torch.equal(found.dequantize(), weight.float())
    if axis == 1:
        HQQ.check(found, "layer", dtype)
        again = HQQ.pack(found, "layer", dtype)
        assert again.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(again[name], tensor), name
            assert again[name].dtype == tensor.dtype, name
        return
    with pytest.raises(SchemeError, match="axis 0, which is read and not written"):
        HQQ.check(found, "layer", dtype)


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_hqq_itself(bits: int, axis: int, as_float: bool) -> None:
    quantize = pytest.importorskip("hqq.core.quantize")
    torch.manual_seed(bits)
    config = quantize.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis, view_as_float=as_float)
    linear = torch.nn.Linear(128, 96, bias=False)
    weight = linear.weight.detach().clone()
    layer = quantize.HQQLinear(linear, config, compute_dtype=torch.bfloat16, device="cpu")
    tensors = {f"layer.{name}": tensor.detach() for name, tensor in layer.state_dict().items()}
    scheme = HQQ.scheme_of({"quant_config": settings(bits, 64, axis)}, "folder")
    found = HQQ.unpack(tensors, "layer", scheme)
    assert torch.equal(found.dequantize(), layer.dequantize().detach().float())
    assert float((found.dequantize() - weight).norm() / weight.norm()) < 0.6
    if axis == 1:
        reader = quantize.HQQLinear(None, None, compute_dtype=torch.bfloat16, device="cpu")
        packed = HQQ.pack(found, "layer", torch.bfloat16)
        reader.load_state_dict({name.removeprefix("layer."): tensor for name, tensor in packed.items()})
        assert torch.equal(reader.dequantize(), layer.dequantize())


def save_base(folder: Path, dtype: torch.dtype, config: Any = None, axis: int = 1, bits: Any = lambda _: 4) -> Path:
    """tiny-llama with the linears of its blocks in HQQ."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(TINY_LLAMA / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if ".layers." not in name or "norm" in name:
            tensors[name] = tensor.to(dtype)
            continue
        made, _ = stored(tensor.float(), bits(module), GROUP, axis, dtype)
        tensors |= {f"{module}.{key.removeprefix('layer.')}": value for key, value in made.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = json.loads((TINY_LLAMA / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    quantization = {
        "quant_method": "hqq",
        "skip_modules": ["lm_head"],
        "quant_config": config or settings(4, GROUP, axis),
    }
    (folder / "config.json").write_text(json.dumps(model | {"quantization_config": quantization}))
    for file in TINY_LLAMA.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def adapter(folder: Path) -> Path:
    tensors = {}
    for module, (a, b) in updates().items():
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    return write_adapter(folder, tensors, r=R, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"])


def merged(base: Path, own: Path, out: Path, *words: str) -> Path:
    main(["merge", str(base), str(own), "--qa-lora", "sum", "--requant", "hqq", "--algorithm", "zeros", "-o", str(out),
          "--device", "cpu", *words])  # fmt: skip
    return out


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float16, 3e-3), (torch.bfloat16, 0.03)])
def test_zero_points_take_the_update(dtype: torch.dtype, error: float, tmp_path: Path) -> None:
    base, own = save_base(tmp_path / "base", dtype), adapter(tmp_path / "adapter")
    short = ["--eval-tokens", "256", "--eval-seq-len", "64", "--attribution", "never"]
    out = merged(base, own, tmp_path / "out", *short)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"{module}.zero" for module in MODULES}
    for module in MODULES:
        a, b = updates()[module]
        update = (b.double() @ a.double() * (ALPHA / R)).reshape(-1, 1)
        wanted = before[f"{module}.zero"].double() - update / before[f"{module}.scale"].double()
        assert torch.equal(after[f"{module}.zero"], wanted.float().to(dtype)) or dtype == torch.float32
        torch.testing.assert_close(after[f"{module}.zero"].double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    report = json.loads((out / "qconv-report.json").read_text())
    assert report["verdict"] == "pass"
    assert report["stages"]["zero points"]["relative error of the update by rounding zero points"] < error


def test_settings_by_kind_of_linear(tmp_path: Path) -> None:
    own = {tag: settings(3 if tag == "mlp.down_proj" else 4, GROUP, 1) for tag in _tags()}
    base = save_base(tmp_path / "base", torch.float16, own, bits=lambda module: 3 if "down_proj" in module else 4)
    view = dequantize(open_checkpoint(base))
    assert view.schemes["model.layers.2.mlp.down_proj"].bits == 3
    out = merged(base, adapter(tmp_path / "adapter"), tmp_path / "out", "--no-validate")
    config = json.loads((out / "config.json").read_text())["quantization_config"]["quant_config"]
    assert {tag: c["weight_quant_params"]["nbits"] for tag, c in config.items()} == {
        tag: 3 if tag == "mlp.down_proj" else 4 for tag in _tags()
    }
    assert dequantize(open_checkpoint(out)).schemes.keys() == view.schemes.keys()
    del own["mlp.up_proj"]
    other = save_base(tmp_path / "other", torch.float16, own, bits=lambda module: 3 if "down_proj" in module else 4)
    with pytest.raises(CheckpointError, match=r"says nothing of 'mlp\.up_proj'"):
        dequantize(open_checkpoint(other))
    schemes = {f"model.layers.{i}.mlp.up_proj": Scheme(bits=3 + i, group_size=64, symmetric=False) for i in range(2)}
    with pytest.raises(SchemeError, match=r"one scheme for mlp\.up_proj of all blocks"):
        mixed_config(HQQ, schemes["model.layers.0.mlp.up_proj"], schemes, [], False)


@pytest.mark.parametrize(("bits", "code"), [(5, 32), (5, 255), (6, 64)])
def test_codes_of_more_bits_than_the_folder_says(bits: int, code: int, tmp_path: Path) -> None:
    """They lie in bytes, which have room for more."""
    base = save_base(tmp_path / "base", torch.float16, settings(bits, GROUP, 1), bits=lambda _: bits)
    name = "model.layers.1.mlp.up_proj"
    tensors = load_file(base / "model.safetensors")
    whole = dequantize(open_checkpoint(base)).read_quantized(name)
    tensors[f"{name}.W_q"][3, 5] = 2**bits - 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    found = dequantize(open_checkpoint(base)).read_quantized(name)
    assert int((found.codes_NK != whole.codes_NK).sum()) <= 1
    assert int(found.codes_NK.max()) == 2**bits - 1
    tensors[f"{name}.W_q"][3, 5] = code
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    view = dequantize(open_checkpoint(base))
    with pytest.raises(
        CheckpointError, match=rf"{base}: tensor '{name}\.W_q' holds a code {code}, and {2**bits - 1} is"
    ):
        view.read(f"{name}.weight")
    view.read("model.layers.0.mlp.up_proj.weight")


def _tags() -> list[str]:
    return [f"self_attn.{role}_proj" for role in "qkvo"] + [f"mlp.{role}_proj" for role in ("gate", "up", "down")]


def test_codes_of_another_format_get_float_zero_points(tmp_path: Path) -> None:
    words = ["quantize", str(TINY_LLAMA), "--to", "gptq", "--algorithm", "rtn", "--group-size", str(GROUP), "--asym"]
    main([*words, "-o", str(tmp_path / "base"), "--device", "cpu", "--no-validate"])
    out = merged(tmp_path / "base", adapter(tmp_path / "adapter"), tmp_path / "out", "--no-validate", "--dtype", "fp16")
    base, found = (dequantize(open_checkpoint(folder)) for folder in (tmp_path / "base", out))
    for module in MODULES:
        one, two = base.read_quantized(module), found.read_quantized(module)
        assert torch.equal(one.codes_NK, two.codes_NK)
        assert torch.equal(one.scales_NG, two.scales_NG)
        assert two.zeros_NG is not None
        assert bool((two.zeros_NG != two.zeros_NG.round()).any())


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    good, _ = stored(torch.randn(24, 64), 4, 32, 1, torch.bfloat16)
    scheme = Scheme(bits=4, group_size=32, symmetric=False)

    def expect(words: str, **changes: Tensor) -> None:
        with pytest.raises(CheckpointError, match=words):
            HQQ.unpack(good | {f"layer.{name}": tensor for name, tensor in changes.items()}, "layer", scheme)

    expect("scales or zero points are quantized", quant_zero=torch.tensor(1, dtype=torch.uint8))
    expect("say 4 bits, groups of 16 on axis 1", group_size=torch.tensor(16, dtype=torch.int32))
    expect("packed as '2bit_u8', and quantization_config 4 bits", packing=letters("2bit_u8"))
    expect("compute_dtype' says 'torch.int8'", compute_dtype=letters("torch.int8"))
    expect("says 24 x 16, which groups of 32 do not fill", shape=torch.tensor([24, 16]))
    expect("has shape", W_q=good["layer.W_q"][:-1])
    q = HQQ.unpack(good, "layer", scheme)
    with pytest.raises(NumericsError, match=r"take the dtype of the base's scales \(bfloat16\), as --dtype"):
        HQQ.check(
            HQQ.unpack(good | {"layer.scale": good["layer.scale"] * 2**-30}, "layer", scheme), "layer", torch.float16
        )
    with pytest.raises(SchemeError, match="packs 2 groups into one, and 3 are no multiple"):
        HQQ.check_shapes("layer", 3, 32, scheme)
    assert q.computed_in == torch.bfloat16
    for config, words in (
        ({}, "weight_quant_params"),
        ({"quant_config": settings(1, 64, 1)}, "nbits 1, group_size 64, axis 1"),
        ({"quant_config": settings(4, 0, 1)}, "group_size 0"),
    ):
        with pytest.raises(CheckpointError, match=words):
            HQQ.scheme_of(config, "folder")
    base = save_base(tmp_path / "base", torch.bfloat16, axis=0)
    words = ["merge", str(base), str(adapter(tmp_path / "adapter")), "--qa-lora", "sum", "--requant", "hqq"]
    with pytest.raises(SystemExit):
        main([*words, "--no-validate", "-o", str(tmp_path / "out")])
    assert "axis 0, which is read and not written" in capsys.readouterr().err
