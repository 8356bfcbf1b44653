"""IR-QLoRA's information calibration: a base of codes of W - tau, made with bitsandbytes and ``nf4_quant``'s formulas.

The repository's ``search`` chooses tau by entropy on a GPU; which tau it finds does not matter to what reads the base:
medians are taken here. Decoding is checked against bitsandbytes' own ``dequantize_4bit`` and dynamic map.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconv.adapter_configs import AdapterOptions
from qconv.checkpoint import open_checkpoint
from qconv.cli import main
from qconv.convert import dequantize
from qconv.errors import AdapterError, CheckpointError, NumericsError
from qconv.inputs import load_reference
from tests.merge_cases import PREFIX, TINY_LLAMA, write_adapter

R, ALPHA, BLOCK, RUN = 4, 6, 64, 256
NAME = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def calibrated(tiny_nf4: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A base as the documented lines save it, and what its layers multiply with."""
    bnb = pytest.importorskip("bitsandbytes").functional
    folder = tmp_path_factory.mktemp("calibrated") / "base"
    shutil.copytree(tiny_nf4, folder)
    original, tensors = open_checkpoint(TINY_LLAMA), load_file(folder / "model.safetensors")
    table, expected = bnb.create_dynamic_map(), {}
    for weight in [name.partition(".quant_state")[0] for name in tensors if ".quant_state" in name]:
        w = original.read(weight)
        blocks = w.reshape(-1, RUN, BLOCK)
        tau = blocks.median(2, keepdim=True)[0] + 0.01 * blocks.abs().amax(2, keepdim=True)
        packed, state = bnb.quantize_4bit(
            (blocks - tau).reshape(w.shape).contiguous(), quant_type="nf4", compress_statistics=True, blocksize=BLOCK
        )
        tau_absmax = tau.abs().amax(1, keepdim=True)
        tau_quant = ((tau / tau_absmax).unsqueeze(-1) - table).abs().argmin(-1).to(torch.uint8)
        module = weight.removesuffix(".weight")
        tensors |= {f"{weight}.{part}": value for part, value in state.as_dict(packed=True).items()}
        tensors |= {weight: packed, f"{module}.tau_quant": tau_quant.reshape(-1, RUN)}
        tensors[f"{module}.tau_absmax"] = tau_absmax.reshape(-1, 1)
        decoded = bnb.dequantize_4bit(packed, state)
        shift = table[tau_quant.long()] * tau_absmax
        expected[weight] = (decoded.reshape(-1, BLOCK) + shift.reshape(-1, 1)).reshape(w.shape).to(w.dtype)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder, expected


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = torch.Generator().manual_seed(0)
    tensors = {
        f"{PREFIX}{NAME}.lora_A.weight": torch.randn(R, 256, generator=made) * 0.1,
        f"{PREFIX}{NAME}.lora_B.weight": torch.randn(256, R, generator=made) * 0.1,
        f"{PREFIX}{NAME}.lora_default_A_scale": torch.tensor([0.7]),
        f"{PREFIX}{NAME}.lora_default_B_scale": torch.tensor([-0.3]),
    }
    return write_adapter(tmp_path_factory.mktemp("ir") / "adapter", tensors, r=R, lora_alpha=ALPHA)


def test_tau_is_added_to_every_block(calibrated: tuple[Path, dict[str, Tensor]]) -> None:
    folder, expected = calibrated
    view = dequantize(open_checkpoint(folder))
    assert view.kind == "bnb-nf4-dq"
    assert len(expected) == 28
    for name, w in expected.items():
        assert torch.equal(view.read(name), w), name
    assert not any("tau" in name for name in view.specs())


def test_an_adapter_is_merged_into_what_training_saw(
    calibrated: tuple[Path, dict[str, Tensor]], adapter: Path, tmp_path: Path
) -> None:
    folder, expected = calibrated
    words = ["merge", str(folder), str(adapter), "--ir-qlora", "calibrated", "-o", str(tmp_path / "out")]
    short = ["--eval-tokens", "256", "--eval-seq-len", "64", "--attribution", "never", "--dtype", "fp32"]
    main([*words, *short, "--device", "cpu"])
    document = json.loads((tmp_path / "out" / "qconv-report.json").read_text())
    assert document["verdict"] == "pass"
    assert document["fidelity"]["total"]["kl"]["mean"] < 0.01
    merged = load_file(tmp_path / "out" / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"{PREFIX}{NAME}.lora_{side}.weight"].double() for side in "AB")
    eye = torch.eye(R, dtype=torch.float64).repeat_interleave(256 // R, 1)
    delta = ALPHA / R * (b - 0.3 * eye.T) @ (a + 0.7 * eye / (256 // R))
    torch.testing.assert_close(
        merged[f"{NAME}.weight"].double(), expected[f"{NAME}.weight"].double() + delta, atol=1e-5, rtol=1e-5
    )
    for name, w in expected.items():
        if name != f"{NAME}.weight":
            assert torch.equal(merged[name], w.float()), name


def test_the_documented_lines_save_such_a_base(tiny_nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    table = pytest.importorskip("bitsandbytes").functional.create_dynamic_map()
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_nf4)
    model = peft.get_peft_model(model, peft.LoraConfig(r=R, target_modules=["q_proj", "down_proj"]))
    before, made = dequantize(open_checkpoint(tiny_nf4)), torch.Generator().manual_seed(1)
    taus = {}
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            weight = name.removeprefix("base_model.model.") + ".weight"
            runs = before.specs()[weight].shape[0] * before.specs()[weight].shape[1] // (BLOCK * RUN)
            codes = torch.randint(0, 256, (runs, RUN), dtype=torch.uint8, generator=made)
            absmax = torch.rand(runs, 1, generator=made)
            module.base_layer.tau_quant, module.base_layer.tau_absmax = codes, absmax
            taus[weight] = table[codes.long()] * absmax
    text = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text(encoding="utf-8")
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    exec(text.partition("```python\n")[2].partition("```")[0], {"model": model})
    after = dequantize(open_checkpoint(tmp_path / "base"))
    assert after.specs().keys() == before.specs().keys()
    assert len(taus) == 8
    for name in before.specs():
        expected = before.read(name)
        if name in taus:
            expected = (expected.reshape(-1, BLOCK) + taus[name].reshape(-1, 1)).to(expected.dtype).view(expected.shape)
        assert torch.equal(after.read(name), expected), name


def test_base_and_option_belong_together(
    calibrated: tuple[Path, dict[str, Tensor]], adapter: Path, tiny_nf4: Path
) -> None:
    with pytest.raises(AdapterError, match="give that option"):
        load_reference(open_checkpoint(calibrated[0]), str(adapter), None, options=AdapterOptions(ir_qlora="plain"))
    with pytest.raises(AdapterError, match="has no tau"):
        load_reference(open_checkpoint(tiny_nf4), str(adapter), None, options=AdapterOptions(ir_qlora="calibrated"))


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (lambda t: t.pop(f"{NAME}.tau_absmax"), CheckpointError, "tau_absmax"),
        (
            lambda t: t.update({f"{NAME}.tau_quant": t[f"{NAME}.tau_quant"].T.contiguous()}),
            CheckpointError,
            "runs of 256",
        ),
        (lambda t: t[f"{NAME}.tau_absmax"].fill_(torch.nan), NumericsError, "NaN"),
    ],
)
def test_damage(
    edit: Callable[[dict[str, Tensor]], object],
    error: type[Exception],
    words: str,
    calibrated: tuple[Path, dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    shutil.copytree(calibrated[0], tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    edit(tensors)
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(error, match=words):
        dequantize(open_checkpoint(tmp_path / "base")).read(f"{NAME}.weight")
